"""One reward call: its samples, what signals and gates share about them, their way from text to total, its result."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from acqsynth.domains import Domain, Sample
from acqsynth.normal_form import visible
from acqsynth.rewards.reliability import Spread

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TRIES = 3  # single samples in a row that fail before the part itself is taken to be broken


class Batch(list[Sample]):
    """Samples with results that are computed once in a reward call: answers drawn, embeddings, verdicts, scores.

    Signals and gates that share nothing can treat it as a list of samples. Nothing outlives the call, as the student
    may move.
    """

    def __init__(self, samples: Iterable[Sample] = (), results: dict[Hashable, dict[Any, Any]] | None = None) -> None:
        super().__init__(samples)
        self._results = {} if results is None else results
        #: scorer -> its values of exactly these samples
        self.scores: dict[Any, Any] = {}

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Batch:
        """The samples themselves if they are a batch, else a batch of them."""
        return samples if isinstance(samples, Batch) else cls(samples)

    def part(self, samples: Iterable[Sample]) -> Batch:
        """Other samples of the same call."""
        return Batch(samples, self._results)

    def each(
        self,
        name: Hashable,
        items: Sequence[T],
        compute: Callable[[list[T]], Iterable[Any]],
        key: Callable[[T], Hashable] = lambda item: item,
    ) -> list[Any]:
        """The result of each item. ``compute`` is called with those that are new, and gives theirs in order.

        Args:
            name: of the results.
            items: what to compute; items of equal key have one result.
            compute: as above.
            key: ``id`` tells items apart that cannot be hashed.
        """
        known = self._results.setdefault(name, {})
        keys = [key(item) for item in items]
        new = {k: item for k, item in zip(keys, items, strict=True) if k not in known}
        if new:
            # The item is kept too: an id is unique only while its object lives.
            results = zip(new.items(), compute(list(new.values())), strict=True)
            known.update((k, (item, result)) for (k, item), result in results)
        return [known[k][1] for k in keys]

    def verified(self, domain: Domain) -> list[bool | None]:
        """``domain.verify`` of each sample, asked once: it may run programs."""
        return self.each((domain, "verified"), self, domain.verify, id)


def sample_length(sample: Sample) -> int:
    """Visible characters of question, reasoning and answer."""
    return sum(len(visible(text).strip()) for text in (sample.question, sample.reasoning, sample.answer))


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
    """Sets the totals of the gated entries, from those of the valid ones; 0 if totals are ``bounded`` by 0 and 1."""
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


class Guard:
    """Calls the signals and gates of a reward. One that raises masks samples; it does not end the run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.failures = 0  #: calls that raised so far

    def __call__(
        self, part: str, function: Callable[[Any], Sequence[Any]], samples: Sequence[Any], *, singly: bool = True
    ) -> Sequence[Any]:
        """What the function gives for n samples; None for each that it fails on.

        A function that fails on a :class:`Batch` is called for one sample at a time, so that a bad sample masks itself
        alone, until the first ``_TRIES`` have failed too; not if ``singly`` is False.
        """
        if not samples:
            return []
        try:
            return _called(part, function, samples)
        except Exception as error:
            logger.exception("%s: %r failed on %d samples", self.name, part, len(samples))
            self.failures += 1
            singly = singly and not (isinstance(error, _WrongLengthError) or getattr(function, "set_level", False))
        found: list[Any] = [None] * len(samples)
        if len(samples) > 1 and isinstance(samples, Batch) and singly:
            failed = 0
            for i, sample in enumerate(samples):
                try:
                    [found[i]] = _called(part, function, samples.part([sample]))
                    failed = 0
                except Exception:
                    failed += 1
                    if failed == _TRIES and all(value is None for value in found):
                        break
        return found


class _WrongLengthError(ValueError):
    """A part gives another number of values than it got samples; no sample is to blame."""


def _called(part: str, function: Callable[[Any], Sequence[Any]], samples: Sequence[Any]) -> Sequence[Any]:
    values = function(samples)
    if len(values) != len(samples):
        raise _WrongLengthError(f"{part}: expected {len(samples)} values, one a sample, got {len(values)}")
    return values
