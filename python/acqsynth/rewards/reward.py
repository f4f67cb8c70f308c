"""The composed reward of a generator: gates, then signals, fused to one number a sample.

    reward = ComposedReward.default(domain, "path/to/student", seeds=seeds, engine=engine)
    GRPOTrainer(model=generator, reward_funcs=[reward], ...)

GRPO, best-of-n and DPO share it. A call of n completions goes through these steps:

1. Each text is parsed, then passed through the gates, cheap ones first; the first that rejects it counts.
2. Signals score what passed. A scorer that fails, on one sample or on all, masks: the sample's total is None, and the
   sample is left out of all statistics. A failure is counted and logged, and never becomes a number.
3. Each signal's value is taken relative to samples of like length (:class:`acqsynth.rewards.fusion.LengthBins`).
4. :func:`acqsynth.rewards.fusion.fuse` makes one number of the signals. A gated sample gets the floor: 0 under ``rank``
   and ``quantile``, whose values are above 0; otherwise one standard deviation of the call below the lowest of its
   group (of the call, if no other of the group passed). So it never outranks or ties with a valid sample of its group.
5. Archives take in what passed.

The published method adds a bonus for the format to one signal (:mod:`acqsynth.rewards.paper`). Here the format is a
gate: a bonus can be traded against the signal, and text that is no question has the largest signal of all.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch

import acqcore
from acqsynth.domains import Domain, Sample
from acqsynth.engines import Engine
from acqsynth.rewards.answers import Learnability, SampledAnswers
from acqsynth.rewards.batch import Batch, Entry, Guard, Rewards, set_floor
from acqsynth.rewards.fusion import BOUNDED, HISTORY, METHODS, LengthBins, checked_weights, fuse
from acqsynth.rewards.gates import Gate, Label, default_gates, require_samples
from acqsynth.rewards.signals import Diversity, Signal, acquisition_signals
from acqsynth.rewards.texts import Embedder, NgramEmbedder
from acqsynth.rewards.trl import (
    Completion,
    Log,
    TrlReward,
    completion_text,
    prompt_key,
    summary,
)

PARSES = "parses"  #: the gate before the others

#: Signals of the default reward and their weights. They rank a weak but learnable skill first and no trap, and their
#: ranks agree with the measured gain (``benchmarks/bench_signals.py``). ``influence`` (in all parameters) needs a
#: reference set, ``learnability`` (of answers that the domain finds right) an engine of the student. Measures of size
#: alone are left out: they favour coin flips and noise. Influence gets a quarter, being the noisiest for one sample;
#: so does learnability, which cannot tell guessing from half-learnt skills (at a half each, one row in five came from a
#: trap, at a quarter one in eight). Diversity gets a tenth: at a half the generator learnt to ask for the most digits
#: (``benchmarks/bench_loop.py``, on its tuning seeds).
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


class ComposedReward(TrlReward):
    """Gated and fused signals: a reward function of TRL 1.16, and ``score`` for other callers.

    Archives, histories and length statistics take in what is trained on: TRL's evaluation leaves them as they are. A
    call logs each signal's values and the gate that rejected, and :meth:`metrics`.

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
        _check_names("signals", signals, "total")
        _check_names("gates", gates, PARSES)
        if fusion not in METHODS:
            raise ValueError(f"fusion: unknown {fusion!r}, expected one of {', '.join(METHODS)}")
        names = dict.fromkeys(signal.name for signal in signals)
        self.weights = checked_weights(names, weights) if signals else {}
        chosen = set(names) if length_normalised is True else set(length_normalised or ())
        if chosen - set(names):
            raise ValueError(f"length_normalised: unknown {sorted(chosen - set(names))}, expected of {list(names)}")
        super().__init__(name)
        self.domain = domain
        self.signals = list(signals)
        self.gates = list(gates)
        self.fusion = fusion
        self.sync = sync
        self.length_bins = {name: LengthBins() for name in sorted(chosen)}
        self.history: dict[str, list[float]] = {name: [] for name in names}
        self._guard = Guard(name)

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

    def _reward(self, prompts: Sequence[Any], completions: Sequence[Completion], log: Log) -> list[float | None]:
        # TRL deals whole groups to the ranks in turn, so one may begin on a rank and end on the next.
        texts, groups = [completion_text(c) for c in completions], [prompt_key(prompt) for prompt in prompts]
        rewards = self._score(texts, groups, not log.evaluates, by_runs=True)
        shown: dict[str, Sequence[Any]] = {**rewards.components, "gate": rewards.rejected_by}
        metrics = self.metrics(rewards) if rewards.total else {}
        self._log(rewards.total, shown, metrics, log)
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
            found |= {f"{name}/{key}": number for key, number in summary(values, rewards.lengths).items()}
        for name, spread in rewards.spread.items():
            if spread.reliability is not None:
                found[f"{name}/reliability"] = spread.reliability
        for part in self._parts():
            found |= {f"{part.name}/{key}": value for key, value in getattr(part, "logged", {}).items()}
            if hasattr(part, "__len__"):
                found[f"archive/{part.name}"] = len(part)
        return found

    def refresh(self, student: Any) -> None:
        """Moves everything that scores, answers or labels to another student.

        Args:
            student: a path or hub id; also what the scorers take, for a reward that neither answers nor labels.
        """
        parts = self._parts()
        # Answers and labels are shared by parts: each object moves once.
        shared = [getattr(part, name, None) for part in parts for name in ("answers", "label")]
        for part in {id(part): part for part in (*parts, *shared)}.values():
            if hasattr(part, "refresh"):
                part.refresh(student)

    @property
    def failures(self) -> int:
        """Calls of a signal or gate that raised so far."""
        return self._guard.failures

    def state_dict(self) -> dict[str, Any]:
        """Archives, histories, length statistics and counts, for ``torch.save``."""
        return {
            "masked": self.masked,
            "failures": self.failures,
            "history": {name: list(values) for name, values in self.history.items()},
            "length_bins": {name: bins.state_dict() for name, bins in self.length_bins.items()},
            "parts": {key: part.state_dict() for key, part in self._stateful().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from where the reward of that state stood.

        Raises:
            ValueError: it is the state of a reward of other signals or gates.
        """
        stateful = self._stateful()
        for key, ours in (("parts", stateful), ("length_bins", self.length_bins), ("history", self.history)):
            if set(state[key]) != set(ours):
                raise ValueError(f"state: expected {key} {sorted(ours)}, got {sorted(state[key])}")
        self.masked, self._guard.failures = state["masked"], state["failures"]
        self.history = {name: list(values) for name, values in state["history"].items()}
        for name, bins in self.length_bins.items():
            bins.load_state_dict(state["length_bins"][name])
        for key, part in stateful.items():
            part.load_state_dict(state["parts"][key])

    def __repr__(self) -> str:
        weights = ", ".join(f"{weight:g} {name}" for name, weight in self.weights.items())
        return f"ComposedReward({self.fusion} of {weights or 'gates'}; gates {', '.join(self._gate_names())})"

    def _score(self, texts: Sequence[str | None], groups: Sequence[Hashable], update: bool, by_runs: bool) -> Rewards:
        if len(texts) != len(groups):
            raise ValueError(f"groups: expected {len(texts)}, one a text, got {len(groups)}")
        local = [Entry(group, text) for group, text in zip(groups, texts, strict=True)]
        batch = Batch()
        for entry in local:
            self._parse(entry)
        if update:
            self._check_form(
                [entry.sample for entry in local],
                "parses as a sample of the domain %r, so each gets the least reward; Domain.generator_prompt asks a "
                "generator for the form",
                self.domain.name,
            )
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
                    self._guard(part.name, partial(_accept, part), accepted, singly=False)
        mine = ranks[own]
        self.masked += sum(entry.total is None for entry in mine)
        rewards = Rewards.of(mine, [signal.name for signal in self.signals], self._gate_names())
        if update:
            self._watch.add(rewards.spread)
        return rewards

    def _parse(self, entry: Entry) -> None:
        parsed: Any = False
        if entry.text is not None:
            [parsed] = self._guard("parse", lambda texts: [self.domain.parse(texts[0]) or False], [entry.text])
        if parsed is False:
            entry.rejected_by = PARSES
        else:
            entry.sample, entry.masked = parsed, parsed is None

    def _gate(self, gate: Gate, asked: Sequence[Entry], batch: Batch) -> None:
        for entry, verdict in zip(asked, self._guard(gate.name, gate, _samples(asked, batch)), strict=True):
            if verdict is None:
                entry.masked = True
            elif isinstance(verdict, Sample):
                entry.sample = verdict
            elif not verdict:
                entry.rejected_by = gate.name

    def _gathered(self, local: list[Entry], batch: Batch) -> tuple[list[list[Entry]], int]:
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

    def _value(self, signals: Sequence[Signal], valid: Sequence[Entry], samples: Batch) -> None:
        for signal in signals:
            values = self._guard(signal.name, signal, samples)
            for entry, value in zip(valid, values, strict=True):
                # NaN and infinity are failures too.
                entry.values[signal.name] = value if value is not None and abs(value) < float("inf") else None
            if hasattr(signal, "stderr") and any(value is not None for value in values):
                errors = self._guard(signal.name, partial(_errors, signal), samples)
                for entry, error in zip(valid, errors, strict=True):
                    if error is not None:
                        entry.stderr[signal.name] = error

    def _total(self, entries: Sequence[Entry], update: bool) -> None:
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
        set_floor(entries, self.fusion in BOUNDED)

    def _parts(self) -> list[Any]:
        return [*self.signals, *self.gates]

    def _gate_names(self) -> list[str]:
        return [PARSES, *(gate.name for gate in self.gates)]

    def _stateful(self) -> dict[str, Any]:
        """Key -> part, of those that have a state."""
        named = [("signal", part) for part in self.signals] + [("gate", part) for part in self.gates]
        return {f"{kind}/{part.name}": part for kind, part in named if hasattr(part, "state_dict")}


def _check_names(argument: str, parts: Sequence[Any], taken: str) -> None:
    seen = {taken}
    for part in parts:
        name = getattr(part, "name", None)
        if not callable(part) or not isinstance(name, str):
            raise TypeError(f"{argument}: expected callable objects with a name, got {part!r}")
        if name in seen:
            raise ValueError(f"{argument}: {name!r} is there twice or is taken, give one of them another name")
        seen.add(name)


def _errors(signal: Any, samples: Sequence[Sample]) -> Sequence[float | None]:
    """Standard errors of a signal's values; None for each where it has none."""
    found: Sequence[float | None] | None = signal.stderr(samples)
    return [None] * len(samples) if found is None else found


def _accept(part: Any, samples: Sequence[Sample]) -> Sequence[Sample]:
    part.accept(samples)
    return samples


def _samples(entries: Sequence[Entry], batch: Batch) -> Batch:
    return batch.part(entry.sample for entry in entries if entry.sample is not None)
