"""Statistics of evaluations against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from acqsynth.domains import Sample
from acqsynth.domains.classification import Classification
from acqsynth.engines import Sampling
from acqsynth.evaluate import (
    accuracy_by_skill,
    bootstrap,
    bootstrap_change,
    evaluate,
    evaluate_by_likelihood,
    rank_correlation,
    signal_validity,
)


@pytest.fixture
def echo(scripted):
    """Answers what stands behind the question mark."""
    return scripted(lambda prompt, draw, seed: prompt[-1]["content"].split("?")[1])


def test_evaluate_takes_the_most_likely_answer_and_lets_the_domain_judge(sums, echo):
    rows = [Sample("1+1?2", "2"), Sample("1+2?4", "3"), Sample("2+2?so\n4.0", "4"), Sample("3?none", "3")]
    found = evaluate(echo, sums, rows, seed=5)
    assert found.answers == ["2", "4", "4.0", None]
    assert found.right == [True, False, True, False]
    assert found.accuracy == 0.5
    prompts = [sums.student_prompt(row.question) for row in rows]
    assert echo.calls == [(prompts, Sampling(temperature=0.0, max_tokens=sums.answer_tokens, seed=5))]
    evaluate(echo, sums, rows, max_tokens=3)
    assert echo.calls[-1][1].max_tokens == 3


def test_no_rows_are_refused(sums, echo):
    with pytest.raises(ValueError, match="rows: expected at least one, got none"):
        evaluate(echo, sums, [])


def test_bootstrap_of_one_seed_is_the_binomial():
    right = np.array([[1.0] * 60 + [0.0] * 40])
    found = bootstrap(right, resamples=20000, level=0.95)
    # Resampled means of 100 rows with p = 0.6 are Binomial(100, 0.6) / 100: its 2.5 % and 97.5 % quantiles.
    assert found.mean == pytest.approx(0.6)
    assert found.low == pytest.approx(0.50, abs=0.011)
    assert found.high == pytest.approx(0.69, abs=0.011)


def test_bootstrap_over_seeds_alone():
    # Every row of a fit is the same, so only the draw of fits matters: 0, 1/2 or 1 with 1/4, 1/2, 1/4.
    right = np.array([[1.0] * 8, [0.0] * 8])
    found = bootstrap(right, resamples=4000, level=0.4)
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)
    wide = bootstrap(right, resamples=4000, level=0.6)
    assert (wide.low, wide.high) == (0.0, 1.0)


def test_a_level_apart_gives_nested_intervals_and_equal_seeds_equal_ones():
    right = np.random.default_rng(0).integers(0, 2, (3, 50)).astype(float)
    narrow, wide = bootstrap(right, level=0.8), bootstrap(right, level=0.99)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high
    assert bootstrap(right, seed=4) == bootstrap(right, seed=4)


def test_change_is_paired_by_row():
    before = np.array([[1.0, 0.0] * 50])
    after = before.copy()
    after[0, 1:21:2] = 1.0  # ten of a hundred rows are newly right, none is lost
    found = bootstrap_change(after, before, resamples=20000)
    assert found.mean == pytest.approx(0.1)
    # Paired, the difference of a resample is Binomial(100, 0.1) / 100, far narrower than two independent draws.
    assert found.low == pytest.approx(0.05, abs=0.011)
    assert found.high == pytest.approx(0.16, abs=0.011)


def test_no_change_is_exactly_none():
    right = np.array([[1.0, 0.0, 1.0]])
    found = bootstrap_change(right, right)
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("right", [np.zeros(3), np.zeros((0, 3)), np.zeros((2, 0))])
def test_what_is_no_matrix_is_refused(right):
    with pytest.raises(ValueError, match=r"right: expected \[seeds, rows\]"):
        bootstrap(right)


def test_a_change_over_other_rows_is_refused():
    with pytest.raises(ValueError, match="other: expected 3 rows as in right, got 2"):
        bootstrap_change(np.zeros((1, 3)), np.zeros((1, 2)))


def test_accuracy_by_skill():
    right = np.array([[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0]])
    assert accuracy_by_skill(right, ["add", "add", "sort", None]) == {"add": (0.75, 2), "sort": (0.5, 1)}


def test_signal_validity_is_spearmans():
    scores = {"a": [1.0, 2.0, 3.0, 4.0, 5.0], "b": [5.0, 4.0, 3.0, 2.0, 1.0], "c": [2.0, 2.0, 1.0, 3.0, 3.0]}
    gains = [0.1, 0.3, 0.2, 0.5, 0.4]
    found = signal_validity(scores, gains)
    assert {name: value.mean for name, value in found.items() if value} == pytest.approx(
        {name: spearmanr(column, gains).statistic for name, column in scores.items()}
    )
    assert found["a"] is not None
    assert found["a"].mean == pytest.approx(0.8)  # 1 - 6 * (0 + 1 + 1 + 1 + 1) / (5 * 24)
    assert found["a"].low < 0.8 < found["a"].high <= 1.0


def test_an_undefined_correlation_is_none_and_not_a_number():
    assert signal_validity({"flat": [1.0, 1.0, 1.0]}, [1.0, 2.0, 3.0]) == {"flat": None}
    assert signal_validity({"a": [1.0, 2.0, 3.0]}, [1.0, 1.0, 1.0]) == {"a": None}
    assert signal_validity({"a": [1.0, 2.0]}, [1.0, 2.0]) == {"a": None}
    assert signal_validity({"a": []}, []) == {"a": None}


def test_scores_of_another_length_are_refused():
    with pytest.raises(ValueError, match="scores: expected 3 values of 'a', one a batch, got 2"):
        signal_validity({"a": [1.0, 2.0]}, [1.0, 2.0, 3.0])


def test_order_alone_counts():
    assert rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 1000.0]) == pytest.approx(1)
    assert rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    # Spearman: 1 - 6 sum d^2 / (n (n^2 - 1)), d = 1, 1, 0, 0
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 3.0, 4.0]) == pytest.approx(1 - 6 * 2 / 60)


def test_unscored_samples_are_left_out():
    assert rank_correlation([1.0, None, 2.0, 3.0, math.nan], [1.0, 5.0, 2.0, 3.0, 0.0]) == pytest.approx(1)
    assert rank_correlation([1.0, None, 2.0, 3.0], [1.0, 5.0, math.inf, 3.0]) is None


class Likely:
    """An engine that finds the text named in the prompt the likeliest, and all others equal."""

    name = "likely"

    def logprobs(self, prompts, texts):
        return [[0.0 if prompt[-1]["content"].startswith(f"{text}!") else -1.0 for text in texts] for prompt in prompts]


def test_the_likeliest_label_is_the_answer():
    labels = ["card", "card_arrival", 'say "hi", then go', *(f"intent_{i}" for i in range(147))]
    domain = Classification(labels)
    rows = [Sample(f"{domain.solution(Sample('', label))}! Where?", label) for label in labels]
    rows += [Sample("card arrival! Where?", "card"), Sample("none", "card"), Sample("none", "card_arrival")]
    found = evaluate_by_likelihood(Likely(), domain, rows, labels)
    assert found.answers == [*labels, "card_arrival", "card", "card"]  # of equals the first
    assert found.right == [True] * 150 + [False, True, False]
    assert found.completions[1] == "card arrival"


def test_likelihood_needs_labels_and_an_engine_that_gives_it(echo):
    rows = [Sample("Where?", "card")]
    with pytest.raises(ValueError, match="rows, labels: expected at least one of each, got 1 and 0"):
        evaluate_by_likelihood(Likely(), Classification(), rows, [])
    with pytest.raises(ValueError, match="engine: the likelihood of labels needs transformers, got scripted"):
        evaluate_by_likelihood(echo, Classification(), rows, ["card"])


def test_undefined_without_an_order():
    assert rank_correlation([], []) is None
    assert rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    with pytest.raises(ValueError, match="after: expected 2 scores, as before has, got 1"):
        rank_correlation([1.0, 2.0], [1.0])
