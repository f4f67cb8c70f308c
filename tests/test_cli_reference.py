"""The command ``reference``: the file it writes, and runs that read it."""

from __future__ import annotations

import json
import os
from unittest.mock import Mock

import pytest

import acqcore
from acqcore.cli import main

TEXTS = ["The quick brown fox", "a fox", "The answer is 5.", "def add(a, b): return a + b", "the lazy dog"]


def test_a_reference_file(command, student, tmp_path, read):
    rows = [{"q": "a fox", "a": f" jumps {i}"} for i in range(4)]
    out, columns = tmp_path / "reference.pt", ["--prompt-column", "q", "--completion-column", "a"]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    given = ["--student", str(student), "--data", str(tmp_path / "validation.jsonl"), "--out", str(out)]
    assert main(["reference", *given, *columns, "--parameters", "1", "--dim", "64", "--backend", "eager"]) == 0
    arguments = json.dumps({"influence": {"reference": str(out)}})
    assert main([*command(rows, acquisitions="influence", acquisition_args=arguments), *columns]) == 0
    samples = [{"prompt": row["q"], "completion": row["a"]} for row in rows]
    loaded = acqcore.Student.load(student)
    reference = acqcore.influence_reference(loaded, samples[:2], parameters=1, dim=64, backend="eager")
    expected = acqcore.influence(loaded, samples, reference, backend="eager")
    assert [row["influence"] for row in read(tmp_path / "out.jsonl")] == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "a fox"}', '{"text'], "validation.jsonl: line 2: not JSON"),
        (['{"text": "a fox"}', '{"body": "a"}'], "validation.jsonl: line 2: no column 'text'"),
        (['{"text": "a fox"}', "", '{"text": ""}'], "validation.jsonl: line 3: nothing to score"),
        (['{"prompt": "a", "completion": ""}'], "validation.jsonl: line 1: the completion is empty"),
        ([], "validation.jsonl has no rows"),
    ],
)
def test_a_reference_set_is_whole(lines, message, student, tmp_path, refused):
    data = tmp_path / "validation.jsonl"
    data.write_text("\n".join(lines))
    given = ["--student", str(student), "--data", str(data), "--out", str(tmp_path / "reference.pt")]
    assert message in refused(["reference", *given, "--backend", "eager"])
    assert not (tmp_path / "reference.pt").exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("validation.jsonl", "is or contains the data, which would be lost"),
        ("link.pt", "is or contains the data, which would be lost"),
        ("other.pt", "out: other.pt exists; --overwrite replaces it"),
        ("folder", "out: expected a file, folder is a folder"),
        ("pipe", "out: pipe is neither a file nor a folder"),
        ("none/reference.pt", "out: the folder none does not exist"),
    ],
)
def test_a_reference_replaces_nothing_unasked(out, message, student, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("acqcore.files.reference.load_student", None)  # refused before any work
    (tmp_path / "folder").mkdir()
    (tmp_path / "validation.jsonl").write_text(row := json.dumps({"text": "a fox"}))
    (tmp_path / "link.pt").symlink_to("validation.jsonl")
    (tmp_path / "other.pt").write_text("keep")
    os.mkfifo(tmp_path / "pipe")
    overwrite = [] if out == "other.pt" else ["--overwrite"]
    words = ["reference", "--student", str(student), "--data", "validation.jsonl", "--out", out, *overwrite]
    assert message in refused(words)
    assert (tmp_path / "validation.jsonl").read_text() == row
    assert (tmp_path / "other.pt").read_text() == "keep"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("dim", "0", "--dim: expected an int >= 1, got 0"),
        ("seed", "-1", "seed: expected 0 to "),
        ("parameters", "some", "parameters: unknown 'some', expected one of head, trainable, all"),
        ("parameters", "0", "parameters: expected at least 1 transformer block, got 0"),
        ("max-length", "1", "argument --max-length: expected an int >= 2, got 1"),
        ("limit", "0", "argument --limit: expected an int >= 1, got 0"),
        ("backend", "gpu", "argument --backend: invalid choice: 'gpu'"),
    ],
)
def test_wrong_options_are_rejected_before_the_student_loads(option, value, message, refused, tmp_path):
    data = tmp_path / "validation.jsonl"
    data.write_text(json.dumps({"text": "a fox"}))
    words = ["reference", "--student", "org/missing", "--data", str(data), "--out", str(tmp_path / "reference.pt")]
    assert message in refused([*words, f"--{option}", value])


def test_an_interrupted_reference_keeps_the_old_one(student, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("acqcore.files.reference.influence_reference", Mock(side_effect=KeyboardInterrupt))
    data, out = tmp_path / "validation.jsonl", tmp_path / "reference.pt"
    data.write_text(json.dumps({"text": "a fox"}))
    out.write_text("keep")
    words = ["reference", "--student", str(student), "--data", str(data), "--out", str(out), "--overwrite"]
    assert main(words) == 130
    assert capsys.readouterr().err == "acqcore: interrupted; nothing was written\n"
    assert out.read_text() == "keep"


def test_a_run_does_not_resume_with_another_reference(command, student, tmp_path, monkeypatch, refused):
    def reference(text):
        data = tmp_path / "validation.jsonl"
        data.write_text(json.dumps({"text": text}))
        words = ["--student", str(student), "--data", str(data), "--out", str(tmp_path / "reference.pt"), "--overwrite"]
        assert main(["reference", *words, "--dim", "64", "--backend", "eager"]) == 0

    arguments = json.dumps({"influence": {"reference": str(tmp_path / "reference.pt")}})
    scoring = command([{"text": text} for text in TEXTS], acquisitions="influence", acquisition_args=arguments)
    reference("a fox")
    with monkeypatch.context() as patch:
        patch.setattr("acqcore.scoring.plan.Plan.batches", Mock(side_effect=KeyboardInterrupt))
        assert main(scoring) == 130
    reference("the lazy dog")
    assert "with different argument_files" in refused(scoring)
    reference("a fox")
    assert main(scoring) == 0
