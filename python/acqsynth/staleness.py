"""How far the scores of a student have drifted since it was last refreshed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.stats import spearmanr


def rank_correlation(before: Sequence[float | None], after: Sequence[float | None]) -> float | None:
    """Spearman's rank correlation of two scorings of the same samples.

    Args:
        before, after: n scores each; where either is None or not finite the sample is left out.

    Returns:
        A number in [-1, 1]; None where fewer than three samples are left, or one side has a single value.

    Raises:
        ValueError: of different length.
    """
    if len(before) != len(after):
        raise ValueError(f"after: expected {len(before)} scores, as before has, got {len(after)}")
    pairs = [
        (a, b)
        for a, b in zip(before, after, strict=True)
        if a is not None and b is not None and math.isfinite(a) and math.isfinite(b)
    ]
    if len(pairs) < 3 or min(len(set(column)) for column in zip(*pairs, strict=True)) == 1:
        return None
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)
