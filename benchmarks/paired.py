"""Paired comparisons over seeds: t intervals, Holm's correction, and the smallest detectable difference."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student_t


@dataclass(frozen=True)
class Difference:
    """Mean of n paired differences.

    Attributes:
        low, high: 95 % t interval of the mean; infinite for one pair.
        deviation: standard deviation of the differences; NaN for one pair.
        p: two-sided p value of the hypothesis that the mean is 0.
        detectable: the mean that a test at 5 % would detect with a power of about 80 %.
    """

    n: int
    mean: float
    low: float
    high: float
    deviation: float
    p: float
    detectable: float

    def shown(self, p: float | None = None) -> bool:
        """Whether the mean is above 0 at the 5 % level, by ``p`` (an adjusted value) or its own."""
        return self.mean > 0 and (self.p if p is None else p) < 0.05


def difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Statistics of ``a - b``, seed by seed.

    Raises:
        ValueError: ``a`` is empty, or ``a`` and ``b`` have different lengths.
    """
    if not a or len(a) != len(b):
        raise ValueError(f"a, b: expected equally many values, at least one each, got {len(a)} and {len(b)}")
    d = [x - y for x, y in zip(a, b, strict=True)]
    n, mean = len(d), statistics.fmean(d)
    if n == 1:
        return Difference(1, mean, -math.inf, math.inf, math.nan, 1.0, math.inf)
    deviation = statistics.stdev(d)
    error = deviation / math.sqrt(n)
    if error == 0:
        return Difference(n, mean, mean, mean, 0.0, 0.0 if mean else 1.0, 0.0)
    half = float(student_t.ppf(0.975, n - 1)) * error
    p = 2 * float(student_t.sf(abs(mean) / error, n - 1))
    return Difference(n, mean, mean - half, mean + half, deviation, p, half + float(student_t.ppf(0.8, n - 1)) * error)


def plural(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p values of the comparisons of one family (Holm 1979)."""
    adjusted: dict[str, float] = {}
    least = 0.0
    for i, name in enumerate(sorted(p, key=lambda key: p[key])):
        least = max(least, min(1.0, (len(p) - i) * p[name]))
        adjusted[name] = least
    return {name: adjusted[name] for name in p}
