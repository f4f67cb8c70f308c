"""Signals over answers that the student samples for a question; one draw serves them all.

=====================  ==========================================================================================
``confidence``         mean over the drawn tokens of ``1 - (p1 - p2)``, p1 and p2 the two largest probabilities;
                       0 = sure, 1 = torn. Larger is more worth, so it is *lack* of confidence, as the paper's
                       reward of that name is. Source: margin sampling, Scheffer et al. 2001
``answer_variance``    different parsed answers over k
``semantic_entropy``   entropy of the shares of the different parsed answers, nats (Farquhar et al. 2024)
``learnability``       ``p (1 - p)``, p the share of the k answers that equal the sample's own (Florensa et al.
                       2018; Foster et al. 2025): 0 for what is always or never answered so
=====================  ==========================================================================================

Equal means equal after ``domain.canonical``; learnability asks ``domain.equivalent``.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from acqsynth.domains import Domain, Sample
from acqsynth.engines import Completion, Engine, Sampling
from acqsynth.rewards.embeddings import Embedder
from acqsynth.rewards.shared import once


@dataclass(frozen=True)
class Drawn:
    """A sampled answer."""

    completion: Completion
    answer: str | None  #: as it stands in the completion; None where it gives none
    canonical: str | None


class SampledAnswers:
    """k answers of the student to each question, drawn once in a reward call whoever asks.

    Args:
        engine: of the student.
        domain: prompts the student and parses its answers.
        k: answers of each question.
        temperature: 1 draws from the student's own distribution.
        max_tokens: of an answer; by default the domain's.
        top2: keep the probabilities that ``confidence`` needs.
        seed: with the questions asked it gives the seed of a draw, so that other questions draw otherwise, and a run
            that resumes draws as if it had not stopped.

    Raises:
        ValueError: k below 1.
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
        if k < 1:
            raise ValueError(f"k: expected at least 1 answer, got {k}")
        self.engine = engine
        self.domain = domain
        self.k = k
        self.sampling = Sampling(k, temperature, 1.0, max_tokens or domain.answer_tokens, seed, top2)

    def draw(self, questions: Sequence[str]) -> list[list[Drawn]]:
        """k answers of each of n questions; those seen before in this call are not drawn again."""
        known: dict[str, list[Drawn]] = once((id(self), "draws"), dict)
        new = [q for q in dict.fromkeys(questions) if q not in known]
        if new:
            sampling = replace(self.sampling, seed=zlib.crc32("\0".join(new).encode(), self.sampling.seed))
            prompts = [self.domain.student_prompt(q) for q in new]
            for question, completions in zip(new, self.engine.generate(prompts, sampling), strict=True):
                known[question] = [self._read(completion) for completion in completions]
        return [known[q] for q in questions]

    def shares(self, samples: Sequence[Sample]) -> list[float]:
        """Share of the k answers that equal the sample's own, of n samples."""
        known: dict[tuple[str, str], float] = once((id(self), "shares"), dict)
        new = {(s.question, s.answer): s for s in samples if (s.question, s.answer) not in known}
        asked: list[tuple[Sample, int, str]] = []  # sample, its answers of one kind, one of them
        for sample, drawn in zip(new.values(), self.draw([question for question, _ in new]), strict=True):
            counts = _clusters(drawn)
            kinds = {d.canonical: d.answer for d in drawn if d.canonical is not None and d.answer is not None}
            asked += [(sample, counts[canonical], answer) for canonical, answer in kinds.items()]
        right = self.domain.equivalent([sample for sample, _, _ in asked], [answer for _, _, answer in asked])
        known.update(dict.fromkeys(new, 0.0))
        for (sample, count, _), equal in zip(asked, right, strict=True):
            known[sample.question, sample.answer] += equal * count / self.k
        return [known[sample.question, sample.answer] for sample in samples]

    def refresh(self, student: Any) -> None:
        """Another student answers from now on, see :meth:`acqsynth.engines.Engine.reload`."""
        self.engine.reload(student)

    def _read(self, completion: Completion) -> Drawn:
        answer = self.domain.answer_of(completion.text)
        return Drawn(completion, answer, None if answer is None else self.domain.canonical(answer))


class Confidence:
    """Mean of ``1 - (p1 - p2)`` over the tokens of the student's own answers, in [0, 1]; None where there is no token.

    Args:
        answers: drawn with ``top2``.
        paper_compat: the released form, ``1 / mean(p1 - p2)`` clipped to [0, 2], over one answer of at most 512 tokens
            to the raw question, p1 and p2 the first two entries of a dictionary that holds the drawn token first.

    Raises:
        ValueError: answers without ``top2``.
    """

    name = "confidence"

    def __init__(self, answers: SampledAnswers, *, paper_compat: bool = False) -> None:
        if not answers.sampling.top2:
            raise ValueError("answers: expected them with top2=True, which confidence reads")
        self.answers = answers
        self.paper_compat = paper_compat

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        if self.paper_compat:
            return self._released(samples)
        draws = self.answers.draw([sample.question for sample in samples])
        return [_mean([1 - m for d in drawn for m in _margins(d.completion)]) for drawn in draws]

    def _released(self, samples: Sequence[Sample]) -> list[float | None]:
        sampling = replace(self.answers.sampling, n=1, max_tokens=512)
        values: list[float | None] = []
        for [completion] in self.answers.engine.generate([sample.question for sample in samples], sampling):
            mean = _mean(_margins_in_dictionary_order(completion))
            if mean is not None:
                mean = min(max(1 / mean if mean else math.inf, 0.0), 2.0)
            values.append(mean)
        return values


class AnswerVariance:
    """Different parsed answers over k, in [0, 1]; an answer that can not be parsed is none.

    Args:
        answers: the draws.
        paper_compat: the released form, HDBSCAN clusters (of two or more, as the paper's setting is not known) of the
            embeddings of whole completions over k, the label of noise counted as a cluster.
        embed: of the completions, for ``paper_compat``.

    Raises:
        ValueError: paper_compat without embed.
    """

    name = "answer_variance"

    def __init__(self, answers: SampledAnswers, *, paper_compat: bool = False, embed: Embedder | None = None) -> None:
        if paper_compat and embed is None:
            raise ValueError("embed: expected an embedder of sentences with paper_compat")
        self.answers = answers
        self.embed = embed if paper_compat else None

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        draws = self.answers.draw([sample.question for sample in samples])
        if self.embed is not None:
            return [_labels(self.embed([d.completion.text for d in drawn])) / len(drawn) for drawn in draws]
        return [len(_clusters(drawn)) / len(drawn) for drawn in draws]


class SemanticEntropy:
    """Entropy in nats over the different parsed answers, 0 to log k; None where no answer can be parsed."""

    name = "semantic_entropy"

    def __init__(self, answers: SampledAnswers) -> None:
        self.answers = answers

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        draws = self.answers.draw([sample.question for sample in samples])
        return [_entropy(list(_clusters(drawn).values())) for drawn in draws]


class Learnability:
    """``p (1 - p)`` in [0, 1/4], p the share of the student's answers that equal the sample's own.

    Args:
        answers: of the student.
        verified: 0 where ``domain.verify`` does not find the sample's own answer right. Against an answer that nobody
            checked, a question whose answer is the toss of a coin has the largest value there is.
    """

    name = "learnability"

    def __init__(self, answers: SampledAnswers, *, verified: bool = False) -> None:
        self.answers = answers
        self.verified = verified

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        values: list[float | None] = [p * (1 - p) for p in self.answers.shares(samples)]
        if not self.verified:
            return values
        right = self.answers.domain.verify(samples)
        return [value if ok else 0.0 for value, ok in zip(values, right, strict=True)]


def _clusters(drawn: Sequence[Drawn]) -> Counter[str]:
    return Counter(d.canonical for d in drawn if d.canonical is not None)


def _entropy(counts: Sequence[int]) -> float | None:
    total = sum(counts)
    return -sum(c / total * math.log(c / total) for c in counts) + 0.0 if total else None


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _margins(completion: Completion) -> list[float]:
    """``p1 - p2`` of each token."""
    if completion.top2_logprobs is None:
        raise ValueError("engine: gave no top2_logprobs, though they were asked for")
    return [math.exp(first) - math.exp(second) for first, second in completion.top2_logprobs]


def _margins_in_dictionary_order(completion: Completion) -> list[float]:
    """As :func:`_margins`, but of the first two of {drawn token, top tokens}, as vLLM orders them."""
    if completion.top2_logprobs is None or completion.token_logprobs is None:
        raise ValueError("engine: gave no top2_logprobs and token_logprobs, though they were asked for")
    margins = []
    for drawn, (first, second) in zip(completion.token_logprobs, completion.top2_logprobs, strict=True):
        other = second if drawn == first else first
        margins.append(math.exp(drawn) - math.exp(other))
    return margins


def _labels(
    vectors: torch.Tensor,  # [k, d]
) -> int:
    """Different labels that HDBSCAN gives, its noise among them."""
    from sklearn.cluster import HDBSCAN

    if len(vectors) < 2:
        return len(vectors)
    return len(set(HDBSCAN(min_cluster_size=2, copy=True).fit_predict(vectors.double().numpy()).tolist()))
