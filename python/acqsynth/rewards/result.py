"""The samples of one reward call, from text to total, and what the call gives."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from acqsynth.domains import Sample
from acqsynth.rewards.gates import sample_length
from acqsynth.rewards.reliability import Spread


@dataclass
class Entry:
    """One text on its way through the reward; it crosses processes under ``sync``."""

    group: Hashable
    text: str | None
    sample: Sample | None = None
    masked: bool = False  #: a part failed on it
    rejected_by: str | None = None  #: the first gate that did
    values: dict[str, float | None] = field(default_factory=dict)  #: by signal
    stderr: dict[str, float] = field(default_factory=dict)
    total: float | None = None

    @property
    def valid(self) -> bool:
        return self.sample is not None and not self.masked and self.rejected_by is None

    @property
    def length(self) -> int:
        return len(self.text or "") if self.sample is None else sample_length(self.sample)


@dataclass
class Rewards:
    """What a call gave, n entries each."""

    total: list[float | None]  #: the reward; None if a scorer failed
    samples: list[Sample | None]  #: None for text that does not parse
    components: dict[str, list[float | None]]  #: signal -> its own values; None for samples gated or failed
    #: gate -> False if it rejected the sample; True also if it was not asked because an earlier one rejected it
    gates: dict[str, list[bool]]
    lengths: list[int] = field(default_factory=list)  #: characters of the sample, or of a text that does not parse
    groups: list[Hashable] = field(default_factory=list)
    #: signal that is estimated at random -> standard errors of its values
    stderr: dict[str, list[float | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Sequence[Entry], signals: Sequence[str], gates: Sequence[str]) -> Rewards:
        """The columns of the entries, by the names of signals and gates."""
        return cls(
            [entry.total for entry in entries],
            [entry.sample for entry in entries],
            {name: [entry.values.get(name) for entry in entries] for name in signals},
            {name: [entry.rejected_by != name for entry in entries] for name in gates},
            [entry.length for entry in entries],
            [entry.group for entry in entries],
            {
                name: [entry.stderr.get(name) for entry in entries]
                for name in signals
                if any(name in entry.stderr for entry in entries)
            },
        )

    @property
    def passed(self) -> list[bool]:
        """Whether no gate rejected the sample."""
        return [all(column) for column in zip(*self.gates.values(), strict=True)]

    @property
    def rejected_by(self) -> list[str]:
        """The gate that rejected each sample, or an empty string."""
        rows = zip(*self.gates.values(), strict=True)
        return [next((name for name, ok in zip(self.gates, row, strict=True) if not ok), "") for row in rows]

    @property
    def spread(self) -> dict[str, Spread]:
        """The spread within groups of each signal that has standard errors."""
        return {name: Spread.within(self.components[name], errors, self.groups) for name, errors in self.stderr.items()}


def set_floor(entries: Sequence[Entry], bounded: bool) -> None:
    """Totals of the gated entries, from those of the valid ones.

    Args:
        entries: of all ranks; the valid ones have their totals.
        bounded: the totals lie between 0 and 1, so the floor is 0.
    """
    gated = [entry for entry in entries if entry.rejected_by is not None]
    known = [(entry.group, entry.total) for entry in entries if entry.rejected_by is None and entry.total is not None]
    if bounded or not known:
        for entry in gated:
            entry.total = 0.0
        return
    totals = [total for _, total in known]
    step = statistics.pstdev(totals) or 1.0
    lowest: dict[Hashable, float] = {}
    for group, total in known:
        lowest[group] = min(total, lowest.get(group, total))
    for entry in gated:
        entry.total = lowest.get(entry.group, min(totals)) - step
