"""Blocks are retried, given up, left alone once finished, and held one at a time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import acqcore
from acqcore.cli import main
from acqcore.files.data import scan
from acqcore.files.parts import Parts
from acqcore.files.worker import ATTEMPTS, BlockScorer, Job
from acqcore.scoring.plan import Plan

ROWS = [{"text": f"the fox {i}"} for i in range(7)]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr("acqcore.files.worker._PAUSE_S", 0.0)


@pytest.fixture
def scorer(student, tmp_path):
    """Scorer of ``ROWS`` in data.jsonl, with one row per batch."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    plan = Plan.of("entropy", batch_tokens=1, backend="eager")
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    job = Job(str(student), data, out, {"text": "text"}, ["text"], plan, max_length=None, dtype=None, device=None)
    Parts(job.out).claim({})
    return BlockScorer(job)


@pytest.fixture
def block(scorer):
    """The only block of data.jsonl."""
    [block] = scan(scorer.job.data, 10, None)[0]
    return block


@pytest.fixture
def failing(monkeypatch):
    """``failing(n)``: scoring fails n times after a first batch; returns the numbers of rows it was called with."""

    def arrange(times):
        calls: list[int] = []

        batches = Plan.batches

        def fail(plan, runner, rows, done):
            calls.append(sum(i not in done for i in range(len(rows))))
            for batch in batches(plan, runner, rows, done):
                yield batch
                if len(calls) <= times:
                    raise MemoryError("no room\nfor this")

        monkeypatch.setattr(Plan, "batches", fail)
        return calls

    return arrange


def test_a_block_that_fails_for_a_moment_goes_on_with_its_finished_batches(scorer, block, failing, read):
    calls = failing(2)
    told: list[int] = []
    scorer.complete(block, told.append)
    assert calls == [7, 6, 5]
    assert sum(told) == 7
    assert min(told) >= 0
    report = scorer.parts.report(0)
    assert (report["rows"], report["valid"], report["errors"], report["new_rows"]) == (7, 7, [], calls[2])
    assert [row["valid"] for row in read(scorer.parts.path(0))] == [True] * 7


def test_standard_errors_go_along(scorer, block, failing, read):
    arguments = {"mutual_information": {"form": "linear", "probes": 3}}
    plan = Plan.of(["entropy", "mutual_information"], arguments, batch_tokens=1, backend="eager")
    scorer = BlockScorer(dataclasses.replace(scorer.job, plan=plan))
    texts = [row["text"] for row in ROWS]
    scores = acqcore.score(scorer.student, texts, plan.names, acquisition_args=arguments, backend="eager")
    failing(1)  # so that a batch is read back
    scorer.complete(block)
    rows = read(scorer.parts.path(0))
    names = ["entropy", "mutual_information", "mutual_information_stderr"]
    assert list(rows[0]) == scorer.job.output_columns == ["row", "text", *names, "n_tokens", "valid", "error"]
    for name in names[:2]:
        assert [row[name] for row in rows] == pytest.approx(scores[name].tolist(), rel=1e-4)
    errors = scores.stderr["mutual_information"]
    assert [row["mutual_information_stderr"] for row in rows] == pytest.approx(errors.tolist(), rel=1e-3)
    assert [row["valid"] for row in rows] == [True] * 7


def test_a_single_probe_has_no_standard_error_and_is_valid(scorer, block, read):
    plan = Plan.of("mutual_information", {"mutual_information": {"form": "linear", "probes": 1}}, backend="eager")
    scorer = BlockScorer(dataclasses.replace(scorer.job, plan=plan))
    scorer.complete(block)
    rows = read(scorer.parts.path(0))
    assert [row["mutual_information_stderr"] for row in rows] == [None] * 7
    assert [row["valid"] for row in rows] == [True] * 7


def test_draws_have_no_such_column(scorer):
    plan = Plan.of("mutual_information", {"mutual_information": {"draws": 8}})
    assert dataclasses.replace(scorer.job, plan=plan).measured == ["mutual_information"]


def test_batches_of_another_cut_are_no_gap(scorer, block, read):
    """Rows of a finished batch that was cut differently, as by a GPU, are scored again."""
    scorer = BlockScorer(dataclasses.replace(scorer.job, plan=Plan.of("entropy", batch_tokens=8192, backend="eager")))
    scorer.parts.append(0, [0, 6], [[-7.0], [-7.0]])
    told: list[int] = []
    scorer.complete(block, told.append)
    assert sum(told) == 7
    values = [row["entropy"] for row in read(scorer.parts.path(0))]
    assert all(value > 0 for value in values)


def test_a_block_that_keeps_failing_is_given_up(scorer, block, failing):
    calls = failing(100)
    told: list[int] = []
    scorer.complete(block, told.append)
    assert len(calls) == ATTEMPTS
    assert sum(told) == 7
    assert not scorer.parts.finished(0)
    reason = scorer.parts.failure(0).read_text().splitlines()
    assert reason[0] == "MemoryError: no room"
    assert "in fail" in "".join(reason)  # the traceback


def test_a_block_whose_processes_died_is_given_up(scorer, block):
    for _ in range(ATTEMPTS):
        scorer.parts.attempt(0)
    scorer.complete(block)
    assert scorer.parts.failure(0).read_text() == f"all {ATTEMPTS} processes that scored it died"


def test_a_finished_block_is_left_alone(scorer, block, failing):
    scorer.complete(block)
    calls = failing(100)
    told: list[int] = []
    scorer.complete(block, told.append)
    assert (calls, told) == ([], [7])


@pytest.mark.parametrize("out", ["out.jsonl", "out.csv", "out.parquet", "out"])
def test_the_same_command_tries_failed_blocks_again_and_no_others(out, command, tmp_path, capsys, read):
    arguments = command(ROWS, out=tmp_path / out, block_rows=3)
    parts = Parts(tmp_path / out)
    in_the_way = parts.folder / "block-000001.batches"
    in_the_way.mkdir(parents=True)
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert "4 of 7 rows scored" in captured.out
    assert "3 rows with an error; 1 failed block; rerun the command to retry" in " ".join(captured.out.split())
    assert f"rows 3 to 5 of the output failed {ATTEMPTS} times: IsADirectoryError: " in captured.err
    if out == "out.jsonl":
        rows = read(tmp_path / out)
        assert [row["row"] for row in rows] == list(range(7))
        assert [row["valid"] for row in rows] == [True] * 3 + [False] * 3 + [True]
        assert rows[4]["error"].startswith("its block failed: IsADirectoryError: ")
        assert (rows[4]["text"], rows[4]["entropy"], rows[4]["n_tokens"]) == ("the fox 4", None, 0)

    in_the_way.rmdir()
    kept = parts.report(0)
    Path(parts.folder / "block-000000.json").write_text(json.dumps({**kept, "valid": 1}))  # lost if it is redone
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "5 of 7 rows scored" in captured.out
    assert "\n3 rows, " in captured.out
    assert captured.err == ""
    assert not parts.folder.exists()
    if out == "out.jsonl":
        rows = read(tmp_path / out)
        assert [(row["row"], row["text"], row["valid"]) for row in rows] == [
            (i, row["text"], True) for i, row in enumerate(ROWS)
        ]


def test_memory_does_not_grow_with_the_file(command, tmp_path, extra_mib):
    """With an 80 kB column next to the text, holding all 450 rows would take 37 MB, of which 6 are there before."""
    commands = []
    for n in (75, 450):
        rows = [{"text": f"fox {i}", "note": "x" * 81920} for i in range(n)]
        line = command(rows, data=tmp_path / f"{n}.jsonl", block_rows=40, out=tmp_path / f"{n}.out.jsonl")
        (tmp_path / "data.jsonl").rename(tmp_path / f"{n}.jsonl")
        commands.append(f"main({line})")
    assert extra_mib(f"from acqcore.cli import main; {commands[0]}", commands[1]) < 16
    assert len((tmp_path / "450.out.jsonl").read_text().splitlines()) == 450
