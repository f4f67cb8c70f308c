"""The C++ SIMD backend: passes pointers, strides and sizes to the extension, which does the arithmetic."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from acqcore import checks
from acqcore.backends import extension
from acqcore.backends.base import MAX, Backend, DrawRows, Dropout, FisherSums, Gram, HeadRows, LogitRows, Probes
from acqcore.backends.extension import core as _core, matrix, pointer
from acqcore.philox import threshold


class Cpu(Backend):
    name = "cpu"
    description = "C++ SIMD: product and statistics fused tile by tile; never holds the logits"
    devices = ("cpu",)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def unavailable(self) -> str | None:
        return extension.missing()

    def instruction_set(self) -> str:
        """``ACQCORE_ISA`` if set, else the best that this processor supports.

        Raises:
            ValueError: unknown name. RuntimeError: this build or processor does not support it.
        """
        forced = os.environ.get("ACQCORE_ISA")
        if forced is None:
            return _core.best_isa()
        names = dict(_core.isas())
        checks.one_of("ACQCORE_ISA", forced, names)
        if names[forced]:
            raise RuntimeError(f"ACQCORE_ISA: {forced!r} is not available here: {names[forced]}")
        return forced

    def longest_gram(self, depth: int, dtype: torch.dtype) -> int:
        # A Gram adds 1.2 to 1.4 T / 2D float32 products to the statistics, less with AMX; delta adds 2, less where
        # bfloat16 products are cheaper (D = 576). Past 2048 rows a Gram needs much memory.
        isa = self.instruction_set()
        if isa == "x86-64-v4-amx":
            return min(18 * depth // 5, 2048)
        return min((2 if isa == "x86-64-v4-bf16" and dtype == torch.bfloat16 else 3) * depth, 2048)

    def row_stats(self, rows: HeadRows, gram: Gram | None = None) -> None:
        with self._arguments(rows) as (isa, head, state, index), _gram_args(gram) as of_gram:
            _core.row_stats(isa, head, *of_gram, state, index)

    def logit_stats(self, rows: LogitRows) -> None:
        targets = None if rows.targets is None else rows.targets.contiguous()
        addresses = rows.state.data_ptr(), rows.index.data_ptr()
        isa, threads = self.instruction_set(), torch.get_num_threads()
        _core.logit_stats(isa, threads, matrix(rows.logits), pointer(targets), rows.temperature, *addresses)

    def delta_hash(
        self,
        rows: HeadRows,
        places: torch.Tensor,  # [V] int32
        out: torch.Tensor,  # [N, n] float32, written
    ) -> None:
        with self._arguments(rows) as arguments:
            _core.delta_hash(*arguments, places.data_ptr(), out.shape[1], out.data_ptr())

    def gram_norm(
        self,
        rows: HeadRows,
        gram: Gram,
        local_max: torch.Tensor,  # [N] float64
        weights: torch.Tensor,  # [N] float64
        squared: torch.Tensor,  # [len(gram.bounds)] float64, written
    ) -> None:
        local_max, weights = local_max.contiguous(), weights.contiguous()
        with self._arguments(rows) as arguments, _gram_args(gram) as of_gram:
            _core.gram_norm(*arguments, *of_gram, local_max.data_ptr(), weights.data_ptr(), squared.data_ptr())

    def head_grad_norm(
        self,
        rows: HeadRows,
        bounds: tuple[tuple[int, int], ...],
        weights: torch.Tensor,  # [N] float64
        squared: torch.Tensor,  # [len(bounds)] float64, written
    ) -> None:
        weights = weights.contiguous()
        of_samples = torch.tensor(bounds, dtype=torch.int64)
        with self._arguments(rows) as arguments:
            _core.head_grad_norm(*arguments, of_samples.data_ptr(), len(bounds), weights.data_ptr(), squared.data_ptr())

    def delta_sums(
        self,
        rows: HeadRows,
        values: torch.Tensor | None = None,  # [N, D], written
        places: torch.Tensor | None = None,  # [V] int32
        hashed: torch.Tensor | None = None,  # [N, n] float32, written
        gram: Gram | None = None,
    ) -> None:
        """Forms Gram matrices in a separate pass if a sample has more rows than a thread's share: a task holds whole
        samples, so the other threads would wait."""
        longest = 0 if gram is None else max(end - begin for begin, end in gram.bounds)
        if longest * torch.get_num_threads() > len(rows.hidden):
            self.row_stats(rows, gram)
            gram = None
        width = 0 if hashed is None else hashed.shape[1]
        with self._arguments(rows) as (isa, head, state, index), _gram_args(gram) as of_gram:
            _core.delta_sums(
                isa, head, *of_gram, state, index, pointer(values), pointer(places), width, pointer(hashed)
            )

    def fill_hidden_grad(
        self,
        rows: HeadRows,  # their state filled
        out: torch.Tensor,  # [N, D], written
    ) -> None:
        """Folds the logits again; most of the cost is the second product, which is needed in any case."""
        assert rows.targets is not None
        own = replace(rows, state=torch.empty_like(rows.state), index=torch.empty_like(rows.index))
        self.delta_sums(own, out)
        shift = (own.state[MAX] - rows.state[MAX]).exp().where(rows.targets != -100, 0)  # not 1 for a shard
        out *= shift[:, None].to(out.dtype)

    def fisher_sums(self, rows: HeadRows, probes: Probes, out: FisherSums) -> None:
        samples, positions = probes.samples.contiguous(), probes.positions.contiguous()
        signs = probes.count, probes.seed, samples.data_ptr(), positions.data_ptr()
        with self._arguments(rows) as arguments:
            _core.fisher_sums(*arguments, *signs, out.sums.data_ptr(), out.signed.data_ptr(), out.squares.data_ptr())

    def dropout_mask(
        self,
        dropout: Dropout,
        site: int,
        keep: torch.Tensor,  # [K, N, units] bool, written
    ) -> None:
        draws, n, units = keep.shape
        with _dropout_args(dropout) as arguments:
            assert arguments is not None
            _core.dropout_mask(
                self.instruction_set(), torch.get_num_threads(), arguments, site, n, draws, units, keep.data_ptr()
            )

    def mixture_stats(self, rows: DrawRows) -> None:
        self._mixture(rows)

    def stats_and_mixture(self, rows: HeadRows, draws: DrawRows, gram: Gram | None = None) -> None:
        if draws.dropout is None or draws.dropout.form != "block":
            super().stats_and_mixture(rows, draws, gram)
        else:
            self._mixture(draws, rows, gram)

    def _mixture(self, draws: DrawRows, rows: HeadRows | None = None, gram: Gram | None = None) -> None:
        """Statistics of the draws and, in the block form, of the rows without dropout."""
        # The extension sees [K, N, D] as [K * N, D].
        hidden = draws.hidden if draws.dropout is not None else draws.hidden.flatten(0, 1)
        first = HeadRows(hidden, draws.heads[0], draws.targets, 1.0, draws.state, draws.votes)
        biases = [None if head.bias is None else head.bias.to(torch.float32).contiguous() for head in draws.heads]
        of_heads = [matrix(head.weight) for head in draws.heads], [pointer(bias) for bias in biases]
        undropped = (0, 0) if rows is None else (rows.state.data_ptr(), rows.index.data_ptr())
        with (
            self._arguments(first) as (isa, head, state, index),
            _dropout_args(draws.dropout) as dropout,
            _gram_args(gram) as of_gram,
        ):
            _core.mixture_stats(
                isa, head, draws.state.shape[1], draws.draws, dropout, *of_heads, state, index, *of_gram, *undropped
            )

    @contextmanager
    def _arguments(self, rows: HeadRows) -> Iterator[tuple[str, _core.HeadArgs, int, int]]:
        """The first arguments of every head operation: instruction set, head, and the addresses of state and index. The
        tensors they point to live as long as the context."""
        head = rows.head
        bias = None if head.bias is None else head.bias.to(torch.float32).contiguous()
        targets = None if rows.targets is None else rows.targets.contiguous()
        of_head = _core.HeadArgs(
            torch.get_num_threads(), matrix(rows.hidden), matrix(head.weight), pointer(bias), pointer(targets),
            head.softcap or 0.0, head.scale, rows.temperature, head.vocab_start,
        )  # fmt: skip
        yield self.instruction_set(), of_head, rows.state.data_ptr(), rows.index.data_ptr()
        del bias, targets


@contextmanager
def _dropout_args(dropout: Dropout | None) -> Iterator[_core.Dropout | None]:
    """The extension's arguments for a dropout; the tensors they point to live as long as the context."""
    if dropout is None:
        yield None
        return
    samples, positions = dropout.samples.contiguous(), dropout.positions.contiguous()
    addresses = samples.data_ptr(), positions.data_ptr()
    yield _core.Dropout(
        dropout.form, dropout.width, threshold(dropout.p), 1 / (1 - dropout.p), dropout.seed, *addresses
    )
    del samples, positions


@contextmanager
def _gram_args(gram: Gram | None) -> Iterator[tuple[int, int, int]]:
    """The samples' bounds, their number and the products; zeros for None. The bounds live as long as the context."""
    if gram is None:
        yield 0, 0, 0
        return
    bounds = torch.tensor(gram.bounds, dtype=torch.int64)
    yield bounds.data_ptr(), len(gram.bounds), gram.products.data_ptr()
    del bounds


def hash_columns(
    values: torch.Tensor,  # [N, P] float32, contiguous
    places: torch.Tensor,  # [P] int32, as from ``signs.hashed_places``
    out: torch.Tensor,  # [N, dim] float32, contiguous, written
) -> None:
    """Signed sums of the columns that share a place."""
    isa, threads = Cpu().instruction_set(), torch.get_num_threads()
    rows, columns = values.shape
    _core.hash_columns(isa, threads, values.data_ptr(), rows, columns, places.data_ptr(), out.shape[1], out.data_ptr())
