"""The arms of a recipe: what they share, their rounds and seeds, what each may spend, and what the report tells."""

from __future__ import annotations

import json

import fake_run
from fake_run import plan_of, run

from acqsynth.artefacts import read_json, read_table


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
    assert [path.step for path in selected.arguments["spent"]] == grpo.arms["grpo"].trained
    best = plan_of(recipe, "generator.method=best_of_n", "baselines=[best_of_n, no_rl]")
    assert list(best.arms) == ["best_of_n", "no_rl"]
    assert best.arms["best_of_n"].written[0].arguments["spent"] == []


def test_all_arms_learn_equal_rows_with_equal_settings(fakes, recipe):
    plan = plan_of(recipe, "student.rows=[10, 70]", "student.others={small: other}")
    settings = {}
    for arm in plan.arms.values():
        for key, fit in arm.fits.items():
            assert fit.arguments["ranked"] == (arm.name == "filtered_real")
            other = {name: value for name, value in fit.settings().items() if name not in ("samples", "ranked")}
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
    strengths = [read_json(store.path(u / "model") / "config.json")["strength"] for u in arm.trained]
    assert strengths == [45, 51, 57]
    metrics = read_json(store.path(plan.report / "metrics.json"))
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
    metrics = read_json(store.path(plan.report / "metrics.json"))
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
    counts = read_json(store.output / "02-generate/best_of_n/counts.json")
    # The fake training drew 12 completions and 90 questions are wanted: (12 + 90) / 90 per prompt, at least 2.
    assert counts["completions"] == 180
    table = read_table(store.output / "02-generate/best_of_n/samples.parquet")
    assert len(table["reward"]) == counts["kept"] > 70
    assert table["reward_size"] == [1.0] * counts["kept"]


def test_rejection_sampling_spends_what_all_rounds_of_its_seed_did(fakes, recipe):
    plan = plan_of(recipe, "baselines=[best_of_n]", "rounds=2", "generator.seeds=[0, 3]")
    spent = [[str(each) for each in step.arguments["spent"]] for step in plan.arms["best_of_n"].written]
    folders = [f"01-train/grpo{seed}-round-{i}/counts.json" for seed in ("", "@3") for i in (1, 2)]
    assert spent == [folders[:2], folders[2:]]


def test_the_report_counts_the_samples_of_every_generator(fakes, recipe):
    options = ("generator.method=best_of_n", "generator.seeds=[0, 3]", "baselines=[]")
    plan, store, _ = run(recipe, *options, "evaluation.validity.batches=0")
    metrics = read_json(store.path(plan.report / "metrics.json"))
    assert metrics["samples"]["scored"] == metrics["arms"]["best_of_n"]["written"]["kept"] > 100


def test_completions_without_a_score_are_noted(fakes, recipe, monkeypatch):
    _, store, _ = run(recipe, "evaluation.validity.batches=0")
    metrics = read_json(store.output / "06-report/report/metrics.json")
    said = [each["text"] for each in metrics["verdict"] if each["kind"] == "note"]
    assert said == ["grpo: 8.3 % of the completions could not be scored and counted for nothing."]  # 1 of 12


def test_repeated_rows_of_an_evaluation_set_are_noted(fakes, recipe, monkeypatch):
    load = fake_run.Sums.load
    monkeypatch.setattr(fake_run.Sums, "load", lambda *given: load(*given)[:-2] + load(*given)[:2])
    _, store, _ = run(recipe, "evaluation.validity.batches=0", "generator.method=none", "baselines=[]")
    metrics = read_json(store.output / "06-report/report/metrics.json")
    assert {"kind": "note", "text": "2 of the 40 rows of more repeat a question, so its intervals are too narrow."} in (
        metrics["verdict"]
    )


def test_settings_name_earlier_rounds_and_models_of_the_reward(tmp_path):
    plan = plan_of("arithmetic", "rounds=2", f"output={tmp_path}")
    first, second = plan.of("generate")[:2]
    settings = [step.settings()["writing"] for step in (first, second)]
    assert [each["earlier"] for each in settings] == [[], [f"{first}/samples.parquet"]]
    assert [each["scoring"]["models"] for each in settings] == [[], []]
    plan = plan_of("arithmetic", f"reward.embedder={tmp_path}", f"output={tmp_path}")
    assert plan.of("train")[0].settings()["scoring"]["models"] == [str(tmp_path)]
    for unused in ("~nobody-of-this-name/x", "x" * 300):
        plan = plan_of("arithmetic", f"reward={{signals: {{entropy: }}, embedder: {unused}}}", f"output={tmp_path}")
        assert plan.of("train")[0].settings()["scoring"]["models"] == []
