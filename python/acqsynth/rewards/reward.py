"""The rewards of a generator, under the contract of TRL's GRPO and RLOO trainers.

    reward = ComposedReward.default(domain, "path/to/student", seeds=seeds, engine=engine)
    GRPOTrainer(model=generator, reward_funcs=[reward], ...)

:class:`ComposedReward` gates samples and fuses several signals, the same for GRPO, best-of-n and DPO. What happens in a
call of n completions, in this order:

1. Each text is parsed, then passed through the gates, cheap ones first; the first that rejects it counts.
2. Signals score what passed. A scorer that fails, on one sample or on all, masks: the sample's total is None, and the
   sample is left out of all statistics. A failure is counted and logged, and never becomes a number.
3. Each signal's value is taken relative to samples of like length (:class:`acqsynth.rewards.fusion.LengthBins`).
4. :func:`acqsynth.rewards.fusion.fuse` makes one number of the signals. A gated sample gets the floor: 0 under ``rank``
   and ``quantile``, whose values are above 0; otherwise one standard deviation of the call below the least of its group
   (of the call, if no other of the group passed). So it never outranks a valid sample of its group, nor ties with one.
5. Archives take in what passed.

It departs from the published method, which adds a bonus for the format to one signal (:mod:`acqsynth.rewards.paper`):
what is added can be traded, and text that is no question has the largest signal of all.

:class:`AcquisitionReward` is one acquisition times whether the text parses:

    reward = AcquisitionReward("path/to/student", "entropy")

On the command line any acquisition is a ready-made reward, ``trl grpo --reward_funcs acqsynth.rewards.entropy``, whose
student the environment variable ``ACQSYNTH_STUDENT`` names. ``AcquisitionReward(url="http://scorer:8000",
acquisition="entropy")`` asks the server that ``acqsynth serve`` started. Malformed text scores highest on most
acquisitions, so the format check multiplies; an added bonus would still rank it first. Where values may be negative,
text that does not parse gets the least value there is: -1 for influence, which is a cosine.

A masked sample is left out of the advantage only where every reward masks it: TRL counts it as 0 for the one that does.
:func:`acqsynth.rewards.combined` adds several rewards and masks a sample for all of them.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import json
import logging
import statistics
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch

import acqcore
from acqcore import Reduction
from acqsynth.domains import Domain, Sample
from acqsynth.engines import Engine
from acqsynth.parsing import parse_sample
from acqsynth.rewards.batch import Batch
from acqsynth.rewards.fusion import BOUNDED, HISTORY, METHODS, LengthBins, checked_weights, fuse
from acqsynth.rewards.gates import Gate, Label, default_gates, require_samples, sample_length
from acqsynth.rewards.reliability import Spread, Watch
from acqsynth.rewards.scoring import Scored, Scorer
from acqsynth.rewards.signals import Diversity, Learnability, SampledAnswers, Signal, acquisition_signals
from acqsynth.rewards.texts import Embedder, NgramEmbedder

logger = logging.getLogger(__name__)

#: A parser gives a sample as ``acqcore.score`` takes it, or None.
Parser = Callable[[str], Any]
Completion = str | list[dict[str, Any]]
LogExtra = Callable[[str, list[Any]], None]  #: takes a column name and n values, for the table of completions
LogMetric = Callable[[str, float], None]  #: takes a name and a number

PARSES = "parses"  #: the gate before the others

#: Signals of the default reward and their weights: those that rank a weak but learnable skill first and no trap, and
#: whose ranks agree with the measured gain (``benchmarks/bench_signals.py``). ``influence`` (in all parameters) needs a
#: reference set, ``learnability`` (of answers that the domain finds right) an engine of the student. No measure of size
#: alone is among them: those favour coin flips and noise. Influence, the noisiest for one sample, counts a quarter;
#: learnability too, as it cannot separate guessing from half-learnt skills (with a half each, one row in five taught
#: was a trap's, with a quarter one in eight); diversity a tenth: with a half it taught to ask for what has the most
#: digits (``benchmarks/bench_loop.py``, on its tuning seeds).
DEFAULT_WEIGHTS: dict[str, float] = {
    "mutual_information": 1.0,
    "influence": 0.25,
    "learnability": 0.25,
    "diversity": 0.1,
}


#: Arguments of mutual information in the default reward. Eight draws of dropout at 5 % in all blocks do not agree with
#: themselves within a data set on SmolLM2-135M, where they add half a nat to the loss; four probes of the linear form
#: do (``docs/reliability.md``).
INFORMATION: dict[str, Any] = {"form": "linear", "probes": 4}


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

    @property
    def passed(self) -> list[bool]:
        """Whether no gate rejected the sample."""
        return [all(column) for column in zip(*self.gates.values(), strict=True)]

    @property
    def spread(self) -> dict[str, Spread]:
        """Of each signal with standard errors, within the groups."""
        return {name: Spread.within(self.components[name], errors, self.groups) for name, errors in self.stderr.items()}

    @property
    def rejected_by(self) -> list[str]:
        """The gate that rejected each sample, or an empty string."""
        rows = zip(*self.gates.values(), strict=True)
        return [next((name for name, ok in zip(self.gates, row, strict=True) if not ok), "") for row in rows]


class ComposedReward:
    """Gated and fused signals, as a reward function of TRL 1.16 and for other callers of ``score``.

    Args:
        domain: parses texts.
        signals: with different names. Without any, the reward is that of the gates alone: 1 for what passes, 0 for the
            rest.
        gates: with different names; :func:`acqsynth.rewards.gates.default_gates` makes the usual ones. Whether a text
            parses is always asked first.
        fusion: a method of :func:`acqsynth.rewards.fusion.fuse`. The default suits every caller, even one that sends
            one sample at a time. With whole groups, as in GRPO, ``z`` taught more (``benchmarks/bench_loop.py``).
        weights: signal -> weight, 1 by default. A negative weight reverses a signal; 0 only logs it.
        length_normalised: signals that are taken relative to their bin of lengths; True for all.
        sync: the ranks of a ``torch.distributed`` group call together, and share groups that straddle ranks, archives
            and running statistics. One collective a call, so every rank has to call.
        name: what TRL logs.

    Raises:
        ValueError: an unknown fusion, weight or name to normalise, or a name twice.
        TypeError: a signal or gate that cannot be called or has no name.
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
        self._watch = Watch(name)
        self.masked = 0  #: samples without a total so far
        self.failures = 0  #: calls of a part that raised so far
        self._parsed = False  #: whether a text has parsed, or its absence was told

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
            student: as :class:`acqsynth.rewards.scoring.Scorer`; not one whose weights ranks share, which mutual
                information in its linear form refuses.
            seeds: the rows that the generator is shown.
            reference: rows whose loss should fall, for ``influence``.
            engine: of the student, for ``learnability`` and the gate ``answerable``.
            evaluation: rows that no sample may repeat.
            embed: of questions, for ``diversity``; hashed n-grams by default.
            answers: options of :class:`SampledAnswers`.
            label: n samples -> each with its label, or None without one; by default samples keep the answers that the
                generator wrote.
            scoring: options of Scorer.
            options: of ComposedReward.
        """
        require_samples("seeds", seeds)
        if reference is not None and not isinstance(reference, acqcore.Reference):
            require_samples("reference", reference)
        require_samples("evaluation", evaluation)
        drawn = None if engine is None else SampledAnswers(engine, domain, **(answers or {}))
        passes = dict(scoring or {})
        acquisitions: dict[str, dict[str, Any]] = {"mutual_information": dict(INFORMATION)}
        if reference is not None:
            acquisitions["influence"] = {"reference": reference}
        signals: list[Signal] = [*acquisition_signals(student, acquisitions, domain, **passes)]
        if drawn is not None:
            signals.append(Learnability(drawn, verified=True))
        signals.append(Diversity(embed or NgramEmbedder()))
        rows = {"seeds": seeds, "evaluation": evaluation}
        gates = default_gates(domain, **rows, label=label, student=student, answers=drawn, **passes)
        weights = {signal.name: DEFAULT_WEIGHTS[signal.name] for signal in signals}
        return cls(domain, signals, **({"gates": gates, "weights": weights} | options))

    def score(self, texts: Sequence[str | None], groups: Sequence[Hashable], *, update: bool = True) -> Rewards:
        """Rewards of n texts.

        Args:
            texts: what a generator wrote; None never parses.
            groups: of n texts; equal keys, on any rank under ``sync``, are one group.
            update: let archives, histories and length statistics take the call in; False leaves all unchanged, for a
                probe that is scored repeatedly.

        Raises:
            ValueError: texts and groups of different length.
        """
        return self._score(texts, groups, update, by_runs=False)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        completion_ids: Sequence[list[int]] | None = None,
        log_extra: LogExtra | None = None,
        log_metric: LogMetric | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Totals of n completions, under the contract of TRL.

        Archives, histories and length statistics take in what is trained on: TRL's evaluation leaves them as they are.

        Args:
            prompts: n prompts; consecutive equal ones are a group. TRL deals whole groups to the ranks in turn, so one
                may begin on a rank and end on the next: ``sync`` joins them again.
            completions: n texts, or n lists of messages whose last assistant message is the text.
            completion_ids, columns: what else TRL passes; not read.
            log_extra: gets each signal's values and the gate that rejected.
            log_metric: gets :meth:`metrics`; if it is the trainer's own, it also says whether the trainer evaluates.

        Returns:
            n totals; None (masked from the advantage, see the module) if a scorer failed.
        """
        texts = [completion_text(c) for c in completions]
        rewards = self._score(
            texts, [prompt_key(prompt) for prompt in prompts], not _evaluates(log_metric), by_runs=True
        )
        _log(
            self.__name__,
            {**rewards.components, "gate": rewards.rejected_by},
            self.metrics(rewards) if rewards.total else {},
            log_extra,
            log_metric,
        )
        _warn_of_mask(rewards.total, log_metric)
        return rewards.total

    def metrics(self, rewards: Rewards) -> dict[str, float]:
        """What is logged of a call; undefined numbers are left out.

        ``gated/<gate>`` and ``masked``: shares of the samples. ``<signal>/mean``, ``<signal>/length_correlation`` and
        the same of ``total``: over the samples that passed. ``<signal>/reliability``: share of its spread within groups
        that is not noise of the estimate (:mod:`acqsynth.rewards.reliability`), for signals that give standard errors.
        ``archive/<signal or gate>``: entries held. And what a part has in ``logged``.
        """
        n = len(rewards.total)
        found = {f"gated/{name}": passes.count(False) / n for name, passes in rewards.gates.items()}
        found["masked"] = rewards.total.count(None) / n
        total = [value if ok else None for value, ok in zip(rewards.total, rewards.passed, strict=True)]
        for name, values in (rewards.components | {"total": total}).items():
            found |= {f"{name}/{key}": number for key, number in _summary(values, rewards.lengths).items()}
        for part in self._parts():
            found |= {f"{part.name}/{key}": number for key, number in getattr(part, "logged", {}).items()}
        for name, spread in rewards.spread.items():
            if spread.reliability is not None:
                found[f"{name}/reliability"] = spread.reliability
        return found | {f"archive/{part.name}": len(part) for part in self._parts() if hasattr(part, "__len__")}

    def refresh(self, student: Any) -> None:
        """Moves everything that scores, answers or labels to another student.

        Args:
            student: a path or hub id; also what the scorers take, for a reward that neither answers nor labels.
        """
        held = [getattr(part, name, None) for part in self._parts() for name in ("answers", "label")]
        for part in {id(part): part for part in (*self._parts(), *held)}.values():
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
        """Continues from where the reward of that state stood.

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

    def __repr__(self) -> str:
        weights = ", ".join(f"{weight:g} {name}" for name, weight in self.weights.items())
        return f"ComposedReward({self.fusion} of {weights or 'gates'}; gates {', '.join(self._gate_names())})"

    def _score(self, texts: Sequence[str | None], groups: Sequence[Hashable], update: bool, by_runs: bool) -> Rewards:
        if len(texts) != len(groups):
            raise ValueError(f"groups: expected {len(texts)}, one a text, got {len(groups)}")
        local = [_Entry(group, text) for group, text in zip(groups, texts, strict=True)]
        batch = Batch()
        for entry in local:
            self._parse(entry)
        if update and local and not self._parsed:
            self._parsed = True  # or said once
            if all(entry.sample is None for entry in local):
                logger.warning(
                    "%s: none of the first %d texts parses as a sample of the domain %r, so each gets the least "
                    "reward; Domain.generator_prompt asks a generator for the form",
                    self.__name__, len(local), self.domain.name,
                )  # fmt: skip
        for gate in self.gates:
            self._gate(gate, [entry for entry in local if entry.valid], batch)
        ranks, own = self._gathered(local, batch)
        entries = [entry for rank in ranks for entry in rank]
        if by_runs:
            for j, (_, members) in enumerate(groupby(entries, key=lambda entry: entry.group)):
                for entry in members:
                    entry.group = j
        self._total(entries, update)
        if update:
            accepted = batch.part(e.sample for e in entries if e.sample is not None and e.valid and e.total is not None)
            for part in self._parts():
                if hasattr(part, "accept"):
                    self._guarded(part.name, partial(_accept, part), accepted, alone=False)
        mine = ranks[own]
        self.masked += sum(entry.total is None for entry in mine)
        rewards = Rewards(
            [entry.total for entry in mine],
            [entry.sample for entry in mine],
            {signal.name: [entry.values.get(signal.name) for entry in mine] for signal in self.signals},
            {name: [entry.rejected_by != name for entry in mine] for name in self._gate_names()},
            [entry.length for entry in mine],
            [entry.group for entry in mine],
            {
                signal.name: [entry.stderr.get(signal.name) for entry in mine]
                for signal in self.signals
                if any(signal.name in entry.stderr for entry in mine)
            },
        )
        if update:
            self._watch.add(rewards.spread)
        return rewards

    def _parse(self, entry: _Entry) -> None:
        parsed: Any = False
        if entry.text is not None:
            [parsed] = self._guarded("parse", lambda texts: [self.domain.parse(texts[0]) or False], [entry.text])
        if parsed is False:
            entry.rejected_by = PARSES
        else:
            entry.sample, entry.masked = parsed, parsed is None

    def _gate(self, gate: Gate, asked: Sequence[_Entry], batch: Batch) -> None:
        for entry, verdict in zip(asked, self._guarded(gate.name, gate, _samples(asked, batch)), strict=True):
            if verdict is None:
                entry.masked = True
            elif isinstance(verdict, Sample):
                entry.sample = verdict
            elif not verdict:
                entry.rejected_by = gate.name

    def _gathered(self, local: list[_Entry], batch: Batch) -> tuple[list[list[_Entry]], int]:
        """The entries of each rank with the signals' values, and which rank is this one."""
        on_each = [signal for signal in self.signals if not getattr(signal, "set_level", False)]
        on_all = [signal for signal in self.signals if signal not in on_each]
        valid = [entry for entry in local if entry.valid]
        samples = _samples(valid, batch)
        self._value(on_each, valid, samples)
        distributed = torch.distributed
        if not (self.sync and distributed.is_available() and distributed.is_initialized()):
            self._value(on_all, valid, samples)
            return [local], 0
        ranks: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(ranks, local)
        valid = [entry for rank in ranks for entry in rank if entry.valid]
        self._value(on_all, valid, _samples(valid, batch))
        return ranks, distributed.get_rank()

    def _value(self, signals: Sequence[Signal], valid: Sequence[_Entry], samples: Batch) -> None:
        for signal in signals:
            values = self._guarded(signal.name, signal, samples)
            for entry, value in zip(valid, values, strict=True):
                # NaN and infinity are failures too.
                entry.values[signal.name] = value if value is not None and abs(value) < float("inf") else None
            if hasattr(signal, "stderr") and any(value is not None for value in values):
                errors = self._guarded(signal.name, partial(_errors, signal), samples)
                for entry, error in zip(valid, errors, strict=True):
                    if error is not None:
                        entry.stderr[signal.name] = error

    def _guarded(
        self, name: str, function: Callable[[Any], Sequence[Any]], samples: Sequence[Any], alone: bool = True
    ) -> Sequence[Any]:
        """What the function gives for n samples; None for each that it fails on.

        A function that fails on all together is asked for one at a time, so that one sample masks itself alone, until
        ``_TRIES`` in a row have failed too: then it is not for the samples.
        """
        if not samples:
            return []
        try:
            return _called(name, function, samples)
        except Exception as error:
            logger.exception("%s: %r failed on %d samples", self.__name__, name, len(samples))
            self.failures += 1
            alone = alone and not (isinstance(error, _WrongLengthError) or getattr(function, "set_level", False))
        found: list[Any] = [None] * len(samples)
        if len(samples) > 1 and isinstance(samples, Batch) and alone:
            in_a_row = 0
            for i, sample in enumerate(samples):
                try:
                    [found[i]] = _called(name, function, samples.part([sample]))
                    in_a_row = 0
                except Exception:
                    in_a_row += 1
                    if in_a_row == _TRIES and all(value is None for value in found):
                        break
        return found

    def _total(self, entries: Sequence[_Entry], update: bool) -> None:
        valid = [entry for entry in entries if entry.valid]
        if not self.signals:
            for entry in entries:
                entry.total = None if entry.masked else float(entry.rejected_by is None)
            return
        # A sample without one of the values that count is left out of the statistics of all.
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

    def _floor(self, gated: Sequence[_Entry], valid: Sequence[_Entry]) -> None:
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

    def _parts(self) -> list[Any]:
        return [*self.signals, *self.gates]

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
    stderr: dict[str, float] = field(default_factory=dict)
    total: float | None = None

    @property
    def valid(self) -> bool:
        return self.sample is not None and not self.masked and self.rejected_by is None

    @property
    def length(self) -> int:
        return len(self.text or "") if self.sample is None else sample_length(self.sample)


_TRIES = 3


class _WrongLengthError(ValueError):
    """A part gives another number of values than it got samples, which is no fault of a sample."""


def _called(name: str, function: Callable[[Any], Sequence[Any]], samples: Sequence[Any]) -> Sequence[Any]:
    values = function(samples)
    if len(values) != len(samples):
        raise _WrongLengthError(f"{name}: expected {len(samples)} values, one a sample, got {len(values)}")
    return values


def _errors(signal: Any, samples: Sequence[Sample]) -> Sequence[float | None]:
    """Standard errors of a signal's values; None for each where it has none."""
    found: Sequence[float | None] | None = signal.stderr(samples)
    return [None] * len(samples) if found is None else found


def _accept(part: Any, samples: Sequence[Sample]) -> Sequence[Sample]:
    part.accept(samples)
    return samples


def _samples(entries: Sequence[_Entry], batch: Batch) -> Batch:
    return batch.part(entry.sample for entry in entries if entry.sample is not None)


def _check_names(argument: str, parts: Sequence[Any], taken: tuple[str, ...]) -> None:
    seen = set(taken)
    for part in parts:
        name = getattr(part, "name", None)
        if not callable(part) or not isinstance(name, str):
            raise TypeError(f"{argument}: expected callable objects with a name, got {part!r}")
        if name in seen:
            raise ValueError(f"{argument}: {name!r} is there twice or is taken, give one of them another name")
        seen.add(name)


# --- one acquisition --------------------------------------------------------------------------------------------------


class AcquisitionReward:
    """The acquisition value of each completion for a student, as a reward function of TRL 1.16.

    Args:
        student: a transformers causal LM (even the model in training: it is scored in eval mode and left unchanged), an
            ``acqcore.Student``, a path or hub id, or None for the path in the environment variable
            ``ACQSYNTH_STUDENT``. A path is loaded at the first call and shared by all rewards of the process.
        acquisition: a name from ``acqcore.acquisitions()``. For several, pass several rewards: TRL weights them.
        parse: text of a completion -> sample for ``acqcore.score``, or None if it is no sample; by default the tagged
            question and its solution. ``acqsynth.parsing`` also has ``parse_chat_sample``, the same as turns of a chat,
            and ``as_text``, the whole completion.
        arguments: of the acquisition, as in ``acquisition_args`` of ``acqcore.score``: ``{"parameters": "all"}`` for
            ``grad_norm``; ``{"reference": ...}``, which ``influence`` requires.
        reduction: how token values become one, as in ``acqcore.score``.
        tokenizer: the student's; by default the one beside its path. A model given as an object needs it.
        backend: as in ``acqcore.score``.
        batch_tokens: tokens of one forward pass of the student, as in ``acqcore.score``.
        device: where a path is loaded; by default the CPU. A model given as an object stays where it is.
        max_length: longer samples are cut to this many tokens, and to what the student can take.
        sync: the ranks of a ``torch.distributed`` group call together and share the least value, which text that does
            not parse gets. Needed on several ranks where values have no least one: influence by dot product.
        name: the name TRL logs; by default ``acquisition_<acquisition>``.
        url: of a server instead of a student; gives a :class:`RemoteAcquisitionReward`.

    Raises:
        ValueError: an unknown acquisition, a model without a tokenizer, or a max_length below 2.
        TypeError: parse is not callable.
    """

    def __new__(cls, *arguments: Any, url: str | None = None, **options: Any) -> AcquisitionReward:
        # TRL asks the class whether its call is a coroutine, so a reward over a network is a class of its own.
        return super().__new__(RemoteAcquisitionReward if url is not None and cls is AcquisitionReward else cls)

    def __init__(
        self,
        student: Any = None,
        acquisition: str = "entropy",
        *,
        url: None = None,
        parse: Parser = parse_sample,
        arguments: Mapping[str, Any] | None = None,
        sync: bool = False,
        name: str | None = None,
        **scoring: Any,
    ) -> None:
        self._set_up(acquisition, parse, name, arguments, sync)
        named = None if arguments is None else {acquisition: arguments}
        self.scorer = Scorer(student, (acquisition,), arguments=named, name=self.__name__, **scoring)

    def _set_up(
        self,
        acquisition: str,
        parse: Parser,
        name: str | None,
        arguments: Mapping[str, Any] | None,
        sync: bool,
    ) -> None:
        if not callable(parse):
            raise TypeError(f"parse: expected a function of a text, got {type(parse).__name__}")
        self.__name__ = name or f"acquisition_{acquisition}"
        self.acquisition = acquisition
        self.parse = parse
        self._watch = Watch(self.__name__)
        self.masked = 0  #: samples that could not be scored so far
        self._sync = sync
        cosine = acquisition == "influence" and (arguments or {}).get("similarity", "cosine") == "cosine"
        self._least = -1.0 if cosine else 0.0  #: no value is below it, as far as is known
        self._unbounded = acquisition == "influence" and not cosine
        self._parsed = False  #: whether a text has parsed, or its absence was told

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        completion_ids: Sequence[list[int]] | None = None,
        log_extra: LogExtra | None = None,
        log_metric: LogMetric | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Rewards of n completions, scored in one ``acqcore.score`` call.

        Args:
            prompts: n prompts of the generator, equal ones of a group; the completion holds the sample.
            completions: n texts, or n lists of messages whose last assistant message is the text.
            completion_ids, columns: what else TRL passes; not read.
            log_extra: gets the values and whether each text parses.
            log_metric: gets shares parsed and masked, mean and correlation with length; of an acquisition that is
                estimated at random also ``reliability``, as in :meth:`ComposedReward.metrics`.

        Returns:
            n rewards: the acquisition value; 0.0 (or the least value, if that is negative) for text that does not
                parse; None (masked from the advantage, see the module) if the sample could not be scored.

        Raises:
            RuntimeError: the student comes from the environment, and ``ACQSYNTH_STUDENT`` is not set; values without a
                least one on several ranks without ``sync``.
            ValueError, TypeError: as ``acqcore.score``.
        """
        if not self._parsed:
            self.scorer.check()  # even if nothing parses
        samples = [self._sample(completion) for completion in completions]
        scored = self.scorer([sample for sample in samples if _parsed(sample)])
        return self._rewards(prompts, samples, scored, log_extra, log_metric)

    def rewards(self, prompts: Sequence[Any], completions: Sequence[Completion]) -> list[float | None]:
        """The same, for callers of their own: in a script or notebook, whether the reward is here or at a url."""
        return self(prompts, completions)

    def _sample(self, completion: Completion) -> Any:
        """What ``parse`` gives; ``_FAILED`` where it fails on this text."""
        text = completion_text(completion)
        try:
            return None if text is None else self.parse(text)
        except Exception:
            logger.exception("%s: parse failed on a text", self.__name__)
            return _FAILED

    def _rewards(
        self,
        prompts: Sequence[Any],
        samples: Sequence[Any],
        scored: Scored,
        log_extra: LogExtra | None,
        log_metric: LogMetric | None,
    ) -> list[float | None]:
        """Rewards of n samples, None for text that does not parse, from what the others scored."""
        n = len(samples)
        parsed = [i for i, sample in enumerate(samples) if _parsed(sample)]
        if samples and not self._parsed:
            self._parsed = True  # or said once
            if all(sample is None for sample in samples):
                logger.warning(
                    "%s: none of the first %d completions has the form that parse=%s reads, so each gets the least "
                    "reward; ask for <question>...</question><answer>...</answer> in the prompts, or pass "
                    "parse=acqsynth.parsing.as_text to score whole completions",
                    self.__name__, n, getattr(self.parse, "__name__", type(self.parse).__name__),
                )  # fmt: skip
        values: list[float | None] = [None] * n
        lengths = [0] * n
        for i, value, length in zip(parsed, scored.values[self.acquisition], scored.lengths, strict=True):
            values[i], lengths[i] = value, length
        floor = self._floor([value for value in values if value is not None])
        rewards = [floor if sample is None else value for sample, value in zip(samples, values, strict=True)]
        masked = rewards.count(None)
        self.masked += masked
        metrics = {"parsed": len(parsed) / n, "masked": masked / n, **_summary(values, lengths)} if n else {}
        errors = scored.stderr.get(self.acquisition)
        columns: dict[str, list[Any]] = {"value": values, "parsed": [sample is not None for sample in samples]}
        if errors is not None:
            placed = dict(zip(parsed, errors, strict=True))
            columns["stderr"] = [placed.get(i) for i in range(n)]
            spread = Spread.within(values, columns["stderr"], [prompt_key(prompt) for prompt in prompts])
            self._watch.add({self.acquisition: spread})
            if spread.reliability is not None:
                metrics["reliability"] = spread.reliability
        _log(self.__name__, columns, metrics, log_extra, log_metric)
        _warn_of_mask(rewards, log_metric)
        return rewards

    def _floor(self, values: Sequence[float]) -> float:
        """Reward of text that does not parse: the same on all ranks, as a group may be spread over them."""
        floor = min([self._least, *values])
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return floor
        if self._sync:
            floors: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(floors, floor)
            return min(floors)
        if self._unbounded or floor < self._least - 1e-6:
            raise RuntimeError(
                f"{self.__name__}: the values of {self.acquisition} have no least one, and ranks must agree on the "
                "reward of text that does not parse; make the reward with sync=True"
            )
        return self._least

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.acquisition!r}, name={self.__name__!r})"


class RemoteAcquisitionReward(AcquisitionReward):
    """What ``AcquisitionReward(url=...)`` makes: the same numbers from a server, awaited.

    TRL awaits all such rewards of a step together; elsewhere call :meth:`rewards`. Samples without an answer after all
    retries (see :class:`acqsynth.serve.client.ScorerClient`) are masked, counted in ``masked`` and logged.

    Args:
        student: None; the server has one.
        acquisition, parse, reduction, max_length, sync, name: as :class:`AcquisitionReward`.
        url: of the server, ``http://host:port``.
        arguments: as :class:`AcquisitionReward`, of text and numbers.
        token: of the server; by default the one in the environment variable ``ACQSYNTH_TOKEN``, if set.
        client: options of ``ScorerClient``: ``timeout``, ``attempts``, ``batch``, ``backoff``, ``breaker``.

    Raises:
        ValueError: a student beside the url, no such URL, a max_length below 2.
        TypeError: parse is not callable, or an option of a student in this process.
        ModuleNotFoundError: httpx is not installed.
    """

    def __init__(
        self,
        student: None = None,
        acquisition: str = "entropy",
        *,
        url: str,
        parse: Parser = parse_sample,
        arguments: Mapping[str, Any] | None = None,
        reduction: Reduction = "mean",
        max_length: int = 2048,
        token: str | None = None,
        client: Mapping[str, Any] | None = None,
        sync: bool = False,
        name: str | None = None,
    ) -> None:
        try:
            from acqsynth.serve.client import ScorerClient
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f'url: asking a server needs {error.name}, which is not installed: run pip install "acqcore[serve]"'
            ) from error
        if student is not None:
            raise ValueError("student: expected none beside url, the server has its own")
        if max_length < 2:
            raise ValueError(f"max_length: expected at least 2 tokens, got {max_length}")
        self._set_up(acquisition, parse, name, arguments, sync)
        self.client = ScorerClient(url, token=token, **(client or {}))
        self._spec: dict[str, Any] = {
            "arguments": None if arguments is None else {acquisition: dict(arguments)},
            "reduction": reduction,
            "max_length": max_length,
        }

    async def __call__(  # type: ignore[override]  # a coroutine of what the other gives, see __new__
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        completion_ids: Sequence[list[int]] | None = None,
        log_extra: LogExtra | None = None,
        log_metric: LogMetric | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """As :meth:`AcquisitionReward.__call__`.

        Raises:
            acqsynth.serve.client.ScorerError: the server refuses the request: a wrong token or acquisition.
        """
        samples = [self._sample(completion) for completion in completions]
        given = [sample for sample in samples if _parsed(sample)]
        scored = await self.client.score(given, (self.acquisition,), **self._spec)
        return self._rewards(prompts, samples, scored, log_extra, log_metric)

    def rewards(self, prompts: Sequence[Any], completions: Sequence[Completion]) -> list[float | None]:
        """As :meth:`AcquisitionReward.rewards`; waits for the answer, where the call itself is a coroutine."""
        with ThreadPoolExecutor(1) as pool:  # a notebook has an event loop of its own
            return pool.submit(asyncio.run, self(prompts, completions)).result()


@functools.cache
def reward_from_environment(acquisition: str) -> AcquisitionReward:
    """The ready-made reward of an acquisition, whose student the environment names."""
    return AcquisitionReward(None, acquisition)


def combined(
    rewards: Sequence[Callable[..., Any]], weights: Sequence[float] | None = None, *, name: str = "combined"
) -> Callable[..., Any]:
    """One reward function of several: their weighted sum, None where one of them gives None.

    TRL adds the rewards of a sample and leaves out those that are None, so that a sample which one reward could not
    score competes with the rest of its sum. Here it is masked.

    Args:
        rewards: reward functions of TRL, coroutines among them.
        weights: one a reward, 1 by default.
        name: what TRL logs; each reward is logged under its own name.

    Raises:
        ValueError: no rewards, or not one weight a reward.
    """
    scales = [1.0] * len(rewards) if weights is None else [float(weight) for weight in weights]
    if not rewards or len(scales) != len(rewards):
        raise ValueError(f"weights: expected {max(1, len(rewards))}, one a reward, got {len(scales)}")

    def total(columns: Sequence[Sequence[float | None]]) -> list[float | None]:
        rows = zip(*columns, strict=True)
        return [
            None
            if any(value is None for value in row)
            else sum(scale * value for scale, value in zip(scales, row, strict=True) if value is not None)
            for row in rows
        ]

    def together(*arguments: Any, **columns: Any) -> list[float | None]:
        return total([reward(*arguments, **columns) for reward in rewards])

    async def awaited(*arguments: Any, **columns: Any) -> list[float | None]:
        given = [reward(*arguments, **columns) for reward in rewards]
        return total([await value if inspect.isawaitable(value) else value for value in given])

    waits = any(inspect.iscoroutinefunction(f) or inspect.iscoroutinefunction(type(f).__call__) for f in rewards)
    function: Callable[..., Any] = awaited if waits else together
    function.__name__ = name
    return function


def _evaluates(log_metric: LogMetric | None) -> bool:
    """Whether the trainer whose method this is evaluates."""
    model = getattr(getattr(log_metric, "__self__", None), "model", None)
    return isinstance(model, torch.nn.Module) and not model.training


def _warn_of_mask(rewards: Sequence[float | None], log_metric: LogMetric | None) -> None:
    """Say once that a masked sample counts as 0 beside other rewards."""
    functions = getattr(getattr(log_metric, "__self__", None), "reward_funcs", ())
    if None in rewards and isinstance(functions, Sequence) and len(functions) > 1:
        _warn_once()


@functools.cache
def _warn_once() -> None:
    logger.warning(
        "a sample that could not be scored counts as 0 for its reward beside the others: "
        "acqsynth.rewards.combined([...]) makes one reward of several, and masks it"
    )


def completion_text(completion: Completion) -> str | None:
    """The text of a completion: itself, or its last assistant message's; None if that has none."""
    if isinstance(completion, str):
        return completion
    for message in reversed(completion):
        if message.get("role") == "assistant":
            content = message.get("content")
            if isinstance(content, list):  # blocks, as for a model that also takes images
                content = "".join(block.get("text", "") for block in content if block.get("type") == "text")
            return content if isinstance(content, str) else None
    return None


def prompt_key(prompt: Any) -> str:
    """A text by which equal prompts are equal, whatever objects (images) they hold."""
    return prompt if isinstance(prompt, str) else json.dumps(_hashable(prompt), sort_keys=True)


def _hashable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _hashable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_hashable(part) for part in value]
    if value is None or isinstance(value, str | int | float):
        return value
    content = value.tobytes() if hasattr(value, "tobytes") else value if isinstance(value, bytes) else b""
    return [type(value).__qualname__, hashlib.sha256(content).hexdigest() if content else str(value)]


_FAILED = object()  #: the sample of a text that the parser fails on


def _parsed(sample: Any) -> bool:
    return sample is not None and sample is not _FAILED


def _summary(values: Sequence[float | None], lengths: Sequence[int]) -> dict[str, float]:
    """Mean of the values, and their correlation with the lengths if that is defined."""
    scored = [(value, length) for value, length in zip(values, lengths, strict=True) if value is not None]
    if not scored:
        return {}
    summary = {"mean": statistics.fmean(value for value, _ in scored)}
    if min(len(set(column)) for column in zip(*scored, strict=True)) > 1:
        summary["length_correlation"] = statistics.correlation(*zip(*scored, strict=True))
    return summary


def _log(
    name: str,
    columns: Mapping[str, Sequence[Any]],
    metrics: Mapping[str, float],
    log_extra: LogExtra | None,
    log_metric: LogMetric | None,
) -> None:
    if log_extra is not None:
        for key, values in columns.items():
            log_extra(f"{name}_{key}", list(values))
    if log_metric is not None:
        for key, number in metrics.items():
            log_metric(f"{name}/{key}", number)
