"""Data files are read row by row, and written whole or not at all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from acqcore.data_files import Record, choose_columns, read, write

ROWS = [{"text": "a\nb", "n": 1}, {"text": 'ç, "d"', "n": 2}]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_what_is_written_is_read(suffix: str, tmp_path: Path) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"data.{suffix}"
    write(path, {"text": [row["text"] for row in ROWS], "n": np.array([1, 2])})
    records = read(path, None)
    assert [record.line for record in records] == [1, 2]
    assert [record.values["text"] for record in records] == [row["text"] for row in ROWS]
    assert [int(record.values["n"]) for record in records] == [1, 2]
    assert len(read(path, 1)) == 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_bad_lines_are_records_with_an_error(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n{"text": \n[1]\n{"text": "\xff"}\n{"text": "b"}')
    records = read(path, None)
    assert [record.line for record in records] == [1, 3, 4, 5, 6]
    errors = [record.error for record in records]
    assert errors[0] is errors[4] is None
    assert errors[1] == "not JSON: Expecting value (column 9)"
    assert errors[2] == "expected a JSON object, got list"
    assert errors[3] == "not UTF-8: invalid start byte (byte 11)"


def test_nan_is_null_or_empty(tmp_path: Path) -> None:
    table = {"x": np.array([np.nan, 1.5], dtype=np.float32), "e": ["bad", None]}
    write(tmp_path / "a.jsonl", table)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"x": None, "e": "bad"}, {"x": 1.5, "e": None}]
    write(tmp_path / "a.csv", table)
    assert (tmp_path / "a.csv").read_text().split() == ["x,e", ",bad", "1.5,"]


def test_unknown_extension(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"extension of data\.txt: unknown '\.txt', expected one of \.jsonl"):
        read(tmp_path / "data.txt", None)


@pytest.mark.parametrize(
    ("present", "options", "chosen"),
    [
        (["prompt", "completion", "text"], {}, {"prompt": "prompt", "completion": "completion"}),
        (["id", "messages"], {}, {"messages": "messages"}),
        (["question", "answer"], {}, {"question": "prompt", "answer": "completion"}),
        (["text"], {}, {"text": "text"}),
        (["q", "a", "text"], {"prompt": "q", "completion": "a"}, {"q": "prompt", "a": "completion"}),
        (["q", "a", "text"], {"text": "a"}, {"a": "text"}),
    ],
)
def test_columns(present: list[str], options: dict[str, str], chosen: dict[str, str]) -> None:
    names: dict[str, Any] = {"prompt": None, "completion": None, "text": None, **options}
    assert choose_columns([Record(1, dict.fromkeys(present))], **names) == chosen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            "data: expected columns prompt and completion, messages, question and answer, or text, got x, y",
        ),
        ({"prompt": "x"}, "--prompt-column and --completion-column: expected both or neither"),
        ({"prompt": "x", "completion": "y", "text": "x"}, "--text-column: expected it without"),
        ({"text": "z"}, "data: no column 'z', expected one of x, y"),
    ],
)
def test_bad_columns(options: dict[str, str], message: str) -> None:
    names: dict[str, Any] = {"prompt": None, "completion": None, "text": None, **options}
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_columns([Record(1, {"x": 1, "y": 2})], **names)
