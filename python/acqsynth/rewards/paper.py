"""The published reward as its code has it, to compare with: one signal plus a bonus for the format.

What :class:`ComposedReward` does otherwise, and why: it multiplies gates instead of adding a bonus, since what is added
can be traded; it takes no account of what follows the question, where this one subtracts 0.001 a character, so that
long reasoning swamps the signal; a failure masks, where here every exception is a reward of -5; and a reward of gates
alone (``ComposedReward(domain, [], gates=...)``) tells samples apart, where the "format only" baseline is a constant.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from acqsynth.domains import Domain, Sample
from acqsynth.rewards.composed import ComposedReward, Rewards
from acqsynth.rewards.signals import Signal

_END = "</question>"
_BONUS = 1.0  # the size of the bonus is not in the paper; that it is a constant less the length is
_FAILED = -5.0


class PaperReward(ComposedReward):
    """``signal + 1 - 0.001 * characters after </question>``; 0 for what does not parse, -5 where anything raises.

    Args:
        domain: parses texts.
        signal: made with ``paper_compat=True``; None for the "format only" baseline, the same number for every text.
        name: what TRL logs.

    Raises:
        TypeError: a signal that can not be called or has no name.
    """

    def __init__(self, domain: Domain, signal: Signal | None, *, name: str = "paper_reward") -> None:
        signals = [] if signal is None else [signal]
        super().__init__(domain, signals, fusion="raw", length_normalised=False, name=name)

    def score(self, texts: Sequence[str | None], groups: Sequence[Hashable], *, update: bool = True) -> Rewards:
        """As :meth:`ComposedReward.score`; ``update`` is not read, the signals of the paper take in what they see."""
        return self._score(texts, groups, update, by_runs=False)

    def _score(self, texts: Sequence[str | None], groups: Sequence[Hashable], update: bool, by_runs: bool) -> Rewards:
        rewards = Rewards([], [], {signal.name: [] for signal in self.signals}, {"parses": []})
        for text in texts:
            sample, value, total = self._released(text)
            rewards.total.append(total)
            rewards.samples.append(sample)
            rewards.gates["parses"].append(sample is not None)
            rewards.lengths.append(len(text or ""))
            for column in rewards.components.values():
                column.append(value)
        return rewards

    def _released(self, text: str | None) -> tuple[Sample | None, float | None, float]:
        """Sample, signal and total of one text."""
        if not self.signals:
            return self.domain.parse(text or ""), None, _BONUS
        sample = None
        try:
            sample = self.domain.parse(text or "")
            if sample is None or text is None:
                return None, None, 0.0
            [value] = self.signals[0]([sample])
            if value is None:
                raise ValueError("no value")
            return sample, value, value + _BONUS - 0.001 * len(text.partition(_END)[2])
        except Exception:
            return sample, None, _FAILED
