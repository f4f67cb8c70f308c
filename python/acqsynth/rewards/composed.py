"""The reward of a generator: gates, then several signals fused, the same for GRPO, best-of-n and DPO.

    reward = ComposedReward.default(domain, "path/to/student", seeds=seeds, engine=engine)
    GRPOTrainer(model=generator, reward_funcs=[reward], ...)

What is done to a call of n completions, in this order:

1. Each is parsed, then passed through the gates, cheap ones first; the first that rejects it counts.
2. Signals score what passed. A scorer that fails, on one sample or on all, masks: the sample's total is None and stands
   outside all statistics. A failure is counted and logged, and never becomes a number.
3. Each signal's value is taken relative to samples of like length (``LengthBins``).
4. ``fuse`` makes one number of the signals. A gated sample gets the floor: 0 under ``rank`` and ``quantile``, whose
   values are above 0; otherwise one standard deviation of the call below the least of its group (of the call, where
   the group has no other). So it never outranks a valid sample of its group, and never equals one.
5. Archives take in what passed.

It departs from the published method, which adds a bonus for the format to one signal (``acqsynth.rewards.paper``):
what is added can be traded, and text that is no question has the largest signal of all.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch

import acqcore
from acqsynth.domains import Domain, Sample
from acqsynth.engines import Engine
from acqsynth.rewards.acquisition import completion_text
from acqsynth.rewards.answers import Learnability, SampledAnswers
from acqsynth.rewards.diversity import Diversity
from acqsynth.rewards.embeddings import Embedder, NgramEmbedder
from acqsynth.rewards.fusion import BOUNDED, HISTORY, METHODS, checked_weights, fuse
from acqsynth.rewards.gates import Gate, Label, default_gates, sample_length
from acqsynth.rewards.lengths import LengthBins
from acqsynth.rewards.shared import one_call
from acqsynth.rewards.signals import Signal, acquisition_signals

logger = logging.getLogger(__name__)

PARSES = "parses"  #: the gate that stands before the others

#: Signals of the default reward and their weights: those that rank a weak skill that can be learned first and no trap,
#: and whose ranks go with the gain measured (``benchmarks/bench_signals.py``). ``influence`` (in all parameters) is
#: there where a reference set is given, ``learnability`` (of answers that the domain finds right) where an engine of
#: the student is. No measure of size alone is among them: those favour coin flips and noise. Influence counts a
#: quarter, as it is the noisiest of one sample; learnability too, as it can not tell what is guessed now and then from
#: what is learnt by halves (with a half each, one row in five taught was a trap's, with a quarter one in eight);
#: diversity a tenth: with a half it taught to ask for what has the most digits (``benchmarks/bench_loop.py``, on its
#: seeds for tuning).
DEFAULT_WEIGHTS: dict[str, float] = {
    "mutual_information": 1.0,
    "influence": 0.25,
    "learnability": 0.25,
    "diversity": 0.1,
}


@dataclass
class Rewards:
    """What a call gave, n entries each."""

    #: the reward; None where a scorer failed
    total: list[float | None]
    #: None where the text is no sample
    samples: list[Sample | None]
    #: signal -> values as the signal gave them; None where gated or failed
    components: dict[str, list[float | None]]
    #: gate -> False where this one rejected the sample; True also where it was not asked, an earlier one having spoken
    gates: dict[str, list[bool]]
    #: characters of the sample, or of the text where it is none
    lengths: list[int] = field(default_factory=list)

    @property
    def passed(self) -> list[bool]:
        """Whether no gate rejected the sample."""
        return [all(column) for column in zip(*self.gates.values(), strict=True)]


class ComposedReward:
    """Gated and fused signals, as a reward function of TRL 1.16 and for ``score`` by others.

    Args:
        domain: parses texts.
        signals: with different names. None at all makes it a reward of the gates alone: 1 for what passes, 0 for the
            rest.
        gates: with different names; :func:`acqsynth.rewards.gates.default_gates` makes the usual ones. That a text
            parses is always asked, first.
        fusion: a method of :func:`acqsynth.rewards.fusion.fuse`. The default suits any caller, one that sends a sample
            at a time too. Where whole groups come, as in GRPO, ``z`` taught more (``benchmarks/bench_loop.py``).
        weights: signal -> weight, 1 by default. Negative turns a signal round; 0 has it logged only.
        length_normalised: signals that are taken relative to their bin of lengths; True for all.
        sync: the ranks of a ``torch.distributed`` group call together: groups that straddle ranks, archives and
            running statistics are those of all. One collective a call, so every rank has to call.
        name: what TRL logs.

    Raises:
        ValueError: an unknown fusion, weight or name to normalise, or a name twice.
        TypeError: a signal or gate that can not be called or has no name.
    """

    def __init__(
        self,
        domain: Domain,
        signals: Sequence[Signal],
        *,
        gates: Sequence[Gate] = (),
        fusion: str = "quantile",
        weights: Mapping[str, float] | None = None,
        length_normalised: bool | Collection[str] = True,
        sync: bool = False,
        name: str = "reward",
    ) -> None:
        _check_names("signals", signals, ("total",))
        _check_names("gates", gates, (PARSES,))
        if fusion not in METHODS:
            raise ValueError(f"fusion: unknown {fusion!r}, expected one of {', '.join(METHODS)}")
        names = dict.fromkeys(signal.name for signal in signals)
        self.weights = checked_weights(names, weights) if signals else {}
        chosen = set(names) if length_normalised is True else set(length_normalised or ())
        if chosen - set(names):
            raise ValueError(f"length_normalised: unknown {sorted(chosen - set(names))}, expected of {list(names)}")
        self.domain = domain
        self.signals = list(signals)
        self.gates = list(gates)
        self.fusion = fusion
        self.sync = sync
        self.__name__ = name
        self.length_bins = {name: LengthBins() for name in sorted(chosen)}
        self.history: dict[str, list[float]] = {name: [] for name in names}
        #: Over the life of this reward: samples without a total, and calls of a scorer that raised.
        self.masked = 0
        self.failures = 0
        #: Seconds of the last call.
        self.seconds = 0.0
        self._previous_end: float | None = None

    @classmethod
    def default(
        cls,
        domain: Domain,
        student: Any,
        *,
        seeds: Sequence[Sample],
        reference: Sequence[Sample] | acqcore.Reference | None = None,
        engine: Engine | None = None,
        evaluation: Sequence[Sample] = (),
        embed: Embedder | None = None,
        answers: Mapping[str, Any] | None = None,
        label: Label | None = None,
        scoring: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> ComposedReward:
        """The signals of ``DEFAULT_WEIGHTS`` behind the default gates.

        Args:
            domain: of the samples.
            student: as :class:`acqsynth.rewards.scoring.Scorer`.
            seeds: the rows the generator is shown.
            reference: rows whose loss shall fall, for ``influence``.
            engine: of the student, for ``learnability`` and the gate ``answerable``.
            evaluation: rows that no sample may repeat.
            embed: of questions, for ``diversity``; hashed n-grams by default.
            answers: options of :class:`SampledAnswers`.
            label: n samples -> each with its label, or None where it has none; by default samples keep the answers
                that the generator wrote.
            scoring: options of Scorer.
            options: of ComposedReward.
        """
        drawn = None if engine is None else SampledAnswers(engine, domain, **(answers or {}))
        signals: list[Signal] = []
        acquisitions: dict[str, dict[str, Any]] = {"mutual_information": {}}
        if reference is not None:
            acquisitions["influence"] = {"reference": reference}
        signals += acquisition_signals(student, acquisitions, domain, **(scoring or {}))
        if drawn is not None:
            signals.append(Learnability(drawn, verified=True))
        signals.append(Diversity(embed or NgramEmbedder()))
        given = {
            "gates": default_gates(
                domain,
                seeds=seeds,
                evaluation=evaluation,
                label=label,
                student=student,
                answers=drawn,
                **(scoring or {}),
            ),
            "weights": {signal.name: DEFAULT_WEIGHTS[signal.name] for signal in signals},
        }
        return cls(domain, signals, **(given | options))

    def score(self, texts: Sequence[str | None], groups: Sequence[Hashable], *, update: bool = True) -> Rewards:
        """Rewards of n texts.

        Args:
            texts: what a generator wrote; None is no sample.
            groups: of n texts; equal keys, on any rank under ``sync``, are one group.
            update: let archives, histories and length statistics take the call in; False leaves all as it was, for a
                probe that is scored again and again.

        Raises:
            ValueError: texts and groups of different length.
        """
        return self._score(texts, groups, update, by_runs=False)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str | list[dict[str, Any]]],
        completion_ids: Sequence[list[int]] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Totals of n completions, under the contract of TRL.

        Args:
            prompts: n prompts; consecutive equal ones are a group. TRL deals whole groups to the ranks in turn, so
                one can begin on a rank and end on the next: with ``sync`` they are put together again.
            completions: n texts, or n lists of messages whose last assistant message is the text.
            completion_ids, columns: the rest of what TRL passes; not read.
            log_extra: takes a column name and n values, for the table of completions.
            log_metric: takes a name and a number: each signal's mean and correlation with length, the share each
                gate rejects, the share masked, seconds and share of the step.

        Returns:
            n totals; None (masked from the advantage) where a scorer failed.
        """
        begin = time.perf_counter()
        groups = [prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True) for prompt in prompts]
        rewards = self._score([completion_text(c) for c in completions], groups, True, by_runs=True)
        end = time.perf_counter()
        self.seconds = end - begin
        if log_extra is not None:
            for name, values in rewards.components.items():
                log_extra(f"{self.__name__}_{name}", list(values))
            log_extra(f"{self.__name__}_gate", _first_rejections(rewards))
        if log_metric is not None and rewards.total:
            metrics = self.metrics(rewards) | {"seconds": self.seconds}
            # From the end of one call to the end of the next is a whole step of the trainer.
            if self._previous_end is not None:
                metrics["time_share"] = self.seconds / (end - self._previous_end)
            for key, number in metrics.items():
                log_metric(f"{self.__name__}/{key}", number)
        self._previous_end = end
        return rewards.total

    def metrics(self, rewards: Rewards) -> dict[str, float]:
        """What is logged of a call; what is not defined is left out.

        ``gated/<gate>`` and ``masked``: shares of the samples. ``<signal>/mean``, ``<signal>/length_correlation`` and
        the same of ``total``: over the samples that passed. ``archive/<signal or gate>``: entries held.
        """
        n = len(rewards.total)
        found = {f"gated/{name}": passes.count(False) / n for name, passes in rewards.gates.items()}
        found["masked"] = rewards.total.count(None) / n
        passed = rewards.passed
        columns = rewards.components | {
            "total": [v if ok else None for v, ok in zip(rewards.total, passed, strict=True)]
        }
        for name, values in columns.items():
            pairs = [
                (value, length) for value, length in zip(values, rewards.lengths, strict=True) if value is not None
            ]
            if pairs:
                found[f"{name}/mean"] = statistics.fmean(value for value, _ in pairs)
                if min(len(set(column)) for column in zip(*pairs, strict=True)) > 1:
                    found[f"{name}/length_correlation"] = statistics.correlation(*zip(*pairs, strict=True))
        parts: list[Any] = [*self.signals, *self.gates]
        found.update({f"archive/{part.name}": len(part) for part in parts if hasattr(part, "__len__")})
        return found

    def refresh(self, student: Any) -> None:
        """Moves everything that scores, answers or labels to another student.

        Args:
            student: a path or hub id; also what the scorers take, for a reward that neither answers nor labels.
        """
        parts: list[Any] = [*self.signals, *self.gates]
        held = [getattr(part, name, None) for part in parts for name in ("answers", "label")]
        for part in {id(part): part for part in (*parts, *held)}.values():
            if hasattr(part, "refresh"):
                part.refresh(student)

    def state_dict(self) -> dict[str, Any]:
        """Archives, histories, length statistics and counts, for ``torch.save``."""
        return {
            "masked": self.masked,
            "failures": self.failures,
            "history": {name: list(values) for name, values in self.history.items()},
            "length_bins": {name: bins.state_dict() for name, bins in self.length_bins.items()},
            "parts": {key: part.state_dict() for key, part in self._stateful()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the reward of that state stood.

        Raises:
            ValueError: it is the state of a reward of other signals or gates.
        """
        parts = dict(self._stateful())
        for key, ours in (("parts", parts), ("length_bins", self.length_bins), ("history", self.history)):
            if set(state[key]) != set(ours):
                raise ValueError(f"state: expected {key} {sorted(ours)}, got {sorted(state[key])}")
        self.masked, self.failures = state["masked"], state["failures"]
        self.history = {name: list(values) for name, values in state["history"].items()}
        for name, bins in self.length_bins.items():
            bins.load_state_dict(state["length_bins"][name])
        for key, part in parts.items():
            part.load_state_dict(state["parts"][key])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_previous_end": None}  # another process has another clock

    def __repr__(self) -> str:
        weights = ", ".join(f"{weight:g} {name}" for name, weight in self.weights.items())
        return f"ComposedReward({self.fusion} of {weights or 'gates'}; gates {', '.join(self._gate_names())})"

    def _score(self, texts: Sequence[str | None], groups: Sequence[Hashable], update: bool, by_runs: bool) -> Rewards:
        if len(texts) != len(groups):
            raise ValueError(f"groups: expected {len(texts)}, one a text, got {len(groups)}")
        with one_call():
            local = [_Entry(group, text) for group, text in zip(groups, texts, strict=True)]
            self._gate(local)
            valid = [entry for entry in local if entry.valid]
            for signal in self.signals:
                if not getattr(signal, "set_level", False):
                    self._signal(signal, valid)
            ranks, own = self._gathered(local)
            entries = [entry for rank in ranks for entry in rank]
            valid = [entry for entry in entries if entry.valid]
            for signal in self.signals:
                if getattr(signal, "set_level", False):
                    self._signal(signal, valid)
            if by_runs:
                runs = groupby(entries, key=lambda entry: entry.group)
                for j, (_, members) in enumerate(runs):
                    for entry in members:
                        entry.group = j
            self._total(entries, update)
            if update:
                accepted = _samples([entry for entry in entries if entry.valid and entry.total is not None])
                parts: list[Any] = [*self.signals, *self.gates]
                for part in parts:
                    if hasattr(part, "accept"):
                        self._guarded(part.name, partial(_accept, part, accepted), len(accepted))
        mine = ranks[own]
        self.masked += sum(entry.total is None for entry in mine)
        return Rewards(
            [entry.total for entry in mine],
            [entry.sample for entry in mine],
            {signal.name: [entry.values.get(signal.name) for entry in mine] for signal in self.signals},
            {name: [entry.rejected_by != name for entry in mine] for name in self._gate_names()},
            [entry.length for entry in mine],
        )

    def _gate(self, entries: Sequence[_Entry]) -> None:
        for entry in entries:
            [parsed] = self._guarded("parse", partial(_parsed, self.domain, entry.text), 1)
            entry.sample, entry.masked = parsed or None, parsed is None
            if parsed is False:
                entry.rejected_by = PARSES
        for gate in self.gates:
            asked = [entry for entry in entries if entry.valid]
            verdicts = self._guarded(gate.name, partial(gate, _samples(asked)), len(asked))
            for entry, verdict in zip(asked, verdicts, strict=True):
                if verdict is None:
                    entry.masked = True
                elif isinstance(verdict, Sample):
                    entry.sample = verdict
                elif not verdict:
                    entry.rejected_by = gate.name

    def _signal(self, signal: Signal, valid: Sequence[_Entry]) -> None:
        values = self._guarded(signal.name, partial(signal, _samples(valid)), len(valid))
        for entry, value in zip(valid, values, strict=True):
            # A scorer's NaN or infinity is a failure, too.
            entry.values[signal.name] = value if value is not None and abs(value) < float("inf") else None

    def _guarded(self, name: str, function: Callable[[], Sequence[Any]], n: int) -> Sequence[Any]:
        """What the function gives for n samples, or None for each where it fails."""
        if n == 0:
            return []
        try:
            values = function()
            if len(values) != n:
                raise ValueError(f"{name}: expected {n} values, one a sample, got {len(values)}")
        except Exception:
            logger.exception("%s: %r failed on %d samples", self.__name__, name, n)
            self.failures += 1
            return [None] * n
        return values

    def _gathered(self, local: list[_Entry]) -> tuple[list[list[_Entry]], int]:
        """The entries of each rank, and which are ours."""
        distributed = torch.distributed
        if not (self.sync and distributed.is_available() and distributed.is_initialized()):
            return [local], 0
        ranks: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(ranks, local)
        return ranks, distributed.get_rank()

    def _total(self, entries: Sequence[_Entry], update: bool) -> None:
        valid = [entry for entry in entries if entry.valid]
        if not self.signals:
            for entry in entries:
                entry.total = None if entry.masked else float(entry.rejected_by is None)
            return
        # Where one signal that counts is missing, the others are left out of the statistics too.
        known = [e for e in valid if all(e.values[name] is not None for name in self.weights)]
        columns = {name: [entry.values[name] for entry in known] for name in self.weights}
        lengths = [entry.length for entry in known]
        for name, bins in self.length_bins.items():
            if name in columns:
                columns[name] = bins(columns[name], lengths, update=update)
        totals = fuse(columns, [entry.group for entry in known], self.fusion, self.weights, self.history)
        for entry, total in zip(known, totals, strict=True):
            entry.total = total
        if update:
            for name, column in columns.items():
                self.history[name] = [*self.history[name], *(v for v in column if v is not None)][-HISTORY:]
        self._floor([entry for entry in entries if entry.rejected_by is not None], known)

    def _floor(self, gated: Iterable[_Entry], valid: Sequence[_Entry]) -> None:
        totals = [entry.total for entry in valid if entry.total is not None]
        if self.fusion in BOUNDED or not totals:
            for entry in gated:
                entry.total = 0.0
            return
        step = statistics.pstdev(totals) or 1.0
        lowest: dict[Hashable, float] = {}
        for entry in valid:
            if entry.total is not None:
                lowest[entry.group] = min(entry.total, lowest.get(entry.group, entry.total))
        for entry in gated:
            entry.total = lowest.get(entry.group, min(totals)) - step

    def _gate_names(self) -> list[str]:
        return [PARSES, *(gate.name for gate in self.gates)]

    def _stateful(self) -> list[tuple[str, Any]]:
        kinds = (("signal", self.signals), ("gate", self.gates))
        return [(f"{kind}/{part.name}", part) for kind, parts in kinds for part in parts if hasattr(part, "state_dict")]


@dataclass
class _Entry:
    """One text on its way; it crosses processes under ``sync``."""

    group: Hashable
    text: str | None
    sample: Sample | None = None
    masked: bool = False
    rejected_by: str | None = None
    values: dict[str, float | None] = field(default_factory=dict)
    total: float | None = None

    @property
    def valid(self) -> bool:
        return self.sample is not None and not self.masked and self.rejected_by is None

    @property
    def length(self) -> int:
        return len(self.text or "") if self.sample is None else sample_length(self.sample)


def _parsed(domain: Domain, text: str | None) -> list[Sample | bool]:
    """The sample, or False where the text is none."""
    sample = None if text is None else domain.parse(text)
    return [False if sample is None else sample]


def _accept(part: Any, samples: Sequence[Sample]) -> Sequence[Sample]:
    part.accept(samples)
    return samples


def _samples(entries: Sequence[_Entry]) -> list[Sample]:
    return [entry.sample for entry in entries if entry.sample is not None]


def _first_rejections(rewards: Rewards) -> list[str]:
    """The gate that rejected each sample, or an empty string."""
    names = list(rewards.gates)
    rows = zip(*rewards.gates.values(), strict=True)
    return [next((name for name, ok in zip(names, row, strict=True) if not ok), "") for row in rows]


def _check_names(argument: str, parts: Sequence[Any], taken: tuple[str, ...]) -> None:
    seen = set(taken)
    for part in parts:
        name = getattr(part, "name", None)
        if not callable(part) or not isinstance(name, str):
            raise TypeError(f"{argument}: expected objects with a name that can be called, got {part!r}")
        if name in seen:
            raise ValueError(f"{argument}: {name!r} is there twice or is taken, give one of them another name")
        seen.add(name)
