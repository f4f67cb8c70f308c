"""Signals based on the student's own answers: k per question, drawn once per call for all signals and gates.

Answers are distinct if :func:`acqsynth.label.cluster` separates them: ``18`` and ``18 eggs`` are the same answer.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from acqsynth import checks
from acqsynth.domains import Domain, Sample
from acqsynth.engines import Completion, Engine, Sampling
from acqsynth.label import cluster
from acqsynth.rewards.batch import Batch
from acqsynth.rewards.signals import Published
from acqsynth.rewards.texts import Embedder


@dataclass(frozen=True)
class Drawn:
    """A sampled answer."""

    completion: Completion
    answer: str | None  #: verbatim from the completion; None if it has none


class SampledAnswers:
    """k student answers per question, drawn once per reward call and shared by all signals and gates.

    Args:
        k: answers per question.
        temperature: 1 samples from the student's own distribution.
        max_tokens: maximum tokens per answer; by default the domain's.
        top2: keep the probabilities that ``confidence`` needs.
        seed: sampling seed, combined with the questions asked, so that different questions get different seeds and a
            resumed run repeats the draws it would have made.

    Raises:
        ValueError: k below 1, or as :class:`acqsynth.engines.Sampling`.
    """

    def __init__(
        self,
        engine: Engine,
        domain: Domain,
        *,
        k: int = 8,
        temperature: float = 1.0,
        max_tokens: int | None = None,
        top2: bool = False,
        seed: int = 0,
    ) -> None:
        checks.positive_int("k", k)
        self.engine = engine
        self.domain = domain
        self.k = k
        most = domain.answer_tokens if max_tokens is None else max_tokens
        self.sampling = Sampling(k, temperature, 1.0, most, seed, top2)

    def draw(self, samples: Sequence[Sample]) -> list[list[Drawn]]:
        """For each of n samples, k answers to its question."""
        return Batch.of(samples).each((self, "draws"), [sample.question for sample in samples], self._draw)

    def shares(self, samples: Sequence[Sample]) -> list[Fraction]:
        """For each of n samples, the share of the k answers that equal its own."""
        batch = Batch.of(samples)

        def compute(new: list[Sample]) -> list[Fraction]:
            asked: list[tuple[int, int, str]] = []  # position, number of answers of one form, one of these
            for i, drawn in enumerate(self.draw(batch.part(new))):
                forms: dict[str, list[str]] = {}
                for d in drawn:
                    if d.answer is not None:
                        forms.setdefault(self.domain.canonical(d.answer), []).append(d.answer)
                asked += [(i, len(answers), answers[0]) for answers in forms.values()]
            right = self.domain.equivalent([new[i] for i, _, _ in asked], [answer for _, _, answer in asked])
            shares = [Fraction(0)] * len(new)
            for (i, count, _), equal in zip(asked, right, strict=True):
                shares[i] += equal * Fraction(count, self.k)
            return shares

        return batch.each((self, "shares"), batch, compute, _answered)

    def clusters(self, samples: Sequence[Sample]) -> list[list[int]]:
        """For each of n samples, the sizes of the clusters of equal answers, largest first."""
        return [[len(members) for members in found] for found in self._clusters(samples)]

    def of_majority(self, samples: Sequence[Sample]) -> list[bool]:
        """For each of n samples, whether its answer is the most frequent of the k answers; False for a tie."""
        batch = Batch.of(samples)

        def compute(new: list[Sample]) -> list[bool]:
            most: list[str | None] = []
            for drawn, found in zip(self.draw(batch.part(new)), self._clusters(batch.part(new)), strict=True):
                alone = bool(found) and (len(found) == 1 or len(found[0]) > len(found[1]))
                most.append(drawn[found[0][0]].answer if alone else None)
            return self.domain.equivalent(new, most)

        return batch.each((self, "majority"), batch, compute, _answered)

    def _clusters(self, samples: Sequence[Sample]) -> list[list[list[int]]]:
        batch = Batch.of(samples)

        def compute(new: list[Sample]) -> list[list[list[int]]]:
            answers = [[d.answer for d in drawn] for drawn in self.draw(batch.part(new))]
            return cluster(self.domain, new, answers)

        return batch.each((self, "clusters"), batch, compute, lambda sample: (sample.question, _extra(sample)))

    def refresh(self, student: Any) -> None:
        """Switches to another student, see :meth:`acqsynth.engines.Engine.reload`."""
        self.engine.reload(student)

    def _draw(self, questions: list[str]) -> list[list[Drawn]]:
        sampling = replace(self.sampling, seed=zlib.crc32("\0".join(questions).encode(), self.sampling.seed))
        prompts = [self.domain.student_prompt(question) for question in questions]
        groups = self.engine.generate(prompts, sampling)
        return [[Drawn(draw, self.domain.answer_of(draw.text)) for draw in group] for group in groups]


def _answered(sample: Sample) -> tuple[str, str, str]:
    return sample.question, sample.answer, _extra(sample)


def _extra(sample: Sample) -> str:
    """The sample's ``extra`` as text: a domain may compare answers by it, such as by the tests of a program."""
    return json.dumps(sample.extra, sort_keys=True, default=str)


class Confidence(Published):
    """Mean of ``1 - (p1 - p2)`` over the tokens of the student's own answers, p1 and p2 the two largest probabilities.

    In [0, 1]: 0 = certain, 1 = undecided, so it measures the *lack* of confidence, like the paper's reward of that
    name; None without tokens. Source: margin sampling, Scheffer et al. 2001.

    Raises:
        ValueError: answers drawn without ``top2``.
    """

    name = "confidence"

    def __init__(self, answers: SampledAnswers, *, paper_compat: bool = False) -> None:
        if not answers.sampling.top2:
            raise ValueError("answers: expected SampledAnswers with top2=True, which confidence needs")
        self.answers = answers

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        return [mean([1 - m for d in drawn for m in margins(d.completion)]) for drawn in self.answers.draw(samples)]


class AnswerVariance(Published):
    """Number of distinct answers divided by k, in [0, 1]; completions without an answer do not count."""

    name = "answer_variance"

    def __init__(self, answers: SampledAnswers, *, paper_compat: bool = False, embed: Embedder | None = None) -> None:
        self.answers = answers

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        return [len(sizes) / self.answers.k for sizes in self.answers.clusters(samples)]


class SemanticEntropy:
    """Entropy of the shares of the distinct answers in nats, 0 to log k; None if no completion has an answer.

    Source: Farquhar et al. 2024.
    """

    name = "semantic_entropy"

    def __init__(self, answers: SampledAnswers) -> None:
        self.answers = answers

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        return [_entropy(sizes) for sizes in self.answers.clusters(samples)]


class Learnability:
    """``p (1 - p)`` in [0, 1/4], p the share of the student's answers that equal the sample's own.

    Args:
        verified: return 0 unless ``domain.verify`` confirms the sample's own answer, as a question whose answer is a
            coin toss gets the largest value. For domains that cannot prove answers (mathematics, medicine), 0 unless
            the majority of the student's answers agrees with it; ``logged`` records this as ``by_majority``.

    Source: Florensa et al. 2018; Foster et al. 2025.
    """

    name = "learnability"

    def __init__(self, answers: SampledAnswers, *, verified: bool = False) -> None:
        self.answers = answers
        self.verified = verified
        #: Metrics that a reward logs besides the values.
        self.logged = {"by_majority": float(not answers.domain.proves)} if verified else {}

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        batch = Batch.of(samples)
        # Exact, as fusion ranks values that differ by rounding.
        values: list[float | None] = [float(p * (1 - p)) for p in self.answers.shares(batch)]
        if not self.verified:
            return values
        verdicts = batch.verified(self.answers.domain)
        if self.answers.domain.proves:
            return [v if ok else 0.0 for v, ok in zip(values, verdicts, strict=True)]
        agreed = self.answers.of_majority(batch)
        return [
            v if ok or (ok is None and agrees) else 0.0 for v, ok, agrees in zip(values, verdicts, agreed, strict=True)
        ]


def mean(values: Sequence[float]) -> float | None:
    """The mean; None if there are no values."""
    return math.fsum(values) / len(values) if values else None


def margins(completion: Completion) -> list[float]:
    """``p1 - p2`` of each token."""
    if completion.top2_logprobs is None:
        raise ValueError("engine: returned no top2_logprobs, though they were requested")
    return [math.exp(first) - math.exp(second) for first, second in completion.top2_logprobs]


def _entropy(counts: Sequence[int]) -> float | None:
    total = sum(counts)
    return -sum(c / total * math.log(c / total) for c in counts) + 0.0 if total else None
