"""Rows of a recipe's sets: which are left out or refused, and how real rows are drawn and ranked."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import fake_run
import pytest
from fake_run import plan_of, run

from acqsynth.artefacts import read_json, read_rows
from acqsynth.domains import Sample
from acqsynth.rewards import ComposedReward, build
from acqsynth.stages import rows as stage
from acqsynth.steps import StepError, Store


def test_rows_of_an_evaluation_set_are_left_out(fakes, recipe):
    replay = ("data.replay={source: 'sums:3030', limit: 30}", "student.replay=0.1")
    plan = plan_of(recipe, "data.real={source: 'sums:1140', limit: 100}", *replay)
    store = Store(Path(plan.config.output))
    store.run(plan.of("seeds")[0])
    sizes = read_json(store.output / "00-seeds/rows/rows.json")
    assert sizes["real"] == {"rows": 90, "left_out": 10}
    assert sizes["replay"] == {"rows": 20, "left_out": 10}
    replay = [row.question for row in read_rows(store.output / "00-seeds/rows/replay.parquet")]
    assert replay == [f"{n}+1" for n in range(3040, 3060)]
    assert sizes["evaluation-in_distribution"] == {"rows": 150, "left_out": 0}


def test_a_row_disguised_by_other_signs_is_left_out(fakes, recipe, monkeypatch):
    disguised = Sample("Question 1: 1000 \u2010 1\u200b?", "999")
    monkeypatch.setattr(
        fake_run.Sums,
        "load",
        lambda self, source, *rest: [Sample(f"{source[5:]} - 1?", "0"), disguised][: 2 - (source == "sums:1000")],
    )
    plan = plan_of(recipe, "evaluation.others={}", "evaluation.validity.batches=0")
    store = Store(Path(plan.config.output))
    store.run(plan.of("seeds")[0])
    assert [row.question for row in read_rows(store.output / "00-seeds/rows/real.parquet")] == ["200 - 1?"]


def test_no_sample_repeats_a_row_of_any_evaluation_set(fakes, recipe, monkeypatch):
    """The gate of every reward gets the rows of all sets, not only of the recipe's own."""
    refused = []

    def make(*arguments, evaluation, made=build.build, **rows):
        refused.append({row.question for row in evaluation})
        return made(*arguments, **rows)

    monkeypatch.setattr(build, "build", make)
    run(recipe, "baselines=[best_of_n]")
    sets = {f"{n}+1" for n in (*range(1000, 1150), *range(3000, 3040))}
    # Two checks without rows, then to train, write, select and test signals.
    assert refused == [{"question"}] * 2 + [sets] * 4


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.seeds.source=nowhere.jsonl", "00-seeds/rows: data.seeds: nowhere.jsonl: no such file"),
        ("data.real={source: 'sums:1000', limit: 100}", "data.real: every row is also in an evaluation set"),
        ("student.replay=0.1 data.replay={source: 'sums:3000'}", "data.replay: every row is also in an evaluation set"),
        ("evaluation.others.more.source=gone", "evaluation.others.more: gone: no such file"),
        ("student.replay=0.8", "00-seeds/rows: student.replay: expected 280 rows for a share of 0.8 beside 70 samples"),
        ("data.seeds={source: 'sums:0', skip: 50}", "has no rows after the first 50"),
        ("evaluation.validity.rows=150", "00-seeds/rows: evaluation.validity.rows: expected 150 real rows of a skill"),
    ],
)
def test_data_that_can_not_be_used_is_one_sentence(fakes, recipe, override, sentence):
    with pytest.raises(StepError) as caught:
        run(recipe, *re.split(r" (?=data)", override))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_filtered_rows_are_the_ones_ranked_first(fakes, recipe):
    plan = plan_of(recipe)
    store = Store(Path(plan.config.output))
    ranked, random = (plan.arms[name].rows[0][0] for name in ("filtered_real", "random_real"))
    for step in (ranked, random):
        store.run(step)
    found = read_rows(store.path(ranked / "samples.parquet"))
    assert [sample.question for sample in found] == [f"{n}+1" for n in range(399, 329, -1)]
    drawn = read_rows(store.path(random / "samples.parquet"))
    assert len({sample.question for sample in drawn}) == 70


class Recorded:
    def __init__(self, name, seen):
        self.name = name
        self.seen = seen

    def __call__(self, samples):
        self.seen.append(samples)
        return [1.0] * len(samples)


def test_signals_of_a_pool_are_given_one_batch():
    seen = []
    reward = SimpleNamespace(signals=[Recorded(name, seen) for name in ("a", "b")])
    assert stage.signal_values(reward, [Sample("1+1", "2")]) == {"a": [1.0], "b": [1.0]}
    assert seen[0] is seen[1]


def test_rows_are_ranked_by_the_weights_of_the_reward():
    reward = SimpleNamespace(fusion="raw", weights={"entropy": 2.0, "margin": -1.0}, length_bins={})
    logged_only = [None, 50.0, -50.0, 0.0]
    columns = {"entropy": [3.0, 1.0, None, 2.0], "margin": [0.0, 9.0, 5.0, 1.0], "loss": logged_only}
    fused = stage.fused(columns, reward, [Sample("1+1", "2")] * 4)
    assert fused == [6.0, -7.0, None, 3.0]


def test_rows_are_ranked_after_their_lengths_effect_is_removed(sums):
    """As the reward does in training: a sum over tokens grows with the length, which would rank the longest first."""
    rows = [Sample("+".join("1" * n), str(n)) for n in (2, 4, 8, 16) for _ in range(40)]
    surplus = [[0.0, 3.0, 1.0, 2.0][i % 4] for i in range(len(rows))]
    columns = {"loss": [len(row.question) + more for row, more in zip(rows, surplus, strict=True)]}
    reward = ComposedReward(sums, [Recorded("loss", [])])
    totals = stage.fused(columns, reward, rows)
    first = sorted(range(len(rows)), key=lambda i: -totals[i])[:40]
    assert {len(rows[i].question) for i in first} == {3, 7, 15, 31}
    assert {surplus[i] for i in first} == {3.0}
    # Rows that lack a value of another signal count in no statistic, as in the reward.
    reward = ComposedReward(sums, [Recorded("loss", []), Recorded("margin", [])], length_normalised=["loss"])
    outlier, lacking = [*columns["loss"], 1e6], [*[0.0] * len(rows), None]
    both = stage.fused({"loss": outlier, "margin": lacking}, reward, [*rows, rows[-1]])
    assert both[:-1] == stage.fused({**columns, "margin": lacking[:-1]}, reward, rows)
