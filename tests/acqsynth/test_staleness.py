from __future__ import annotations

import math

import pytest

from acqsynth.staleness import rank_correlation


def test_order_alone_counts() -> None:
    assert rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 1000.0]) == pytest.approx(1)
    assert rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    # Spearman: 1 - 6 sum d^2 / (n (n^2 - 1)), d = 1, 1, 0, 0
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 3.0, 4.0]) == pytest.approx(1 - 6 * 2 / 60)


def test_unscored_samples_are_left_out() -> None:
    assert rank_correlation([1.0, None, 2.0, 3.0, math.nan], [1.0, 5.0, 2.0, 3.0, 0.0]) == pytest.approx(1)
    assert rank_correlation([1.0, None, 2.0, 3.0], [1.0, 5.0, math.inf, 3.0]) is None


def test_undefined_without_an_order() -> None:
    assert rank_correlation([], []) is None
    assert rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    with pytest.raises(ValueError, match="after: expected 2 scores, as before has, got 1"):
        rank_correlation([1.0, 2.0], [1.0])
