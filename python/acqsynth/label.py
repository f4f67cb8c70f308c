"""Answers to generated questions: the majority of several sampled answers if it is large enough, or what the domain
computes.

The generator's own answer is not used: it is a single draw from the model that was rewarded for hard questions.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy

from acqsynth.config import LabellingConfig
from acqsynth.domains import Domain, Sample
from acqsynth.engines import Completion, Engine, Sampling

Embed = Callable[[Sequence[str]], Any]  #: n texts -> [n, D] vectors

COSINE_DISTANCE = 0.35  #: of clusters of open text, as in the published recipe


@dataclass(frozen=True)
class Label:
    """The verdict of k answers on one question."""

    sample: Sample | None  #: with the majority's answer and reasoning; None without a label
    agreement: float  #: share of the k completions in the largest cluster
    answers: list[str | None]  #: of each completion; None if it gave none
    abstained_why: str | None = None  #: None with a label


def label(
    engine: Engine,
    domain: Domain,
    samples: Sequence[Sample],
    *,
    k: int = 16,
    temperature: float = 0.8,
    threshold: float = 0.5,
    seed: int = 0,
    max_tokens: int | None = None,
    embed: Embed | None = None,
) -> list[Label]:
    """A label for each question, or the reason why there is none.

    Answers whose canonical form is equal are one cluster; clusters are merged whose representatives the domain finds
    equivalent, in both directions, to each other and to the same others. With ``embed``, for open text, clusters are
    those of average linkage at a cosine distance of 0.35.

    The majority is represented by one of the completions of the largest cluster that were not cut off: the one of
    median length in tokens (the shortest often skips steps, the longest rambles), or with ``embed`` the medoid.

    Args:
        engine: of the student, or of a stronger teacher.
        samples: their answers and reasoning are ignored.
        k: answers to each question.
        threshold: least share of the k completions that agree; a completion without an answer counts as dissent.
        max_tokens: most tokens of an answer; by default the domain's.
        embed: n texts -> n vectors.

    Raises:
        ValueError: k below 1 or a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: expected a share in (0, 1], got {threshold}")
    most = domain.answer_tokens if max_tokens is None else max_tokens
    sampling = Sampling(n=k, temperature=temperature, max_tokens=most, seed=seed)
    drawn = engine.generate([domain.student_prompt(sample.question) for sample in samples], sampling)
    answers = [[domain.answer_of(draw.text) for draw in draws] for draws in drawn]
    clusters = [cluster_texts(row, embed) for row in answers] if embed else cluster(domain, samples, answers)
    return [
        _decide(domain, *columns, threshold, embed) for columns in zip(samples, drawn, answers, clusters, strict=True)
    ]


def label_by_domain(domain: Domain, samples: Sequence[Sample], *, seed: int = 0) -> list[Label]:
    """A label for each question whose answer the domain can compute; ``seed`` is that of answers that are random."""
    return [
        Label(None, 0.0, [], "the domain cannot compute it") if solved is None else Label(solved, 1.0, [solved.answer])
        for solved in domain.computed(samples, seed)
    ]


class Labeller:
    """Labels samples by the method of a recipe.

    Args:
        config: any method but ``own``.
        engine: makes the engine that answers, of the student or the teacher; not called for method ``computed``.

    Raises:
        ValueError: options that :func:`label` does not have.
    """

    def __init__(self, config: LabellingConfig, domain: Domain, engine: Callable[[], Engine]) -> None:
        self.domain = domain
        self.options: dict[str, Any] = {"k": config.k, "temperature": config.temperature, "threshold": config.threshold}
        known = inspect.signature(label).parameters
        for name in config.options:
            if name in self.options or name not in known or known[name].kind is not inspect.Parameter.KEYWORD_ONLY:
                raise ValueError(f"options: unknown {name!r}, expected max_tokens")
        self.options |= config.options
        Sampling(n=config.k, temperature=config.temperature, max_tokens=config.options.get("max_tokens", 1))
        self.engine = None if config.method == "computed" else engine()
        self._moves = config.method == "majority"

    def __call__(self, samples: Sequence[Sample], seed: int = 0) -> list[Label]:
        """A label for each sample."""
        if self.engine is None:
            return label_by_domain(self.domain, samples, seed=seed)
        return label(self.engine, self.domain, samples, seed=seed, **self.options)

    def refresh(self, student: Any) -> None:
        """Labels with another student from now on; a teacher stays."""
        if self.engine is not None and self._moves:
            self.engine.reload(student)


def cluster(
    domain: Domain, samples: Sequence[Sample], answers: Sequence[Sequence[str | None]]
) -> list[list[list[int]]]:
    """Clusters of each question's answers, as indices, largest first; None belongs to no cluster.

    The domain compares only the first answers of clusters, in one call for all questions, and compares those it finds
    equal again in the other direction: if tests judge an answer, rather than the other answer, two wrong ones differ.
    """
    by_form: list[list[list[int]]] = []
    for row in answers:
        forms: dict[str, list[int]] = {}
        for i, answer in enumerate(row):
            if answer is not None:
                forms.setdefault(domain.canonical(answer), []).append(i)
        by_form.append(_largest_first(forms.values()))
    pairs = [
        (question, a, b)
        for question, forms in enumerate(by_form)
        for a, b in itertools.combinations(range(len(forms)), 2)
    ]

    def same(pairs: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        if not pairs:
            return []
        first = [[str(answers[question][form[0]]) for form in forms] for question, forms in enumerate(by_form)]
        gold = [replace(samples[question], answer=first[question][a], reasoning="") for question, a, _ in pairs]
        verdicts = domain.equivalent(gold, [first[question][b] for question, _, b in pairs])
        return [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict]

    joined: list[list[tuple[int, int]]] = [[] for _ in by_form]
    for question, b, a in same([(question, b, a) for question, a, b in same(pairs)]):
        joined[question].append((a, b))
    return [_merged(forms, joined[question]) for question, forms in enumerate(by_form)]


def cluster_texts(texts: Sequence[str | None], embed: Embed) -> list[list[int]]:
    """Like :func:`cluster`, for one question's open answers by their embeddings."""
    from sklearn.cluster import AgglomerativeClustering

    given = [i for i, text in enumerate(texts) if text is not None]
    if len(given) < 2:
        return [given] if given else []
    vectors = numpy.asarray(embed([str(texts[i]) for i in given]))
    found = AgglomerativeClustering(
        n_clusters=None, metric="cosine", linkage="average", distance_threshold=COSINE_DISTANCE
    ).fit_predict(vectors)
    clusters: dict[int, list[int]] = {}
    for i, number in zip(given, found.tolist(), strict=True):
        clusters.setdefault(number, []).append(i)
    return _largest_first(clusters.values())


def _decide(
    domain: Domain,
    sample: Sample,
    draws: Sequence[Completion],
    answers: list[str | None],
    clusters: list[list[int]],
    threshold: float,
    embed: Embed | None,
) -> Label:
    if not clusters:
        return Label(None, 0.0, answers, "no completion gives an answer")
    largest = clusters[0]
    agreement = len(largest) / len(answers)
    if agreement < threshold:
        return Label(None, agreement, answers, f"agreement {agreement:.2f} is below {threshold:.2f}")
    if len(clusters) > 1 and len(clusters[1]) == len(largest):
        return Label(None, agreement, answers, f"{len(largest)} completions agree on each of two answers")
    candidates = [i for i in largest if draws[i].finished]
    if not candidates:
        return Label(None, agreement, answers, "every completion that agrees was cut off")
    if embed is None:
        candidates.sort(key=lambda i: len(draws[i].token_ids))
        chosen = candidates[(len(candidates) - 1) // 2]
    else:
        vectors = numpy.asarray(embed([str(answers[i]) for i in candidates]), dtype=float)  # [n, D]
        vectors /= numpy.linalg.norm(vectors, axis=1, keepdims=True)
        chosen = candidates[int((vectors @ vectors.sum(axis=0)).argmax())]
    answer = str(answers[chosen])
    reasoning = _reasoning(domain, draws[chosen].text, answer)
    return Label(replace(sample, answer=answer, reasoning=reasoning), agreement, answers)


def _reasoning(domain: Domain, text: str, answer: str) -> str:
    """The completion without the last lines that only state the answer, which ``Domain.solution`` writes again."""
    text = text.strip()
    before = text.removesuffix(answer.strip())
    if before != text and (not before or before[-1].isspace()):
        return before.strip()
    before, _, last = text.rpartition("\n")
    return before.strip() if before and domain.answer_of(last) == answer else text


def _merged(forms: Sequence[list[int]], same: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Merges clusters that equal exactly the same ones.

    Equality is not transitive: 50% equals 0.5 and, as a percent sign may be missing, 50. It votes for neither, and
    must not join them.
    """
    equal = [{i} for i in range(len(forms))]
    for a, b in same:
        equal[a].add(b)
        equal[b].add(a)
    clusters: dict[frozenset[int], list[int]] = {}
    for form, others in zip(forms, equal, strict=True):
        clusters.setdefault(frozenset(others), []).extend(form)
    return _largest_first(map(sorted, clusters.values()))


def _largest_first(clusters: Iterable[list[int]]) -> list[list[int]]:
    return sorted(clusters, key=lambda members: (-len(members), members[0]))
