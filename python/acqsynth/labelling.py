"""Answers to generated questions: several are drawn, and the majority is the label where it is large enough; or the
domain computes them.

What the generator itself answered is not used: it is one draw, and by the model that wanted the question to be hard.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy

from acqsynth.domains.base import Domain, Sample
from acqsynth.engines.base import Completion, Engine, Sampling

Embed = Callable[[Sequence[str]], Any]  #: n texts -> [n, D] vectors

#: Of the published recipe, for open text.
COSINE_DISTANCE = 0.35


@dataclass(frozen=True)
class Label:
    """What k answers say of one question."""

    #: with the majority's answer and reasoning; None where there is no label
    sample: Sample | None
    #: share of the k completions that are in the largest cluster
    agreement: float
    #: of each completion; None where it gave none
    answers: list[str | None]
    #: None where there is a label
    abstained_why: str | None = None


@dataclass(frozen=True)
class Accuracy:
    """How right labels are."""

    labelled: int  #: questions with a label
    known: int  #: of these, those whose truth is known
    right: int  #: of these, the right ones

    @property
    def share(self) -> float | None:
        """Right labels of those whose truth is known; None where there is none."""
        return self.right / self.known if self.known else None


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
    """A label for each question, or the reason that there is none.

    Answers whose canonical form is equal are one cluster; clusters are merged whose representatives the domain finds
    equivalent, in both directions, to each other and to the same others. With ``embed``, for open text, clusters are
    those of average linkage at a cosine distance of 0.35.

    The completion that stands for the majority: among those of the largest cluster that ended by themselves, the one
    of median length in tokens (the shortest often leaves the steps out, the longest rambles); with ``embed`` the
    medoid.

    Args:
        engine: of the student, or of a stronger teacher.
        domain: of the questions.
        samples: their answers and reasoning are not looked at.
        k: answers to each question.
        temperature: of the draws.
        threshold: least share of the k completions that agree, those without an answer counted as dissent.
        seed: of the draws.
        max_tokens: most tokens of an answer; by default the domain's.
        embed: n texts -> n vectors.

    Raises:
        ValueError: k below 1 or a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: expected a share in (0, 1], got {threshold}")
    sampling = Sampling(n=k, temperature=temperature, max_tokens=max_tokens or domain.answer_tokens, seed=seed)
    drawn = engine.generate([domain.student_prompt(sample.question) for sample in samples], sampling)
    answers = [[domain.answer_of(draw.text) for draw in draws] for draws in drawn]
    clusters = [cluster_texts(row, embed) for row in answers] if embed else cluster(domain, samples, answers)
    return [
        _decide(domain, *columns, threshold, embed) for columns in zip(samples, drawn, answers, clusters, strict=True)
    ]


def computed(domain: Domain, samples: Sequence[Sample], *, seed: int = 0) -> list[Label]:
    """A label for each question whose answer the domain computes (``Domain.computed``).

    Args:
        domain: of the questions.
        samples: their answers and reasoning are not looked at.
        seed: of answers that are left to chance.
    """
    return [
        Label(None, 0.0, [], "the domain can not compute it") if solved is None else Label(solved, 1.0, [solved.answer])
        for solved in domain.computed(samples, seed)
    ]


def cluster(
    domain: Domain, samples: Sequence[Sample], answers: Sequence[Sequence[str | None]]
) -> list[list[list[int]]]:
    """Clusters of each question's answers, as indices, largest first; what is None is in none.

    The domain compares the first answers of clusters only, in one call for all questions, and those it finds the same
    once more the other way round: where an answer is judged by tests and not by the other answer, two wrong ones are
    not the same.
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
    """As :func:`cluster`, of one question's open answers by their embeddings."""
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


def accuracy(domain: Domain, labels: Sequence[Label], truth: Sequence[Sample] | None = None) -> Accuracy:
    """How many labels are right, where that is known.

    Args:
        domain: of the questions.
        labels: n labels.
        truth: n samples with the right answers; by default the domain tells what it can (:meth:`Domain.verify`).

    Raises:
        ValueError: truth of another length.
    """
    if truth is not None and len(truth) != len(labels):
        raise ValueError(f"truth: expected {len(labels)} samples, one a label, got {len(truth)}")
    labelled = [i for i, label in enumerate(labels) if label.sample is not None]
    samples = [sample for label in labels if (sample := label.sample) is not None]
    verdicts: Sequence[bool | None]
    if truth is None:
        verdicts = domain.verify(samples)
    else:
        verdicts = domain.equivalent([truth[i] for i in labelled], [sample.answer for sample in samples])
    known = [verdict for verdict in verdicts if verdict is not None]
    return Accuracy(len(labelled), len(known), known.count(True))


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
    """The completion up to where its last lines only state the answer, which ``Domain.solution`` writes again."""
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
