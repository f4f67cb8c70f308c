"""Paired comparisons over seeds: t intervals, Holm's correction, and the smallest detectable difference."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from scipy.stats import t as student_t

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Difference:
    """Mean of n paired differences.

    Attributes:
        low, high: 95 % t interval of the mean; infinite for one pair.
        deviation: standard deviation of the differences; NaN for one pair.
        p: two-sided p value of the hypothesis that the mean is 0; of a sign test if all differences are equal.
        detectable: the mean that a test at 5 % would detect with a power of about 80 %.
    """

    n: int
    mean: float
    low: float
    high: float
    deviation: float
    p: float
    detectable: float

    def __str__(self) -> str:
        if self.n == 1:
            return f"{self.mean:+.1f}, one seed"
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"

    def verdict(self, p: float | None = None) -> str:
        """What the 5 % level shows, by ``p`` (an adjusted value) or its own."""
        p = self.p if p is None else p
        if p >= 0.05 or not self.mean:
            return "no gain shown"
        return f"gain shown, p = {p:.2g}" if self.mean > 0 else "a loss is shown"

    def primary(self, title: str, over: str = "") -> str:
        """The line about the primary outcome."""
        return (
            f"- **Primary: {title}: {self} points**{over} ({self.verdict()}; paired standard deviation "
            f"{self.deviation:.1f}, a difference of {self.detectable:.1f} would be found in 80 % of such runs)."
        )


def half_width(values: Sequence[float]) -> float:
    """Half of the mean's 95 % t interval; at least two values."""
    return float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def with_interval(values: Sequence[float], digits: int = 1) -> str:
    """Mean and half-width of its 95 % t interval; the mean alone for one value."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {half_width(values):.{digits}f}"


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
    if error <= 1e-12 * abs(mean):
        return Difference(n, mean, mean, mean, 0.0, 2 * 0.5**n if mean else 1.0, 0.0)
    half = float(student_t.ppf(0.975, n - 1)) * error
    p = 2 * float(student_t.sf(abs(mean) / error, n - 1))
    return Difference(n, mean, mean - half, mean + half, deviation, p, half + float(student_t.ppf(0.8, n - 1)) * error)


def plural(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def holm(p: Mapping[Key, float]) -> dict[Key, float]:
    """Adjusted p values of the comparisons of one family (Holm 1979)."""
    adjusted: dict[Key, float] = {}
    least = 0.0
    for i, name in enumerate(sorted(p, key=lambda key: p[key])):
        least = max(least, min(1.0, (len(p) - i) * p[name]))
        adjusted[name] = least
    return {name: adjusted[name] for name in p}
