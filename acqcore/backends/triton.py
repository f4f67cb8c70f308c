"""The Triton backend: chooses tiles and launches the kernels of ``acqcore.kernels``.

``ACQCORE_TF32=1`` permits TF32 for float32 products. ``TRITON_INTERPRET=1`` makes Triton run kernels in numpy: the
backend then serves CPU tensors when named, for tests.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from acqcore import checks
from acqcore.backends.base import MAX, SECOND, DrawRows, Dropout, FisherSums, Gram, HeadRows, LogitRows, Probes
from acqcore.backends.chunked import Chunked
from acqcore.backends.extension import constant_when_compiled
from acqcore.head import Head
from acqcore.kept import on_device
from acqcore.philox import threshold
from acqcore.slots import BLOCK, gaps

if TYPE_CHECKING:
    from acqcore.kernels.factors import Factors
    from acqcore.kernels.product import Product

#: Triton reads this when a kernel is defined, so it is fixed for the process.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")

#: Compute capability of the first devices with bfloat16 products.
LEAST_CAPABILITY = (8, 0)

#: From this major compute capability on, Triton 3.6 computes a float32 product with a half-precision operand in plain
#: TF32 on the matrix units, regardless of the requested precision. Split into three such products (``tf32x3``), it
#: keeps 22 of float32's 24 bits: the half-precision operand is exact in TF32, and the other is split in two.
MIXED_SPLIT_FROM = 10


#: Maximum elements of the Gram matrices of one group of longer samples: 64 MiB.
GRAM_ELEMENTS = 1 << 24

#: Logarithm of 2^15.
FLOAT16_SHIFT = 15 * math.log(2)


class Triton(Chunked):
    name = "triton"
    description = (
        "Triton kernels run by Triton's interpreter (TRITON_INTERPRET=1), for tests"
        if INTERPRETED
        else "Triton: statistics, head gradients and draws fused with the product; never holds the logits"
    )
    automatic = not INTERPRETED
    devices = ("cpu",) if INTERPRETED else ("cuda",)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def unavailable(self) -> str | None:
        return _unavailable()

    def instruction_set(self) -> str:
        """``interpreter``, or the architecture of the current device, such as ``sm_90``."""
        if INTERPRETED:
            return "interpreter"
        major, minor = torch.cuda.get_device_capability()
        return f"sm_{major}{minor}"

    def row_stats(self, rows: HeadRows, gram: Gram | None = None) -> None:
        from acqcore.kernels.gram import row_stats_and_grams
        from acqcore.kernels.row_stats import row_stats

        of_grams, of_rows = _products(rows.hidden, rows.head, rows.temperature, "gram", "row_stats")
        short, long = (None, None) if gram is None else gram.split(BLOCK)
        with _launching(rows.hidden):
            if short is not None:
                assert rows.targets is not None
                row_stats_and_grams(
                    of_grams, rows.hidden, rows.targets, short.bounds, short.starts, rows.state, rows.index,
                    short.products,
                )  # fmt: skip
            for begin, end in gaps(() if short is None else short.bounds, len(rows.hidden)):
                part = slice(begin, end)
                targets = None if rows.targets is None else rows.targets[part]
                row_stats(of_rows, rows.hidden[part], targets, rows.state, rows.index, begin)
        if long is not None:
            self.fill_gram(rows, long)

    def fill_gram(
        self,
        rows: HeadRows,  # their state filled
        gram: Gram,
    ) -> None:
        """The Gram matrices of samples longer than a block, in a second pass over the weights."""
        from acqcore.kernels.factors import grams

        for first, end in _groups(gram.bounds):
            bounds, starts = gram.bounds[first:end], gram.starts[first:end]
            part = _take(rows, bounds)
            with _launching(rows.hidden):
                grams(
                    _factors(rows), part.hidden, part.targets, part.state[MAX].float(), tuple(e - b for b, e in bounds),
                    starts, gram.products,
                )  # fmt: skip

    def longest_gram(self, depth: int, dtype: torch.dtype) -> int:
        return BLOCK

    def gram_norm(
        self,
        rows: HeadRows,
        gram: Gram,
        local_max: torch.Tensor,  # [N] float64
        weights: torch.Tensor,  # [N] float64
        squared: torch.Tensor,  # [len(gram.bounds)] float64, written
    ) -> None:
        from acqcore.kernels.gram_norm import gram_norm

        assert rows.targets is not None
        [product] = _products(rows.hidden, rows.head, rows.temperature, "row_stats")
        with _launching(rows.hidden):
            gram_norm(
                product, rows.hidden, rows.targets, gram.bounds, gram.starts, rows.state, rows.index, gram.products,
                local_max, weights, squared,
            )  # fmt: skip

    def head_grad_norm(
        self,
        rows: HeadRows,
        bounds: tuple[tuple[int, int], ...],
        weights: torch.Tensor,  # [N] float64
        squared: torch.Tensor,  # [len(bounds)] float64, written
    ) -> None:
        """Uses Gram matrices formed in a second pass; samples with too large a matrix run in chunked torch."""
        for first, last in _groups(bounds):
            own, share = bounds[first:last], squared[first:last]
            if (own[0][1] - own[0][0]) ** 2 > GRAM_ELEMENTS:
                super().head_grad_norm(rows, own, weights, share)
            else:
                gram = Gram.empty(own, torch.float32, squared.device)
                self.fill_gram(rows, gram)
                self.gram_norm(rows, gram, rows.state[MAX], weights, share)

    def fill_hidden_grad(
        self,
        rows: HeadRows,  # their state filled
        out: torch.Tensor,  # [N, D], written
    ) -> None:
        """Recomputes the logits."""
        from acqcore.kernels.factors import hidden_sums

        assert rows.targets is not None
        largest, second = rows.state[MAX], rows.state[SECOND]
        # Relative to the largest logit other than the target's, so a confident row's factors are not all close to 0.
        excluded = (rows.targets == rows.index) & second.isfinite()
        reference = second.where(excluded, largest)
        if torch.promote_types(rows.hidden.dtype, rows.head.weight.dtype) == torch.float16:
            reference = reference - FLOAT16_SHIFT  # factors up to 2^15: float16 has few values near 0
        reference = reference.float()
        final = (reference.double() - largest).exp().where(rows.targets != -100, 1.0)
        with _launching(rows.hidden):
            hidden_sums(_factors(rows), rows.hidden, rows.targets.contiguous(), reference, final.float(), out)

    def fill_fisher_sums(self, rows: HeadRows, probes: Probes, out: FisherSums) -> None:
        """Recomputes the logits."""
        from acqcore.kernels.cotangents import fisher_sums

        assert rows.targets is not None
        scored = rows.targets != checks.IGNORE_INDEX
        largest, second = rows.state[MAX], rows.state[SECOND]
        reference = second.where(second.isfinite(), largest)
        if torch.promote_types(rows.hidden.dtype, rows.head.weight.dtype) == torch.float16:
            reference = reference - FLOAT16_SHIFT
        reference = reference.where(scored, 0).float()
        final = (reference.double() - largest).exp().where(scored, 0)
        with _launching(rows.hidden):
            fisher_sums(
                _factors(rows), rows.hidden, rows.index.where(scored, -1), reference, probes.samples.contiguous(),
                probes.positions.contiguous(), final, probes.seed, out.sums, out.signed, out.squares,
            )  # fmt: skip

    def logit_stats(self, rows: LogitRows) -> None:
        from acqcore.kernels.config import strips_for
        from acqcore.kernels.logit_stats import logit_stats

        strips = strips_for(*_device(rows.logits), rows.logits.shape[1])
        with _launching(rows.logits):
            logit_stats(rows.logits, rows.targets, rows.temperature, rows.state, rows.index, strips)

    def delta_hash(
        self,
        rows: HeadRows,
        places: torch.Tensor,  # [V] int32
        out: torch.Tensor,  # [N, n] float32, written
    ) -> None:
        self._hash(rows, places, False, out)

    def delta_sums(
        self,
        rows: HeadRows,
        values: torch.Tensor | None = None,  # [N, D], written
        places: torch.Tensor | None = None,  # [V] int32
        hashed: torch.Tensor | None = None,  # [N, n] float32, written
        gram: Gram | None = None,
    ) -> None:
        if hashed is None or gram is not None:
            super().delta_sums(rows, values, places, hashed, gram)
            return
        assert places is not None
        self._hash(rows, places, True, hashed)
        if values is not None:
            self.fill_hidden_grad(rows, values)

    def _hash(self, rows: HeadRows, places: torch.Tensor, fill: bool, out: torch.Tensor) -> None:
        from acqcore.kernels.sketch import hashed_delta

        assert rows.targets is not None
        [product] = _products(rows.hidden, rows.head, rows.temperature, "sketch")
        with _launching(rows.hidden):
            hashed_delta(product, rows.hidden, rows.targets, places, rows.state, rows.index, fill, out)

    def dropout_mask(
        self,
        dropout: Dropout,
        site: int,
        keep: torch.Tensor,  # [K, N, units] bool, written
    ) -> None:
        from acqcore.kernels.philox import dropout_mask

        with _launching(keep):
            dropout_mask(dropout.samples, dropout.positions, site, dropout.seed, threshold(dropout.p), keep)

    def mixture_stats(self, rows: DrawRows) -> None:
        """Ensembles of several heads run in chunked torch."""
        from acqcore.kernels.block_mixture import block_mixture_stats, serves
        from acqcore.kernels.mixture import Masks, mixture_stats

        if len(rows.heads) > 1:
            super().mixture_stats(rows)
            return
        (head,), masks = rows.heads, None
        if rows.dropout is not None:
            d, head = rows.dropout, rows.dropout.of_head(head)
            masks = Masks(d.samples, d.positions, d.width, d.seed, threshold(d.p))
        inputs = rows.hidden, rows.targets, rows.draws
        with _launching(rows.hidden):
            if masks is not None and serves(masks.width, rows.hidden.shape[1], rows.draws):
                [product] = _products(rows.hidden, head, 1.0, "block_mixture")
                block_mixture_stats(product, *inputs, masks, rows.state, rows.votes)
            else:
                visits = _products(rows.hidden, head, 1.0, "row_stats", "mixture")
                mixture_stats(*visits, *inputs, masks, rows.state, rows.votes)


def _products(hidden: torch.Tensor, head: Head, temperature: float, *kernels: str) -> list[Product]:
    """The product of hidden states with the head in the tiles of each kernel."""
    from acqcore.kernels.config import tiles_for
    from acqcore.kernels.product import Product

    device, major = _device(hidden)
    dtype = torch.promote_types(hidden.dtype, head.weight.dtype)
    kind, precision = ("ieee" if dtype == torch.float32 else "half"), "ieee"
    if dtype == torch.float32 and _tf32():
        kind = precision = "tf32"
    elif major >= MIXED_SPLIT_FROM and head.weight.dtype != dtype:
        precision = "tf32x3"
    bias = None if head.bias is None else head.bias.float().contiguous()
    of_head = head.weight, bias, head.softcap, head.scale, temperature, head.vocab_start
    tiles = [tiles_for(device, major, kind, *head.weight.shape, kernel) for kernel in kernels]
    # numpy has no bfloat16 products, so the interpreter multiplies in float32.
    return [Product(*of_head, of_kernel, precision, upcast=INTERPRETED) for of_kernel in tiles]


def _factors(rows: HeadRows) -> Factors:
    from acqcore.kernels.factors import Factors

    [product] = _products(rows.hidden, rows.head, rows.temperature, "row_stats")
    return Factors(**vars(product), multiprocessors=_multiprocessors(rows.hidden))


def _groups(bounds: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Groups ``[first, last)`` of samples that share the ring of factors, bounded by its rows and ``GRAM_ELEMENTS``."""
    from acqcore.kernels.factors import ROWS

    edges: list[int] = []
    rows, elements = ROWS, GRAM_ELEMENTS
    for i, (begin, end) in enumerate(bounds):
        rows, elements = rows + end - begin, elements + (end - begin) ** 2
        if rows > ROWS or elements > GRAM_ELEMENTS:
            edges.append(i)
            rows, elements = end - begin, (end - begin) ** 2
    return list(itertools.pairwise([*edges, len(bounds)]))


def _take(rows: HeadRows, bounds: Sequence[tuple[int, int]]) -> HeadRows:
    """The concatenated rows of these samples."""
    assert rows.targets is not None
    if all(end == begin for (_, end), (begin, _) in itertools.pairwise(bounds)):
        part: slice | torch.Tensor = slice(bounds[0][0], bounds[-1][1])
    else:
        part = on_device(torch.cat([torch.arange(begin, end) for begin, end in bounds]), rows.hidden.device)
    return replace(
        rows, hidden=rows.hidden[part], targets=rows.targets[part].contiguous(), state=rows.state[:, part].contiguous(),
        index=rows.index[part],
    )  # fmt: skip


@constant_when_compiled
def _unavailable() -> str | None:
    """Why Triton or a device for it is missing, or None."""
    if importlib.util.find_spec("triton") is None:
        return 'the package triton is not installed; on Linux, run pip install "acqcore[triton]"'
    if INTERPRETED:
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device or driver"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        had, needed = (".".join(map(str, c)) for c in (capability, LEAST_CAPABILITY))
        return f"{torch.cuda.get_device_name()} has compute capability {had}, at least {needed} is required"
    return None


def _tf32() -> bool:
    """Whether float32 products may use TF32: ``ACQCORE_TF32=1``.

    Torch's own switch is ignored: trainers set it process-wide, and TF32 costs 1e-3 of a logit.
    """
    value = os.environ.get("ACQCORE_TF32", "0")
    checks.one_of("ACQCORE_TF32", value, ("0", "1"))
    return value == "1"


def _device(tensor: torch.Tensor) -> tuple[str, int]:
    """Name and major compute capability of the tensor's device."""
    if INTERPRETED:
        return "interpreter", 0
    return torch.cuda.get_device_name(tensor.device), torch.cuda.get_device_capability(tensor.device)[0]


def _multiprocessors(tensor: torch.Tensor) -> int:
    return 1 if INTERPRETED else torch.cuda.get_device_properties(tensor.device).multi_processor_count


@contextlib.contextmanager
def _launching(tensor: torch.Tensor) -> Iterator[None]:
    """Makes the tensor's device current for Triton's launches, or silences numpy's warnings in the interpreter."""
    if not INTERPRETED:
        with torch.cuda.device(tensor.device):
            yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
