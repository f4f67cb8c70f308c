"""Slots of whole samples in blocks, as the fused CUDA kernel reads them."""

from __future__ import annotations

from functools import lru_cache

import torch

from acqcore import slots
from acqcore.slots import BLOCK

#: Blocks of slots come in pairs.
PAIR = 2


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
    stretches = list(bounds)
    for begin, end in slots.gaps(bounds, n):
        stretches += [(first, min(first + BLOCK, end)) for first in range(begin, end, BLOCK)]
    first_slots, blocks = slots.pack([end - begin for begin, end in stretches])
    rows, samples, firsts, lasts = slots.slot_table(first_slots, -(-blocks // PAIR) * PAIR, stretches)
    table = torch.empty((len(rows), 4), dtype=torch.int32)
    table[:, 0] = rows
    table[:, 1] = (firsts | lasts << 16).where(rows >= 0, 0)
    no_matrix = [-1] * (len(stretches) - len(bounds) + 1)  # the last one for empty slots
    table[:, 2:] = torch.tensor([*starts, *no_matrix])[samples].view(torch.int32).view(-1, 2)
    return table
