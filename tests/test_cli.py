"""The command line on a small saved model: results, resuming, bad lines, outputs."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM

import acqcore
from acqcore.cli import main
from acqcore.files.table import write_rows

TEXTS = ["The quick brown fox", "a fox", "The answer is 5.", "def add(a, b): return a + b", "the lazy dog"]


def test_scores_are_those_of_score(command, student, tmp_path, capsys, read):
    arguments = command([{"text": text} for text in TEXTS], acquisitions="margin,loss")
    assert main(arguments) == 0
    scores = acqcore.score(str(student), TEXTS, ("margin", "loss"), backend="eager")
    rows = read(tmp_path / "out.jsonl")
    assert list(rows[0]) == ["row", "text", "margin", "loss", "n_tokens", "valid", "error"]
    for i, row in enumerate(rows):
        assert (row["row"], row["text"], row["valid"], row["error"]) == (i, TEXTS[i], True, None)
        assert row["margin"] == pytest.approx(scores["margin"][i].item(), rel=1e-6)
        assert row["loss"] == pytest.approx(scores["loss"][i].item(), rel=1e-6)
        assert row["n_tokens"] == scores.n_tokens[i]
    out = capsys.readouterr().out
    assert "5 of 5 rows scored" in out
    for shown in ("margin", "loss", f"{scores['loss'].mean():.4g}", f"{scores['loss'].max():.4g}"):
        assert shown in out
    assert not (tmp_path / "out.jsonl.parts").exists()


def test_conversations_and_limit(command, tmp_path, read):
    turns = [{"role": "user", "content": "a fox?"}, {"role": "assistant", "content": "a dog."}]
    assert main(command([{"messages": turns}] * 3, limit=2, max_length=20, dtype="bfloat16")) == 0
    rows = read(tmp_path / "out.jsonl")
    assert len(rows) == 2
    assert rows[0]["messages"] == turns


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_rows_with_images_are_rejected_as_in_python(suffix, command, tmp_path, read):
    rows = [{"text": "a fox", "image": image} for image in (None, "fox.png")]
    data = tmp_path / f"given.{suffix}"
    write_rows(data, rows, ["text", "image"])
    assert main(command([], data=data)) == 0
    found = read(tmp_path / "out.jsonl")
    assert [row["error"] for row in found] == [None, "image: expected text, as only text is scored"]
    assert main(command([], data=data, out=tmp_path / "text.jsonl", text_column="text")) == 0
    assert all(row["valid"] for row in read(tmp_path / "text.jsonl"))


def test_bad_lines_are_reported_and_the_rest_is_scored(command, tmp_path, capsys, read):
    good = {"prompt": "a", "completion": " [/b] fox"}
    rows = [
        good,
        '{"prompt": "a", ',
        "",
        {"prompt": "a", "completion": ""},
        {"prompt": "a"},
        {"prompt": "a", "completion": [3]},
        {"prompt": "a", "completion": "fox " * 80},
        good,
    ]
    assert main(command(rows, acquisitions="entropy,loss")) == 0
    captured = capsys.readouterr()
    errors = captured.err.strip().splitlines()
    data = tmp_path / "data.jsonl"
    assert [line.split(": ")[1] for line in errors] == [f"line {n}" for n in (2, 4, 5, 6, 7)]
    assert errors[0].startswith(f"{data}: line 2: not JSON: ")
    assert errors[1] == f"{data}: line 4: the completion is empty, there is nothing to score"
    assert errors[2] == f"{data}: line 5: no column 'completion'"
    assert errors[3] == f"{data}: line 6: completion: expected a string, got list"
    assert "tokens, the student takes at most 64" in errors[4]
    assert "2 of 7 rows scored" in captured.out
    assert "[/b] fox" in captured.out
    result = read(tmp_path / "out.jsonl")
    assert [row["valid"] for row in result] == [True, False, False, False, False, False, True]
    assert result[0]["entropy"] == result[6]["entropy"]
    for row, error in zip(result[1:6], errors, strict=True):
        assert row["entropy"] is row["loss"] is None
        assert error.endswith(row["error"])


def test_nothing_but_bad_lines(command, tmp_path, read):
    assert main(command([{"text": ""}, {"text": True}])) == 1
    assert [row["valid"] for row in read(tmp_path / "out.jsonl")] == [False, False]


@pytest.mark.parametrize("damaged", [False, True])
def test_no_finite_value(damaged, command, student, tmp_path, capsys):
    shutil.copytree(student, tmp_path / "nan")
    model = AutoModelForCausalLM.from_pretrained(student)
    fox = acqcore.Student.load(student).tokenizer("a fox").input_ids[-1]
    model.model.embed_tokens.weight.data[slice(None) if damaged else fox] = math.nan
    model.save_pretrained(tmp_path / "nan")
    assert main(command([{"text": "a fox is a fox"}], student=tmp_path / "nan")) == (2 if damaged else 1)
    said = capsys.readouterr()
    if damaged:
        assert said.err.endswith("the logits of LlamaForCausalLM are not finite; its weights may be damaged\n")
    else:
        assert "0 of 1 rows scored" in said.out


def test_a_killed_run_goes_on_where_it_stopped(command, tmp_path, read):
    rows = [{"text": f"{TEXTS[i % 5]} {i} {'fox ' * (i % 7)}"} for i in range(450)]
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.parts" / "block-000000.batches"
    arguments = command(rows, batch_tokens=64, acquisitions="entropy,loss")
    process = subprocess.Popen(
        [sys.executable, "-m", "acqcore", *arguments], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (part.exists() and part.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()

    kept = part.read_bytes()
    finished = [json.loads(line) for line in kept[: kept.rfind(b"\n") + 1].splitlines()]
    done = {row for batch in finished for row in batch["rows"]}
    assert 0 < len(done) < len(rows)
    # Marked values show which rows come from the finished batches and which are scored now.
    marked = [{**batch, "values": [[-7.0, -7.0]] * len(batch["rows"])} for batch in finished]
    part.write_text("".join(json.dumps(batch) + "\n" for batch in marked) + '{"rows": [1')
    assert main(arguments) == 0
    resumed = read(out)
    assert {row["row"] for row in resumed if row["entropy"] == -7} == done

    assert main([*arguments, "--overwrite"]) == 0  # from the start: the parts are gone
    whole = read(out)
    first = {row: values for batch in finished for row, values in zip(batch["rows"], batch["values"], strict=True)}
    for row, again in zip(whole, resumed, strict=True):
        values = first.get(row["row"], [again["entropy"], again["loss"]])
        assert [row["entropy"], row["loss"]] == values


@pytest.mark.parametrize("name", ["out.jsonl", "student/out.jsonl"])
def test_another_run_may_not_take_over(name, command, tmp_path, monkeypatch, capsys, refused):
    rows, out = [{"text": text} for text in TEXTS], tmp_path / name
    with monkeypatch.context() as patch:
        patch.setattr("acqcore.scoring.plan.Plan.batches", Mock(side_effect=KeyboardInterrupt))
        assert main(command(rows, out=out)) == 130
    assert "the same command resumes" in capsys.readouterr().err
    message = refused(command(rows, out=out, acquisitions="margin"))
    assert "holds an interrupted run with different acquisitions ('entropy' there, 'margin' here)" in message
    assert "with different data" in refused(command(rows[1:], out=out))
    assert main(command(rows, out=out)) == 0


def test_a_run_does_not_resume_with_another_student(command, student, tmp_path, monkeypatch, refused):
    monkeypatch.setenv("HOME", str(tmp_path))
    members = json.dumps({"mutual_information": {"members": ["~/member", "~/member"]}})
    shutil.copytree(student, tmp_path / "member")
    words = command(
        [{"text": "a fox"}], student="~/student", acquisitions="mutual_information", acquisition_args=members
    )
    with monkeypatch.context() as patch:
        patch.setattr("acqcore.scoring.plan.Plan.batches", Mock(side_effect=KeyboardInterrupt))
        assert main(words) == 130
    for folder, key in (("student", "student_files"), ("member", "argument_files")):
        (tmp_path / folder / "new").touch()
        assert f"with different {key}" in refused(words)
        (tmp_path / folder / "new").unlink()
    assert main(words) == 0


def test_an_interrupted_run_gives_away_no_file(command, tmp_path, monkeypatch, refused):
    out, rows = tmp_path / "out.jsonl", [{"text": "a fox", "x": 1}]
    out.write_text("keep")
    monkeypatch.setattr("acqcore.scoring.plan.Plan.batches", Mock(side_effect=KeyboardInterrupt))
    assert main([*command(rows), "--overwrite"]) == 130
    words = ["select", *command(rows)[3:7], "--n", "1", "--signal", "x"]
    assert refused(words) == f"--out: {out} exists; --overwrite replaces it"


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_blocks_are_joined(suffix, command, tmp_path, read):
    rows: list[Any] = [{"text": text} for text in TEXTS]
    rows[3] = "bad"
    outs = [tmp_path / f"whole.{suffix}", tmp_path / f"blocks.{suffix}"]
    for out, block_rows in zip(outs, (4096, 2), strict=True):
        assert main(command(rows, out=out, block_rows=block_rows)) == 0
    whole, blocks = map(read, outs)
    assert [int(row["row"]) for row in blocks] == [0, 1, 2, 3, 4]
    assert list(whole[0]) == list(blocks[0])
    for a, b in zip(whole, blocks, strict=True):
        assert a | {"entropy": None} == b | {"entropy": None}
        if a["valid"] in (True, "True"):
            assert float(a["entropy"]) == pytest.approx(float(b["entropy"]), rel=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir() if "whole" in path.name or "blocks" in path.name) == [
        f"blocks.{suffix}",
        f"whole.{suffix}",
    ]


def test_every_acquisition_that_does_not_compare_samples(command, student, tmp_path, read):
    loaded = acqcore.Student.load(student)
    reference, archive = acqcore.influence_reference(loaded, TEXTS[:2], dim=64, backend="eager"), acqcore.Archive()
    archive.add(acqcore.grad_sketch(loaded, TEXTS[:2], dim=64, backend="eager"))
    reference.save(tmp_path / "reference.pt")
    torch.save(archive.state_dict(), tmp_path / "archive.pt")
    acqcore.epig_reference(loaded, TEXTS[:2], dim=64, backend="eager").save(tmp_path / "epig.pt")
    names = [name for name in acqcore.acquisitions() if name != "gradient_diversity"]
    arguments = {
        "grad_norm": {"parameters": "all"},
        "mutual_information": {"layers": 1, "draws": 2},
        "influence": {"reference": str(tmp_path / "reference.pt")},
        "epig": {"reference": str(tmp_path / "epig.pt")},
        "archive_novelty": {"archive": str(tmp_path / "archive.pt"), "dim": 64},
    }
    rows = [{"text": text} for text in TEXTS]
    assert main(command(rows, acquisitions=",".join(names), acquisition_args=json.dumps(arguments))) == 0
    given = {**arguments, "influence": {"reference": reference}, "archive_novelty": {"archive": archive, "dim": 64}}
    scores = acqcore.score(loaded, TEXTS, names, acquisition_args=given, backend="eager")
    for row, *expected in zip(read(tmp_path / "out.jsonl"), *scores.values(), strict=True):
        assert [row[name] for name in names] == pytest.approx([value.item() for value in expected], rel=1e-6)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_the_highest_rows(suffix, command, tmp_path, capsys, read):
    rows: list[Any] = [{"text": f'{text}, "{i}"\n'} for i, text in enumerate(TEXTS)]
    rows[1] = {"text": ""}  # without a value
    whole, top = tmp_path / f"whole.{suffix}", tmp_path / f"top.{suffix}"
    assert main(command(rows, out=whole, acquisitions="loss,entropy")) == 0
    assert main(command(rows, out=top, acquisitions="loss,entropy", block_rows=2, top_k=3)) == 0
    assert "4 of 5 rows scored, the 3 highest written" in " ".join(capsys.readouterr().out.split())
    scored = [row for row in read(whole) if row["loss"] not in (None, "") and math.isfinite(float(row["loss"]))]
    highest = sorted(scored, key=lambda row: -float(row["loss"]))[:3]
    expected = sorted(highest, key=lambda row: int(row["row"]))
    assert [(int(row["row"]), row["text"]) for row in read(top)] == [(int(row["row"]), row["text"]) for row in expected]
    assert list(read(top)[0]) == list(expected[0])
    none = tmp_path / f"none.{suffix}"
    assert main(command(rows[1:2], out=none, top_k=3)) == 1
    assert read(none) == []


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_the_highest_of_rows_with_long_cells(suffix, command, tmp_path):
    rows = [{"text": f"a fox {i}", "note": "x, " * 50_000} for i in range(3)]
    assert main(command(rows, out=tmp_path / f"out.{suffix}", top_k=2)) == 0
    assert (tmp_path / f"out.{suffix}").read_text().count("x, " * 50_000) == 2


def test_a_data_set_by_name(command, tmp_path, monkeypatch, refused, read, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "org" / "name").mkdir(parents=True)
    for split, texts in (("train", TEXTS), ("test", TEXTS[:2])):
        lines = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts))
        (tmp_path / "org" / "name" / f"{split}.jsonl").write_text(lines)
    assert main(command([], data="org/name")) == 0
    assert [row["text"] for row in read(tmp_path / "out.jsonl")] == TEXTS
    assert main([*command([], data="org/name", split="test"), "--overwrite"]) == 0
    assert [row["text"] for row in read(tmp_path / "out.jsonl")] == TEXTS[:2]
    assert not (tmp_path / "out.jsonl.parts").exists()
    (tmp_path / "out.jsonl").unlink()
    message = refused(command([], data="org/name", split="tests"))
    assert message.startswith("--data: org/name is neither a file nor a loadable data set:")
    assert main(command([], data="org/name", text_column="body")) == 2
    assert not (tmp_path / "out.jsonl.parts").exists()
    beside = tmp_path / "org" / "name" / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("acqcore.cli._collect", Mock(side_effect=KeyboardInterrupt))
        for out in (beside, "out.jsonl"):
            assert main(command([], data="org/name", out=out)) == 130
    assert main(command([], data="org/name", out=beside)) == 0
    beside.unlink()
    (tmp_path / "org" / "name" / "train.jsonl").write_text(json.dumps({"text": "another", "id": 9}) + "\n")
    capsys.readouterr()
    assert main(command([], data="org/name")) == 2
    assert "holds an interrupted run with different data " in capsys.readouterr().err
    (tmp_path / "out.jsonl.parts" / "manifest.json").unlink()  # as of a run that was killed while it cleaned up
    assert main(command([], data="org/name")) == 0
    assert [row["text"] for row in read(tmp_path / "out.jsonl")] == ["another"]


@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_as_output(linked, command, tmp_path, read):
    out = tmp_path / "scores"
    for folder in (tmp_path / "linked" if linked else out, tmp_path / "scores.tmp"):
        folder.mkdir()
    if linked:
        out.symlink_to("linked")
    (tmp_path / "scores.tmp" / "notes.txt").touch()
    arguments = command([{"text": text} for text in TEXTS], out=out, block_rows=3)
    assert main(arguments) == 0
    assert (tmp_path / "scores.tmp" / "notes.txt").exists()
    assert sorted(path.name for path in out.iterdir()) == ["part-000000.parquet", "part-000001.parquet"]
    assert [row["text"] for row in read(out)] == TEXTS
    assert out.is_symlink() == linked
    assert not (tmp_path / "scores.parts").exists()


def test_a_full_disk(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("acqcore.files.worker._PAUSE_S", 0)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("acqcore.files.worker.write_block", Mock(side_effect=full))
    assert main(command([{"text": "a fox"}])) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    out = tmp_path / "out.jsonl"
    assert last == f"acqcore: error: {out}: No space left on device; the scores are kept in {out}.parts"


def test_an_output_is_scored_again(command, tmp_path, read):
    assert main(command([{"text": text} for text in TEXTS], out=tmp_path / "first.jsonl")) == 0
    arguments = command([], data=tmp_path / "first.jsonl", out=tmp_path / "out.jsonl", acquisitions="loss")
    assert main(arguments) == 0
    first, second = read(tmp_path / "first.jsonl"), read(tmp_path / "out.jsonl")
    assert [row["entropy"] for row in second] == [row["entropy"] for row in first]
    assert [row["data_row"] for row in second] == [0, 1, 2, 3, 4]


def test_values_of_tokens(command, student, tmp_path, read):
    rows = [{"text": TEXTS[0]}, {"text": ""}, {"text": TEXTS[2]}]
    assert main([*command(rows, acquisitions="loss,grad_norm,entropy"), "--keep-tokens"]) == 0
    found = read(tmp_path / "out.jsonl")
    scores = acqcore.score(str(student), [TEXTS[0], TEXTS[2]], ("loss", "entropy"), keep_tokens=True, backend="eager")
    tokenizer = acqcore.Student.load(student).tokenizer
    for row, i in ((found[0], 0), (found[2], 1)):
        assert row["token_ids"] == tokenizer(row["text"]).input_ids[1:]
        assert row["loss_tokens"] == pytest.approx(scores.tokens["loss"][i].tolist(), rel=1e-5)
        assert row["entropy_tokens"] == pytest.approx(scores.tokens["entropy"][i].tolist(), rel=1e-5)
        assert "grad_norm_tokens" not in row
    assert found[1]["token_ids"] == found[1]["loss_tokens"] == []


class TestOutput:
    """Existing files are lost only if the user explicitly gives them up."""

    @pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
    def test_the_data_is_never_the_output(self, suffix, command, tmp_path, refused):
        data = tmp_path / f"in.{suffix}"
        assert main(command([{"text": "a fox"}], out=data)) == 0
        before = data.read_bytes()
        (tmp_path / "linked").symlink_to(tmp_path)
        for out in (data, tmp_path / "linked" / data.name):
            for more in ([], ["--overwrite"]):
                assert "is or contains the data, which would be" in refused([*command([], data=data, out=out), *more])
        assert data.read_bytes() == before

    def test_a_folder_that_holds_the_data(self, command, tmp_path, refused):
        assert main(command([{"text": "a fox"}], out=tmp_path / "scores")) == 0
        [data] = (tmp_path / "scores").iterdir()
        assert "is or contains the data" in refused([*command([], data=data, out=tmp_path / "scores"), "--overwrite"])
        assert data.exists()

    @pytest.mark.parametrize("exists", [False, True])
    @pytest.mark.parametrize("chooses", [False, True])
    def test_a_link_to_a_file_is_followed(self, chooses, exists, command, tmp_path, read):
        (tmp_path / "real").mkdir()
        target, link = tmp_path / "real" / "out.jsonl", tmp_path / "link.jsonl"
        link.symlink_to(target)
        if exists:
            target.touch()
        words = command([{"text": "a fox", "x": 1}], out=link)
        if chooses:
            words = ["select", *words[3:7], "--n", "1", "--signal", "x"]
        assert main(words) == 0
        assert link.is_symlink()
        assert [row["text"] for row in read(target)] == ["a fox"]

    def test_a_link_to_a_file_of_another_extension(self, command, tmp_path, refused):
        (tmp_path / "link.csv").symlink_to(tmp_path / "out.jsonl")
        assert "expected a link to a file of the same extension" in refused(command([], out=tmp_path / "link.csv"))

    @pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.parquet", "out"])
    def test_an_output_is_replaced_where_asked(self, name, command, tmp_path, capsys, refused):
        arguments = command([{"text": "a fox"}], out=tmp_path / name)
        assert main(arguments) == 0
        assert f"--out: {tmp_path / name} exists; --overwrite replaces it" in refused(arguments)
        assert main([*command([{"text": "a fox"}] * 2, out=tmp_path / name), "--overwrite"]) == 0
        assert "2 of 2 rows scored" in capsys.readouterr().out

    def test_a_folder_of_others_stays(self, command, tmp_path, refused):
        """Even if an interrupted run left its parts beside the folder."""
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("keep")
        arguments = [*command([{"text": "a fox"}], out=tmp_path / "out"), "--overwrite"]
        for _ in range(2):
            assert "contains files other than parts of an output" in refused(arguments)
            (tmp_path / "out.parts").mkdir(exist_ok=True)
            (tmp_path / "out.parts" / "manifest.json").write_text("{}")
        assert (tmp_path / "out" / "notes.txt").read_text() == "keep"
