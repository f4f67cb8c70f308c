"""Separates a signal's spread within a group into differences between samples and noise of the estimator.

An estimated value is the true one plus an error, ``x = t + e``, with independent errors across samples. The variance
of x within a group is then that of t plus the mean squared standard error, and

    reliability = var(t) / var(x) = 1 - mean(stderr^2) / var(x)

is the squared correlation of x with t, and also the correlation of x with a second measurement of the same samples:
test-retest reliability without the second pass. Advantages are computed within groups, so a signal whose reliability
within groups is 0 rewards at random, however well it separates easy from hard questions across groups.

Variances are pooled over the groups before taking the ratio. A mean of ratios would be biased: in groups of 4, with
values of reliability 0.9, its expectation is 0.7.

Source: classical test theory (Spearman 1904; Lord & Novick 1968, chapter 3).
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

logger = logging.getLogger(__name__)

LOWEST = 0.5  #: below this, most of a signal's spread within a group is noise, and a warning is logged
ENOUGH = 16  #: degrees of freedom required for a warning; with fewer the estimate is too uncertain

Values = Sequence[float | None]


@dataclass(frozen=True)
class Spread:
    """Sums over groups, each weighted by its degrees of freedom (members minus one).

    Attributes:
        noise: sum of the mean squared standard errors.
        total: sum of the variances of the values.
        freedom: sum of the degrees of freedom.
    """

    noise: float = 0.0
    total: float = 0.0
    freedom: int = 0

    @classmethod
    def within(cls, values: Values, stderr: Values, groups: Sequence[Hashable]) -> Spread:
        """The spread of n values with their standard errors and groups. Skips samples that lack a value or a standard
        error, and groups with fewer than two remaining samples."""
        members: dict[Hashable, list[tuple[float, float]]] = {}
        for value, error, group in zip(values, stderr, groups, strict=True):
            if value is not None and error is not None:
                members.setdefault(group, []).append((value, error))
        spread = cls()
        for pairs in members.values():
            freedom = len(pairs) - 1
            if freedom:
                noise = freedom * statistics.fmean(error * error for _, error in pairs)
                spread += cls(noise, freedom * statistics.variance(value for value, _ in pairs), freedom)
        return spread

    def __add__(self, other: Spread) -> Spread:
        return Spread(self.noise + other.noise, self.total + other.total, self.freedom + other.freedom)

    @property
    def reliability(self) -> float | None:
        """Reliability in [0, 1]; None if no two samples of a group differ."""
        return min(1.0, max(0.0, 1 - self.noise / self.total)) if self.total > 0 else None


class Watch:
    """Accumulates each signal's spread over calls and warns once about each signal that is mostly noise.

    Args:
        name: the reward's name, shown in the warning.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._spread: dict[str, Spread] = {}
        self._warned: set[str] = set()

    def add(self, signals: Mapping[str, Spread]) -> None:
        """Adds the spread of a call."""
        for signal, spread in signals.items():
            so_far = self._spread[signal] = self._spread.get(signal, Spread()) + spread
            found = so_far.reliability
            if found is None or found >= LOWEST or so_far.freedom < ENOUGH or signal in self._warned:
                continue
            self._warned.add(signal)
            logger.warning(
                "%s: reliability of %r within groups is %.2f: %.0f %% of its spread there is estimation noise. "
                "Raise its probes or draws; for mutual_information, form='linear' with more probes costs least",
                self._name, signal, found, 100 * (1 - found),
            )  # fmt: skip
