"""Packs whole samples into blocks of 128 rows, for the fused kernel that keeps Gram matrices beside row states."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

#: Rows in a block, and in the longest sample that keeps a Gram matrix.
BLOCK = 128
#: Blocks of slots come in pairs.
PAIR = 2
_NO_MATRIX = -1


@lru_cache(maxsize=64)
def slot_table(
    bounds: tuple[tuple[int, int], ...],  # [begin, end) rows of each sample, at most BLOCK, none overlapping
    starts: tuple[int, ...],  # first element of each sample's matrix
    n: int,  # rows
) -> torch.Tensor:
    """``[slots, 4]`` int32: a slot's row, -1 if empty; ``first | last << 16``; ``start`` as int64.

    First and last are the slots of the row's sample, counted from the start of its block. Rows outside all samples form
    stretches of their own, with a start of -1.
    """
    begins, ends, first_elements = _with_gaps(np.array(bounds, np.int64).reshape(-1, 2), np.array(starts, np.int64), n)
    lengths = ends - begins
    first_slots, blocks = _placed(lengths)
    slots = -(-blocks // PAIR) * PAIR * BLOCK
    rows = np.full(slots, -1, np.int32)
    spans = np.zeros(slots, np.int32)
    matrices = np.full(slots, _NO_MATRIX, np.int64)
    within = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
    at = np.repeat(first_slots, lengths) + within
    first = first_slots % BLOCK
    rows[at] = np.repeat(begins, lengths) + within
    spans[at] = np.repeat(first | (first + lengths - 1) << 16, lengths)
    matrices[at] = np.repeat(first_elements, lengths)
    table = np.empty((slots, 4), np.int32)
    table[:, 0] = rows
    table[:, 1] = spans
    table[:, 2:] = matrices.view(np.int32).reshape(slots, 2)
    return torch.from_numpy(table)


def _with_gaps(
    bounds: np.ndarray,  # [samples, 2]
    starts: np.ndarray,  # [samples]
    n: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Begins, ends and starts of the samples, then of stretches of at most BLOCK rows that cover the other rows."""
    order = np.lexsort((bounds[:, 1], bounds[:, 0]))
    gap_begins = np.concatenate([[0], bounds[order, 1]])
    gap_ends = np.concatenate([bounds[order, 0], [n]])
    pieces = -(-(gap_ends - gap_begins) // BLOCK)
    number = np.arange(pieces.sum()) - np.repeat(pieces.cumsum() - pieces, pieces)
    begins = np.repeat(gap_begins, pieces) + number * BLOCK
    ends = np.minimum(begins + BLOCK, np.repeat(gap_ends, pieces))
    return (
        np.concatenate([bounds[:, 0], begins]),
        np.concatenate([bounds[:, 1], ends]),
        np.concatenate([starts, np.full(len(begins), _NO_MATRIX)]),
    )


def _placed(
    lengths: np.ndarray,  # of samples, at most BLOCK
) -> tuple[np.ndarray, int]:
    """First slot of each sample and number of blocks; places the longest first, in the fullest block with room."""
    first_slots = np.zeros_like(lengths)
    order = np.argsort(-lengths, kind="stable")
    blocks = 0
    with_room: list[list[int]] = [[] for _ in range(BLOCK + 1)]  # blocks by number of free slots
    longest_first = lengths[order]
    edges = np.flatnonzero(np.diff(longest_first, prepend=-1, append=-1))
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        length = int(longest_first[begin])
        if length == 0:
            continue
        at, room = begin, length
        while at < end:  # samples of the same length fill one block after another
            while room < BLOCK and not with_room[room]:
                room += 1
            if with_room[room]:
                block = with_room[room].pop()
            else:
                block, blocks = blocks, blocks + 1
            count = min(room // length, end - at)
            first_slots[order[at : at + count]] = block * BLOCK + BLOCK - room + length * np.arange(count)
            with_room[room - count * length].append(block)
            at += count
    return first_slots, blocks
