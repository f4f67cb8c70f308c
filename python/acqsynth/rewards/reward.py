"""The composed reward of a generator: gates, then signals, fused into one number per sample.

    reward = ComposedReward.default(domain, "path/to/student", seeds=seeds, engine=engine)
    GRPOTrainer(model=generator, reward_funcs=[reward], ...)

GRPO, best-of-n and DPO share it. A call with n completions takes these steps:

1. Each text is parsed, then passes through the gates, cheap ones first, until one rejects it. A sample that a gate
   replaces, such as by a labelled one, passes the earlier gates again.
2. Signals score the samples that passed. A scorer that fails, on one sample or on all, masks: the sample's total is
   None, and the sample is excluded from all statistics. A weighted signal or a gate that has failed on all samples so
   far, at least three, raises :class:`acqsynth.rewards.batch.BrokenPartError`, on all ranks under ``sync``.
3. Each signal's value is normalised against samples of similar length (:class:`acqsynth.rewards.fusion.LengthBins`).
4. :func:`acqsynth.rewards.fusion.fuse` combines the signals. A gated sample gets the floor: 0 under ``rank`` and
   ``quantile``, whose values are above 0; otherwise one standard deviation of the call below the lowest of its group
   (of the call, if none of the group passed; under ``raw``, of all calls so far). So it never outranks or ties with a
   valid sample of its group. While no sample has passed, it is 0.
5. Archives add the samples that passed.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch

import acqcore
from acqsynth.domains import Domain, Sample
from acqsynth.engines import Engine
from acqsynth.rewards.answers import Learnability, SampledAnswers
from acqsynth.rewards.batch import Batch, BrokenPartError, Entry, Rewards, numbers, require_samples, set_floor
from acqsynth.rewards.fusion import BOUNDED, HISTORY, METHODS, LengthBins, checked_weights, fuse
from acqsynth.rewards.gates import Gate, Label, default_gates
from acqsynth.rewards.signals import Diversity, Signal, acquisition_signals
from acqsynth.rewards.texts import Embedder, NgramEmbedder
from acqsynth.rewards.trl import Completion, Log, TrlReward, completion_text, prompt_key, summary, warn_of_ranks

PARSES = "parses"  #: name of the gate before all others

#: Signals of the default reward and their weights. They rank a weak but learnable skill first, never a trap, and their
#: ranks agree with the measured gain (``benchmarks/bench_signals.py``). Measures of magnitude favour coin flips and
#: noise. Influence is the noisiest for a single sample, and learnability cannot tell guessing from half-learnt skills:
#: at 0.5 each, one row in five came from a trap; at 0.25, one in eight. With diversity at 0.5 the generator learnt to
#: ask for the most digits (``benchmarks/bench_loop.py``, on its tuning seeds).
DEFAULT_WEIGHTS: dict[str, float] = {
    "mutual_information": 1.0,
    "influence": 0.25,
    "learnability": 0.25,
    "diversity": 0.1,
}


#: Arguments of mutual information in the default reward. On SmolLM2-135M, eight dropout draws at 5 % in all blocks add
#: half a nat to the loss and are not reproducible within a data set; four probes of the linear form are
#: (``docs/reliability.md``).
INFORMATION: dict[str, Any] = {"form": "linear", "probes": 4}


class ComposedReward(TrlReward):
    """Gated and fused signals: a TRL 1.16 reward function, with ``score`` for other callers.

    TRL's evaluation leaves archives, histories and length statistics unchanged. Calls and refreshes from several
    threads take turns. A call logs each signal's values, the gate that rejected each sample, and :meth:`metrics`.

    Args:
        domain: parses texts.
        signals: signals with unique names. Without any, the reward is 1 for samples that pass the gates, else 0.
        gates: gates with unique names; :func:`acqsynth.rewards.gates.default_gates` creates the usual ones. A check
            that the text parses always comes first.
        fusion: a method of :func:`acqsynth.rewards.fusion.fuse`. The default suits every caller, even one that sends
            one sample at a time. With whole groups, as in GRPO, ``z`` taught students more
            (``benchmarks/bench_loop.py``).
        weights: signal -> weight, 1 by default. A negative weight reverses a signal; 0 only logs it.
        length_normalised: signals to normalise by length bin; True for all.
        sync: the ranks of the ``torch.distributed`` group call together and share archives, running statistics, and
            groups that straddle ranks. Every call uses one collective, so every rank must call. Without it, a rank
            compares a sample only with its own, and the reward warns.
        name: name under which TRL logs.

    Raises:
        ValueError: an unknown fusion method, weight or signal to normalise, or a duplicate name.
        TypeError: a domain that is not a ``Domain``, such as its name; a signal or gate that is not callable or has no
            name.
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
        if not isinstance(domain, Domain):
            raise TypeError(f"domain: expected a Domain, as acqsynth.domains.domain(name) returns, got {domain!r:.60}")
        _check_names("signals", signals, "total")
        _check_names("gates", gates, PARSES)
        if fusion not in METHODS:
            raise ValueError(f"fusion: unknown {fusion!r}, expected one of {', '.join(METHODS)}")
        names = dict.fromkeys(signal.name for signal in signals)
        self.weights = checked_weights(names, weights) if signals else {}
        if isinstance(length_normalised, str):
            raise TypeError(f"length_normalised: expected names or a bool, got {length_normalised!r}")
        chosen = set(names) if length_normalised is True else set(length_normalised or ())
        if chosen - set(names):
            raise ValueError(f"length_normalised: unknown {sorted(chosen - set(names))}, known signals: {list(names)}")
        super().__init__(name)
        self.domain = domain
        self.signals = list(signals)
        self.gates = list(gates)
        self.fusion = fusion
        self.sync = sync
        self.length_bins = {name: LengthBins() for name in sorted(chosen)}
        self.history: dict[str, list[float]] = {name: [] for name in names}
        self.scored = 0  #: number of texts scored so far, without evaluation and probes
        self._lowest = math.inf  # of the totals of all calls
        self._turn = threading.RLock()  # calls and refreshes in threads take turns

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_turn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _turn=threading.RLock())

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
        weights: Mapping[str, float] | None = None,
        **options: Any,
    ) -> ComposedReward:
        """The default gates, then the signals of ``DEFAULT_WEIGHTS``.

        Args:
            domain: parses texts.
            student: as :class:`acqsynth.rewards.scoring.Scorer`, but not sharded across ranks, which the linear form of
                mutual information does not support.
            seeds: rows shown to the generator.
            reference: rows whose loss should fall, for ``influence``.
            engine: an engine for the student, for ``learnability`` and the gate ``answerable``.
            evaluation: rows that no sample may repeat.
            embed: embedder of questions, for ``diversity``; hashed n-grams by default.
            answers: options of :class:`SampledAnswers`.
            label: maps n samples to labelled samples, with None for those that have no label; by default samples keep
                the generator's answers.
            scoring: options of Scorer.
            weights: signal -> weight that replaces the one in ``DEFAULT_WEIGHTS``.
            options: other options of ComposedReward.
        """
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
        default = {signal.name: DEFAULT_WEIGHTS[signal.name] for signal in signals}
        return cls(domain, signals, **({"gates": gates} | options | {"weights": default | dict(weights or {})}))

    def score(self, texts: Sequence[str | None], groups: Sequence[Hashable], *, update: bool = True) -> Rewards:
        """Scores n texts.

        Args:
            texts: generated texts; None never parses.
            groups: group key of each text; equal keys, on any rank under ``sync``, form one group.
            update: update archives, histories and length statistics; False leaves them unchanged, for a probe that is
                scored repeatedly.

        Raises:
            ValueError: texts and groups differ in length.
            TypeError: a string in place of the texts; a group that is not hashable, or a tensor, which equals only
                itself.
        """
        if isinstance(texts, str):
            raise TypeError("texts: expected a list of texts, got a string")
        for i, group in enumerate(groups):
            try:
                hash(group)
                usable = not isinstance(group, torch.Tensor)
            except TypeError:
                usable = False
            if not usable:
                raise TypeError(f"groups[{i}]: expected a hashable key such as a string, got {group!r:.60}")
        with self._turn:
            return self._score(texts, groups, update, by_runs=False)

    def _reward(self, prompts: Sequence[Any], completions: Sequence[Completion], log: Log) -> list[float | None]:
        # TRL splits consecutive groups over the ranks, so a group may begin on one rank and end on the next.
        texts, groups = [completion_text(c) for c in completions], [prompt_key(prompt) for prompt in prompts]
        with self._turn:
            rewards = self._score(texts, groups, not log.evaluates, by_runs=True)
            metrics = self.metrics(rewards)
        shown: dict[str, Sequence[Any]] = {**rewards.components, "gate": rewards.rejected_by}
        self._log(rewards.total, shown, metrics, log)
        return rewards.total

    def metrics(self, rewards: Rewards) -> dict[str, float]:
        """Metrics logged for a call; undefined numbers are omitted.

        ``gated/<gate>`` and ``masked``: shares of the samples. ``<signal>/mean``, ``<signal>/length_correlation`` and
        the same for ``total``: over the samples that passed. ``<signal>/reliability``: share of its spread within
        groups that is not estimation noise (:class:`acqsynth.rewards.batch.Spread`), for signals with standard errors.
        ``archive/<signal or gate>``: number of entries. Signals and gates add the metrics in their ``logged``.
        """
        if not (n := len(rewards.total)):
            return {}
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
        """Switches everything that scores, answers or labels to another student.

        Args:
            student: a path or hub id; without sampled answers and labels, also any other student that Scorer accepts.
        """
        parts = self._parts()
        # Signals and gates share answers and labels, so each object is refreshed once.
        shared = [getattr(part, name, None) for part in parts for name in ("answers", "label")]
        with self._turn:
            self._guard.restart()
            for part in {id(part): part for part in (*parts, *shared)}.values():
                if hasattr(part, "refresh"):
                    part.refresh(student)

    @property
    def failures(self) -> int:
        """Number of signal and gate calls that have raised."""
        return self._guard.failures

    def state_dict(self) -> dict[str, Any]:
        """Archives, histories, length statistics and counts, for ``torch.save``."""
        with self._turn:
            return {
                "masked": self.masked,
                "scored": self.scored,
                **self._guard.state_dict(),
                "lowest": self._lowest,
                "history": {name: list(values) for name, values in self.history.items()},
                "length_bins": {name: bins.state_dict() for name, bins in self.length_bins.items()},
                "parts": {key: part.state_dict() for key, part in self._stateful().items()},
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state of :meth:`state_dict`.

        Raises:
            ValueError: the state belongs to a reward with other signals or gates.
        """
        stateful = self._stateful()
        for key, ours in (("parts", stateful), ("length_bins", self.length_bins), ("history", self.history)):
            if (found := set(state.get(key, ()))) != set(ours):
                raise ValueError(f"state: expected {key} {sorted(ours)}, got {sorted(found)}")
        with self._turn:
            self._guard.load_state_dict(state)
            self.masked, self.scored, self._lowest = state["masked"], state["scored"], state["lowest"]
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
            raise ValueError(f"groups: expected {len(texts)}, one per text, got {len(groups)}")
        local = [Entry(group, text) for group, text in zip(groups, texts, strict=True)]
        batch = Batch()
        ranks, own = self._gathered(local, batch, update)
        if update:
            self._check_form(
                [entry.sample for entry in local],
                "parses as a sample of the domain %r, so each gets the lowest reward; Domain.generator_prompt asks a "
                "generator for the expected format",
                self.domain.name,
            )
        entries = [entry for rank in ranks for entry in rank]
        if by_runs:
            for j, (_, members) in enumerate(groupby(entries, key=lambda entry: entry.group)):
                for entry in members:
                    entry.group = j
        self._total(entries, update)
        if update:
            accepted = _samples([entry for entry in entries if entry.valid and entry.total is not None], batch)
            for part in self._parts():
                if hasattr(part, "accept"):
                    self._guard(part.name, partial(_accept, part), accepted, singly=False)
        mine = ranks[own]
        rewards = Rewards.of(mine, [signal.name for signal in self.signals], self._gate_names())
        if update:
            self.scored += len(mine)
            self.masked += rewards.total.count(None)
            self._watch.add(rewards.spread)
        return rewards

    def _parse(self, entries: Sequence[Entry], update: bool) -> None:
        read = self._guard.each("parse", self.domain.parse, [entry.text for entry in entries], needed=update)
        for entry, parsed in zip(entries, read, strict=True):
            if entry.text is None or parsed == (None,):
                entry.rejected_by = PARSES
            else:
                entry.sample, entry.masked = (None, True) if parsed is None else (parsed[0], False)

    def _gate(self, gate: Gate, entries: Sequence[Entry], batch: Batch, update: bool) -> None:
        valid = [entry for entry in entries if entry.valid]
        for entry, verdict in zip(valid, self._ask(gate, gate, _samples(valid, batch), update), strict=True):
            if verdict is None:
                entry.masked = True
            elif isinstance(verdict, Sample):
                entry.sample = verdict
            elif not verdict:
                entry.rejected_by = gate.name

    def _judge(self, local: Sequence[Entry], batch: Batch, update: bool) -> None:
        """Parses the texts of this process, and asks the gates and the signals that do not compare samples."""
        self._parse(local, update)
        for i, gate in enumerate(self.gates):
            before = [entry.sample for entry in local]
            self._gate(gate, local, batch, update)
            replaced = [entry for entry, sample in zip(local, before, strict=True) if entry.sample is not sample]
            for earlier in self.gates[:i]:
                self._gate(earlier, replaced, batch, update)
        self._value([signal for signal in self.signals if not _compares(signal)], local, batch, update)

    def _gathered(self, local: list[Entry], batch: Batch, update: bool) -> tuple[list[list[Entry]], int]:
        """The entries of each rank with the signals' values, and this process's rank."""
        distributed = torch.distributed
        ranks_exist = distributed.is_available() and distributed.is_initialized()
        synced = self.sync and ranks_exist
        if ranks_exist and not synced and distributed.get_world_size() > 1:
            warn_of_ranks(self.__name__)
        broken = None
        try:
            self._judge(local, batch, update)
        except BrokenPartError as error:
            broken = error  # raised on all ranks: the others would wait for this one
        found: list[Any] = [(local, broken)]
        if synced:
            found = [None] * distributed.get_world_size()
            distributed.all_gather_object(found, (local, broken))
        for _, failure in found:
            if failure is not None:
                raise failure
        ranks = [entries for entries, _ in found]
        entries = [entry for rank in ranks for entry in rank]
        self._value([signal for signal in self.signals if _compares(signal)], entries, batch, update)
        return ranks, distributed.get_rank() if synced else 0

    def _value(self, signals: Sequence[Signal], entries: Sequence[Entry], batch: Batch, update: bool) -> None:
        valid = [entry for entry in entries if entry.valid]
        samples = _samples(valid, batch)
        for signal in signals:
            values = self._ask(signal, partial(numbers, signal), samples, update)
            for entry, value in zip(valid, values, strict=True):
                entry.values[signal.name] = value
            if hasattr(signal, "stderr") and any(value is not None for value in values):
                errors = self._ask(signal, partial(numbers, signal.stderr), samples, update)
                for entry, error in zip(valid, errors, strict=True):
                    if error is not None:
                        entry.stderr[signal.name] = error

    def _ask(self, part: Any, function: Callable[[Any], Sequence[Any]], samples: Batch, update: bool) -> Sequence[Any]:
        # Only a part that masks training samples may raise: no signal of weight 0, and none in a probe.
        needed = update and (part in self.gates or part.name in self.weights)
        return self._guard(part.name, function, samples, singly=not _compares(part), needed=needed)

    def _total(self, entries: Sequence[Entry], update: bool) -> None:
        valid = [entry for entry in entries if entry.valid]
        if not self.signals:
            for entry in entries:
                entry.total = None if entry.masked else float(entry.rejected_by is None)
            return
        # A sample that lacks the value of any weighted signal is excluded from all statistics.
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
        lowest = math.inf
        if self.fusion == "raw":  # its totals of different calls are comparable
            lowest = min([self._lowest, *(total for total in totals if total is not None)])
            if update:
                self._lowest = lowest
        set_floor(entries, self.fusion in BOUNDED, lowest)

    def _parts(self) -> list[Any]:
        return [*self.signals, *self.gates]

    def _gate_names(self) -> list[str]:
        return [PARSES, *(gate.name for gate in self.gates)]

    def _stateful(self) -> dict[str, Any]:
        """The signals and gates that have state, by key."""
        named = [("signal", part) for part in self.signals] + [("gate", part) for part in self.gates]
        return {f"{kind}/{part.name}": part for kind, part in named if hasattr(part, "state_dict")}


def _check_names(argument: str, parts: Sequence[Any], taken: str) -> None:
    if callable(parts):
        raise TypeError(f"{argument}: expected a list, got {parts!r}")
    seen = {taken}
    for part in parts:
        name = getattr(part, "name", None)
        if not callable(part) or not isinstance(name, str):
            raise TypeError(f"{argument}: expected callable objects with a name, got {part!r}")
        if name in seen:
            raise ValueError(f"{argument}: the name {name!r} is duplicated or reserved, rename one of them")
        seen.add(name)


def _compares(part: Any) -> bool:
    """Whether a signal or gate compares the samples of a call, so that single ones cannot be retried."""
    return bool(getattr(part, "set_level", False))


def _accept(part: Any, samples: Sequence[Sample]) -> Sequence[Sample]:
    part.accept(samples)
    return samples


def _samples(entries: Sequence[Entry], batch: Batch) -> Batch:
    return batch.part(entry.sample for entry in entries if entry.sample is not None)
