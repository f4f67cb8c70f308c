"""Statistics of a mixture of draws in plain torch, a tile of rows, draws and vocabulary at a time.

The first pass over the vocabulary computes the draws' normalisers, the second the sums of ``eager.mixture``. Both
compute the same products in float32 and sum in float64: normalisers from differently rounded products would cost the
sums their last digits.

Ranks that share a vocabulary exchange each draw's largest logit, its index and its log-sum-exp between the passes, and
the sums after the second pass: 24 bytes per row and draw, and 48 per row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from acqcore.backends.base import Backend, DrawRows
from acqcore.head import Head, compute_dtype
from acqcore.vocab_parallel import gathered, summed

#: Bound on a chunk's hidden states in all draws, and a separate bound on its weights in float32.
OPERAND_BYTES = 16 << 20
#: Bound on the tiles of logits and their temporaries.
TILE_BYTES = 24 << 20
#: Rows in a chunk, counting each draw; more would make tiles narrow.
MAX_ROWS = 4096
#: Tile-sized float64 buffers that exist at once.
TEMPORARIES = 6


def mixture_in_chunks(backend: Backend, rows: DrawRows) -> None:
    """``Backend.mixture_stats`` with a bounded part of the ``[K, N, V]`` logits at a time."""
    n, depth = rows.hidden.shape[-2:]
    row_bytes = rows.draws * max(depth, 1) * (rows.hidden.element_size() + 4)  # as stored, and in float32
    at_once = max(min(OPERAND_BYTES // row_bytes, MAX_ROWS // rows.draws), 1)
    for begin in range(0, n, at_once):
        part = slice(begin, min(begin + at_once, n))
        targets = None if rows.targets is None else rows.targets[part]
        drawn, heads = _drawn(backend, rows, part)
        _mixture(drawn, heads, targets, rows.state[:, part], rows.votes[:, part])


def _mixture(
    drawn: torch.Tensor,  # [K, n, D]
    heads: tuple[Head, ...],  # one or K
    targets: torch.Tensor | None,  # [n]
    state: torch.Tensor,  # [6, n] float64, written
    votes: torch.Tensor,  # [K, n] int64, written
) -> None:
    draws, n = drawn.shape[:2]
    start = heads[0].vocab_start
    top = drawn.new_full((draws, n), -torch.inf, dtype=compute_dtype(drawn.dtype, heads[0].weight.dtype))
    log_z = drawn.new_full((draws, n), -torch.inf, dtype=torch.float64)
    votes.fill_(start)
    for columns in _vocab_chunks(heads[0], draws * n):
        z = _logits(drawn, heads, columns)
        tile_top, at = z.max(dim=2)
        rises = tile_top > top
        top = tile_top.where(rises, top)
        votes.copy_((at + start + columns.start).where(rises, votes))
        log_z = torch.logaddexp(log_z, z.double().logsumexp(dim=2))
    group = heads[0].group
    if group is not None:
        tops, indices, sums = gathered(torch.stack([top.double(), votes.double(), log_z]), group).unbind(dim=1)
        votes.copy_(indices.masked_fill(tops < tops.amax(dim=0), torch.inf).amin(dim=0))  # the lowest index on ties
        log_z = sums.logsumexp(dim=0)
    entropy, information, reverse, log_target, sum_sq, spread = state.zero_()
    log_target[:] = -torch.inf
    for columns in _vocab_chunks(heads[0], draws * n):
        log_p = _logits(drawn, heads, columns).double() - log_z[:, :, None]  # [K, n, columns]
        p = log_p.exp()
        log_m = log_p.logsumexp(dim=0) - math.log(draws)  # [n, columns]
        m = log_m.exp()
        entropy -= (p * log_p).masked_fill(p == 0, 0).mean(dim=0).sum(dim=1)
        information += (p * (log_p - log_m)).masked_fill(p == 0, 0).mean(dim=0).sum(dim=1)
        reverse += (m * (log_m - log_p.mean(dim=0))).masked_fill(m == 0, 0).sum(dim=1)
        sum_sq += m.square().sum(dim=1)
        spread += (p - m).square().mean(dim=0).sum(dim=1)
        if targets is not None:
            local = targets - (start + columns.start)
            here = (local >= 0) & (local < m.shape[1])
            log_target[:] = log_m.gather(1, local.where(here, 0)[:, None])[:, 0].where(here, log_target)
    if group is not None:
        if targets is not None:  # another rank's target adds nothing here
            local = targets - start
            log_target.masked_fill_((local < 0) | (local >= len(heads[0].weight)), 0)
        state.copy_(summed(state, group))
    if targets is not None:
        ignored = targets == -100
        state.masked_fill_(ignored, torch.nan)
        votes.masked_fill_(ignored, -1)


def _drawn(backend: Backend, rows: DrawRows, part: slice) -> tuple[torch.Tensor, tuple[Head, ...]]:
    """Hidden states ``[K, n, D]`` of every draw, and the heads that give their logits."""
    dropout = rows.dropout
    if dropout is None:
        return rows.hidden[:, part], rows.heads
    hidden = rows.hidden[part]
    n, depth = hidden.shape
    units = -(-depth // dropout.width)
    keep = torch.empty((rows.draws, n, units), dtype=torch.bool, device=hidden.device)
    of_part = replace(dropout, samples=dropout.samples[part], positions=dropout.positions[part])
    backend.dropout_mask(of_part, 0, keep)
    keep = keep.repeat_interleave(dropout.width, dim=2)[:, :, :depth]
    return hidden.where(keep, 0), (dropout.of_head(rows.heads[0]),)


def _vocab_chunks(head: Head, n: int) -> Iterator[slice]:
    """Slices of the vocabulary whose weights and tiles of ``n`` rows fit the bounds."""
    vocab, depth = head.weight.shape
    size = max(min(OPERAND_BYTES // (4 * max(depth, 1)), TILE_BYTES // (8 * TEMPORARIES * n)), 1)
    return (slice(begin, min(begin + size, vocab)) for begin in range(0, vocab, size))


def _logits(
    drawn: torch.Tensor,  # [K, n, D]
    heads: tuple[Head, ...],  # one or K
    columns: slice,
) -> torch.Tensor:
    """Some columns of the logits, ``[K, n, columns]``."""
    parts = [shard(head, columns) for head in heads]
    if len(parts) == 1:
        return parts[0].logits(drawn.flatten(0, 1)).view(*drawn.shape[:2], -1)
    return torch.stack([part.logits(hidden) for part, hidden in zip(parts, drawn, strict=True)])


def shard(head: Head, columns: slice) -> Head:
    """The head restricted to some rows of its weight."""
    bias = None if head.bias is None else head.bias[columns]
    return replace(head, weight=head.weight[columns], bias=bias, vocab_start=head.vocab_start + columns.start)
