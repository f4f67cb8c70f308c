"""State of one reward call: samples, results shared by signals and gates, entries from text to total, final rewards,
and how much of a signal's spread is noise."""

from __future__ import annotations

import logging
import math
import statistics
import traceback
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from acqsynth.domains import Domain, Sample
from acqsynth.normal_form import visible

logger = logging.getLogger(__name__)

T = TypeVar("T")
Values = Sequence[float | None]

LOWEST = 0.5  #: below this, most of a signal's spread within a group is noise, and a warning is logged
ENOUGH = 16  #: degrees of freedom required for a warning; with fewer the estimate is too uncertain

_LARGEST = torch.finfo(torch.float32).max  # squares of larger values overflow in statistics
_TRIES = 3  # samples on which a signal or gate fails before it is itself considered broken


@dataclass(frozen=True)
class Spread:
    """The spread of a signal within groups: differences between samples, and noise of the estimator.

    An estimated value is the true one plus an error, ``x = t + e``, with independent errors across samples, so that

        reliability = var(t) / var(x) = 1 - mean(stderr^2) / var(x)

    is the squared correlation of x with t, and the correlation of x with a second measurement of the same samples
    (Spearman 1904; Lord & Novick 1968, chapter 3). Advantages are computed within groups, so a signal whose reliability
    there is 0 rewards at random. The variances are pooled over groups first: the mean of the groups' ratios would be
    biased, to 0.7 in groups of 4 with values of reliability 0.9. Sums weight a group by its degrees of freedom (members
    minus one).

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
    """Accumulates each signal's spread over calls and warns once about each signal of the reward ``name`` that is
    mostly noise."""

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


class Batch(list[Sample]):
    """Samples with results that are computed once per reward call: sampled answers, embeddings, verdicts, scores.

    Signals and gates that share nothing can treat it as a list of samples. Results are discarded after the call,
    because the student may change.
    """

    def __init__(self, samples: Iterable[Sample] = (), results: dict[Hashable, dict[Any, Any]] | None = None) -> None:
        super().__init__(samples)
        self._results = {} if results is None else results

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Batch:
        """Returns ``samples`` if it is a batch, otherwise wraps it in one."""
        return samples if isinstance(samples, Batch) else cls(samples)

    def part(self, samples: Iterable[Sample]) -> Batch:
        """A batch of other samples of the same call, sharing its results."""
        return Batch(samples, self._results)

    def each(
        self,
        name: Hashable,
        items: Sequence[T],
        compute: Callable[[list[T]], Iterable[Any]],
        key: Callable[[T], Hashable] = lambda item: item,
    ) -> list[Any]:
        """The result for each item, kept under ``name``. Items with equal keys share one: ``compute`` maps only new
        ones to their results, in order. Pass ``id`` as the key of unhashable items."""
        known = self._results.setdefault(name, {})
        keys = [key(item) for item in items]
        new = {k: item for k, item in zip(keys, items, strict=True) if k not in known}
        if new:
            # Keep the item as well: an id is unique only while its object is alive.
            results = zip(new.items(), compute(list(new.values())), strict=True)
            known.update((k, (item, result)) for (k, item), result in results)
        return [known[k][1] for k in keys]

    def verified(self, domain: Domain) -> list[bool | None]:
        """``domain.verify`` for each sample, called only once because it may run programs."""
        return self.each((id(domain), "verified"), self, domain.verify, id)  # a dataclass need not be hashable


def require_samples(name: str, rows: Sequence[Any], *, some: bool = False) -> None:
    """Raises TypeError, naming the row, if a row is not a ``Sample``; with ``some``, ValueError if there are none."""
    if some and not rows:
        raise ValueError(f"{name}: expected at least one sample")
    for i, row in enumerate(rows):
        if not isinstance(row, Sample):
            raise TypeError(
                f"{name}[{i}]: expected acqsynth.domains.Sample(question, answer), got {type(row).__name__}; "
                "Domain.load reads rows as samples"
            )


def numbers(function: Callable[[Any], Any], samples: Sequence[Sample]) -> list[float | None]:
    """A signal's values or standard errors as plain floats in the range of float32; None if there are none, and for NaN
    and infinity."""
    found = function(samples)
    plain = [math.nan if v is None else float(v) for v in ([None] * len(samples) if found is None else found)]
    return [max(-_LARGEST, min(_LARGEST, value)) if math.isfinite(value) else None for value in plain]


def sample_length(sample: Sample) -> int:
    """Number of visible characters in question, reasoning and answer."""
    return sum(len(visible(text).strip()) for text in (sample.question, sample.reasoning, sample.answer))


@dataclass
class Entry:
    """The state of one text during a reward call; sent between processes under ``sync``."""

    group: Hashable
    text: str | None
    sample: Sample | None = None
    masked: bool = False  #: parsing or a gate failed, or a gate was undecided
    rejected_by: str | None = None  #: first gate that rejected it
    values: dict[str, float | None] = field(default_factory=dict)  #: by signal
    stderr: dict[str, float] = field(default_factory=dict)
    total: float | None = None

    @property
    def valid(self) -> bool:
        return self.sample is not None and not self.masked and self.rejected_by is None

    @property
    def length(self) -> int:
        if self.sample is not None:
            return sample_length(self.sample)
        return len(self.text) if isinstance(self.text, str) else 0


@dataclass
class Rewards:
    """Results of a reward call; each column has n entries."""

    total: list[float | None]  #: the reward; None if a scorer failed
    samples: list[Sample | None]  #: None for text that does not parse
    components: dict[str, list[float | None]]  #: signal -> unfused values; None for samples gated or failed
    #: gate -> False if it rejected the sample; True also if an earlier gate had already rejected it
    gates: dict[str, list[bool]]
    lengths: list[int] = field(default_factory=list)  #: characters of the sample, or of text that does not parse
    groups: list[Hashable] = field(default_factory=list)
    #: randomly estimated signal -> standard errors of its values
    stderr: dict[str, list[float | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Sequence[Entry], signals: Sequence[str], gates: Sequence[str]) -> Rewards:
        """Collects entries into columns, named by signal and gate."""
        return cls(
            total=[entry.total for entry in entries],
            samples=[entry.sample for entry in entries],
            components={name: [entry.values.get(name) for entry in entries] for name in signals},
            gates={name: [entry.rejected_by != name for entry in entries] for name in gates},
            lengths=[entry.length for entry in entries],
            groups=[entry.group for entry in entries],
            stderr={
                name: [entry.stderr.get(name) for entry in entries]
                for name in signals
                if any(name in entry.stderr for entry in entries)
            },
        )

    @property
    def passed(self) -> list[bool]:
        """Whether each sample passed all gates."""
        return [all(column) for column in zip(*self.gates.values(), strict=True)]

    @property
    def rejected_by(self) -> list[str]:
        """The gate that rejected each sample, or an empty string."""
        rows = zip(*self.gates.values(), strict=True)
        return [next((name for name, ok in zip(self.gates, row, strict=True) if not ok), "") for row in rows]

    @property
    def spread(self) -> dict[str, Spread]:
        """The within-group spread of each signal that has standard errors."""
        return {name: Spread.within(self.components[name], errors, self.groups) for name, errors in self.stderr.items()}


def set_floor(entries: Sequence[Entry], bounded: bool, lowest_ever: float) -> None:
    """Sets the totals of gated entries, below those of valid ones and below ``lowest_ever`` if that is finite; to 0 if
    totals are ``bounded`` by 0 and 1, or none is known."""
    gated = [entry for entry in entries if entry.rejected_by is not None]
    known = [(entry.group, entry.total) for entry in entries if entry.rejected_by is None and entry.total is not None]
    if bounded or (not known and lowest_ever == math.inf):
        for entry in gated:
            entry.total = 0.0
        return
    totals = [total for _, total in known]
    step = (statistics.pstdev(totals) if totals else 0.0) or 1.0
    lowest: dict[Hashable, float] = {}
    for group, total in known:
        lowest[group] = min(total, lowest.get(group, total))
    for entry in gated:
        least = lowest_ever if lowest_ever < math.inf else lowest.get(entry.group, min(totals))
        entry.total = least - step


class BrokenPartError(RuntimeError):
    """A signal or gate that has never worked: it would mask every sample."""


class Guard:
    """Calls signals and gates; one that raises masks samples instead of ending the run, if it has ever worked."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.failures = 0  #: number of calls that have raised
        self._worked: set[str] = set()
        self._failed: Counter[str] = Counter()  # samples on which a needed part failed before it ever worked

    def restart(self) -> None:
        """Forgets which parts have worked, as with another student none may."""
        self._worked.clear()
        self._failed.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"failures": self.failures, "worked": sorted(self._worked), "failed": dict(self._failed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.failures = state["failures"]
        self._worked = set(state["worked"])
        self._failed = Counter(state["failed"])

    def __call__(
        self,
        part: str,
        function: Callable[[Any], Sequence[Any]],
        samples: Sequence[Any],
        *,
        singly: bool = True,
        needed: bool = False,
    ) -> Sequence[Any]:
        """The function's values for n samples; None for samples it fails on.

        A function that fails on a :class:`Batch` is retried one sample at a time, so that a bad sample masks only
        itself; it gives up if the first, the middle and the last sample all fail. ``singly=False`` disables the retry,
        as for a function that compares the samples; its failures on fewer than ``_TRIES`` samples do not count.

        Raises:
            BrokenPartError: a ``needed`` part has failed on all samples tried so far, at least ``_TRIES``.
        """
        if not samples:
            return []
        try:
            values = _called(part, function, samples)
            self._worked.add(part)
            return values
        except Exception as error:
            cause = error
            logger.exception("%s: %r failed on %d samples", self.name, part, len(samples))
            chain: list[BaseException] = [error]
            for each in chain:  # frees what the call held, such as a GPU's memory
                traceback.clear_frames(each.__traceback__)
                chain += [e for e in (each.__cause__, each.__context__) if e is not None and e not in chain]
            self.failures += 1
            tried = len(samples) if singly or len(samples) >= _TRIES else 0
            singly = singly and not isinstance(error, _WrongLengthError)
        found: list[Any] = [None] * len(samples)
        if len(samples) > 1 and isinstance(samples, Batch) and singly:
            tried = failed = 0
            for i in dict.fromkeys((0, len(samples) // 2, len(samples) - 1, *range(len(samples)))):
                if tried == failed == _TRIES:
                    break
                tried += 1
                try:
                    [found[i]] = _called(part, function, samples.part([samples[i]]))
                    self._worked.add(part)
                except Exception:
                    failed += 1
        self._count(part, tried, cause, needed)
        return found

    def each(
        self, part: str, function: Callable[[str], Any], texts: Sequence[str | None], *, needed: bool
    ) -> list[tuple[Any] | None]:
        """``(value,)`` of each text, None for those that are None or that the function fails on.

        Raises:
            BrokenPartError: as a call does.
        """
        found: list[tuple[Any] | None] = [None] * len(texts)
        cause, failed = None, 0
        for i, text in enumerate(texts):
            try:
                if text is not None:
                    found[i] = (function(text),)
                    self._worked.add(part)
            except Exception as error:
                cause, failed = cause or error, failed + 1
        if cause is not None:  # one entry for all: a generator may begin with hundreds of broken texts
            logger.error("%s: %r failed on %d of %d texts", self.name, part, failed, len(texts), exc_info=cause)
            self.failures += failed
            self._count(part, failed, cause, needed)
        return found

    def _count(self, part: str, tried: int, cause: Exception, needed: bool) -> None:
        """Counts samples on which a part failed; raises if it is needed and has never worked."""
        if needed and part not in self._worked:
            self._failed[part] += tried
            if self._failed[part] >= _TRIES:
                summary = f"{self.name}: {part!r} failed on each of the {self._failed[part]} samples tried"
                raise BrokenPartError(f"{summary}: {type(cause).__name__}: {cause}") from cause


class _WrongLengthError(ValueError):
    """A signal or gate returned a different number of values than samples, so no single sample is at fault."""


def _called(part: str, function: Callable[[Any], Sequence[Any]], samples: Sequence[Any]) -> Sequence[Any]:
    values = function(samples)
    if len(values) != len(samples):
        raise _WrongLengthError(f"{part}: expected {len(samples)} values, one per sample, got {len(values)}")
    return values
