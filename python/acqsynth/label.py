"""Labels for generated questions: a sufficiently large majority of sampled answers, or the domain's computed answer.

The generator's own answer is not used: it is a single draw from a model that was rewarded for hard questions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from acqsynth.config import LabellingConfig
from acqsynth.domains import Domain, Sample
from acqsynth.engines import Completion, Engine, Sampling


@dataclass(frozen=True)
class Label:
    """The label of one question, decided by k answers."""

    sample: Sample | None  #: with the majority's answer and, as reasoning, its completion; None if unlabelled
    agreement: float  #: share of the k completions in the largest cluster
    answers: list[str | None]  #: of each completion; None if it has no answer
    abstained_why: str | None = None  #: None if labelled


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
) -> list[Label]:
    """Labels each question, or gives the reason why there is no label.

    The label is taken from a completion of the largest cluster (:func:`cluster`) that was not cut off: the one of
    median length in tokens, as the shortest often skips steps and the longest rambles.

    Args:
        engine: engine of the student or a stronger teacher.
        samples: their answers and reasoning are ignored.
        k: answers per question.
        temperature, seed: of the sampled answers.
        threshold: minimum share of the k completions that agree; a completion without an answer counts as dissent.
        max_tokens: maximum tokens per answer; by default the domain's.

    Raises:
        ValueError: k below 1, a threshold outside (0, 1], or temperature 0 with several answers, which are equal.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: expected a share in (0, 1], got {threshold}")
    _check_draws(k, temperature)
    most = domain.answer_tokens if max_tokens is None else max_tokens
    sampling = Sampling(n=k, temperature=temperature, max_tokens=most, seed=seed)
    drawn = engine.generate([domain.student_prompt(sample.question) for sample in samples], sampling)
    answers = [[domain.answer_of(draw.text) for draw in draws] for draws in drawn]
    clusters = cluster(domain, samples, answers)
    return [_decide(domain, *columns, threshold) for columns in zip(samples, drawn, answers, clusters, strict=True)]


def _check_draws(k: int, temperature: float) -> None:
    if temperature == 0 and k > 1:
        raise ValueError("temperature: expected more than 0, as equal answers always agree, or k of 1")


def label_by_domain(domain: Domain, samples: Sequence[Sample], *, seed: int = 0) -> list[Label]:
    """Labels each question whose answer the domain can compute; ``seed`` determines random answers."""
    return [
        Label(None, 0.0, [], "the domain cannot compute it") if solved is None else Label(solved, 1.0, [solved.answer])
        for solved in domain.computed(samples, seed)
    ]


class Labeller:
    """Labels samples by the method that a recipe names.

    Args:
        config: any method but ``own``.
        engine: creates the engine of the student or the teacher that answers; not called for ``computed``.

    Raises:
        ValueError: an option that :func:`label` does not accept, or ``computed`` in a domain that computes no answers.
    """

    def __init__(self, config: LabellingConfig, domain: Domain, engine: Callable[[], Engine]) -> None:
        self.domain = domain
        if config.method == "computed" and getattr(domain.computed, "__func__", None) is Domain.computed:
            raise ValueError(f"method: expected any but computed, as the domain {domain.name} computes no answers")
        for name in config.options:
            if name != "max_tokens":
                raise ValueError(f"options: unknown {name!r}, expected max_tokens")
        Sampling(max_tokens=config.options.get("max_tokens", 1))
        if config.method != "computed":
            _check_draws(config.k, config.temperature)
        own: dict[str, Any] = {name: getattr(config, name) for name in ("k", "temperature", "threshold")}
        self.options = own | config.options
        self.engine = None if config.method == "computed" else engine()
        self._moves = config.method == "majority"

    def __call__(self, samples: Sequence[Sample], seed: int = 0) -> list[Label]:
        """A label for each sample."""
        if self.engine is None:
            return label_by_domain(self.domain, samples, seed=seed)
        return label(self.engine, self.domain, samples, seed=seed, **self.options)

    def refresh(self, student: Any) -> None:
        """Replaces the student that answers; a teacher is kept."""
        if self.engine is not None and self._moves:
            self.engine.reload(student)


def cluster(
    domain: Domain, samples: Sequence[Sample], answers: Sequence[Sequence[str | None]]
) -> list[list[list[int]]]:
    """Clusters each question's answers; returns indices, largest cluster first. None belongs to no cluster.

    Answers with equal canonical forms share a cluster. Clusters are merged if the domain finds their longest
    answers equivalent, in both directions, to each other and to the same other ones. It compares those of all questions
    in one call.
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
        # The longest names its unit: "5" equals "5 euros", but "$5", which has the form of "5", does not.
        longest = [
            [max((str(row[i]) for i in form), key=len) for form in forms]
            for row, forms in zip(answers, by_form, strict=True)
        ]
        gold = [replace(samples[question], answer=longest[question][a], reasoning="") for question, a, _ in pairs]
        verdicts = domain.equivalent(gold, [longest[question][b] for question, _, b in pairs])
        return [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict]

    joined: list[list[tuple[int, int]]] = [[] for _ in by_form]
    for question, b, a in same([(question, b, a) for question, a, b in same(pairs)]):
        joined[question].append((a, b))
    return [_merged(forms, joined[question]) for question, forms in enumerate(by_form)]


def _decide(
    domain: Domain,
    sample: Sample,
    draws: Sequence[Completion],
    answers: list[str | None],
    clusters: list[list[int]],
    threshold: float,
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
    candidates.sort(key=lambda i: len(draws[i].token_ids))
    chosen = candidates[(len(candidates) - 1) // 2]
    answer = str(answers[chosen])
    labelled = domain.labelled(sample, answer, draws[chosen].text.strip())
    learnt = domain.answer_of(domain.solution(labelled))
    if learnt is None or domain.canonical(learnt) != domain.canonical(answer):
        return Label(None, agreement, answers, "the answer cannot be read back from the text to learn")
    return Label(labelled, agreement, answers)


def _merged(forms: Sequence[list[int]], same: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Merges clusters that are equal to exactly the same clusters.

    Equality is not transitive: 50% equals 0.5 and, since a percent sign may be missing, 50. It counts for neither and
    must not join the two.
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
