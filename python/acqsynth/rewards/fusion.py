"""Several signals into one number.

With r a signal's values, g the samples of a group, mu and sigma mean and standard deviation (of the population):

============  =====================================================================================================
``raw``       ``sum_k w_k r_k``: for signals of one scale
``z``         ``sum_k w_k (r_k - mu_gk) / (sigma_gk + mean_g sigma_gk)``. The mean over the groups of the call keeps a
              group of next to no variance from being blown up to the size of the others
``rank``      ``sum_k |w_k| q_k``, ``q = (rank - 1/2) / n`` in the group, ties at their mean; groups of 8 or more
``quantile``  the same with q the mid-distribution quantile among the values of this call and up to ``HISTORY`` before
              it: an outlier counts no more than another, yet a group of near equals stays one, groups compare, and a
              group may have one member
``gdpo``      ``z``, then over the call minus its mean and over its standard deviation: Liu et al. 2026, "GDPO: Group
              reward-Decoupled Normalization Policy Optimization", with the guard of ``z`` for its epsilon
============  =====================================================================================================

In ``rank`` and ``quantile`` the weights are made to sum to 1 in size and a negative weight counts ``1 - q``, so that
the result lies strictly between 0 and 1. Elsewhere a negative weight turns the signal round. ``z`` and ``gdpo`` are
advantages already: a trainer should not divide by the deviation of the group again (TRL: ``scale_rewards="none"``).
Quantiles instead of values: the normal-score idea of van der Waerden 1952; midpoints for ties, Parzen 2004.

A sample without a value of some signal is left out of all statistics and gets None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Groups = npt.NDArray[np.int64]

#: Values of each signal that ``quantile`` remembers.
HISTORY = 1024


def fuse(
    components: Mapping[str, Sequence[float | None]],
    groups: Sequence[Hashable],
    method: str = "quantile",
    weights: Mapping[str, float] | None = None,
    history: Mapping[str, Sequence[float]] | None = None,
) -> list[float | None]:
    """One value for each of n samples.

    Args:
        components: signal -> n values.
        groups: of n samples, the completions of one prompt; equal keys are one group.
        method: as above.
        weights: signal -> weight, 1 by default; 0 leaves a signal out (it masks nothing).
        history: signal -> earlier values, for ``quantile``.

    Raises:
        ValueError: an unknown method, a weight of an unknown signal, no signal with a weight, or columns of different
            length.
    """
    if method not in METHODS:
        raise ValueError(f"fusion: unknown {method!r}, expected one of {', '.join(METHODS)}")
    weight = checked_weights(components, weights)
    n = len(groups)
    for name, values in components.items():
        if len(values) != n:
            raise ValueError(f"components: expected {n} values of {name!r}, one a sample, got {len(values)}")
    r = np.array([components[name] for name in weight], dtype=np.float64).reshape(len(weight), n)  # None -> NaN
    known = ~np.isnan(r).any(axis=0)
    keys = {key: j for j, key in enumerate(dict.fromkeys(groups))}
    g = np.array([keys[key] for key in groups], dtype=np.int64)[known]
    w = np.array(list(weight.values()))
    total = np.full(n, np.nan)
    if known.any():
        past = [np.asarray((history or {}).get(name, ()), dtype=np.float64) for name in weight]
        total[known] = METHODS[method](r[:, known], g, w, past)
    return [None if np.isnan(value) else float(value) for value in total]


def checked_weights(names: Mapping[str, object], weights: Mapping[str, float] | None) -> dict[str, float]:
    """Name -> weight of those that have one, in the order of the names; raises as :func:`fuse`."""
    unknown = set(weights or ()) - set(names)
    if unknown:
        raise ValueError(f"weights: unknown {sorted(unknown)}, expected of {', '.join(names) or 'none'}")
    every = {name: float((weights or {}).get(name, 1.0)) for name in names}
    if not all(np.isfinite(value) for value in every.values()):
        raise ValueError(f"weights: expected finite numbers, got {every}")
    weight = {name: value for name, value in every.items() if value != 0}
    if not weight:
        raise ValueError("weights: expected at least one signal with a weight other than 0")
    return weight


# Each method takes values r [K, n] of K signals, groups g [n], weights w [K], and earlier values of each signal; it
# gives [n].


def _raw(r: Values, g: Groups, w: Values, past: list[Values]) -> Values:
    return w @ r


def _z(r: Values, g: Groups, w: Values, past: list[Values]) -> Values:
    count = np.bincount(g).astype(np.float64)  # [G], 0 if all of a group are masked
    present = count > 0
    total = np.zeros(r.shape[1])
    for weight, values in zip(w, r, strict=True):
        mean = np.bincount(g, values) / np.maximum(count, 1)
        deviation = np.sqrt(np.bincount(g, np.square(values - mean[g])) / np.maximum(count, 1))
        scale = deviation + deviation[present].mean()
        # Not over the deviation where that is rounding: equal values stay equal.
        level = np.abs(values).max() * 1e-12
        total += weight * np.where(scale[g] > level, (values - mean[g]) / np.maximum(scale[g], level or 1.0), 0.0)
    return total


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
    among: Values,  # [m], holds the values
) -> Values:
    """Share of ``among`` below each value, and half of those equal: in a group of n, ``(rank - 1/2) / n``."""
    order = np.sort(among)
    below = np.searchsorted(order, values, side="left")
    upto = np.searchsorted(order, values, side="right")
    return (below + upto) / (2 * len(among))


def _bounded(
    q: Values,  # [K, n]
    w: Values,  # [K]
) -> Values:
    """Weighted mean of q, or of 1 - q for a negative weight; in (0, 1) as q is."""
    share = np.abs(w) / np.abs(w).sum()
    return share @ np.where((w > 0)[:, None], q, 1 - q)


METHODS: dict[str, Callable[[Values, Groups, Values, list[Values]], Values]] = {
    "raw": _raw,
    "z": _z,
    "rank": _rank,
    "quantile": _quantile,
    "gdpo": _gdpo,
}
BOUNDED = ("rank", "quantile")  #: methods whose results lie between 0 and 1


class LengthBins:
    """Takes the length out of a signal: a value becomes its distance, in standard deviations, from the values seen at
    similar lengths.

    A bin is half an octave of the length; between the centres of two bins, means and variances are interpolated. They
    are shrunk, as if by ``prior`` observations, to the straight line through the means of all bins and to the variance
    within them, where a new bin starts. Each new observation of a bin fades the older ones by ``decay``, as the student
    moves and with it the scale of a signal. The values of a call are counted before they are normalised.

    Args:
        prior: observations that a bin starts with.
        decay: weight of an observation after one more of its bin.
    """

    def __init__(self, prior: float = 2.0, decay: float = 0.998) -> None:
        if prior <= 0 or not 0 < decay <= 1:
            raise ValueError(f"prior, decay: expected more than 0 and in (0, 1], got {prior} and {decay}")
        self.prior = prior
        self.decay = decay
        self._bins: dict[int, list[float]] = {}  # weight, mean, mean square deviation

    def __call__(
        self, values: Sequence[float | None], lengths: Sequence[int], *, update: bool = True
    ) -> list[float | None]:
        """n values as deviations from their bin; None stays None.

        Args:
            values: of a signal.
            lengths: of the samples, at least 1.
            update: count these values first.
        """
        if update:
            for value, length in zip(values, lengths, strict=True):
                if value is not None:
                    self._add(round(_position(length)), value)
        return [v if v is None else self._deviation(v, _position(n)) for v, n in zip(values, lengths, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return {"bins": {key: list(moments) for key, moments in self._bins.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._bins = {key: list(moments) for key, moments in state["bins"].items()}

    def _add(self, key: int, value: float) -> None:
        weight, mean, variance = self._bins.get(key, [0.0, 0.0, 0.0])
        weight = self.decay * weight + 1
        step = (value - mean) / weight
        # Welford's update in the form of running means: the old variance keeps its share, the new deviation adds.
        variance = (1 - 1 / weight) * (variance + (value - mean) * step)
        self._bins[key] = [weight, mean + step, variance]

    def _deviation(self, value: float, position: float) -> float:
        if not self._bins:
            return value  # nothing was ever counted
        line, spread = self._overall(position)
        weights, mean, variance = self.prior, self.prior * line, self.prior * spread
        for key in (math.floor(position), math.floor(position) + 1):
            weight, bin_mean, bin_variance = self._bins.get(key, [0.0, 0.0, 0.0])
            weight *= 1 - abs(position - key)
            weights, mean, variance = weights + weight, mean + weight * bin_mean, variance + weight * bin_variance
        # Average the bin's deviation with the overall one, so that a constant bin does not divide by zero.
        scale = (math.sqrt(variance / weights) + math.sqrt(spread)) / 2
        deviation = value - mean / weights
        return deviation / scale if scale > 0 else deviation

    def _overall(self, position: float) -> tuple[float, float]:
        """The line through the bins at a position, its slope shrunk as by ``prior``, and the variance within bins."""
        every = [(key, *moments) for key, moments in self._bins.items()]
        total = sum(weight for _, weight, _, _ in every)
        key_mean = sum(weight * key for key, weight, _, _ in every) / total
        centre = sum(weight * mean for _, weight, mean, _ in every) / total
        spread = sum(weight * variance for _, weight, _, variance in every) / total
        along = sum(weight * (key - key_mean) * (mean - centre) for key, weight, mean, _ in every)
        square = sum(weight * (key - key_mean) ** 2 for key, weight, _, _ in every)
        return centre + along / (square + self.prior) * (position - key_mean), spread


def _position(length: int) -> float:
    """In bins: a length of one stands at 0, twice the length two further on."""
    return 2 * math.log2(max(length, 1))
