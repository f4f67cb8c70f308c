"""Slots of samples in blocks of 128 rows."""

from __future__ import annotations

import random

import pytest
import torch

from acqcore.backends.cuda import PAIR, cuda_slots
from acqcore.slots import BLOCK


@pytest.mark.parametrize("seed", range(20))
def test_every_row_has_a_slot_and_every_sample_stays_whole(seed):
    """Samples have 0 to BLOCK rows, come in any order and do not cover all rows."""
    draw = random.Random(seed)
    samples, row, element = [], 0, 0
    while row < 600:
        row += draw.choice([0, 0, 1, 200])
        length = draw.randint(0, BLOCK)
        samples.append(((row, row + length), element))
        row, element = row + length, element + length**2
    draw.shuffle(samples)
    n = row + draw.choice([0, 5])
    table = cuda_slots(tuple(bounds for bounds, _ in samples), tuple(start for _, start in samples), n)
    assert len(table) % (PAIR * BLOCK) == 0
    slot_of = {int(r): slot for slot, r in enumerate(table[:, 0]) if r >= 0}
    assert sorted(slot_of) == list(range(n))
    assert int((table[:, 0] >= 0).sum()) == n
    for (begin, end), start in samples:
        for i in range(begin, end):
            slot, span = slot_of[i], int(table[slot_of[i], 1])
            first, last = span & 0xFFFF, span >> 16
            assert (slot % BLOCK - first, last - first + 1) == (i - begin, end - begin)
            assert int(table[slot, 2:].clone().view(torch.int64)) == start


def test_packing_fills_blocks():
    bounds = tuple((i, i + 32) for i in range(0, 4096, 32))
    assert len(cuda_slots(bounds, tuple(range(0, 128 * 1024, 1024)), 4096)) == 4096
