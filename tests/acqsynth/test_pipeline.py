"""A whole recipe with fake models: artefacts, shared and skipped steps, kills, and failure messages."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fake_run
import pytest
from fakes import written

import acqsynth.train  # noqa: F401  (before processes are forked)
from acqsynth import config as recipes, label, pipeline, stages, write
from acqsynth.cli import main
from acqsynth.config import EngineConfig, LabellingConfig, RewardConfig, SamplingConfig
from acqsynth.domains import Sample
from acqsynth.rewards import ComposedReward, build
from acqsynth.stages import Replay, Scoring, Writing
from acqsynth.steps import StepContext, StepError, Store, read_rows, read_table, write_rows


def run(recipe, *overrides):
    plan = plan_of(recipe, *overrides)
    store = Store(Path(plan.config.output))
    return plan, store, [str(step) for step in plan.steps if store.run(step)]


def plan_of(recipe, *overrides):
    return pipeline.plan(recipes.load(recipe, overrides))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "recipe.yaml").write_text(fake_run.RECIPE + f"output: {folder / 'out'}\n")
    with pytest.MonkeyPatch.context() as patch:
        fake_run.install(patch.setattr, figures=True)
        run(folder / "recipe.yaml")
    return folder / "out"


@pytest.fixture
def done(finished, recipe, fakes):
    """The recipe, with a finished run copied to this test's folder."""
    shutil.copytree(finished, recipe.parent / "out")
    fakes.clear()
    return recipe


def contents(output):
    """All artefacts, without timings and what depends on them."""
    found = {}
    for path in sorted(output.rglob("*")):
        if not path.is_file() or path.name in (".lock", "run.log", "report.html"):
            continue
        if path.name in ("stage.json", "metrics.json"):
            content = json.loads(path.read_text())
            content.pop("seconds", None)
            content.get("artefacts", {}).pop("metrics.json", None)
            content.get("artefacts", {}).pop("report.html", None)
            for arm in content.get("arms", {}).values():
                arm.pop("seconds", None)
            found[str(path.relative_to(output))] = content
        else:
            found[str(path.relative_to(output))] = path.read_bytes()
    return found


def test_every_artefact_is_there(fakes, recipe):
    plan, store, ran = run(recipe)
    output = store.output
    assert ran == [str(step) for step in plan.steps]
    assert [folder.name for folder in sorted(output.iterdir())] == [
        "00-seeds",
        "01-train",
        "02-generate",
        "03-label",
        "04-fit",
        "05-evaluate",
        "06-report",
    ]
    assert list(plan.arms) == ["grpo", "no_rl", "random_real", "filtered_real", "error_driven"]
    for arm in plan.arms:
        for seed in (0, 1):
            assert (output / f"04-fit/{arm}-student-70-s{seed}/model/config.json").is_file()
            counts = json.loads((output / f"04-fit/{arm}-student-70-s{seed}/counts.json").read_text())
            assert counts == {"wanted": 70, "rows": 70}, arm
    assert (output / "06-report/report/report.html").is_file()
    assert not list(output.rglob("*.partial"))
    assert not list(output.rglob("work"))
    metrics = json.loads((output / "06-report/report/metrics.json").read_text())
    assert set(metrics["sets"]) == {"in_distribution", "more"}
    base = read_table(output / "05-evaluate/base-student/answers-in_distribution.parquet")
    assert metrics["base"]["student"]["in_distribution"]["accuracy"]["mean"] == sum(base["right"]) / 150
    assert metrics["training"]["cost"] == {
        "steps": 3,
        "seconds_per_step": 2.0,
        "reward_seconds_per_step": pytest.approx(0.1),
        "share": pytest.approx(0.05),
    }
    assert [row["text"] for row in metrics["samples"]["best"]] == [f"<b>text {i}</b>" for i in (10, 9, 8, 7, 6)]
    assert metrics["validity"]["signals"]["size"]["batches"] == 4
    labelled = metrics["arms"]["grpo"]["labelled"]
    assert labelled["asked"] == metrics["arms"]["grpo"]["written"]["kept"]
    assert 0 < labelled["right"] < labelled["truth_known"] == labelled["labelled"] < labelled["asked"]
    assert labelled["refuted"] == labelled["truth_known"] - labelled["right"]
    assert metrics["arms"]["random_real"]["written"] is None


def test_a_second_run_does_nothing(fakes, done):
    output = done.parent / "out"
    before = contents(output)
    assert run(done)[2] == []
    assert not fakes
    assert contents(output) == before


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("evaluation.resamples=30", {"06-report"}),
        ("evaluation.validity.batches=2", {"05-evaluate", "06-report"}),
        ("student.seeds=[0, 1, 2]", {"04-fit", "05-evaluate", "06-report"}),
        ("labelling.k=5", {"03-label", "06-report"}),
        ("data.real.limit=100", {"00-seeds", "02-generate", "04-fit", "05-evaluate", "06-report"}),
    ],
)
def test_a_changed_key_runs_only_what_reads_it(fakes, done, override, stages):
    """With k = 5 the fake labels do not change, so the fits are not repeated."""
    ran = run(done, override)[2]
    assert {step.split("/")[0] for step in ran} == stages
    if override.startswith("data.real"):
        assert not any("grpo" in step or "no_rl" in step for step in ran)
    if override.startswith("student.seeds"):
        assert all(step.endswith("-s2") or "report" in step for step in ran)


def test_arms_share_what_reads_the_same(fakes, recipe):
    """Prompting alone is both the main arm and a baseline but runs once. Step names are unique within a stage."""
    plan = plan_of(recipe, "generator.method=none")
    assert plan.main == "no_rl"
    assert [str(step) for step in plan.of("generate")].count("02-generate/no_rl") == 1
    assert plan.of("train") == []
    for each in (plan, plan_of(recipe, "rounds=2", "baselines=[no_rl, best_of_n]")):
        names = [str(step) for step in each.steps]
        assert len(set(names)) == len(names)
    grpo = plan_of(recipe, "baselines=[no_rl, best_of_n]")
    selected = next(step for step in grpo.of("generate") if step.name == "best_of_n")
    assert [selected.arguments["spent"].step] == grpo.arms["grpo"].trained
    best = plan_of(recipe, "generator.method=best_of_n", "baselines=[best_of_n, no_rl]")
    assert list(best.arms) == ["best_of_n", "no_rl"]
    assert best.arms["best_of_n"].written[0].arguments["spent"] is None


def test_all_arms_learn_equal_rows_with_equal_settings(fakes, recipe):
    plan = plan_of(recipe, "student.rows=[10, 70]", "student.others={small: other}")
    settings = {}
    for arm in plan.arms.values():
        for key, fit in arm.fits.items():
            other = {name: value for name, value in fit.settings().items() if name != "samples"}
            settings.setdefault(key, set()).add(json.dumps(other, sort_keys=True))
    assert list(settings) == [(s, n, 0, seed) for s in ("student", "small") for n in (10, 70) for seed in (0, 1)]
    assert all(len(each) == 1 for each in settings.values())
    writing = [plan.arms[name].written[0].arguments["writing"] for name in ("grpo", "no_rl", "error_driven")]
    assert {each.n for each in writing} == {90}


def test_rounds_alternate(fakes, recipe):
    """Each round scores and labels with the student of the previous round and continues from its generator."""
    plan, store, _ = run(recipe, "rounds=3", "baselines=[no_rl]", "evaluation.validity.batches=0")
    arm = plan.arms["grpo"]
    assert [str(step) for step in arm.trained] == [f"01-train/grpo-round-{i}" for i in (1, 2, 3)]
    first, second, third = (step.arguments for step in arm.trained)
    assert (first["generator"], first["scoring"].student) == ("generator", "student")
    assert second["generator"].step is arm.trained[0]
    assert third["generator"].step is arm.trained[1]
    fits = [second["scoring"].student.step, third["scoring"].student.step]
    assert [str(fit) for fit in fits] == ["04-fit/grpo-round-1", "04-fit/grpo-round-2"]
    assert [fit.arguments["n"] for fit in fits] == [24, 24 + 23]
    assert [len(fit.arguments["samples"]) for fit in (*fits, arm.fits["student", 70, 0, 0])] == [1, 2, 3]
    assert arm.labelled[1].arguments["model"].step is fits[0]
    assert [step.arguments["writing"].n for step in arm.written] == [30, 30, 30]
    earlier = [list(map(str, step.arguments["writing"].earlier)) for step in arm.written]
    written = [f"02-generate/grpo-round-{i}/samples.parquet" for i in (1, 2)]
    assert earlier == [[], written[:1], written]
    # The fake trainer adds 5, and 1 more if the scoring student has been fitted.
    strengths = [json.loads((store.path(u / "model") / "config.json").read_text())["strength"] for u in arm.trained]
    assert strengths == [45, 51, 57]
    metrics = json.loads((store.path(plan.report / "metrics.json")).read_text())
    assert [entry["step"] for entry in metrics["training"]["log"]] == list(range(1, 10))


def test_each_seed_of_the_generator_is_a_run_of_its_own(fakes, recipe):
    """Each seed trains, writes and labels separately with its own random seeds; the ranked real rows are shared."""
    overrides = ("baselines=[no_rl, best_of_n, random_real, filtered_real, error_driven]", "rounds=2")
    plan, store, _ = run(recipe, "generator.seeds=[0, 3]", *overrides)
    for name, arm in plan.arms.items():
        assert list(arm.rows) == ([0] if name == "filtered_real" else [0, 3])
        assert list(arm.fits) == [("student", 70, g, seed) for g in arm.rows for seed in (0, 1)]
        read = {g: {fit.settings()["samples"][0] for key, fit in arm.fits.items() if key[2] == g} for g in arm.rows}
        assert [len(each) for each in read.values()] == [1] * len(read)
        assert len(set.union(*read.values())) == len(read)
    grpo = plan.arms["grpo"]
    assert [step.arguments["seed"] for step in grpo.trained] == [0, 1, 6, 7]
    assert grpo.trained[2].arguments["generator"] == "generator"
    assert [step.arguments["writing"].seed for step in plan.arms["no_rl"].written] == [0, 6]
    metrics = json.loads((store.path(plan.report / "metrics.json")).read_text())
    [result] = metrics["arms"]["grpo"]["results"]
    assert (result["generators"], result["seeds"]) == ([0, 0, 3, 3], [0, 1, 0, 1])
    assert metrics["comparisons"][0]["difference"]["fits"] == 4
    assert [entry["step"] for entry in metrics["training"]["log"]] == list(range(1, 7))  # of one generator only
    one = plan_of(recipe, *overrides)
    assert {str(step): step.settings() for step in one.steps[:-1]}.items() <= {
        str(step): step.settings() for step in plan.steps
    }.items()


def test_rejection_sampling_spends_what_training_did(fakes, recipe):
    _, store, _ = run(recipe, "baselines=[best_of_n]", "evaluation.validity.batches=0")
    counts = json.loads((store.output / "02-generate/best_of_n/counts.json").read_text())
    # The fake training drew 12 completions and 90 questions are wanted: (12 + 90) / 90 per prompt, at least 2.
    assert counts["completions"] == 180
    table = read_table(store.output / "02-generate/best_of_n/samples.parquet")
    assert len(table["reward"]) == counts["kept"] > 70
    assert table["reward_size"] == [1.0] * counts["kept"]


def test_the_report_counts_the_samples_of_every_generator(fakes, recipe):
    options = ("generator.method=best_of_n", "generator.seeds=[0, 3]", "baselines=[]")
    plan, store, _ = run(recipe, *options, "evaluation.validity.batches=0")
    metrics = json.loads((store.path(plan.report / "metrics.json")).read_text())
    assert metrics["samples"]["scored"] == metrics["arms"]["best_of_n"]["written"]["kept"] > 100


def test_rejection_sampling_spends_what_all_rounds_of_its_seed_did(fakes, recipe):
    plan = plan_of(recipe, "baselines=[best_of_n]", "rounds=2", "generator.seeds=[0, 3]")
    spent = [[str(each) for each in step.arguments["spent"]] for step in plan.arms["best_of_n"].written]
    folders = [f"01-train/grpo{seed}-round-{i}/counts.json" for seed in ("", "@3") for i in (1, 2)]
    assert spent == [folders[:2], folders[2:]]


@pytest.mark.parametrize("log", [{"logging_steps": 3}, {"log_completions": False}])
def test_completions_are_counted_however_they_are_logged(scoring, student_path, tmp_path, log):
    options = TRAINER | {"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 4} | log
    stages.train_generator(
        StepContext(tmp_path), scoring=scoring, method="grpo", generator=student_path, prompts=4, shown=2,
        turns=False, candidates=None, options=options, seed=0,
    )  # fmt: skip
    assert json.loads((tmp_path / "counts.json").read_text())["completions"] == 6


def test_completions_without_a_score_are_noted(fakes, recipe, monkeypatch):
    _, store, _ = run(recipe, "evaluation.validity.batches=0")
    metrics = json.loads((store.output / "06-report/report/metrics.json").read_text())
    said = [each["text"] for each in metrics["verdict"] if each["kind"] == "note"]
    assert said == ["grpo: 8.3 % of the completions could not be scored and counted for nothing."]  # 1 of 12


def test_errors_are_shown_by_their_skills_share(fakes, recipe):
    pool = [Sample(f"a{i}", "1", "", {"skill": "a"}) for i in range(10)]
    pool += [Sample(f"b{i}", "1", "", {"skill": "b"}) for i in range(90)]
    # All of a and a tenth of b are wrong, so a's share of errors is ten times b's.
    right = [False] * 10 + [i >= 9 for i in range(90)]
    drawn = Counter(sample.question[0] for sample in stages.sample_mistakes(pool, right, 11000, seed=0))
    assert drawn["a"] / drawn["b"] == pytest.approx(10, rel=0.15)
    with pytest.raises(StepError, match="error_driven: the student makes no mistake on the held-out rows"):
        stages.sample_mistakes(pool, [True] * 100, 5, seed=0)


def test_filtered_rows_are_the_ones_ranked_first(finished):
    found = read_rows(finished / "02-generate/filtered_real/samples.parquet")
    assert [sample.question for sample in found] == [f"{n}+1" for n in range(399, 329, -1)]
    drawn = read_rows(finished / "02-generate/random_real/samples.parquet")
    assert len({sample.question for sample in drawn}) == 70


def test_signals_of_a_pool_are_given_one_batch():
    seen = []
    reward = SimpleNamespace(signals=[Recorded(name, seen) for name in ("a", "b")])
    assert stages._values(reward, [Sample("1+1", "2")]) == {"a": [1.0], "b": [1.0]}
    assert seen[0] is seen[1]


class Recorded:
    def __init__(self, name, seen):
        self.name = name
        self.seen = seen

    def __call__(self, samples):
        self.seen.append(samples)
        return [1.0] * len(samples)


def test_rows_of_an_evaluation_set_are_left_out(fakes, recipe):
    plan = plan_of(
        recipe, "data.real={source: 'sums:1140', limit: 100}", "data.replay={source: 'sums:3030', limit: 30}"
    )
    store = Store(Path(plan.config.output))
    store.run(plan.of("seeds")[0])
    sizes = json.loads((store.output / "00-seeds/rows/rows.json").read_text())
    assert sizes["real"] == {"rows": 90, "left_out": 10}
    assert sizes["replay"] == {"rows": 20, "left_out": 10}
    replay = [row.question for row in read_rows(store.output / "00-seeds/rows/replay.parquet")]
    assert replay == [f"{n}+1" for n in range(3040, 3060)]
    assert sizes["evaluation-in_distribution"] == {"rows": 150, "left_out": 0}


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


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.seeds.source=nowhere.jsonl", "00-seeds/rows: data.seeds: nowhere.jsonl: no such file"),
        ("data.real={source: 'sums:1000', limit: 100}", "data.real: every row is also in an evaluation set"),
        ("data.replay={source: 'sums:3000', limit: 40}", "data.replay: every row is also in an evaluation set"),
        ("evaluation.others.more.source=gone", "evaluation.others.more: gone: no such file"),
        ("student.replay=0.8", "00-seeds/rows: student.replay: expected 280 rows for a share of 0.8 beside 70 samples"),
        ("data.seeds={source: 'sums:0', skip: 50}", "has no rows after the first 50"),
        ("evaluation.validity.rows=150", "00-seeds/rows: evaluation.validity.rows: expected 150 real rows of a skill"),
    ],
)
def test_data_that_can_not_be_used_is_one_sentence(fakes, recipe, override, sentence):
    with pytest.raises(StepError) as caught:
        run(recipe, override)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_written_is_one_sentence(fakes, recipe, monkeypatch):
    nothing = SimpleNamespace(rows=[], completions=64, dropped={"does not parse": 60, "gate new": 4})
    monkeypatch.setattr(write, "write", lambda *arguments, **options: nothing)
    told = r"none of 128 completions is a sample \(120 does not parse, 8 gate new\)"
    with pytest.raises(StepError, match=told):
        run(recipe)


def test_a_later_round_that_repeats_itself_adds_no_rows(fakes, recipe, monkeypatch):
    first = []

    def converged(*arguments, asked, **options):
        if not len(asked):
            first.append(asked)
        repeats = SimpleNamespace(rows=[], completions=45, dropped={"repeats a question": 45})
        of_first_round = any(asked is each for each in first)
        return fake_run.write(*arguments, asked=asked, **options) if of_first_round else repeats

    monkeypatch.setattr(write, "write", converged)
    plan, store, _ = run(recipe, "rounds=2", "baselines=[no_rl]", "evaluation.validity.batches=0")
    arm = plan.arms["grpo"]
    first, second = (read_rows(store.path(step) / "samples.parquet") for step in arm.labelled)
    assert first
    assert second == []
    metrics = json.loads((store.path(plan.report) / "metrics.json").read_text())
    kept = json.loads((store.path(arm.written[0]) / "counts.json").read_text())["kept"]
    assert metrics["arms"]["grpo"]["written"]["kept"] == kept
    assert metrics["arms"]["grpo"]["written"]["dropped"]["repeats a question"] == 45
    said: list[str] = []
    stages._write_kept(StepContext(recipe.parent, said.append), [], 8, write.questions(), later=True)
    assert "adds no rows: set fewer rounds or a higher generator.sampling.temperature" in said[-1]


def test_nothing_labelled_is_one_sentence(fakes, recipe, monkeypatch):
    silent = SimpleNamespace(sample=None, agreement=0.0)
    monkeypatch.setattr(label, "label", lambda engine, domain, samples, **options: [silent] * len(samples))
    with pytest.raises(StepError, match=r"03-label/grpo: the answers agree on none of [0-9]+ questions"):
        run(recipe)


@pytest.mark.parametrize(("gates", "kept"), [(None, [1]), (["new"], [0, 1])])
def test_a_label_that_the_question_gives_away_is_dropped(sums, tmp_path, monkeypatch, gates, kept):
    asked = [Sample("The answer is 8. What is 3+5?", "7"), Sample("What is 4+4?", "7")]
    sums.computed = lambda samples, seed: [replace(sample, answer="8") for sample in samples]
    monkeypatch.setattr(stages, "find_domain", lambda name: sums)
    write_rows(tmp_path / "asked.parquet", asked)
    write_rows(tmp_path / "seeds.parquet", SEEDS)
    stages.label_questions(
        StepContext(tmp_path), domain="sums", engine=EngineConfig(), labelling=LabellingConfig(method="computed"),
        model=None, gates=gates, seeds=tmp_path / "seeds.parquet", samples=tmp_path / "asked.parquet", seed=0,
    )  # fmt: skip
    assert read_rows(tmp_path / "samples.parquet") == [replace(asked[i], answer="8") for i in kept]
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert (counts["labelled"], counts["dropped"]) == (len(kept), {} if gates else {"gate no_leak": 1})


@pytest.mark.parametrize("gates", [None, ["new", "fluent"]])
def test_a_label_that_no_seed_has_is_dropped(tmp_path, monkeypatch, scripted, gates):
    """Known labels are written as the seeds spell them, and the skill goes with the label."""
    says = {"gone": "Sure! It is about a delivery.", "late": "card arrival", "stolen": "Lost  Phone\nas it was stolen"}
    engine = scripted(lambda prompt, i, seed: says[prompt[0]["content"].split()[0]])
    monkeypatch.setattr(stages, "_engine", lambda *arguments: engine)
    labelled = [Sample("my parcel is due", "card_arrival"), Sample("my phone was taken", "Lost_phone")]
    write_rows(tmp_path / "seeds.parquet", labelled)
    questions = ("gone with the wind", "late is my envelope", "stolen on the train")
    write_rows(tmp_path / "asked.parquet", [Sample(each, "lost", "", {"skill": "lost"}) for each in questions])
    stages.label_questions(
        StepContext(tmp_path), domain="classification", engine=EngineConfig(), labelling=LabellingConfig(k=2),
        model="student", gates=gates, seeds=tmp_path / "seeds.parquet", samples=tmp_path / "asked.parquet", seed=0,
    )  # fmt: skip
    found = read_rows(tmp_path / "samples.parquet")
    assert [(sample.question, sample.answer, sample.extra) for sample in found] == [
        ("late is my envelope", "card_arrival", {"skill": "card_arrival"}),
        ("stolen on the train", "Lost_phone", {"skill": "Lost_phone"}),
    ]
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert (counts["labelled"], counts["dropped"]) == (2, {"gate sound": 1})


SEEDS = [Sample(f"{n}+{n}", str(2 * n), f"{n} and {n}") for n in range(1, 9)]
TRAINER = {"max_steps": 3, "use_cpu": True, "bf16": False, "save_steps": 1, "gradient_checkpointing": False}


@pytest.fixture
def scoring(sums, student_path, tmp_path, monkeypatch):
    """The default reward with a student of a few thousand parameters, refreshed every two steps."""
    monkeypatch.setattr(stages, "find_domain", lambda name: sums)
    write_rows(tmp_path / "seeds.parquet", SEEDS)
    reward = RewardConfig(answers={"k": 2, "max_tokens": 4}, refresh_steps=2)
    return Scoring(reward, "sums", EngineConfig(), student_path, *[tmp_path / "seeds.parquet"] * 3)


def test_a_generator_learns_from_a_student_that_moves(scoring, student_path, tmp_path):
    said = []
    options = TRAINER | {"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 4}
    arguments = {"generator": student_path, "prompts": 4, "shown": 2, "turns": False, "seed": 0}
    stages.train_generator(
        StepContext(tmp_path, said.append),
        scoring=scoring,
        method="grpo",
        candidates=None,
        options=options,
        **arguments,
    )
    assert (tmp_path / "model/config.json").is_file()
    assert json.loads((tmp_path / "counts.json").read_text()) == {"completions": 6, "masked": 0}
    assert sum("of 3: reward" in line for line in said) == 3
    assert [line for line in said if "scores with" in line] == ["the reward scores with checkpoint-1"]
    # DPO draws its candidates first; random bytes never parse.
    with pytest.raises(ValueError, match="expected a prompt whose best candidate passes the gates"):
        stages.train_generator(
            StepContext(tmp_path / "dpo"), scoring=scoring, method="dpo", options=TRAINER,
            candidates=(SamplingConfig(max_tokens=4), 2), **arguments,
        )  # fmt: skip


@pytest.fixture
def writing(sums, tmp_path, monkeypatch):
    """Writing with a reward that knows how new a question is, and prompts that show held-out rows."""
    monkeypatch.setattr(stages, "find_domain", lambda name: sums)
    write_rows(tmp_path / "seeds.parquet", SEEDS)
    write_rows(tmp_path / "held_out.parquet", [Sample(f"{n}+9", str(n + 9)) for n in range(20, 24)])
    reward = RewardConfig(signals={"diversity": {}}, embedder="ngram", gates=["sound", "new"])
    scoring = Scoring(reward, "sums", EngineConfig(), "student", *[tmp_path / "seeds.parquet"] * 3)
    return Writing(scoring, "generator", SamplingConfig(), 1, False, 8, 0, tmp_path / "held_out.parquet")


@pytest.mark.parametrize("selected", [False, True])
def test_rows_that_prompts_show_are_not_written(writing, tmp_path, monkeypatch, scripted, selected):
    """Neither copies of seeds nor of held-out rows, as they were or disguised, but other questions are."""
    copies = itertools.cycle(["20+9", "1+1", "Question 3: 22+9", "2\u200b1+9"])
    drawn = itertools.count(50)
    engine = scripted(lambda prompt, i, seed: written(f"{n}+9" if (n := next(drawn)) % 2 else next(copies), 1))
    monkeypatch.setattr(stages, "_engine", lambda *arguments: engine)
    if selected:
        stages.select_questions(StepContext(tmp_path), writing=writing, candidates=2, spent=[])
    else:
        stages.write_questions(StepContext(tmp_path), writing=writing)
    found = {sample.question for sample in read_rows(tmp_path / "samples.parquet")}
    assert found == {f"{n}+9" for n in range(51, 67, 2)}
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["dropped"]["gate new"] == counts["completions"] // 2


def test_a_round_asks_no_question_of_an_earlier_one(writing, tmp_path, monkeypatch, scripted):
    """The engine repeats what it wrote in the first round before it goes on."""

    def asked(name, writing):
        (tmp_path / name).mkdir()
        drawn = itertools.count(50)
        engine = scripted(lambda prompt, i, seed: written(f"{next(drawn)}+9", 1))
        monkeypatch.setattr(stages, "_engine", lambda *arguments: engine)
        stages.write_questions(StepContext(tmp_path / name), writing=writing)
        return [sample.question for sample in read_rows(tmp_path / name / "samples.parquet")]

    assert asked("one", writing) == [f"{n}+9" for n in range(50, 58)]
    later = replace(writing, earlier=[tmp_path / "one/samples.parquet"])
    assert asked("two", later) == [f"{n}+9" for n in range(58, 66)]


@pytest.mark.parametrize("selected", [False, True])
def test_repeats_of_an_earlier_chunk_are_replaced(writing, tmp_path, monkeypatch, scripted, selected):
    """Without the gate new too, and a killed step goes on to the same rows."""
    monkeypatch.setattr(stages, "CHUNK", 5)
    ungated = replace(writing.scoring, reward=writing.scoring.reward.model_copy(update={"gates": ["sound"]}))
    write_rows(tmp_path / "earlier.parquet", [Sample(f"{n}+9", str(n + 9)) for n in range(50, 60)])
    asking = replace(writing, scoring=ungated, n=25, earlier=[tmp_path / "earlier.parquet"])

    def asked(folder, killed_at=0):
        calls = itertools.count(1)

        def says(prompt, i, seed):
            if next(calls) == killed_at:
                raise KeyboardInterrupt
            drawn = random.Random(f"{prompt} {i} {seed}").randint(50, 110)
            return written(f"{drawn}+9", drawn + 9)

        monkeypatch.setattr(stages, "_engine", lambda *arguments: scripted(says))
        folder.mkdir(exist_ok=True)
        if selected:
            stages.select_questions(StepContext(folder), writing=asking, candidates=2, spent=())
        else:
            stages.write_questions(StepContext(folder), writing=asking)
        counts = json.loads((folder / "counts.json").read_text())
        return [sample.question for sample in read_rows(folder / "samples.parquet")], counts

    whole, counts = asked(tmp_path / "whole")
    assert len(set(whole)) == len(whole) == counts["kept"] == 25
    assert {int(question[:-2]) for question in whole}.isdisjoint(range(50, 60))
    assert counts["dropped"]["repeats a question"] > 5
    assert counts["dropped"]["surplus"] > 0
    for killed_at in (12, 40, counts["completions"]):
        with pytest.raises(KeyboardInterrupt):
            asked(tmp_path / str(killed_at), killed_at)
        assert asked(tmp_path / str(killed_at)) == (whole, counts)


@pytest.mark.parametrize("selected", [False, True])
def test_the_gate_new_gets_the_rows_shown(writing, tmp_path, monkeypatch, scripted, selected):
    """A held-out row that no prompt shows may be asked, and earlier questions are read once, not for each chunk."""
    monkeypatch.setattr(stages, "CHUNK", 2)
    write_rows(tmp_path / "held_out.parquet", [Sample(f"{n}+9", str(n + 9)) for n in range(20, 60)])
    numbers = itertools.cycle(range(20, 60))
    engine = scripted(lambda prompt, i, seed: written(f"{(n := next(numbers))}+9", n + 9))
    monkeypatch.setattr(stages, "_engine", lambda *arguments: engine)
    made = []
    monkeypatch.setattr(write, "questions", lambda of=write.questions: made.append(of()) or made[-1])
    if selected:
        stages.select_questions(StepContext(tmp_path), writing=writing, candidates=2, spent=())
    else:
        stages.write_questions(StepContext(tmp_path), writing=writing)
    shown = {prompt[0]["content"].split()[1] for prompts, _ in engine.calls for prompt in prompts}
    found = [sample.question for sample in read_rows(tmp_path / "samples.parquet")]
    assert len(shown) == len(found) == 8
    assert shown.isdisjoint(found)
    assert len(made) == 1


def test_settings_omit_what_a_recipe_does_not_use(tmp_path):
    """So that a run begun before an option existed stays valid without it."""
    plan = plan_of("arithmetic", "rounds=2", f"output={tmp_path}")
    first, second = plan.of("generate")[:2]
    settings = [step.settings()["writing"] for step in (first, second)]
    assert "earlier" not in settings[0]
    assert settings[1]["earlier"] == [f"{first}/samples.parquet"]
    assert all("models" not in each["scoring"] for each in settings)
    plan = plan_of("arithmetic", f"reward.embedder={tmp_path}", f"output={tmp_path}")
    assert plan.of("train")[0].settings()["scoring"]["models"] == [str(tmp_path)]


def test_a_finished_run_from_before_its_options_stays_valid(fakes, recipe):
    """Earlier records list empty options, and lack the checks for shortages."""
    plan, store, _ = run(recipe, "baselines=[best_of_n]", "student.replay=0.2")
    for step in plan.steps:
        path = store.path(step) / "stage.json"
        record = json.loads(path.read_text())
        settings = record["made_from"]["settings"]
        for section in (settings, settings.get("writing", {})):
            if "scoring" in section:
                section["scoring"]["models"] = []
        if "writing" in settings:
            settings["writing"]["earlier"] = []
        if step.stage == "seeds":
            del settings["replay"], settings["per_batch"]
        path.write_text(json.dumps(record))
    assert [Store(store.output).reason(step) for step in plan.steps] == [None] * len(plan.steps)


def test_answers_by_likelihood(student_path, tmp_path):
    """The likeliest label is always in the set, even if the untrained student writes no label."""
    rows = [Sample(f"text {i}", label) for i in range(3) for label in ("card", "card_arrival", "a, b")]
    write_rows(tmp_path / "rows.parquet", rows)
    said = []
    stages.answer_rows(
        StepContext(tmp_path, said.append), sets={"test": ("classification", tmp_path / "rows.parquet")},
        model=student_path, engine=EngineConfig(), max_tokens=4, seed=0, likelihood=True,
    )  # fmt: skip
    table = read_table(tmp_path / "answers-test.parquet")
    assert set(table["likeliest"]) <= {"card", "card_arrival", "a, b"}
    assert table["likeliest_right"] == [a == b for a, b in zip(table["likeliest"], table["gold"], strict=True)]
    assert table["right"] == [False] * 9
    assert said[-1].startswith("test: 0.0% right as written, ")
    assert said[-1].endswith("by the likeliest of 3 labels")


def test_a_student_learns_rows_and_replay(scoring, student_path, tmp_path):
    write_rows(tmp_path / "samples.parquet", SEEDS[:4])
    said = []
    stages.fit_student(
        StepContext(tmp_path, said.append), domain="sums", student=str(student_path), n=3, options=TRAINER, seed=0,
        samples=[tmp_path / "samples.parquet"], replay=Replay(0.5, "sums", tmp_path / "seeds.parquet"),
    )  # fmt: skip
    assert json.loads((tmp_path / "counts.json").read_text()) == {"wanted": 3, "rows": 3}
    assert (tmp_path / "model/config.json").is_file()
    assert said[-1].startswith("step 3 of 3: loss ")
    with pytest.raises(ValueError, match=r"replay: expected 9 rows for a share of 0\.75 beside 3 samples, got 8"):
        stages.fit_student(
            StepContext(tmp_path), domain="sums", student=str(student_path), n=3, options=TRAINER, seed=0,
            samples=[tmp_path / "samples.parquet"], replay=Replay(0.75, "sums", tmp_path / "seeds.parquet"),
        )  # fmt: skip


def test_a_student_tells_the_rows_it_did_not_learn(scoring, student_path, tmp_path):
    write_rows(tmp_path / "samples.parquet", [*SEEDS[:3], Sample("1+" * 30 + "1", "31")])
    said = []
    stages.fit_student(
        StepContext(tmp_path, said.append), domain="sums", student=str(student_path), n=4, replay=None, seed=0,
        options=TRAINER | {"max_length": 50}, samples=[tmp_path / "samples.parquet"],
    )  # fmt: skip
    assert json.loads((tmp_path / "counts.json").read_text()) == {"wanted": 4, "rows": 3}
    assert said[-1].startswith("of 4 rows, 1 are not learnt, as the prompt alone fills max_length = 50 tokens, and 0")


def test_rows_are_ranked_by_the_weights_of_the_reward():
    reward = SimpleNamespace(fusion="raw", weights={"entropy": 2.0, "margin": -1.0}, length_bins={})
    logged_only = [None, 50.0, -50.0, 0.0]
    columns = {"entropy": [3.0, 1.0, None, 2.0], "margin": [0.0, 9.0, 5.0, 1.0], "loss": logged_only}
    fused = stages._fused(columns, reward, SEEDS[:4])
    assert fused == [6.0, -7.0, None, 3.0]


def test_rows_are_ranked_after_their_lengths_effect_is_removed(sums):
    """As the reward does in training: a sum over tokens grows with the length, which would rank the longest first."""
    rows = [Sample("+".join("1" * n), str(n)) for n in (2, 4, 8, 16) for _ in range(40)]
    surplus = [[0.0, 3.0, 1.0, 2.0][i % 4] for i in range(len(rows))]
    columns = {"loss": [len(row.question) + more for row, more in zip(rows, surplus, strict=True)]}
    reward = ComposedReward(sums, [Recorded("loss", [])])
    totals = stages._fused(columns, reward, rows)
    first = sorted(range(len(rows)), key=lambda i: -totals[i])[:40]
    assert {len(rows[i].question) for i in first} == {3, 7, 15, 31}
    assert {surplus[i] for i in first} == {3.0}


KILLED = ["train-checkpoint 1", "write 2", "label 1", "fit 3", "generate 9", "best 2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The artefacts of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder, None)
    process.join(300)
    assert process.exitcode == 0
    return contents(folder / "out")


@pytest.mark.parametrize("pause", KILLED)
def test_killed_and_started_again_it_ends_with_the_same(whole, pause, tmp_path):
    process = start(tmp_path, pause)
    deadline = time.monotonic() + 90
    while not (tmp_path / "reached").exists():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.join()
    finished = [path for path in (tmp_path / "out").rglob("stage.json") if path.parent.suffix != ".partial"]
    times = {path: path.stat().st_mtime_ns for path in finished}
    assert times
    again = start(tmp_path, None)
    again.join(300)
    assert again.exitcode == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == times
    assert contents(tmp_path / "out") == whole


def start(folder, pause):
    """Runs the recipe in a process that waits at the call named by ``pause``; forking avoids repeated imports."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(folder, pause))
    process.start()
    return process


def _run(folder, pause):
    os.chdir(folder)
    fake_run.calls.clear()
    if pause is not None:
        os.environ.update({"ACQSYNTH_TEST_PAUSE": pause, "ACQSYNTH_TEST_PAUSE_FILE": str(folder / "reached")})
    Path("recipe.yaml").write_text(fake_run.RECIPE + "output: out\nbaselines: [no_rl, best_of_n, error_driven]\n")
    fake_run.install(setattr)
    sys.exit(main(["run", "recipe.yaml"]))
