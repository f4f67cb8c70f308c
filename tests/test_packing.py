"""The packing is optimal, keeps to its budget and loses no sample."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from acqcore.students.packing import collate, partition
from acqcore.students.samples import Row


def cost(lengths: list[int], batches: list[list[int]], overhead: int) -> int:
    return sum(max(lengths[i] for i in batch) * len(batch) + overhead for batch in batches)


def best(lengths: list[int], budget: int, overhead: int) -> int:
    """Least cost over all ways of cutting the sorted list."""
    ordered = sorted(lengths, reverse=True)

    def rest(i: int) -> int:
        if i == len(ordered):
            return 0
        fits = [k for k in range(1, len(ordered) - i + 1) if k == 1 or k * ordered[i] <= budget]
        return min(k * ordered[i] + overhead + rest(i + k) for k in fits)

    return rest(0)


@pytest.mark.parametrize("overhead", [0, 5, 100])
@pytest.mark.parametrize("seed", range(5))
def test_no_partition_is_cheaper(seed, overhead):
    rng = random.Random(seed)
    lengths = [rng.randint(1, 30) for _ in range(10)]
    batches = partition(lengths, 60, overhead)
    assert cost(lengths, batches, overhead) == best(lengths, 60, overhead)


def test_every_sample_once_longest_first_within_the_budget():
    rng = random.Random(0)
    lengths = [rng.randint(1, 400) for _ in range(500)]
    batches = partition(lengths, 300, 20)
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(lengths, reverse=True)
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 300


def runs(order: list[int], budget: int, lengths: list[int]) -> Iterator[list[list[int]]]:
    """All ways of cutting the list into runs within the budget."""
    if not order:
        yield []
    for k in range(1, len(order) + 1):
        if k == 1 or k * max(lengths[i] for i in order[:k]) <= budget:
            yield from ([order[:k], *rest] for rest in runs(order[k:], budget, lengths))


@pytest.mark.parametrize("repeats", [1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_short_prompts_do_not_lengthen_the_part_of_others(seed, repeats):
    """With ``starts``, no other cut of the list is cheaper; batches that mix prompt lengths cost extra."""
    rng = random.Random(seed)
    starts = [rng.choice([2, 20, 40]) for _ in range(9)]
    lengths = [start + rng.randint(1, 15) for start in starts]
    batches = partition(lengths, 150, 5, None, starts, repeats)
    assert sorted(i for batch in batches for i in batch) == list(range(9))

    def price(cut: list[list[int]]) -> int:
        again = [max(lengths[i] for i in part) - min(starts[i] for i in part) for part in cut]
        return cost(lengths, cut, 5) + repeats * sum(len(p) * a for p, a in zip(cut, again, strict=True))

    order = sorted(range(9), key=lambda i: (-starts[i], -lengths[i]))
    assert price(batches) == min(map(price, runs(order, 150, lengths)))
    assert price(batches) <= price(partition(lengths, 150, 5))


def test_edges():
    assert partition([], 10, 5) == []
    assert partition([7], 3, 5) == [[0]]
    assert partition([2, 2, 2, 2], 100, 5) == [[0, 1, 2, 3]]
    assert partition([3, 3], 100, 0) in ([[0, 1]], [[0], [1]])


def test_collate_pads_on_the_right_and_finds_what_is_scored():
    rows = [
        Row(torch.tensor([5, 6, 7]), torch.tensor([-100, 6, -100])),
        Row(torch.tensor([8, 9, 1, 2]), torch.tensor([-100, -100, 1, 2])),
        Row(torch.tensor([3, 4]), torch.tensor([-100, 4])),
    ]
    input_ids, positions, targets, offsets = collate(rows)
    assert input_ids.tolist() == [[5, 6, 7, 0], [8, 9, 1, 2], [3, 4, 0, 0]]
    assert positions.tolist() == [0, 5, 6, 8]  # positions before the scored tokens, in the flattened batch
    assert targets.tolist() == [6, 1, 2, 4]
    assert offsets.tolist() == [0, 1, 3, 4]
