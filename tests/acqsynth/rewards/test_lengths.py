"""Normalisation of values within length bins."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from acqsynth.rewards.fusion import LengthBins


def drawn(n, seed=0):
    """Values that grow with length, the lengths, and the part of each value that is independent of length."""
    rng = random.Random(seed)
    lengths = [round(2 ** rng.uniform(4, 10)) for _ in range(n)]
    worth = [rng.gauss(0, 1) for _ in range(n)]
    return [length**0.5 + (1 + length / 300) * w for length, w in zip(lengths, worth, strict=True)], lengths, worth


def test_removes_the_correlation_with_length_only():
    bins = LengthBins()
    values, lengths, worth = drawn(2000)
    assert statistics.correlation(values, lengths) > 0.8
    found = bins(values, lengths)
    assert abs(statistics.correlation(found, lengths)) < 0.15
    assert statistics.correlation(found, worth) > 0.9 > statistics.correlation(values, worth)
    assert 0.5 < statistics.pstdev(found) < 1.5


def test_moments_are_those_of_the_bin():
    bins = LengthBins(prior=1e-9, decay=1.0)
    values = [1.0, 2.0, 6.0]
    found = bins(values, [100, 100, 100])
    assert found == pytest.approx([(v - 3) / statistics.pstdev(values) for v in values])


def test_between_two_bins_their_moments_are_mixed():
    bins = LengthBins(prior=1e-9, decay=1.0)
    bins([0.0, 2.0] * 50 + [5.0, 7.0] * 50, [256, 256] * 50 + [512, 512] * 50)  # bins 16 and 18
    bins([3.0, 5.0] * 50, [362, 362] * 50)  # bin 17
    [deviation] = bins([4.0], [331], update=False)  # at 16.742: 0.258 of mean 1 plus 0.742 of mean 4
    position = 2 * math.log2(331)
    share = position - 16
    assert deviation == pytest.approx(4 - ((1 - share) * 1 + share * 4), rel=1e-3)


def test_a_new_bin_starts_from_the_line_through_the_others():
    bins = LengthBins(prior=8.0, decay=1.0)
    for length, level in ((16, 1.0), (64, 2.0), (256, 3.0)):
        bins([level - 0.5, level + 0.5] * 200, [length] * 400)
    on_the_line, above = bins([4.0, 6.0], [1024, 1024], update=False)
    assert abs(on_the_line) < 0.1  # the slope is shrunk slightly
    assert above == pytest.approx(on_the_line + 2 / 0.5)
    assert bins([4.0], [1_000_000], update=False)[0] < -2


def test_a_bin_without_variance_is_not_divided_by_zero():
    bins = LengthBins()
    assert bins([2.0, 2.0], [10, 10]) == [0, 0]
    bins([1.0, 5.0] * 10, [500] * 20)
    [value] = bins([2.0 + 1e-9], [10])
    assert abs(value) < 1


@pytest.mark.parametrize("seed", range(3))
def test_the_order_within_a_call_does_not_matter(seed):
    values, lengths, _ = drawn(50)
    values[:25] = [0.1, 0.2, 0.7, 0.7, 0.2] * 5
    order = random.Random(seed).sample(range(50), 50)
    one, other = LengthBins(), LengthBins()
    for bins in (one, other):
        bins(*drawn(40, seed=1)[:2])
    expected, found = one(values, lengths), other([values[i] for i in order], [lengths[i] for i in order])
    assert found == [expected[i] for i in order]
    assert other.state_dict() == one.state_dict()


@pytest.mark.parametrize("value", [0.1, -0.3, 1e9, 0.0])
def test_a_constant_is_constant_at_any_length(value):
    assert LengthBins()([value] * 7, [10, 17, 33, 70, 150, 400, 401]) == [0.0] * 7


def test_none_stays_none_and_is_not_counted():
    one, other = LengthBins(), LengthBins()
    first, second = other([1.0, 2.0], [10, 10])
    assert one([1.0, None, 2.0], [10, 10, 10]) == [first, None, second]
    assert one.state_dict() == other.state_dict()


def test_without_update_nothing_is_counted():
    bins = LengthBins()
    assert bins([3.0, 5.0], [10, 10], update=False) == [3.0, 5.0]  # nothing seen yet: unchanged
    bins(*drawn(100)[:2])
    state = bins.state_dict()
    bins([1e6], [10], update=False)
    assert bins.state_dict() == state


def test_state_is_restored():
    values, lengths, _ = drawn(200)
    one, other = LengthBins(), LengthBins()
    one(values[:100], lengths[:100])
    other.load_state_dict(one.state_dict())
    assert one(values[100:], lengths[100:]) == other(values[100:], lengths[100:])


def test_old_values_fade():
    bins = LengthBins(decay=0.9)
    bins([0.0, 1.0] * 50, [10] * 100)
    bins([100.0, 101.0] * 50, [10] * 100)
    [value] = bins([100.5], [10], update=False)
    assert abs(value) < 0.2


def test_wrong_arguments():
    with pytest.raises(ValueError, match="prior, decay"):
        LengthBins(decay=0)
