"""Accuracy, intervals and tests over fits, and the validity of signals.

An interval covers the variation over test sets and over fits (seeds of generator or student): Student's t with the
variance over fits plus that over rows and Welch-Satterthwaite degrees of freedom. A bootstrap over two fits would cover
fit noise half of the time. Changes between two students are paired row by row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from acqsynth.domains import Domain, Sample
from acqsynth.engines import Engine, Sampling

Right = npt.NDArray[np.float64]  #: [seeds, rows], 1 if the answer is right


@dataclass(frozen=True)
class Evaluation:
    """A student's answers to n rows."""

    completions: list[str]
    answers: list[str | None]  #: read from each completion by the domain; None if there is none
    right: list[bool]

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self.right) / len(self.right)


@dataclass(frozen=True)
class Interval:
    """A mean and its interval; equal bounds mean that there is no interval because all values are identical."""

    mean: float
    low: float
    high: float


FEWEST = 3  #: fits needed to call a gain or loss
_ROUNDING = 1e-12  # smaller differences of accuracies are rounding errors


@dataclass(frozen=True)
class Change(Interval):
    """A difference of accuracies."""

    p: float  #: two-sided p-value for the hypothesis of no difference
    fits: int  #: number on the side with fewer


def evaluate(
    engine: Engine, domain: Domain, rows: Sequence[Sample], *, max_tokens: int | None = None, seed: int = 0
) -> Evaluation:
    """Answers each row by greedy decoding; the domain judges the answers.

    Args:
        engine: engine of the student.
        rows: n rows with the right answer.
        max_tokens: maximum tokens per answer; by default the domain's.
        seed: passed to the engine.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("rows: expected at least one, got none")
    most = domain.answer_tokens if max_tokens is None else max_tokens
    sampling = Sampling(temperature=0.0, max_tokens=most, seed=seed)
    drawn = engine.generate([domain.student_prompt(row.question) for row in rows], sampling)
    completions = [group[0].text for group in drawn]
    answers = [domain.answer_of(text) for text in completions]
    return Evaluation(completions, answers, domain.equivalent(rows, answers))


def evaluate_by_likelihood(engine: Any, domain: Domain, rows: Sequence[Sample], labels: Sequence[str]) -> Evaluation:
    """Answers each row with its most likely label, so that no answer is outside the set or lost to its spelling.

    Args:
        engine: ``transformers``, which computes log-probabilities of given texts.
        rows: n rows with the right answer.
        domain: supplies the prompts and judges the answers.
        labels: distinct names; of equally likely ones the first wins.

    Raises:
        ValueError: no rows or labels, or an engine without log-probabilities of texts.
    """
    if not rows or not labels:
        raise ValueError(f"rows, labels: expected at least one of each, got {len(rows)} and {len(labels)}")
    if not hasattr(engine, "logprobs"):
        raise ValueError(f"engine: the likelihood of labels needs transformers, got {engine.name}")
    texts = [domain.solution(Sample("", label)) for label in labels]
    values = np.array(engine.logprobs([domain.student_prompt(row.question) for row in rows], texts))  # [n, m]
    best = values.argmax(axis=1)
    read = np.isfinite(values[np.arange(len(rows)), best])  # False for a question too long for the student
    answers = [labels[i] if fits else None for i, fits in zip(best, read, strict=True)]
    return Evaluation([texts[i] for i in best], answers, domain.equivalent(rows, answers))


def accuracy_interval(right: Right, *, generators: Sequence[int] | None = None, level: float = 0.95) -> Interval:
    """Accuracy with its interval over rows and fits.

    Args:
        right: ``[S, N]``, S fits of a student on N rows. With a single fit the interval covers only other rows.
        generators: the generator that wrote the rows of each of the S fits; with ``FEWEST`` or more generators, the
            fits of one generator count as a single draw.
        level: confidence level.

    Raises:
        ValueError: right is not a matrix or is empty, there is not one generator per fit, or level is not in (0, 1).
    """
    values = _matrix("right", right)
    found = _estimate(values.mean(), [_over_fits(values, generators), _variance_of_mean(values.mean(axis=0))], level)
    return Interval(float(values.mean()), max(0.0, found[0]), min(1.0, found[1]))


def change(
    right: Right,
    other: Right,
    *,
    generators: Sequence[int] | None = None,
    other_generators: Sequence[int] | None = None,
    learnt: bool = True,
    level: float = 0.95,
) -> Change:
    """Accuracy of ``right`` minus that of ``other`` on the same rows. If all rows and fits change alike, t is undefined
    and p is that of a sign test over the rows.

    Args:
        right: ``[S, N]``.
        other: ``[S', N]``, on the same rows.
        generators, other_generators, level: as in :func:`accuracy_interval`.
        learnt: whether the fits of ``other`` vary; False for the base student, which is fixed.

    Raises:
        ValueError: the arguments are not matrices over the same rows; as :func:`accuracy_interval`.
    """
    values, others = _matrix("right", right), _matrix("other", other)
    if values.shape[1] != others.shape[1]:
        raise ValueError(f"other: expected {values.shape[1]} rows as in right, got {others.shape[1]}")
    sides = [(values, generators), (others, other_generators)] if learnt else [(values, generators)]
    parts = [_over_fits(*side) for side in sides]
    mean = float(values.mean() - others.mean())
    low, high, p = _estimate(mean, [*parts, _variance_of_mean(values.mean(axis=0) - others.mean(axis=0))], level)
    if low == high and abs(mean) > _ROUNDING:
        p = min(1.0, 2 * 0.5 ** values.shape[1])
    return Change(mean, low, high, p, min(len(side[0]) for side in sides))


def holm(p: Sequence[float], alpha: float = 0.05) -> list[bool]:
    """Which null hypotheses are rejected; the probability of any false rejection is at most ``alpha``.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    rejected = [False] * len(p)
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: (math.isnan(p[i]), p[i]))):
        if not p[i] <= alpha / (len(p) - rank):  # nor for NaN
            break
        rejected[i] = True
    return rejected


def accuracy_by_skill(right: Right, skills: Sequence[str | None]) -> dict[str, tuple[float, int]]:
    """Skill -> accuracy over all seeds of ``right [S, N]`` and number of rows; rows without a skill are left out."""
    values = _matrix("right", right)
    found = {}
    for skill in sorted({skill for skill in skills if skill is not None}):
        picked = [i for i, other in enumerate(skills) if other == skill]
        found[skill] = (float(values[:, picked].mean()), len(picked))
    return found


def signal_validity(
    scores: Sequence[float], gains: Sequence[float], *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval | None:
    """Spearman's rank correlation of a signal with the students' gains.

    Args:
        scores: the signal's mean value of each of B batches.
        gains: B changes in accuracy (or any other measure) after a student learnt one batch.
        resamples, level, seed: for the bootstrap interval over batches; resamples with a constant side are discarded.

    Returns:
        None if it is undefined, with fewer than three batches or a constant side.

    Raises:
        ValueError: scores and gains differ in length.
    """
    from scipy.stats import rankdata

    if (whole := rank_correlation(scores, gains)) is None:
        return None
    picks = np.random.default_rng(seed).integers(0, len(gains), (resamples, len(gains)))
    draws = _correlation(*(rankdata(np.array(column)[picks], axis=1) for column in (scores, gains)))
    if np.isnan(draws).all():
        return None
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(whole, float(low), float(high))


def rank_correlation(before: Sequence[float | None], after: Sequence[float | None]) -> float | None:
    """Spearman's rank correlation of two scorings of the same samples.

    Args:
        before, after: n scores each; samples with a None or non-finite score are left out.

    Returns:
        A number in [-1, 1]; None if fewer than three samples are left or one side is constant.

    Raises:
        ValueError: before and after differ in length.
    """
    from scipy.stats import rankdata

    if len(before) != len(after):
        raise ValueError(f"after: expected {len(before)} scores as in before, got {len(after)}")
    columns = np.array([before, after], dtype=np.float64)  # None -> NaN
    columns = columns[:, np.isfinite(columns).all(axis=0)]
    if columns.shape[1] < 3:
        return None
    [value] = _correlation(*rankdata(columns, axis=1)[:, None])
    return None if np.isnan(value) else float(value)


def _matrix(name: str, values: Right) -> Right:
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"{name}: expected [seeds, rows] with at least one of each, got shape {matrix.shape}")
    return matrix


def _over_fits(values: Right, generators: Sequence[int] | None) -> tuple[float, float]:
    """Variance of the mean over fits, and its degrees of freedom."""
    fits = values.mean(axis=1)
    if generators is not None and len(generators) != len(fits):
        raise ValueError(f"generators: expected {len(fits)}, one per fit, got {len(generators)}")
    if generators is not None and len(set(generators)) >= FEWEST:
        fits = np.array([fits[np.array(generators) == name].mean() for name in dict.fromkeys(generators)])
    return _variance_of_mean(fits)


def _variance_of_mean(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Variance of the mean of N values, and its degrees of freedom."""
    return (float(values.var(ddof=1) / len(values)), len(values) - 1.0) if len(values) > 1 else (0.0, 1.0)


def _estimate(mean: float, parts: Sequence[tuple[float, float]], level: float) -> tuple[float, float, float]:
    """Interval and two-sided p-value of a mean whose variance is the sum of the parts; if it is 0, the mean and 1."""
    from scipy.stats import t

    if not 0 < level < 1:
        raise ValueError(f"level: expected a share in (0, 1), got {level}")
    variance = sum(part for part, _ in parts)
    if variance < _ROUNDING**2:
        return mean, mean, 1.0
    freedom = variance**2 / sum(part**2 / df for part, df in parts)
    half = float(t.ppf((1 + level) / 2, freedom)) * variance**0.5
    return mean - half, mean + half, float(2 * t.sf(abs(mean) / variance**0.5, freedom))


def _correlation(x: Right, y: Right) -> npt.NDArray[np.float64]:
    """Pearson's correlation of each row, ``[R]``; NaN if a row is constant."""
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    scale = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        values: npt.NDArray[np.float64] = np.where(scale > 0, (x * y).sum(axis=1) / scale, np.nan)
    return values
