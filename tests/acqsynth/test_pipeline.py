"""A whole recipe with fake models: its artefacts, what runs again after a change, and kills at every stage."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path

import fake_run
import pytest
from fake_run import run

import acqsynth.train  # noqa: F401  (before processes are forked)
from acqsynth.artefacts import read_json, read_table
from acqsynth.cli import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The plan of a finished run, its store, and the names of the steps that ran."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "recipe.yaml").write_text(fake_run.RECIPE + f"output: {folder / 'out'}\n")
    with pytest.MonkeyPatch.context() as patch:
        fake_run.install(patch.setattr, figures=True)
        return run(folder / "recipe.yaml")


@pytest.fixture
def done(finished, recipe, fakes):
    """The recipe, with a finished run copied to this test's folder."""
    shutil.copytree(finished[1].output, recipe.parent / "out")
    fakes.clear()
    return recipe


def contents(output):
    """All artefacts, without timings and what depends on them."""
    found = {}
    for path in sorted(output.rglob("*")):
        if not path.is_file() or path.name in (".lock", "run.log", "report.html"):
            continue
        if path.name in ("stage.json", "metrics.json"):
            content = read_json(path)
            content.pop("seconds", None)
            content.get("artefacts", {}).pop("metrics.json", None)
            content.get("artefacts", {}).pop("report.html", None)
            for arm in content.get("arms", {}).values():
                arm.pop("seconds", None)
            found[str(path.relative_to(output))] = content
        else:
            found[str(path.relative_to(output))] = path.read_bytes()
    return found


def test_every_artefact_is_there(finished):
    plan, store, ran = finished
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
            counts = read_json(output / f"04-fit/{arm}-student-70-s{seed}/counts.json")
            assert counts == {"wanted": 70, "rows": 70}, arm
    assert (output / "06-report/report/report.html").is_file()
    assert not list(output.rglob("*.partial"))
    assert not list(output.rglob("work"))
    metrics = read_json(output / "06-report/report/metrics.json")
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
