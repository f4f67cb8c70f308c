"""The command line: wrong usage, help and what it says of its environment."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

import acqcore
from acqcore.cli import main


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "--top-k: expected an int >= 1, got 0"),
        ({"acquisitions": "entropie"}, "acquisitions: unknown 'entropie'"),
        ({"reduction": "median"}, "reduction: unknown 'median'"),
        ({"backend": "gpu"}, "argument --backend: invalid choice: 'gpu'"),
        ({"data": "missing.jsonl"}, "missing.jsonl: No such file or directory"),
        ({"data": "missing.parquet"}, "missing.parquet: No such file or directory"),
        (
            {"acquisition_args": '{"loss": {}, "loss": {}}'},
            "expected JSON, got '{\"loss\": {}, \"loss\": {}}': key 'loss' is repeated",
        ),
        ({"acquisition_args": "{bad"}, "argument --acquisition-args: expected JSON, got '{bad': Expecting property"),
        ({"out": "out.txt"}, "extension of out.txt: unknown '.txt'"),
        ({"out": "."}, "--out: expected a name, got '.'"),
        ({"out": "x" * 300}, "File name too long"),
        ({"out": "missing/out.csv"}, "out: the folder missing does not exist"),
        ({"student": "./missing"}, "missing"),
        ({"text_column": "body"}, "data: no column 'body', expected one of text"),
        ({"prompt_column": "text"}, "--prompt-column and --completion-column: expected both or neither"),
        ({"split": "test"}, "--data-config and --split: apply only to data sets, but "),
        ({"limit": 0}, "--limit: expected an int >= 1, got 0"),
        ({"limit": "x"}, "argument --limit: expected an int >= 1, got x"),
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


def test_a_file_without_rows(command, refused):
    assert "data.jsonl has no rows" in refused(command([]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, "--device: 'cuda' is not available"),
        ({"device": "cuda:7"}, "--device: 'cuda:7' is not available"),
        ({"device": "gpu"}, "--device: expected cpu, cuda or cuda:1, got 'gpu'"),
        ({"device": "meta"}, "--device: expected a compute device, got 'meta'"),
        ({"student": "data.jsonl"}, "--student: data.jsonl holds no model (no config.json)"),
        ({"student": "empty"}, "--student: empty holds no model (no config.json)"),
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
    turns = [{"role": "user", "content": "a fox?"}, {"role": "assistant", "content": "a dog."}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    rows = [{"text": "a fox"}]
    assert message in refused(command(rows, **options))
    assert main(command(rows)) == 0


@pytest.mark.parametrize("words", [["--top", "5"], ["--acq", "loss"], ["--dev", "cpu"]])
def test_options_are_not_abbreviated(words, command, refused):
    assert f"unrecognized arguments: {' '.join(words)}" in refused([*command([{"text": "a fox"}]), *words])


def test_version_and_help(capsys, monkeypatch, refused):
    monkeypatch.setenv("ACQCORE_ISA", "avx1024")  # which only backends that run need
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"acqcore {acqcore.__version__}\n"
    with pytest.raises(SystemExit, match="0"):
        main(["score", "--help"])
    offered = capsys.readouterr().out
    assert not re.search(r"``|:func:|:class:", offered)
    assert "gradient_diversity" not in offered
    assert "mutual_information" in offered
    assert "ACQCORE_ISA: unknown 'avx1024', expected one of" in refused(["info"])


def test_info_tells_backends_and_versions(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for word in ("eager", "cpu", version("torch"), acqcore.__version__, "threads"):
        assert word in shown


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("words", ["info", "select --data scores.jsonl --signal x --n 1 --out best.jsonl"])
def test_a_full_disk_under_stdout_is_one_sentence(words, tmp_path):
    (tmp_path / "scores.jsonl").write_text('{"x": 1}\n')
    command = [sys.executable, "-m", "acqcore", *words.split()]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("acqcore: error: No space left on device\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_rows_beyond_the_encoding_of_stdout(command, encoding, capsys, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding))
    assert main(command([{"text": "the fox 😀 is"}, {"text": "is the fox"}])) == 0
    sys.stdout.flush()
    assert capsys.readouterr().err == ""
    assert "\\U0001f600" in written.getvalue().decode(encoding)


def test_tables_without_rich(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["eager", "yes"] for line in lines)
