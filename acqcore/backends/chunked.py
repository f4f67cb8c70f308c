"""Head gradients and draws in plain torch, tile by tile, for GPU backends that have no kernel for them.

The arithmetic is that of ``eager``, but at most ``BUFFER_BYTES`` of the ``[N, V]`` gradients, and of float32 copies of
half-precision inputs, exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from acqcore.backends.base import DrawRows, Dropout, FisherSums, Gram, HeadRows, Probes
from acqcore.backends.chunked_mixture import mixture_in_chunks, shard
from acqcore.backends.eager import (
    GramNorm,
    add_fisher_sums,
    gram_products,
    logit_gradient,
    unnormalised,
    without_ignored,
)
from acqcore.backends.scatter import add_at
from acqcore.defaults import float32_products
from acqcore.head import compute_dtype
from acqcore.philox import keep_mask, sign_words, signs_in

#: Bound on the memory that an operation holds at a time beside its result.
BUFFER_BYTES = 64 << 20
#: Tile-sized buffers that ``logit_gradient`` and its callers hold at once.
TEMPORARIES = 8
#: int64 values per unit that ``keep_mask`` holds at once.
MASK_TEMPORARIES = 4
#: Columns whose signs are drawn at once; Philox takes some 130 launches for any number.
SIGN_COLUMNS = 1 << 14
#: Rows processed at a time; also the most rows that the Gram form multiplies with each other at once.
MAX_ROWS = 1024


class Chunked(GramNorm):
    """A backend whose head gradients and mixtures of draws run in chunked torch."""

    @float32_products()
    def delta_hash(
        self,
        rows: HeadRows,
        places: torch.Tensor,  # [V] int32
        out: torch.Tensor,  # [N, n], written
    ) -> None:
        minus = places < 0
        places = torch.where(minus, ~places, places)
        out.zero_()
        for part, piece in _row_chunks(rows, 0, len(rows.hidden)):
            for columns in _vocab_chunks(rows, len(rows.hidden), 0):
                delta = _delta(piece, columns)
                add_at(out[part], 1, places[columns], delta.where(~minus[columns], -delta))

    def longest_gram(self, depth: int, dtype: torch.dtype) -> int:
        return min(_rows_at_once(depth), depth)

    @float32_products()
    def fill_gram(
        self,
        rows: HeadRows,  # their state filled
        gram: Gram,
    ) -> None:
        """The Gram matrices, in a second pass over the weights."""
        for first, last in _groups(gram.bounds, _rows_at_once(rows.hidden.shape[1])):
            begin, end = gram.bounds[first][0], gram.bounds[last - 1][1]
            part = _rows(rows, slice(begin, end))
            bounds = tuple((b - begin, e - begin) for b, e in gram.bounds[first:last])
            group = Gram(bounds, gram.starts[first:last], gram.products)
            for columns in _vocab_chunks(rows, end - begin, 0):
                gram_products(_factors(part, columns), part, group, columns.start)

    @float32_products()
    def head_grad_norm(
        self,
        rows: HeadRows,
        bounds: tuple[tuple[int, int], ...],
        weights: torch.Tensor,  # [N] float64
        squared: torch.Tensor,  # [len(bounds)] float64, written
    ) -> None:
        for i, (begin, end) in enumerate(bounds):
            squared[i] = _direct_form(rows, begin, end, weights)

    @float32_products()
    def fill_hidden_grad(
        self,
        rows: HeadRows,  # their state filled
        out: torch.Tensor,  # [N, D], written
    ) -> None:
        out.zero_()
        for part, piece in _row_chunks(rows, 0, len(rows.hidden)):
            assert piece.targets is not None
            for columns in _vocab_chunks(rows, len(rows.hidden), rows.hidden.shape[1]):
                factors = _factors(piece, columns)
                of_row = torch.arange(columns.start, columns.stop, device=out.device) + rows.head.vocab_start
                factors.masked_fill_(of_row == piece.targets[:, None], 0)
                out[part].addmm_(factors, rows.head.weight[columns].to(factors.dtype))

    def fisher_sums(self, rows: HeadRows, probes: Probes, out: FisherSums) -> None:
        """In two passes over the weights."""
        self.row_stats(rows)
        self.fill_fisher_sums(rows, probes, out)

    @float32_products()
    def fill_fisher_sums(self, rows: HeadRows, probes: Probes, out: FisherSums) -> None:
        """The second pass, with the state of the rows filled."""
        out.clear()
        for part, piece in _row_chunks(rows, 0, len(rows.hidden)):
            keys = probes.samples[part], probes.positions[part]
            begin, end = 0, 0  # columns whose sign words are in ``words``
            for columns in _vocab_chunks(rows, len(rows.hidden), 2 * rows.hidden.shape[1]):
                if columns.stop > end:
                    begin, end = columns.start, min(columns.start + SIGN_COLUMNS, len(rows.head.weight))
                    end = max(end, columns.stop)
                    words = [sign_words(*keys, slice(begin, end), probes.seed, k) for k in range(probes.count)]
                positive = [signs_in(of_probe, begin, columns) for of_probe in words]
                add_fisher_sums(piece, positive, columns, out.of_rows(part))

    def dropout_mask(
        self,
        dropout: Dropout,
        site: int,
        keep: torch.Tensor,  # [K, N, units] bool, written
    ) -> None:
        n, units = keep.shape[1:]
        at_once = max(BUFFER_BYTES // (4 * 8 * MASK_TEMPORARIES * max(units, 1)), 1)
        for begin in range(0, n, at_once):
            part = slice(begin, begin + at_once)
            samples, positions = dropout.samples[part], dropout.positions[part]
            for k in range(len(keep)):
                keep[k, part] = keep_mask(samples, positions, units, dropout.p, dropout.seed, k, site)

    @float32_products()
    def mixture_stats(self, rows: DrawRows) -> None:
        mixture_in_chunks(self, rows)


def _groups(bounds: Sequence[tuple[int, int]], at_once: int) -> Iterator[tuple[int, int]]:
    """Neighbouring samples ``[first, last)`` of at most ``at_once`` rows together; a longer one gets its own group."""
    first = 0
    for i, (_, end) in enumerate(bounds):
        if i > first and end - bounds[first][0] > at_once:
            yield first, i
            first = i
    if bounds:
        yield first, len(bounds)


def _direct_form(
    rows: HeadRows,
    begin: int,  # of the sample's rows
    end: int,
    weights: torch.Tensor,  # [N] float64
) -> torch.Tensor:
    """``||sum_t w_t delta_t h_t^T||^2``, summed over slices of the gradient's rows."""
    total = torch.zeros((), dtype=torch.float64, device=weights.device)
    depth, dtype = rows.hidden.shape[1], compute_dtype(rows.hidden.dtype)
    for columns in _vocab_chunks(rows, end - begin, 3 * depth):  # the gradient, and its copy in float64 for the norm
        gradient = weights.new_zeros((columns.stop - columns.start, depth), dtype=dtype)
        of_bias = weights.new_zeros(columns.stop - columns.start, dtype=dtype)
        for part, piece in _row_chunks(rows, begin, end):
            delta = _delta(piece, columns)
            delta *= weights[part, None].to(dtype)
            gradient.addmm_(delta.T, piece.hidden)
            of_bias += delta.sum(dim=0)
        total += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        if rows.head.bias is not None:
            total += torch.linalg.vector_norm(of_bias, dtype=torch.float64).square()
    return total


def _rows(rows: HeadRows, part: slice) -> HeadRows:
    """Some of the rows, with hidden states in float32, zero in ignored rows."""
    assert rows.targets is not None
    hidden = rows.hidden[part].to(compute_dtype(rows.hidden.dtype))
    few = replace(
        rows, hidden=hidden, targets=rows.targets[part], state=rows.state[:, part], index=rows.index[part]
    )  # fmt: skip
    return without_ignored(few)


def _rows_at_once(depth: int) -> int:
    """Rows, at most ``MAX_ROWS``, whose hidden states in float32 fit in a quarter of the buffer."""
    return max(min(MAX_ROWS, BUFFER_BYTES // 4 // (4 * max(depth, 1))), 1)


def _row_chunks(rows: HeadRows, begin: int, end: int) -> Iterator[tuple[slice, HeadRows]]:
    """Chunks of the rows from ``begin`` to ``end``, with hidden states in float32."""
    size = _rows_at_once(rows.hidden.shape[1])
    for first in range(begin, end, size):
        part = slice(first, min(first + size, end))
        yield part, _rows(rows, part)


def _vocab_chunks(rows: HeadRows, n: int, width: int) -> Iterator[slice]:
    """Slices of the vocabulary whose weights, with ``width`` more floats per column, and tiles of ``n`` rows fit."""
    vocab, depth = rows.head.weight.shape
    tall = min(n, MAX_ROWS)
    by_weight = BUFFER_BYTES // 4 // (4 * max(depth + width, 1))
    by_tile = BUFFER_BYTES // 2 // (4 * TEMPORARIES * max(tall, 1))
    size = max(min(by_weight, by_tile), 1)
    return (slice(begin, min(begin + size, vocab)) for begin in range(0, vocab, size))


def _delta(rows: HeadRows, columns: slice) -> torch.Tensor:
    """Columns of ``logit_gradient``, ``[N, columns]``."""
    return logit_gradient(replace(rows, head=shard(rows.head, columns)))


def _factors(rows: HeadRows, columns: slice) -> torch.Tensor:
    """Columns of ``unnormalised``, ``[N, columns]``."""
    return unnormalised(shard(rows.head, columns).logits(rows.hidden, rows.temperature), rows)
