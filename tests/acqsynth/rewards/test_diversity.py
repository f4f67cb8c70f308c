"""Novelty over a growing archive."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

import acqcore
from acqsynth.domains import Sample
from acqsynth.rewards import Diversity


def at(texts):
    """Embeds texts that spell out their vector."""
    return torch.tensor([[float(part) for part in text.split()] for text in texts]).reshape(len(texts), -1)


def samples(x):
    return [Sample(" ".join(f"{v:.6f}" for v in row), "1") for row in x.tolist()]


def drawn(n, d=32, seed=0):
    """Random directions with a common component, like embeddings."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 0.5
    return torch.nn.functional.normalize(x, dim=1)


def test_the_smaller_gain_of_archive_and_call():
    signal = Diversity(at, capacity=8, ridge=0.1)
    first = samples(drawn(5))
    second = samples(
        torch.cat([drawn(4, seed=1), drawn(1, seed=1), drawn(2)])
    )  # one copy within the call, two of the archive
    vectors = at([s.question for s in first])
    assert signal(first) == pytest.approx(acqcore.gradient_diversity(vectors, ridge=0.1).tolist())
    signal.accept(first)
    archive = acqcore.Archive(8, ridge=0.1)
    archive.add(vectors)
    later = at([s.question for s in second])
    both = list(
        zip(acqcore.gradient_diversity(later, ridge=0.1).tolist(), archive.novelty(later).tolist(), strict=True)
    )
    expected = [min(pair) for pair in both]
    assert expected not in [list(column) for column in zip(*both, strict=True)]
    assert signal(second) == pytest.approx(expected)
    assert len(signal) == len(archive) == 5


def test_copies_share_next_to_nothing():
    signal = Diversity(at)
    x = torch.eye(16)[[0, 0, 0, 1]]
    values = signal(samples(x))
    assert max(values[:3]) < 0.11
    assert values[3] == pytest.approx(math.log(2))
    signal.accept(samples(x))
    assert max(signal(samples(x[3:]))) < 0.11


def test_scoring_alone_leaves_the_archive():
    signal = Diversity(at)
    signal(samples(drawn(5)))
    assert len(signal) == 0
    signal.accept([])
    assert len(signal) == 0
    assert signal([]) == []


def means(signal, total=1000, call=20):
    """Mean value of each call in a run that adds the samples after every call."""
    x = drawn(total)
    found = []
    for begin in range(0, total, call):
        part = samples(x[begin : begin + call])
        found.append(statistics.fmean(signal(part)))
        if hasattr(signal, "accept"):  # the released form adds samples while scoring
            signal.accept(part)
    return found


def test_novelty_does_not_decay_to_nothing():
    found = means(Diversity(at))
    assert statistics.fmean(found[-10:]) > 0.5 * statistics.fmean(found[1:6])
    assert statistics.fmean(found[-10:]) > 0.2


def test_released_decays_to_nothing():
    found = means(Diversity(at, paper_compat=True))
    assert found[0] > 0.01
    assert max(found[-10:]) < 0.01


def test_released_gain_by_hand():
    signal = Diversity(at, paper_compat=True)
    x = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0], [3.0, 0.0]])
    # First: 1 by convention. Second: distance 3 to the first, minus its best of 0. Third: mean of 5 - 3 and 4 - 3.
    # Fourth, a copy of the second: 3 - 5, 0 - 4 and 4 - 5 are all negative, so 0.
    assert signal(samples(x)) == [1.0, 3.0, 1.5, 0.0]
    assert len(signal) == 3


def test_released_rewards_far_points_and_not_coverage():
    """After twenty samples in one corner and one far away, a sample that fills the gap between them gains little."""
    corner = torch.tensor([[1.0, 0.0]]) + 0.02 * torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    seen = samples(torch.cat([corner, torch.tensor([[-1.0, 0.05]])]))
    hole, farther = samples(torch.tensor([[0.0, 1.0], [-1.2, 0.06]]))
    released, corrected = Diversity(at, paper_compat=True), Diversity(at, capacity=2)
    released(seen)
    assert released([hole])[0] < 0.15
    assert released([farther])[0] > 0.15  # same direction as a member, only farther away
    corrected.accept(seen)
    assert corrected([hole])[0] > 0.4
    assert corrected([farther])[0] < 0.11


@pytest.mark.parametrize("paper_compat", [False, True])
def test_state_is_restored(paper_compat):
    one, other = (Diversity(at, paper_compat=paper_compat) for _ in range(2))
    other.load_state_dict(one.state_dict())
    first, second = samples(drawn(6)), samples(drawn(6, seed=2))
    one(first)
    getattr(one, "accept", list)(first)
    other.load_state_dict(one.state_dict())
    assert len(other) == len(one) > 0
    assert one(second) == other(second)
