"""How much of a signal's spread within a group is the samples', and how much the estimator's noise.

An estimated value is the true one plus an error, ``x = t + e``, and errors of different samples are independent. Then
the variance of x within a group is that of t plus the mean squared standard error, and

    reliability = var(t) / var(x) = 1 - mean(stderr^2) / var(x)

is the squared correlation of x with t, and the correlation of x with a second measurement of the same samples: what
test-retest measures, without the second pass. An advantage is taken within a group, so a signal of reliability 0 there
rewards at random, however well it tells easy questions from hard ones elsewhere.

Variances are pooled over the groups before the ratio is formed. A mean of ratios would be biased: in groups of 4, with
values of reliability 0.9, its expectation is 0.7.

Source: classical test theory (Spearman 1904; Lord & Novick 1968, chapter 3).
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

logger = logging.getLogger(__name__)

LOWEST = 0.5  #: below it most of a signal's spread within a group is noise, and a warning says so
ENOUGH = 16  #: degrees of freedom before a warning; with fewer the figure is a guess

Values = Sequence[float | None]


@dataclass(frozen=True)
class Spread:
    """Sums over groups, each weighted by its degrees of freedom, members less one.

    Attributes:
        noise: of the mean squared standard errors.
        total: of the variances of the values.
        freedom: degrees of freedom.
    """

    noise: float = 0.0
    total: float = 0.0
    freedom: int = 0

    @classmethod
    def within(cls, values: Values, stderr: Values, groups: Sequence[Hashable]) -> Spread:
        """Of n values with their standard errors and groups. Samples without either are left out, and so are groups
        with fewer than two others."""
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
        """In [0, 1]; None if no two samples of a group differ."""
        return min(1.0, max(0.0, 1 - self.noise / self.total)) if self.total > 0 else None


class Watch:
    """Adds up the spread of each signal over calls, and warns once of each that is mostly noise.

    Args:
        name: of the reward, for the message.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._spread: dict[str, Spread] = {}
        self._warned: set[str] = set()

    def add(self, signals: Mapping[str, Spread]) -> None:
        """Takes in the spread of a call."""
        for signal, spread in signals.items():
            so_far = self._spread[signal] = self._spread.get(signal, Spread()) + spread
            found = so_far.reliability
            if found is None or found >= LOWEST or so_far.freedom < ENOUGH or signal in self._warned:
                continue
            self._warned.add(signal)
            logger.warning(
                "%s: reliability of %r within groups is %.2f: %.0f %% of its spread there is noise of the estimate. "
                "Raise its probes or draws; for mutual_information, form='linear' with more probes costs least",
                self._name, signal, found, 100 * (1 - found),
            )  # fmt: skip
