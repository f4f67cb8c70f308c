"""Accuracy, bootstrap intervals, and the validity of signals.

Percentile intervals come from a bootstrap that draws rows and fits (seeds of the student) together, so they cover what
another test set and another fit would have given. A change between two students is paired, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from acqsynth.domains import Domain, Sample
from acqsynth.engines import Engine, Sampling

Right = npt.NDArray[np.float64]  #: [seeds, rows], 1 where the answer is right


@dataclass(frozen=True)
class Evaluation:
    """A student's answers to n rows."""

    completions: list[str]
    answers: list[str | None]  #: that the domain reads from each completion; None if there is none
    right: list[bool]

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self.right) / len(self.right)


@dataclass(frozen=True)
class Interval:
    """A mean and the interval of its bootstrap."""

    mean: float
    low: float
    high: float


def evaluate(
    engine: Engine, domain: Domain, rows: Sequence[Sample], *, max_tokens: int | None = None, seed: int = 0
) -> Evaluation:
    """The most likely answer of the engine's model to each row, judged by the domain.

    Args:
        engine: over the student.
        domain: asks, reads and judges.
        rows: n rows with the right answer.
        max_tokens: most tokens of an answer, by default the domain's.
        seed: of the engine.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("rows: expected at least one, got none")
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens or domain.answer_tokens, seed=seed)
    drawn = engine.generate([domain.student_prompt(row.question) for row in rows], sampling)
    completions = [group[0].text for group in drawn]
    answers = [domain.answer_of(text) for text in completions]
    return Evaluation(completions, answers, domain.equivalent(rows, answers))


def evaluate_by_likelihood(engine: Any, domain: Domain, rows: Sequence[Sample], labels: Sequence[str]) -> Evaluation:
    """The likeliest label of each row: no answer is outside of the set, and none is lost to another spelling.

    Args:
        engine: over the student; ``transformers``, as it takes the log-probabilities of given texts.
        domain: asks and judges.
        rows: n rows with the right answer.
        labels: different names; of equals the first is taken.

    Raises:
        ValueError: no rows or labels, or an engine that cannot do it.
    """
    if not rows or not labels:
        raise ValueError(f"rows, labels: expected at least one of each, got {len(rows)} and {len(labels)}")
    if not hasattr(engine, "logprobs"):
        raise ValueError(f"engine: the likelihood of labels needs transformers, got {engine.name}")
    texts = [domain.solution(Sample("", label)) for label in labels]
    values = np.array(engine.logprobs([domain.student_prompt(row.question) for row in rows], texts))  # [n, m]
    best = values.argmax(axis=1).tolist()
    answers: list[str | None] = [labels[i] for i in best]
    return Evaluation([texts[i] for i in best], answers, domain.equivalent(rows, answers))


def bootstrap(right: Right, *, resamples: int = 2000, level: float = 0.95, seed: int = 0) -> Interval:
    """Accuracy with its interval over rows and seeds.

    Args:
        right: ``[S, N]``, S fits of a student on the same N rows.
        resamples: bootstrap draws.
        level: of the interval.
        seed: of the draws.

    Raises:
        ValueError: right is not a matrix or is empty.
    """
    values = _matrix("right", right)
    draws = _resampled(values, *_weights(values.shape, resamples, seed))
    return _interval(values.mean(), draws, level)


def bootstrap_change(
    right: Right, other: Right, *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Accuracy of ``right`` minus that of ``other``: the same rows are drawn for both, the seeds of each apart.

    Args:
        right: ``[S, N]``.
        other: ``[S', N]``, of the same rows.
        resamples, level, seed: as :func:`bootstrap`.

    Raises:
        ValueError: not matrices over the same rows.
    """
    values, others = _matrix("right", right), _matrix("other", other)
    if values.shape[1] != others.shape[1]:
        raise ValueError(f"other: expected {values.shape[1]} rows as in right, got {others.shape[1]}")
    seeds, rows = _weights(values.shape, resamples, seed)
    other_seeds, _ = _weights(others.shape, resamples, seed + 1)
    draws = _resampled(values, seeds, rows) - _resampled(others, other_seeds, rows)
    return _interval(values.mean() - others.mean(), draws, level)


def accuracy_by_skill(right: Right, skills: Sequence[str | None]) -> dict[str, tuple[float, int]]:
    """Skill -> accuracy over all seeds, and rows; rows without a skill are left out.

    Args:
        right: ``[S, N]``.
        skills: of N rows.
    """
    values = _matrix("right", right)
    found = {}
    for skill in sorted({skill for skill in skills if skill is not None}):
        picked = [i for i, other in enumerate(skills) if other == skill]
        found[skill] = (float(values[:, picked].mean()), len(picked))
    return found


def signal_validity(
    scores: Mapping[str, Sequence[float]],
    gains: Sequence[float],
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval | None]:
    """Spearman's rank correlation of each signal with what students gained.

    Args:
        scores: signal -> mean value of each of B batches.
        gains: B changes of accuracy (or any measure) after a student learnt one batch.
        resamples, level, seed: of the interval over batches; draws in which either side is constant count for nothing.

    Returns:
        signal -> correlation; None where fewer than three batches, or a constant side, leave it undefined.

    Raises:
        ValueError: columns of another length.
    """
    from scipy.stats import rankdata

    y = np.asarray(gains, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, max(len(y), 1), (resamples, len(y)))
    found: dict[str, Interval | None] = {}
    for name, column in scores.items():
        x = np.asarray(column, dtype=np.float64)
        if x.shape != y.shape:
            raise ValueError(f"scores: expected {len(y)} values of {name!r}, one a batch, got {len(x)}")
        whole = _correlation(rankdata(x)[None], rankdata(y)[None]) if len(y) >= 3 else np.array([np.nan])
        if np.isnan(whole[0]):
            found[name] = None
            continue
        draws = _correlation(rankdata(x[picks], axis=1), rankdata(y[picks], axis=1))
        draws = draws[~np.isnan(draws)]
        found[name] = _interval(float(whole[0]), draws, level) if len(draws) else None
    return found


def rank_correlation(before: Sequence[float | None], after: Sequence[float | None]) -> float | None:
    """Spearman's rank correlation of two scorings of the same samples.

    Args:
        before, after: n scores each; a sample with a score that is None or not finite is left out.

    Returns:
        A number in [-1, 1]; None if fewer than three samples are left or one side is constant.

    Raises:
        ValueError: of different length.
    """
    from scipy.stats import rankdata

    if len(before) != len(after):
        raise ValueError(f"after: expected {len(before)} scores, as before has, got {len(after)}")
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


def _weights(shape: tuple[int, ...], resamples: int, seed: int) -> tuple[Right, Right]:
    """How often each seed ``[R, S]`` and each row ``[R, N]`` is drawn."""
    rng = np.random.default_rng(seed)
    n_seeds, n_rows = shape
    rows = rng.multinomial(n_rows, [1 / n_rows] * n_rows, resamples)
    return rng.multinomial(n_seeds, [1 / n_seeds] * n_seeds, resamples).astype(float), rows.astype(float)


def _resampled(values: Right, seeds: Right, rows: Right) -> npt.NDArray[np.float64]:
    """Mean of each draw ``[R]``."""
    drawn: npt.NDArray[np.float64] = np.einsum("rn,rn->r", seeds @ values, rows) / values.size
    return drawn


def _interval(mean: float, draws: npt.NDArray[np.float64], level: float) -> Interval:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(mean), float(low), float(high))


def _correlation(x: Right, y: Right) -> npt.NDArray[np.float64]:
    """Pearson's of each row ``[R]``; NaN where a row is constant."""
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    scale = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        values: npt.NDArray[np.float64] = np.where(scale > 0, (x * y).sum(axis=1) / scale, np.nan)
    return values
