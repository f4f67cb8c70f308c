"""Taking the length out of a signal: running statistics of each bin of lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


class LengthBins:
    """A value as its distance, in standard deviations, from the values seen at like lengths.

    A bin is half an octave of the length. Its mean and variance are shrunk to those of all lengths as by ``prior``
    observations, so that a new bin starts from these; older observations fade by ``decay`` each, as the student and
    with it the scale of a signal moves. The values of a call are counted before they are normalised.

    Args:
        prior: observations of all lengths that a bin starts with.
        decay: weight of an observation after one more of its bin.
    """

    def __init__(self, prior: float = 8.0, decay: float = 0.998) -> None:
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
                    self._add(_bin(length), value)
        return [v if v is None else self._deviation(v, _bin(n)) for v, n in zip(values, lengths, strict=True)]

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

    def _deviation(self, value: float, key: int) -> float:
        every = list(self._bins.values())
        total = sum(weight for weight, _, _ in every)
        if total == 0:
            return value  # nothing was ever counted
        centre = sum(weight * mean for weight, mean, _ in every) / total
        spread = sum(weight * variance for weight, _, variance in every) / total  # within the bins
        weight, mean, variance = self._bins.get(key, [0.0, centre, spread])
        mean = (weight * mean + self.prior * centre) / (weight + self.prior)
        variance = (weight * variance + self.prior * spread) / (weight + self.prior)
        # Half a bin's deviation is the bin's, half that of all: a bin without variance divides by something.
        scale = math.sqrt(variance) + math.sqrt(spread)
        return 2 * (value - mean) / scale if scale > 0 else value - mean


def _bin(length: int) -> int:
    return round(2 * math.log2(max(length, 1)))
