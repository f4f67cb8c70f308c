"""Packs whole samples into blocks of 128 slots, for kernels that keep Gram matrices of the rows in a block."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

#: Slots per block, and maximum rows of a sample.
BLOCK = 128


def pack(lengths: Sequence[int]) -> tuple[list[int], int]:
    """First slot of each sample, and the number of blocks. The longest samples go first, each into the fullest block
    with room; empty ones take no slot."""
    first_slots, blocks = [0] * len(lengths), 0
    with_room: list[list[int]] = [[] for _ in range(BLOCK + 1)]  # blocks by number of free slots
    longest_first = sorted(filter(lengths.__getitem__, range(len(lengths))), key=lengths.__getitem__, reverse=True)
    for length, group in itertools.groupby(longest_first, lengths.__getitem__):
        samples, room = [*group][::-1], length
        while samples:
            while room < BLOCK and not with_room[room]:
                room += 1
            if with_room[room]:
                block = with_room[room].pop()
            else:
                block, blocks = blocks, blocks + 1
            slot = (block + 1) * BLOCK - room
            count = min(room // length, len(samples))
            for place in range(count):
                first_slots[samples.pop()] = slot + place * length
            with_room[room - count * length].append(block)
    return first_slots, blocks


def slot_table(
    first_slots: Sequence[int],  # from pack
    blocks: int,
    bounds: Sequence[tuple[int, int]],  # [begin, end) rows of each sample
) -> torch.Tensor:
    """``[4, blocks * BLOCK]`` int64: row and sample of each slot, first and last slot of the sample, counted from the
    start of the block; -1 in empty slots."""
    first = torch.tensor(first_slots)
    begins, ends = torch.tensor(list(itertools.chain.from_iterable(bounds))).view(-1, 2).T
    lengths = ends - begins
    sample = torch.arange(len(lengths)).repeat_interleave(lengths)
    within = torch.arange(len(sample)) - (lengths.cumsum(0) - lengths)[sample]
    slots = torch.full((4, blocks * BLOCK), -1)
    first_in_block = first % BLOCK
    slots[:, first[sample] + within] = torch.stack(
        [begins[sample] + within, sample, first_in_block[sample], (first_in_block + lengths - 1)[sample]]
    )
    return slots


def gaps(bounds: Sequence[tuple[int, int]], n: int) -> list[tuple[int, int]]:
    """Ranges ``[begin, end)`` of the ``n`` rows outside all samples, whose rows do not overlap."""
    edges = [0, *itertools.chain.from_iterable(sorted(bounds)), n]
    return [(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True) if begin < end]
