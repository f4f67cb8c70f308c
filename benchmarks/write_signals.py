"""The signals, gates and choices of ``bench_write``, whose docstring is the protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

import acqcore
from acqcore.selection.subsets import in_turn
from acqsynth.domains import Sample
from acqsynth.rewards.reward import ComposedReward
from acqsynth.rewards.texts import NearCopies
from benchmarks.pool_data import Message
from benchmarks.pool_signals import influence, samples as as_rows, trusted
from benchmarks.writer import Draws

if TYPE_CHECKING:
    from benchmarks.bench_write import Seed

CANDIDATES = 8  # completions per request
ANSWERABLE = 0.25
DEFAULT = "default"
MUTUAL_INFORMATION: dict[str, Any] = {"form": "linear", "probes": 8}


class StudentSignals:
    """Signals of a seed's warm student on samples, in the format that it is fitted to."""

    def __init__(self, seed: Seed) -> None:
        self._seed, self._fitter = seed, seed.bench.fitter
        self._student = acqcore.Student.from_model(self._fitter.model)
        self._batch_tokens = 32768 if self._fitter.device.type == "cuda" else 2048

    def probability(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Probability that the student writes each sample's label, ``[n]`` float32 on the CPU."""
        return (-self._fitter.losses(self._seed.placed(samples))[0]).exp().cpu()

    def values(self, name: str, samples: Sequence[Sample]) -> torch.Tensor:
        """The signal's values, ``[n]`` float32 on the CPU."""
        if name in ("agreement", "learnability"):
            p = self.probability(samples)
            return p if name == "agreement" else p * (1 - p)
        rows = self._seed.placed(samples)
        if name == "influence":
            return influence(self._fitter, self._student, self._seed.warm_rows, rows, self._batch_tokens)
        acquisition = name.replace(" ", "_")
        arguments = {acquisition: {**MUTUAL_INFORMATION, "seed": self._seed.number}}
        return acqcore.score(
            self._student, as_rows(rows), acquisition, progress=False, batch_tokens=self._batch_tokens,
            acquisition_args=arguments if acquisition == "mutual_information" else None,
        )[acquisition]  # fmt: skip


class StudentSignal:
    """One of these signals, as a component of a reward."""

    def __init__(self, students: StudentSignals, name: str) -> None:
        self._students, self.name = students, name.replace(" ", "_")

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        return [float(value) for value in self._students.values(self.name, samples)]


class Answerable:
    """The gate ``answerable``, with the exact probability instead of a share of sampled answers."""

    name = "answerable"

    def __init__(self, students: StudentSignals) -> None:
        self._students = students

    def __call__(self, samples: Sequence[Sample]) -> list[bool | None]:
        return [bool(p >= ANSWERABLE) for p in self._students.probability(samples)]


class Candidates:
    """Completions of a seed's requests, ``CANDIDATES`` each, and the choices among them."""

    def __init__(self, seed: Seed, draws: Draws, texts: Sequence[str]) -> None:
        self._seed = seed
        labels = [intent for intent in seed.requests for _ in range(CANDIDATES)]
        fits = seed.bench.encode.fits
        #: None if a completion is empty or too long for a student's row.
        self.samples = [
            Sample(text, label) if text and fits(Message(text, label)) else None
            for text, label in zip(texts, labels, strict=True)
        ]
        self._finished = draws.finished.tolist()
        self._students = StudentSignals(seed)
        self._passed: list[bool] | None = None

    def first(self) -> list[Message]:
        """The first usable completion of each request."""
        return [self._fallback(places, None) for places in self._groups()]

    def best(self, name: str) -> list[Message]:
        """The completion with the highest value for each request, excluding near copies of those already taken."""
        values = self._values(name)
        likely = self._of_signal("agreement", [sample is not None for sample in self.samples])
        taken, chosen = NearCopies(), []
        for places in self._groups():
            ranked = sorted((i for i in places if values[i] is not None), key=lambda i: (-(values[i] or 0.0), i))
            fresh = (i for i in ranked if taken.find(self._message(i).text) is None)
            best = next(fresh, None)
            row = self._fallback(places, likely if name == DEFAULT else None) if best is None else self._message(best)
            taken.add([row.text])
            chosen.append(row)
        return chosen

    def trusted(self) -> list[Message]:
        """As many rows as there are requests: trusted labels, then the highest loss, one of each label in turn."""
        fitter, seed = self._seed.bench.fitter, self._seed
        passed = [i for i, value in enumerate(self._values("random")) if value is not None]
        messages = [self._message(i) for i in passed]
        rows = seed.placed(seed.seeds + [sample for i in passed if (sample := self.samples[i]) is not None])
        numbers = {intent: number for number, intent in enumerate(seed.shown)}
        labels = torch.tensor([numbers[one.answer] for one in seed.seeds] + [numbers[one.intent] for one in messages])
        known = len(seed.seeds)
        trust = acqcore.label_trust(fitter.states(rows)[1].cpu(), labels)[known:]
        k = len(seed.requests)
        held = trusted(trust, [one.text for one in messages], int((trust > 0).sum()), k)
        losses = fitter.losses(rows)[0].cpu()[known:]
        order = sorted(held, key=lambda i: (-float(losses[i]), i))
        return [messages[order[i]] for i in in_turn(labels[known:][order], k).tolist()]

    def _groups(self) -> list[range]:
        return [range(i, i + CANDIDATES) for i in range(0, len(self.samples), CANDIDATES)]

    def _message(self, i: int) -> Message:
        sample = self.samples[i]
        assert sample is not None
        return Message(sample.question, sample.answer)

    def _fallback(self, places: range, likely: Sequence[float | None] | None) -> Message:
        """The first or the likeliest usable completion; a seed row of the intent if there is none."""
        there = [i for i in places if self.samples[i] is not None]
        if not there:
            return self._seed.shown[self._seed.requests[places[0] // CANDIDATES]][0]
        return self._message(there[0] if likely is None else max(there, key=lambda i: likely[i] or 0.0))

    def _values(self, name: str) -> list[float | None]:
        """A value for each candidate, None if a gate rejects it."""
        if name == DEFAULT:
            groups = [i // CANDIDATES for i in range(len(self.samples))]
            found = self._seed.reward(DEFAULT).score(self._tagged(), groups, update=False)
            return [total if ok else None for total, ok in zip(found.total, found.passed, strict=True)]
        if self._passed is None:
            gates = ComposedReward(self._seed.domain, [], gates=self._seed.gates())
            self._passed = gates.score(self._tagged(), [0] * len(self.samples), update=False).passed
        if name == "random":
            return [0.0 if ok else None for ok in self._passed]
        return self._of_signal(name, self._passed)

    def _of_signal(self, name: str, asked: Sequence[bool]) -> list[float | None]:
        samples = [sample for sample, ok in zip(self.samples, asked, strict=True) if ok and sample is not None]
        found = iter(self._students.values(name, samples).tolist() if samples else [])
        return [next(found) if ok else None for ok in asked]

    def _tagged(self) -> list[str | None]:
        """The samples in the format of the package's generators; None for unfinished completions."""
        return [
            self._seed.domain.tagged(sample) if sample is not None and done else None
            for sample, done in zip(self.samples, self._finished, strict=True)
        ]
