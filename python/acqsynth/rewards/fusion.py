"""Fuses several signals into one number per sample.

With r a signal's values, g the samples of a group, mu and sigma the population mean and standard deviation:

============  =====================================================================================================
``raw``       ``sum_k w_k r_k``: for signals on the same scale
``z``         ``sum_k w_k (r_k - mu_gk) / (sigma_gk + mean_g sigma_gk)``. The mean over the groups of the call keeps
              near-constant groups from being scaled up to the size of the others
``rank``      ``sum_k |w_k| q_k``, ``q = (rank - 1/2) / n`` in the group, ties averaged; for groups of 8 or more
``quantile``  as ``rank``, with q the mid-distribution quantile among the values of this call and up to ``HISTORY``
              earlier ones: outliers have bounded effect, near-equal values stay near-equal, groups are comparable,
              and a group may have a single member
``gdpo``      ``z``, then standardised over the call: Liu et al. 2026, "GDPO: Group reward-Decoupled Normalization
              Policy Optimization", with the guard of ``z`` in place of its epsilon
============  =====================================================================================================

``rank`` and ``quantile`` normalise the absolute weights to sum to 1 and use ``1 - q`` for a negative weight, so the
result lies strictly between 0 and 1. In the other methods a negative weight flips the signal's sign. ``z`` and ``gdpo``
are already advantages, so a trainer should not divide by the group's deviation again (TRL: ``scale_rewards="none"``).
Sources: van der Waerden 1952 (normal scores: quantiles instead of values); Parzen 2004 (midpoints for ties).

A sample that lacks a finite value of any signal is excluded from all statistics and gets None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Groups = npt.NDArray[np.int64]

#: Past values per signal that ``quantile`` remembers.
HISTORY = 1024


def fuse(
    components: Mapping[str, Sequence[float | None]],
    groups: Sequence[Hashable],
    method: str = "quantile",
    weights: Mapping[str, float] | None = None,
    history: Mapping[str, Sequence[float]] | None = None,
) -> list[float | None]:
    """Fuses the signals into one value for each of n samples.

    Args:
        components: signal -> n values.
        groups: group key of each of n samples; samples with equal keys form a group, usually one prompt's completions.
        method: a name from the table above.
        weights: signal -> weight, 1 by default; 0 excludes a signal, which then masks nothing.
        history: signal -> earlier values, for ``quantile``.

    Raises:
        ValueError: an unknown method, a weight for an unknown signal, no nonzero weight, or columns of different
            lengths.
    """
    if method not in METHODS:
        raise ValueError(f"fusion: unknown {method!r}, expected one of {', '.join(METHODS)}")
    weight = checked_weights(components, weights)
    n = len(groups)
    for name, values in components.items():
        if len(values) != n:
            raise ValueError(f"components: expected {n} values of {name!r}, one per sample, got {len(values)}")
    r = np.array([components[name] for name in weight], dtype=np.float64).reshape(len(weight), n)  # None -> NaN
    known = np.isfinite(r).all(axis=0)
    keys = {key: j for j, key in enumerate(dict.fromkeys(groups))}
    g = np.array([keys[key] for key in groups], dtype=np.int64)[known]
    w = np.array(list(weight.values()))
    total = np.full(n, np.nan)
    if known.any():
        past = [np.asarray((history or {}).get(name, ()), dtype=np.float64) for name in weight]
        total[known] = METHODS[method](r[:, known], g, w, past)
    return [None if np.isnan(value) else float(value) for value in total]


def checked_weights(names: Mapping[str, object], weights: Mapping[str, float] | None) -> dict[str, float]:
    """The nonzero weights by name, in the order of ``names``; raises as :func:`fuse`."""
    unknown = set(weights or ()) - set(names)
    if unknown:
        raise ValueError(f"weights: unknown {sorted(unknown)}, known signals: {', '.join(names) or 'none'}")
    every = {name: finite_weight((weights or {}).get(name, 1.0)) for name in names}
    weight = {name: value for name, value in every.items() if value != 0}
    if not weight:
        raise ValueError("weights: expected at least one signal with a nonzero weight")
    return weight


def finite_weight(weight: Any) -> float:
    """The weight as a float; ValueError if it is not a finite number."""
    if not isinstance(weight, Real) or not math.isfinite(weight):
        raise ValueError(f"weights: expected finite numbers, got {weight!r:.60}")
    return float(weight)


# Each method takes values r [K, n] of K signals, groups g [n], weights w [K] and earlier values of each signal, and
# returns [n].


def _z(r: Values, g: Groups, w: Values, past: list[Values]) -> Values:
    count = np.bincount(g).astype(np.float64)  # [G], 0 for a fully masked group
    present = count > 0
    total = np.zeros(r.shape[1])
    for weight, values in zip(w, r, strict=True):
        mean = np.bincount(g, values) / np.maximum(count, 1)
        deviation = np.sqrt(np.bincount(g, np.square(values - mean[g])) / np.maximum(count, 1))
        scale = deviation + deviation[present].mean()
        # Do not divide by a deviation that is only rounding error: equal values stay equal.
        level = np.abs(values).max() * 1e-12
        total += weight * np.where(scale[g] > level, (values - mean[g]) / np.maximum(scale[g], level or 1.0), 0.0)
    # Signals that cancel out give equal totals, which DPO does not pair.
    size = np.abs(w).sum()
    return np.round(total / size, 12) * size


def _gdpo(r: Values, g: Groups, w: Values, past: list[Values]) -> Values:
    total = _z(r, g, w, past)
    deviation = total.std()
    return (total - total.mean()) / deviation if deviation > 1e-12 else np.zeros_like(total)


def _rank(r: Values, g: Groups, w: Values, past: list[Values]) -> Values:
    q = np.empty_like(r)
    for j in np.unique(g):
        members = g == j
        q[:, members] = [_quantiles(values, values) for values in r[:, members]]
    return _bounded(q, w)


def _quantile(r: Values, g: Groups, w: Values, past: list[Values]) -> Values:
    pairs = zip(r, past, strict=True)
    return _bounded(np.array([_quantiles(values, np.concatenate([values, old])) for values, old in pairs]), w)


def _quantiles(
    values: Values,  # [n]
    among: Values,  # [m], includes the values
) -> Values:
    """Share of ``among`` below each value plus half the share equal to it: in a group of n, ``(rank - 1/2) / n``."""
    order = np.sort(among)
    below = np.searchsorted(order, values, side="left")
    upto = np.searchsorted(order, values, side="right")
    return (below + upto) / (2 * len(among))


def _bounded(
    q: Values,  # [K, n]
    w: Values,  # [K]
) -> Values:
    """Weighted mean of q, or of 1 - q for negative weights; in (0, 1), like q."""
    share = np.abs(w) / np.abs(w).sum()
    return share @ np.where((w > 0)[:, None], q, 1 - q)


METHODS: dict[str, Callable[[Values, Groups, Values, list[Values]], Values]] = {
    "raw": lambda r, g, w, past: w @ r,
    "z": _z,
    "rank": _rank,
    "quantile": _quantile,
    "gdpo": _gdpo,
}
BOUNDED = ("rank", "quantile")  #: methods with results between 0 and 1


class LengthBins:
    """Removes the effect of length from a signal: a value becomes its distance, in standard deviations, from the values
    seen at similar lengths.

    A bin spans half an octave of length; means and variances are interpolated between bin centres. They are shrunk, as
    if by ``prior`` observations, towards the straight line fitted to the means of all bins and towards the variance
    within bins; a new bin starts there. Each new observation in a bin decays those of earlier calls by ``decay``,
    because a signal's scale drifts as the student changes. The values of a call are counted before they are normalised,
    in any order.

    Args:
        prior: pseudo-observations that a bin starts with.
        decay: factor on the weight of older observations at each new one in their bin.
    """

    def __init__(self, prior: float = 2.0, decay: float = 0.998) -> None:
        if prior <= 0 or not 0 < decay <= 1:
            raise ValueError(f"prior, decay: expected prior > 0 and decay in (0, 1], got {prior} and {decay}")
        self.prior = prior
        self.decay = decay
        self._bins: dict[int, list[float]] = {}  # weight, mean, mean square deviation

    def __call__(
        self, values: Sequence[float | None], lengths: Sequence[int], *, update: bool = True
    ) -> list[float | None]:
        """The n values as deviations from their bins; None stays None.

        Args:
            values: a signal's values.
            lengths: sample lengths, at least 1.
            update: add these values to the statistics first.
        """
        if update:
            found: dict[int, list[float]] = {}
            for value, length in zip(values, lengths, strict=True):
                if value is not None:
                    found.setdefault(round(_position(length)), []).append(value)
            for key in sorted(found):
                self._add(key, found[key])
        return [v if v is None else self._deviation(v, _position(n)) for v, n in zip(values, lengths, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return {"bins": {key: list(moments) for key, moments in self._bins.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._bins = {key: list(moments) for key, moments in state["bins"].items()}

    def _add(self, key: int, values: Sequence[float]) -> None:
        n = len(values)
        weight, mean, variance = self._bins.get(key, [0.0, 0.0, 0.0])
        old = self.decay**n * weight
        # Exact sums, so that the order of the values does not matter.
        own_mean = math.fsum(values) / n
        own_variance = math.fsum((value - own_mean) ** 2 for value in values) / n
        weight = old + n
        share, step = n / weight, own_mean - mean
        # Chan's update: the mean of both variances plus the variance between the two means.
        variance = (1 - share) * (variance + share * step**2) + share * own_variance
        self._bins[key] = [weight, mean + share * step, variance]

    def _deviation(self, value: float, position: float) -> float:
        if not self._bins:
            return value  # no statistics yet
        line, spread = self._overall(position)
        weights, mean, variance = self.prior, self.prior * line, self.prior * spread
        for key in (math.floor(position), math.floor(position) + 1):
            weight, bin_mean, bin_variance = self._bins.get(key, [0.0, 0.0, 0.0])
            weight *= 1 - abs(position - key)
            weights, mean, variance = weights + weight, mean + weight * bin_mean, variance + weight * bin_variance
        # Average the bin's deviation with the overall one, so that a constant bin does not divide by zero.
        scale = (math.sqrt(variance / weights) + math.sqrt(spread)) / 2
        deviation = value - mean / weights
        if abs(deviation) <= 1e-12 * abs(value):  # only rounding error: equal values stay equal
            return 0.0
        return deviation / scale if scale > 0 else deviation

    def _overall(self, position: float) -> tuple[float, float]:
        """The line through the bins at a position (slope shrunk by ``prior``), and the variance within bins."""
        every = [(key, *moments) for key, moments in self._bins.items()]
        total = sum(weight for _, weight, _, _ in every)
        key_mean = sum(weight * key for key, weight, _, _ in every) / total
        centre = sum(weight * mean for _, weight, mean, _ in every) / total
        spread = sum(weight * variance for _, weight, _, variance in every) / total
        along = sum(weight * (key - key_mean) * (mean - centre) for key, weight, mean, _ in every)
        square = sum(weight * (key - key_mean) ** 2 for key, weight, _, _ in every)
        return centre + along / (square + self.prior) * (position - key_mean), spread


def _position(length: int) -> float:
    """Length in units of bins: 0 for length 1, plus 2 for each doubling."""
    return 2 * math.log2(max(length, 1))
