"""Taking the length out of a signal: running statistics of each bin of lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


class LengthBins:
    """A value as its distance, in standard deviations, from the values seen at like lengths.

    A bin is half an octave of the length; between the centres of two bins their means and variances are interpolated.
    These are shrunk, as by ``prior`` observations, to the straight line through the means of all bins and to the
    variance within them, so that a new bin starts from there; older observations fade by ``decay`` each, as the student
    and with it the scale of a signal moves. The values of a call are counted before they are normalised.

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
        # Half a bin's deviation is the bin's, half that of all: a bin without variance divides by something.
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
