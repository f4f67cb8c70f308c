"""Fusion of signals, checked against explicit formulas."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from acqsynth.rewards.fusion import BOUNDED, METHODS, fuse

A = [1.0, 2.0, 4.0, 10.0, 10.0, 13.0]
B = [0.3, 0.1, 0.2, 0.5, 0.9, 0.5]
GROUPS = ["p", "p", "p", "q", "q", "q"]


def z(values, spread):
    mean, deviation = statistics.fmean(values), statistics.pstdev(values)
    return [(v - mean) / (deviation + spread) for v in values]


def z_of(column):
    spread = statistics.fmean([statistics.pstdev(column[:3]), statistics.pstdev(column[3:])])
    return z(column[:3], spread) + z(column[3:], spread)


def test_raw():
    assert fuse({"a": A, "b": B}, GROUPS, "raw", {"b": 10}) == pytest.approx([4, 3, 6, 15, 19, 18])


def test_z():
    expected = [2 * a - b for a, b in zip(z_of(A), z_of(B), strict=True)]
    assert fuse({"a": A, "b": B}, GROUPS, "z", {"a": 2, "b": -1}) == pytest.approx(expected)


@pytest.mark.parametrize("method", ["z", "gdpo", "rank", "quantile"])
def test_signals_that_cancel_out_give_equal_totals(method):
    draw = random.Random(0).random
    for _ in range(100):
        first, second = fuse({"a": sorted([draw(), draw()]), "b": sorted([draw(), draw()])[::-1]}, "pp", method)
        assert first == second


def test_gdpo():
    sums = [a + b for a, b in zip(z_of(A), z_of(B), strict=True)]
    expected = [(v - statistics.fmean(sums)) / statistics.pstdev(sums) for v in sums]
    assert fuse({"a": A, "b": B}, GROUPS, "gdpo") == pytest.approx(expected)


def test_rank():
    a = [1 / 6, 3 / 6, 5 / 6, 2 / 6, 2 / 6, 5 / 6]
    b = [5 / 6, 1 / 6, 3 / 6, 2 / 6, 5 / 6, 2 / 6]
    assert fuse({"a": A}, GROUPS, "rank") == pytest.approx(a)
    expected = [(3 * x + y) / 4 for x, y in zip(a, b, strict=True)]
    assert fuse({"a": A, "b": B}, GROUPS, "rank", {"a": 3}) == pytest.approx(expected)


def test_quantile_over_the_call_and_its_history():
    assert fuse({"a": A}, GROUPS, "quantile") == pytest.approx([1 / 12, 3 / 12, 5 / 12, 8 / 12, 8 / 12, 11 / 12])
    with_past = fuse({"a": A}, GROUPS, "quantile", history={"a": [0.0, 3.0]})
    assert with_past == pytest.approx([3 / 16, 5 / 16, 9 / 16, 12 / 16, 12 / 16, 15 / 16])
    assert fuse({"a": [5.0]}, ["only"], "quantile", history={"a": [1.0, 2.0, 9.0]}) == pytest.approx([5 / 8])


def test_a_group_of_near_equals_is_not_blown_up():
    near = [1.0, 1.001, 1.002]
    wide = [0.0, 5.0, 10.0]
    for method in ("z", "gdpo", "quantile"):
        values = fuse({"a": near + wide}, GROUPS, method, history={"a": [0.1 * i for i in range(100)]})
        assert max(values[:3]) - min(values[:3]) < 0.1 * (max(values[3:]) - min(values[3:])), method
    # with nothing else to compare, equal values fuse to 0
    assert fuse({"a": [1.0] * 3}, ["p"] * 3, "z") == [0, 0, 0]
    assert fuse({"a": [0.1] * 3 + [0.3] * 3}, GROUPS, "gdpo") == [0] * 6  # rounding errors are not spread


def test_an_outlier_does_not_drown_the_other_signal():
    huge = [1.0, 2.0, 1e9]
    b = [3.0, 1.0, 2.0]
    assert fuse({"a": huge, "b": b}, ["p"] * 3, "rank") == fuse({"a": [1.0, 2.0, 3.0], "b": b}, ["p"] * 3, "rank")


@pytest.mark.parametrize("unknown", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_masked_samples_enter_no_statistic(method, unknown):
    a = [1.0, unknown, 2.0, 4.0, 10.0, 50.0, 13.0]
    b = [0.3, 7.0, 0.1, 0.2, 0.5, unknown, 0.9]
    groups = ["p", "p", "p", "p", "q", "q", "q"]
    fused = fuse({"a": a, "b": b}, groups, method)
    assert fused[1] is None
    assert fused[5] is None
    kept = [i for i in range(7) if i not in (1, 5)]
    alone = fuse({"a": [a[i] for i in kept], "b": [b[i] for i in kept]}, [groups[i] for i in kept], method)
    assert [fused[i] for i in kept] == alone
    assert fuse({"a": [None, None]}, ["p", "p"], method) == [None, None]
    assert fuse({"a": []}, [], method) == []
    # a group without any known value
    assert fuse({"a": [None, 1.0, 2.0]}, ["p", "q", "q"], method)[0] is None


@pytest.mark.parametrize("method", METHODS)
def test_a_negative_weight_turns_the_order_round(method):
    up, down = fuse({"a": A[:3]}, ["p"] * 3, method), fuse({"a": A[:3]}, ["p"] * 3, method, {"a": -1})
    assert sorted(range(3), key=up.__getitem__) == sorted(range(3), key=down.__getitem__, reverse=True)


@pytest.mark.parametrize("method", BOUNDED)
def test_bounded_methods_stay_inside(method):
    values = fuse({"a": A, "b": B}, GROUPS, method, {"a": -5, "b": 2})
    assert all(0 < value < 1 for value in values)


def test_a_weight_of_zero_leaves_a_signal_out_and_masks_nothing():
    assert fuse({"a": A, "b": [None] * 6}, GROUPS, "rank", {"b": 0}) == fuse({"a": A}, GROUPS, "rank")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mean"}, "fusion: unknown 'mean', expected one of raw, z, rank, quantile, gdpo"),
        ({"weights": {"c": 1}}, r"weights: unknown \['c'\], known signals: a"),
        ({"weights": {"a": 0}}, "weights: expected at least one signal"),
        ({"weights": {"a": math.nan}}, "weights: expected finite numbers"),
        ({"weights": {"a": "much"}}, "weights: expected finite numbers, got 'much'"),
        ({"groups": ["p"]}, "components: expected 1 values of 'a', one per sample, got 6"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        fuse({"a": A}, **({"groups": GROUPS} | options))
