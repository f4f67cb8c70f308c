"""Evaluation statistics, checked against SciPy and values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.stats import spearmanr

from acqsynth.domains import Sample
from acqsynth.domains.classification import Classification
from acqsynth.engines import Sampling
from acqsynth.evaluate import (
    accuracy_by_skill,
    accuracy_interval,
    change,
    evaluate,
    evaluate_by_likelihood,
    holm,
    rank_correlation,
    signal_validity,
)


@pytest.fixture
def echo(scripted):
    """Answers with the text after the question mark."""
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
    with pytest.raises(ValueError, match="max_tokens: expected at least 1, got 0"):
        evaluate(echo, sums, [Sample("1+1", "2")], max_tokens=0)


def test_of_one_fit_the_interval_is_students_over_rows():
    right = np.array([[1.0] * 60 + [0.0] * 40])
    found = accuracy_interval(right)
    expected = stats.ttest_1samp(right[0], 0.0).confidence_interval(0.95)
    assert (found.mean, found.low, found.high) == pytest.approx((0.6, expected.low, expected.high))


@pytest.mark.parametrize("means", [(0.5, 0.6), (0.5, 0.6, 0.55), (0.2, 0.9, 0.4, 0.4)])
def test_where_rows_are_alike_it_is_students_over_fits(means):
    """Holds even for two fits, from which a bootstrap learns next to nothing."""
    right = np.array([[mean] * 50 for mean in means])
    found = change(right, np.full((1, 50), 0.45), learnt=False)
    expected = stats.ttest_1samp(np.array(means), 0.45)
    assert found.mean == pytest.approx(np.mean(means) - 0.45)
    assert found.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)  # of the mean accuracy
    assert (found.low, found.high) == pytest.approx((interval.low - 0.45, interval.high - 0.45))
    assert found.fits == len(means)


def test_two_arms_are_welchs():
    a, b = [0.5, 0.6, 0.7], [0.41, 0.4, 0.43, 0.39]
    found = change(np.array([[mean] * 9 for mean in a]), np.array([[mean] * 9 for mean in b]), level=0.9)
    expected = stats.ttest_ind(a, b, equal_var=False)
    assert found.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.fits == 3


def test_change_is_paired_by_row():
    before = np.array([[1.0, 0.0] * 50])
    after = before.copy()
    after[0, 1:21:2] = 1.0  # ten of a hundred rows become right, none becomes wrong
    found = change(after, before)
    expected = stats.ttest_rel(after[0], before[0])
    assert found.mean == pytest.approx(0.1)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.low == pytest.approx(expected.confidence_interval(0.95).low)


def test_fits_of_one_generator_are_one_draw():
    """Holds for three or more generators; with fewer, each fit counts as a draw."""
    right = np.array([[mean] * 20 for mean in (0.1, 0.11, 0.5, 0.51, 0.9, 0.91)])
    found = accuracy_interval(right, generators=[0, 0, 1, 1, 2, 2])
    expected = stats.ttest_1samp([0.105, 0.505, 0.905], 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((max(0, expected.low), min(1, expected.high)))
    assert accuracy_interval(right, generators=[0, 0, 0, 1, 1, 1]) == accuracy_interval(right)


def test_a_level_apart_gives_nested_intervals_within_shares():
    right = np.random.default_rng(0).integers(0, 2, (3, 50)).astype(float)
    narrow, wide = accuracy_interval(right, level=0.8), accuracy_interval(right, level=0.99)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high
    assert accuracy_interval(np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])).high == 1.0


def test_no_change_is_exactly_none():
    right = np.array([[1.0, 0.0, 1.0]])
    found = change(right, right)
    assert (found.mean, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("after", [np.ones((3, 2)), np.eye(3), np.eye(7), np.full((3, 5), 0.1)])
def test_rows_that_all_change_alike_are_judged_by_their_signs(after):
    before = np.zeros((1, after.shape[1]))
    for right, other in ((after, before), (before, after)):
        found = change(right, other, learnt=False)
        assert found.low == found.high == found.mean != 0
        assert found.p == 2 * 0.5 ** after.shape[1]
    assert change(after, after.mean(axis=0, keepdims=True)).p == 1.0


def test_what_is_called_by_chance_is_rare():
    """Of 300 students that differ from the base by noise alone, about one in twenty has p < 0.05."""
    rng = np.random.default_rng(1)
    called = 0
    for _ in range(300):
        base = (rng.random((1, 200)) < 0.6).astype(float)
        shares = np.clip(0.6 + 0.05 * rng.standard_normal(3), 0, 1)
        fits = np.stack([(rng.random(200) < share).astype(float) for share in shares])
        called += change(fits, base, learnt=False).p < 0.05
    assert called / 300 < 0.08


@pytest.mark.parametrize(
    ("p", "rejected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [True, False, False, True]),  # 0.005 < 0.05/4, 0.01 < 0.05/3, 0.03 > 0.05/2
        ([0.04], [True]),
        ([0.04, 0.04], [False, False]),
        ([], []),
        ([0.5, math.nan, 1e-6], [False, False, True]),
        ([math.nan, 0.001], [False, True]),
        ([0.001, math.nan], [True, False]),
    ],
)
def test_holm(p, rejected):
    assert holm(p) == rejected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generators": [0]}, "generators: expected 2, one per fit, got 1"),
        ({"generators": [0, 1, 2]}, "generators: expected 2, one per fit, got 3"),
        ({"level": 95}, r"level: expected a share in \(0, 1\), got 95"),
        ({"level": 1.0}, r"level: expected a share in \(0, 1\), got 1.0"),
    ],
)
def test_wrong_options_of_an_interval(options, message):
    right = np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    with pytest.raises(ValueError, match=message):
        accuracy_interval(right, **options)
    with pytest.raises(ValueError, match=message):
        change(right, right[:1], learnt=False, **options)


@pytest.mark.parametrize("right", [np.zeros(3), np.zeros((0, 3)), np.zeros((2, 0))])
def test_what_is_no_matrix_is_refused(right):
    with pytest.raises(ValueError, match=r"right: expected \[seeds, rows\]"):
        accuracy_interval(right)


def test_a_change_over_other_rows_is_refused():
    with pytest.raises(ValueError, match="other: expected 3 rows as in right, got 2"):
        change(np.zeros((1, 3)), np.zeros((1, 2)))


def test_accuracy_by_skill():
    right = np.array([[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0]])
    assert accuracy_by_skill(right, ["add", "add", "sort", None]) == {"add": (0.75, 2), "sort": (0.5, 1)}


def test_signal_validity_is_spearmans():
    scores = {"a": [1.0, 2.0, 3.0, 4.0, 5.0], "b": [5.0, 4.0, 3.0, 2.0, 1.0], "c": [2.0, 2.0, 1.0, 3.0, 3.0]}
    gains = [0.1, 0.3, 0.2, 0.5, 0.4]
    found = {name: signal_validity(column, gains) for name, column in scores.items()}
    assert {name: value.mean for name, value in found.items() if value} == pytest.approx(
        {name: spearmanr(column, gains).statistic for name, column in scores.items()}
    )
    assert found["a"] is not None
    assert found["a"].mean == pytest.approx(0.8)  # 1 - 6 * (0 + 1 + 1 + 1 + 1) / (5 * 24)
    assert found["a"].low < 0.8 < found["a"].high <= 1.0


@pytest.mark.parametrize("correlation", [signal_validity, rank_correlation])
def test_an_undefined_correlation_is_none_and_not_a_number(correlation):
    assert correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert correlation([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]) is None
    assert correlation([1.0, 2.0], [1.0, 2.0]) is None
    assert correlation([], []) is None
    with pytest.raises(ValueError, match="after: expected 2 scores as in before, got 3"):
        correlation([1.0, 2.0], [1.0, 2.0, 3.0])


def test_order_alone_counts():
    assert rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 1000.0]) == pytest.approx(1)
    assert rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    # Spearman: 1 - 6 sum d^2 / (n (n^2 - 1)), d = 1, 1, 0, 0
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 3.0, 4.0]) == pytest.approx(1 - 6 * 2 / 60)


def test_unscored_samples_are_left_out():
    assert rank_correlation([1.0, None, 2.0, 3.0, math.nan], [1.0, 5.0, 2.0, 3.0, 0.0]) == pytest.approx(1)
    assert rank_correlation([1.0, None, 2.0, 3.0], [1.0, 5.0, math.inf, 3.0]) is None


class Likely:
    """An engine for which the text named in the prompt is the likeliest and all others are equally likely."""

    name = "likely"

    def logprobs(self, prompts, texts):
        asked = [prompt[-1]["content"] for prompt in prompts]
        nothing = {text: -math.inf if text.startswith("long") else -1.0 for text in asked}
        return [[0.0 if text.startswith(f"{label}!") else nothing[text] for label in texts] for text in asked]


def test_the_likeliest_label_is_the_answer():
    labels = ["card", "card_arrival", 'say "hi", then go', *(f"intent_{i}" for i in range(147))]
    domain = Classification(labels)
    rows = [Sample(f"{domain.solution(Sample('', label))}! Where?", label) for label in labels]
    rows += [Sample("card arrival! Where?", "card"), Sample("none", "card"), Sample("none", "card_arrival")]
    rows += [Sample("long", "card")]  # a question without room for a label
    found = evaluate_by_likelihood(Likely(), domain, rows, labels)
    assert found.answers == [*labels, "card_arrival", "card", "card", None]  # ties go to the first
    assert found.right == [True] * 150 + [False, True, False, False]
    assert found.completions[1] == "card arrival"


def test_likelihood_needs_labels_and_an_engine_that_gives_it(echo):
    rows = [Sample("Where?", "card")]
    with pytest.raises(ValueError, match="rows, labels: expected at least one of each, got 1 and 0"):
        evaluate_by_likelihood(Likely(), Classification(), rows, [])
    with pytest.raises(ValueError, match="engine: the likelihood of labels needs transformers, got fake"):
        evaluate_by_likelihood(echo, Classification(), rows, ["card"])
