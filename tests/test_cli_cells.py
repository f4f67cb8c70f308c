"""Cells of data files on the command line: types, JSON text and conversations."""

from __future__ import annotations

import json
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

import acqcore
from acqcore.cli import main
from acqcore.files.table import write_rows


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


@pytest.mark.parametrize("options", [{}, {"block_rows": 1}, {"top_k": 2}])
def test_parquet_types_are_kept(options, command, tmp_path):
    columns = {
        "ns": pyarrow.array([1, 1_700_000_000_123_456_789], pyarrow.timestamp("ns")),
        "span": pyarrow.array([None, 3_000_000_001], pyarrow.duration("ns")),
        "unsigned": pyarrow.array([2**64 - 1, None], pyarrow.uint64()),
        "map": pyarrow.array([[("a", 1)], None], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "small": pyarrow.array([1, 2], pyarrow.int8()),
        "category": pyarrow.array(["a", None]).dictionary_encode(),
        "entropy": pyarrow.array([None, None], pyarrow.float16()),
        "list": pyarrow.array([[1, 2], None], pyarrow.list_(pyarrow.int32(), 2)),
        "view": pyarrow.array(["a", None], pyarrow.string_view()),
        "views": pyarrow.array([["a"], None], pyarrow.list_(pyarrow.string_view())),
    }
    given = pyarrow.table({"text": ["a fox", "the dog"], **columns})
    parquet.write_table(given, tmp_path / "in.parquet")
    assert main(command([], data=tmp_path / "in.parquet", out=tmp_path / "out.parquet", **options)) == 0
    found = parquet.read_table(tmp_path / "out.parquet")
    for name in given.column_names:
        column = found.column("data_entropy" if name == "entropy" else name)
        assert column.type == given.column(name).type
        assert column.to_pylist() == given.column(name).to_pylist()


def conversation(arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "ok", "tool_calls": [call]}]
    }


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
    write_rows(data, rows, ["prompt", "completion"])
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
        write_rows(tmp_path / name, rows, ["prompt", "completion"])
        out = tmp_path / f"scored-{name}.jsonl"
        assert main(command([], data=tmp_path / name, out=out, max_length=9)) == 0
        assert [row["n_tokens"] for row in read(out)] == [8, 8]
