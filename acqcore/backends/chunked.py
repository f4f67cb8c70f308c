"""What a GPU backend has no kernel for, in plain torch, a tile of rows and vocabulary at a time: head gradients, draws.

The arithmetic is that of ``eager``; what differs is that of the ``[N, V]`` gradients, and of half-precision inputs in
float32, no more than ``BUFFER_BYTES`` exists at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from acqcore.backends.base import Backend, DrawRows, Dropout, HeadRows
from acqcore.backends.chunked_mixture import mixture_in_chunks
from acqcore.backends.eager import logit_gradient
from acqcore.head import compute_dtype
from acqcore.philox import keep_mask

#: Bound on what an operation allocates at a time beside its result.
BUFFER_BYTES = 64 << 20
#: ``logit_gradient`` and its callers hold so many buffers of the size of a tile at once.
TEMPORARIES = 8
#: ``keep_mask`` holds so many int64 for each unit at once.
MASK_TEMPORARIES = 4
#: Rows at a time; also those whose products with each other are formed in the Gram form.
MAX_ROWS = 1024


@contextmanager
def float32_products() -> Iterator[None]:
    """TF32 off for torch's products on a GPU: trainers set it for the whole process, and it costs 1e-3 of a logit."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


class Chunked(Backend):
    """A backend whose head gradients and mixtures of draws are chunked torch."""

    @float32_products()
    def delta_product(
        self,
        rows: HeadRows,
        values: torch.Tensor,  # [V, n]
        out: torch.Tensor,  # [N, n], written
    ) -> None:
        out.zero_()
        for part, piece in _row_chunks(rows, 0, len(rows.hidden)):
            for columns in _vocab_chunks(rows, len(rows.hidden), values.shape[1]):
                delta = _delta(piece, columns)
                out[part].addmm_(delta, values[columns].to(delta.dtype))

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
                out[part].index_add_(1, places[columns], delta.where(~minus[columns], -delta))

    @float32_products()
    def head_grad_norm(
        self,
        rows: HeadRows,
        offsets: torch.Tensor,  # [B + 1]
        weights: torch.Tensor,  # [N] float64
        form: str,
        squared: torch.Tensor,  # [B] float64, written
    ) -> None:
        """Samples of more than ``MAX_ROWS`` tokens take the direct form, whatever is asked.

        Their Gram matrices are large, and the direct form gives the same number at less cost.
        """
        depth = rows.hidden.shape[1]
        at_once = _rows_at_once(depth)
        longest_gram = {"auto": min(at_once, depth), "gram": at_once, "direct": 0}[form]
        bounds = offsets.tolist()
        for group in _groups(bounds, longest_gram, at_once):
            if bounds[group[0] + 1] - bounds[group[0]] <= longest_gram:
                _gram_form(rows, bounds, group, weights, squared)
            else:
                (i,) = group
                squared[i] = _direct_form(rows, bounds[i], bounds[i + 1], weights)

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
    def mixture_stats(
        self,
        rows: DrawRows,
    ) -> None:
        mixture_in_chunks(self, rows)


def _groups(bounds: list[int], longest_gram: int, at_once: int) -> Iterator[list[int]]:
    """Neighbouring samples of at most ``at_once`` rows together; one that is longer than ``longest_gram``, alone."""
    group: list[int] = []
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        long = end - begin > longest_gram
        if group and (long or end - bounds[group[0]] > at_once):
            yield group
            group = []
        if long:
            yield [i]
        else:
            group.append(i)
    if group:
        yield group


def _gram_form(
    rows: HeadRows,
    bounds: list[int],  # B + 1
    group: list[int],  # neighbouring samples
    weights: torch.Tensor,  # [N] float64
    squared: torch.Tensor,  # [B] float64, written for the group
) -> None:
    """``sum_st w_s w_t <delta_s, delta_t> (<h_s, h_t> + 1 with a bias)`` over each sample's tokens."""
    first, last = bounds[group[0]], bounds[group[-1] + 1]
    part = _rows(rows, slice(first, last))
    scale = weights[first:last, None].to(part.hidden.dtype)
    products = weights.new_zeros((last - first, last - first))
    for columns in _vocab_chunks(rows, last - first, 0):
        delta = _delta(part, columns) * scale
        products += delta @ delta.T
    keys = part.hidden @ part.hidden.T
    products *= keys if rows.head.bias is None else keys + 1
    for i in group:
        own = slice(bounds[i] - first, bounds[i + 1] - first)
        squared[i] = products[own, own].sum()


def _direct_form(
    rows: HeadRows,
    begin: int,  # of the sample's rows
    end: int,
    weights: torch.Tensor,  # [N] float64
) -> torch.Tensor:
    """``||sum_t w_t delta_t h_t^T||^2`` by stretches of the gradient's rows."""
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
    """Some of the rows, their hidden states in float32."""
    hidden = rows.hidden[part].to(compute_dtype(rows.hidden.dtype))
    targets = None if rows.targets is None else rows.targets[part]
    return replace(rows, hidden=hidden, targets=targets, state=rows.state[:, part], index=rows.index[part])


def _rows_at_once(depth: int) -> int:
    """At most ``MAX_ROWS`` whose hidden states in float32 take a quarter of the buffer."""
    return max(min(MAX_ROWS, BUFFER_BYTES // 4 // (4 * max(depth, 1))), 1)


def _row_chunks(rows: HeadRows, begin: int, end: int) -> Iterator[tuple[slice, HeadRows]]:
    """Chunks of the rows from ``begin`` to ``end``, their hidden states in float32."""
    size = _rows_at_once(rows.hidden.shape[1])
    for first in range(begin, end, size):
        part = slice(first, min(first + size, end))
        yield part, _rows(rows, part)


def _vocab_chunks(rows: HeadRows, n: int, width: int) -> Iterator[slice]:
    """Stretches of the vocabulary for ``n`` rows: weights, ``width`` floats more for each column, and tiles fit."""
    vocab, depth = rows.head.weight.shape
    tall = min(n, MAX_ROWS)
    by_weight = BUFFER_BYTES // 4 // (4 * max(depth + width, 1))
    by_tile = BUFFER_BYTES // 2 // (4 * TEMPORARIES * max(tall, 1))
    size = max(min(by_weight, by_tile), 1)
    return (slice(begin, min(begin + size, vocab)) for begin in range(0, vocab, size))


def _delta(rows: HeadRows, columns: slice) -> torch.Tensor:
    """Columns of ``logit_gradient``, ``[N, columns]``."""
    head = rows.head
    bias = None if head.bias is None else head.bias[columns]
    shard = replace(head, weight=head.weight[columns], bias=bias, vocab_start=head.vocab_start + columns.start)
    return logit_gradient(replace(rows, head=shard))
