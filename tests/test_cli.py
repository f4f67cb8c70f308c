"""The command line on a small saved model: results, resuming, bad lines, wrong usage."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

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


def test_a_killed_run_goes_on_where_it_stopped(command, tmp_path, read):
    rows = [{"text": f"{TEXTS[i % 5]} {i} {'fox ' * (i % 7)}"} for i in range(900)]
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


def test_another_run_may_not_take_over(command, tmp_path, monkeypatch, capsys, refused):
    rows = [{"text": text} for text in TEXTS]

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("acqcore.scoring.plan.Plan.batches", interrupted)
        assert main(command(rows)) == 130
    assert "the same command resumes" in capsys.readouterr().err
    message = refused(command(rows, acquisitions="margin"))
    assert "holds an interrupted run with different acquisitions ('entropy' there, 'margin' here)" in message
    assert "with different data" in refused(command(rows[1:]))
    assert main(command(rows)) == 0


def test_a_run_does_not_resume_with_another_reference(command, student, tmp_path, monkeypatch, refused):
    def reference(text):
        data = tmp_path / "validation.jsonl"
        data.write_text(json.dumps({"text": text}))
        words = ["--student", str(student), "--data", str(data), "--out", str(tmp_path / "reference.pt"), "--overwrite"]
        assert main(["reference", *words, "--dim", "64", "--backend", "eager"]) == 0

    def interrupted(*_):
        raise KeyboardInterrupt

    arguments = json.dumps({"influence": {"reference": str(tmp_path / "reference.pt")}})
    scoring = command([{"text": text} for text in TEXTS], acquisitions="influence", acquisition_args=arguments)
    reference("a fox")
    with monkeypatch.context() as patch:
        patch.setattr("acqcore.scoring.plan.Plan.batches", interrupted)
        assert main(scoring) == 130
    reference("the lazy dog")
    assert "with different argument_files" in refused(scoring)
    reference("a fox")
    assert main(scoring) == 0


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


def test_an_interrupted_reference_keeps_the_old_one(student, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("acqcore.files.reference.influence_reference", interrupted)
    data, out = tmp_path / "validation.jsonl", tmp_path / "reference.pt"
    data.write_text(json.dumps({"text": "a fox"}))
    out.write_text("keep")
    words = ["reference", "--student", str(student), "--data", str(data), "--out", str(out), "--overwrite"]
    assert main(words) == 130
    assert capsys.readouterr().err == "acqcore: interrupted; nothing was written\n"
    assert out.read_text() == "keep"


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


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_the_highest_of_rows_with_long_cells(suffix, command, tmp_path):
    rows = [{"text": f"a fox {i}", "note": "x, " * 50_000} for i in range(3)]
    assert main(command(rows, out=tmp_path / f"out.{suffix}", top_k=2)) == 0
    assert (tmp_path / f"out.{suffix}").read_text().count("x, " * 50_000) == 2


@pytest.mark.parametrize("options", [{}, {"block_rows": 1}, {"top_k": 2}])
def test_parquet_types_are_kept(options, command, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("pandas")  # without it pyarrow cannot read nanoseconds
    columns = {
        "ns": pyarrow.array([1, 1_700_000_000_123_456_789], pyarrow.timestamp("ns")),
        "span": pyarrow.array([None, 3_000_000_001], pyarrow.duration("ns")),
        "unsigned": pyarrow.array([2**64 - 1, None], pyarrow.uint64()),
        "map": pyarrow.array([[("a", 1)], None], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "small": pyarrow.array([1, 2], pyarrow.int8()),
        "category": pyarrow.array(["a", None]).dictionary_encode(),
        "entropy": pyarrow.array([None, None], pyarrow.float16()),
        "list": pyarrow.array([[1, 2], None], pyarrow.list_(pyarrow.int32(), 2)),
    }
    given = pyarrow.table({"text": ["a fox", "the dog"], **columns})
    parquet.write_table(given, tmp_path / "in.parquet")
    arguments = command([], data=tmp_path / "in.parquet", out=tmp_path / "out.parquet", acquisitions="entropy")
    assert (
        main([*arguments, *(word for key, n in options.items() for word in (f"--{key.replace('_', '-')}", str(n)))])
        == 0
    )
    found = parquet.read_table(tmp_path / "out.parquet")
    for name in given.column_names:
        column = found.column("data_entropy" if name == "entropy" else name)
        assert column.type == given.column(name).type
        assert column.to_pylist() == given.column(name).to_pylist()


def test_a_data_set_by_name(command, tmp_path, monkeypatch, refused, read, capsys):
    pytest.importorskip("datasets")

    def interrupted(*_):
        raise KeyboardInterrupt

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
        patch.setattr("acqcore.cli._collect", interrupted)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "--top-k: expected an int >= 1, got 0"),
        ({"acquisitions": "entropie"}, "acquisitions: unknown 'entropie'"),
        ({"reduction": "median"}, "reduction: unknown 'median'"),
        ({"backend": "gpu"}, "backend: unknown 'gpu'"),
        ({"data": "missing.jsonl"}, "missing.jsonl: No such file or directory"),
        ({"data": "missing.parquet"}, "missing.parquet: No such file or directory"),
        ({"acquisition_args": "{bad"}, "argument --acquisition-args: expected JSON, got '{bad': Expecting property"),
        ({"out": "out.txt"}, "extension of out.txt: unknown '.txt'"),
        ({"out": "missing/out.csv"}, "out: the folder missing does not exist"),
        ({"student": "./missing"}, "missing"),
        ({"text_column": "body"}, "data: no column 'body', expected one of text"),
        ({"prompt_column": "text"}, "--prompt-column and --completion-column: expected both or neither"),
        ({"split": "test"}, "--data-config and --split: only for a data set, "),
        ({"limit": 0}, "--limit: expected an int >= 1, got 0"),
        ({"limit": "x"}, "argument --limit: invalid int value: 'x'"),
        ({"max_length": 65}, "--max-length: the student takes at most 64 tokens, got 65"),
        ({"block_rows": 0}, "--block-rows: expected an int >= 1, got 0"),
        ({"engine": "dask"}, "argument --engine: invalid choice: 'dask'"),
        ({"workers": 2}, "--workers: requires --engine ray, got --engine local"),
        ({"engine": "accelerate", "ray_address": "auto"}, "--ray-address: requires --engine ray"),
        ({"engine": "ray", "workers": 0}, "workers: expected an int >= 1, got 0"),
        ({"engine": "ray", "device": "cuda:1"}, "device: expected cpu or cuda with --engine ray"),
        ({"dtype": "int8"}, "argument --dtype: invalid choice: 'int8'"),
        (
            {"acquisitions": "gradient_diversity"},
            "'gradient_diversity' compares all samples of a call: call acqcore.score",
        ),
        ({"acquisitions": "influence"}, "--acquisition-args: 'influence' needs 'reference'"),
        (
            {"acquisitions": "influence", "acquisition_args": '{"influence": {"reference": "data.jsonl"}}'},
            "reference: expected a file from Reference.save or 'acqcore reference', got data.jsonl",
        ),
    ],
)
def test_wrong_usage_is_one_sentence(options, message, command, refused, tmp_path, monkeypatch):
    """Nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    assert message in refused(command([{"text": "a fox"}], **options))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("option", "package", "extra"),
    [
        ("engine ray", "ray", "ray"),
        ("engine accelerate", "accelerate", "train"),
        ("data org/name", "datasets", "train"),
    ],
)
def test_what_is_not_installed(option, package, extra, command, refused, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = f'--{option} needs {package}: run pip install "acqcore[{extra}]"'
    assert refused(command([{"text": "a fox"}], **dict([option.split()]))) == message


def test_launched_processes_do_not_all_score_everything(command, refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "--engine: 2 processes were launched, expected --engine accelerate, got local"
    assert refused(command([{"text": "a fox"}])) == message


@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_as_output(linked, command, tmp_path, read):
    pytest.importorskip("pyarrow")
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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("full", "out: the folder full contains files other than parts"),
        ("folder.jsonl", "out: folder.jsonl is a folder; for a folder of parquet files, use a name without an ext"),
        ("file", "out: file is a file; a name without an extension means a folder of parquet files"),
    ],
)
def test_outputs_that_are_in_the_way(name, message, command, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "full").mkdir()
    for path in (tmp_path / "file", tmp_path / "full" / "notes.txt"):
        path.write_text("keep")
    assert message in refused(command([{"text": "a fox"}], out=name))
    assert (tmp_path / "full" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "keep"


def test_a_full_disk(command, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("acqcore.files.worker._PAUSE_S", 0)
    monkeypatch.setattr("acqcore.files.worker.write_block", full)
    assert main(command([{"text": "a fox"}])) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    out = tmp_path / "out.jsonl"
    assert last == f"acqcore: error: {out}: No space left on device; the scores are kept in {out}.parts"


def test_a_file_without_rows(command, refused):
    assert "data.jsonl has no rows" in refused(command([]))


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_every_column_is_kept(suffix, command, tmp_path, read):
    """Columns stay in order, also for bad rows; those with the name of an output column are renamed."""
    rows = [
        {"id": 7, "text": "a fox", "entropy": 0.5, "row": "x", "data_row": "y"},
        {"id": 8, "text": "", "entropy": 0.25, "row": "z", "data_row": "w"},
    ]
    out = tmp_path / f"out.{suffix}"
    assert main(command(rows, out=out, block_rows=1)) == 0
    found = read(out)
    names = ["id", "text", "data_entropy", "data_row", "data_data_row"]
    assert list(found[0]) == ["row", *names, "entropy", "n_tokens", "valid", "error"]
    for before, after in zip(rows, found, strict=True):
        assert [str(value) for value in before.values()] == [str(after[name]) for name in names]
    assert (found[1]["error"] or "").startswith("nothing to score")


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


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv", ""])
def test_tool_calls_of_any_arguments(suffix, command, tmp_path, read):
    rows = [conversation({"x": 1}), conversation({"x": "one"}), conversation({})]
    for block_rows in (1, 3):
        out = tmp_path / f"{block_rows}.{suffix}".removesuffix(".")
        assert main(command(rows, out=out, block_rows=block_rows)) == 0
        found = read(out)
        if suffix in ("parquet", ""):
            for before, after in zip(rows, found, strict=True):
                turns = [{k: v for k, v in turn.items() if v is not None} for turn in json.loads(after["messages"])]
                assert turns == before["messages"]
        assert all(row["valid"] in (True, "True") for row in found)


def conversation(arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "ok", "tool_calls": [call]}]
    }


def test_conversations_in_a_csv(command, student, tmp_path, read):
    rows = [conversation({"x": 1})["messages"], conversation({"x": 2})["messages"]]
    assert main(command([{"messages": row} for row in rows], out=tmp_path / "first.csv")) == 0
    assert main(command([], data=tmp_path / "first.csv")) == 0
    for row, found in zip(rows, read(tmp_path / "out.jsonl"), strict=True):
        assert json.loads(found["messages"]) == row
        assert found["valid"]
    data, out = tmp_path / "first.csv", tmp_path / "reference.pt"
    options = ["--student", str(student), "--data", str(data), "--out", str(out)]
    assert main(["reference", *options, "--parameters", "1", "--dim", "64"]) == 0


def test_prompts_and_completions_that_are_conversations_in_a_csv(command, tmp_path, read):
    turns = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    rows = [
        {"prompt": turns[0], "completion": turns[1]},
        {"prompt": "[1, 2]", "completion": "[]"},
        {"prompt": '[{"a": 1}]', "completion": "[x"},
    ]
    for i, row in enumerate(rows):
        first, again = tmp_path / f"{i}.csv", tmp_path / f"{i}.jsonl"
        assert main(command([row], out=first)) == 0
        assert main(command([], data=first, out=again)) == 0
        [[once], [twice]] = read(first), read(again)
        assert float(once["entropy"]) == pytest.approx(twice["entropy"], rel=1e-5)
        assert int(once["n_tokens"]) == twice["n_tokens"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_json_that_is_text(suffix, command, student, tmp_path, read):
    """Prompt and completion of a csv are conversations only if both are; text of other files is text, as in Python."""
    user, reply, records = '[{"role":"u","content":"a"}]', '[{"role":"a","content":"b"}]', '[{"role":"a","name":"b"}]'
    rows = [
        {"prompt": "List the users as JSON.", "completion": records},
        {"prompt": "A fox", "completion": reply},
        {"prompt": user, "completion": " fox"},
        {"prompt": user, "completion": records},
        *([] if suffix == "csv" else [{"prompt": user, "completion": reply}]),
    ]
    data = tmp_path / f"given.{suffix}"
    write_rows(data, rows, ["prompt", "completion"], tmp_path / "none.jsonl")
    assert main(command([], data=data, acquisitions="loss")) == 0
    scores = acqcore.score(str(student), rows, "loss", backend="eager")
    found = read(tmp_path / "out.jsonl")
    assert [row["n_tokens"] for row in found] == scores.n_tokens.tolist()
    assert [row["loss"] for row in found] == pytest.approx(scores["loss"].tolist(), rel=1e-5)


@pytest.mark.parametrize("levels", [250, 400, 900, 3000])
def test_deeply_nested_json_text(levels, command, tmp_path, read):
    """It is the error of a row that needs messages or tools, and text elsewhere; the other rows are scored."""
    deep, turns = "[" * levels + "]" * levels, conversation({"x": 1})["messages"]
    good = {"messages": turns, "tools": None}
    rows = [{**good, "messages": deep}, good, {**good, "tools": deep}, {**good, "messages": deep[:levels]}, good]
    main(command(rows))
    found = read(tmp_path / "out.jsonl")
    assert [row["valid"] for row in found] == [False, True, False, False, True]
    assert found[0]["error"] == found[3]["error"] == "messages: expected a list of messages, got str"
    assert "tools" in found[2]["error"].lower()
    rows = [{"prompt": "a", "completion": deep}, {"prompt": "a", "completion": deep[:levels]}]
    for name in ("texts.csv", "texts.jsonl"):
        write_rows(tmp_path / name, rows, ["prompt", "completion"], tmp_path / "none.jsonl")
        out = tmp_path / f"scored-{name}.jsonl"
        assert main(command([], data=tmp_path / name, out=out, max_length=9)) == 0
        assert [row["n_tokens"] for row in read(out)] == [8, 8]


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, "--device: 'cuda' is not available"),
        ({"device": "cuda:7"}, "--device: 'cuda:7' is not available"),
        ({"device": "gpu"}, "--device: expected cpu, cuda or cuda:1, got 'gpu'"),
        ({"device": "meta"}, "--device: expected a compute device, got 'meta'"),
        ({"student": "data.jsonl"}, "--student: expected a folder or hub id, data.jsonl is a file"),
        ({"student": "empty"}, ""),
        ({"student": "broken"}, ""),
        ({"student": "wordless"}, "wordless has no tokenizer, which rows of a file require"),
        ({"student": "untemplated", "data": "chat.jsonl"}, "the tokenizer of"),
    ],
)
def test_what_a_run_would_find_out_is_one_sentence(options, message, command, student, refused, tmp_path, monkeypatch):
    """The refused command leaves nothing that would block the corrected one."""
    if torch.cuda.is_available() and options.get("device") == "cuda":
        pytest.skip("this machine has one")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    shutil.copytree(student, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no weights")
    shutil.copytree(student, tmp_path / "untemplated")
    (tmp_path / "untemplated" / "chat_template.jinja").unlink()
    shutil.copytree(student, tmp_path / "wordless", ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    (tmp_path / "chat.jsonl").write_text(json.dumps(conversation({})) + "\n")
    rows = [{"text": "a fox"}]
    assert message in refused(command(rows, **options))
    assert main(command(rows)) == 0


@pytest.mark.parametrize("words", [["--top", "5"], ["--acq", "loss"], ["--dev", "cpu"]])
def test_options_are_not_abbreviated(words, command, refused):
    assert f"unrecognized arguments: {' '.join(words)}" in refused([*command([{"text": "a fox"}]), *words])


def test_version_and_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"acqcore {acqcore.__version__}\n"
    with pytest.raises(SystemExit, match="0"):
        main(["score", "--help"])
    offered = capsys.readouterr().out
    assert not re.search(r"``|:func:|:class:", offered)
    assert "gradient_diversity" not in offered
    assert "mutual_information" in offered


def test_info_as_a_module_tells_backends_and_versions():
    result = subprocess.run([sys.executable, "-m", "acqcore", "info"], capture_output=True, text=True, check=True)
    for word in ("eager", "cpu", torch.__version__, acqcore.__version__, "threads"):
        assert word in result.stdout


def test_tables_without_rich(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["eager", "yes"] for line in lines)
