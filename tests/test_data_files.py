"""Data files are read row by row, and written whole or not at all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from acqcore.files.data import Block, Reader, Record, choose_columns, join, scan, write_block

ROWS = [{"text": "a\nb", "n": 1}, {"text": 'ç, "d"', "n": 2}, {"text": "", "n": 3}, {"text": "e\r\nf", "n": 4}]


def read_all(path: Path, block_rows: int = 4096, limit: int | None = None) -> list[Record]:
    """The file's rows by its blocks, last block first."""
    blocks, columns = scan(path, block_rows, limit)
    assert [block.index for block in blocks] == list(range(len(blocks)))
    assert [block.start for block in blocks] == [i * block_rows for i in range(len(blocks))]
    reader = Reader(path, columns)
    pieces = [reader.read(block) for block in reversed(blocks)]
    assert [len(piece) for piece in pieces] == [block.rows for block in reversed(blocks)]
    return [record for piece in reversed(pieces) for record in piece]


@pytest.mark.parametrize("block_rows", [1, 2, 3, 10])
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_what_is_written_is_read(suffix: str, block_rows: int, tmp_path: Path) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    parts = [tmp_path / f"{i}.{suffix}" for i in range(2)]
    for i, part in enumerate(parts):
        rows = ROWS[2 * i : 2 * i + 2]
        write_block(part, {"text": [row["text"] for row in rows], "n": np.array([row["n"] for row in rows])})
    path = tmp_path / f"data.{suffix}"
    join(parts, path, ["text", "n"])
    records = read_all(path, block_rows)
    assert [record.line for record in records] == [1, 2, 3, 4]
    assert [record.values["text"] for record in records] == [row["text"] for row in ROWS]
    assert [int(record.values["n"]) for record in records] == [1, 2, 3, 4]
    assert scan(path, block_rows, None)[1] == ["text", "n"]
    assert len(read_all(path, block_rows, limit=3)) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"0.{suffix}", f"1.{suffix}", path.name]


def test_bad_lines_are_records_with_an_error(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n{"text": \n[1]\n{"text": "\xff"}\n\n\n{"text": "b"}')
    for block_rows in (1, 2, 3, 10):
        records = read_all(path, block_rows)
        assert [record.line for record in records] == [1, 3, 4, 5, 8]
        errors = [record.error for record in records]
        assert errors[0] is errors[4] is None
        assert errors[1] == "not JSON: Expecting value (column 9)"
        assert errors[2] == "expected a JSON object, got list"
        assert errors[3] == "not UTF-8: invalid start byte (byte 11)"


def test_cells_beyond_the_header_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("text,n\na,1,2\n\nb\n")
    assert scan(path, 1, None)[1] == ["text", "n"]
    assert [record.values for record in read_all(path, 1)] == [{"text": "a", "n": "1"}, {"text": "b", "n": None}]


def test_a_csv_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("text\na\n" + "b" * 200_000 + "\n")
    with pytest.raises(ValueError, match=r"data\.csv: after row 1: field larger than field limit"):
        scan(path, 10, None)


@pytest.mark.parametrize("name", ["empty.jsonl", "blank.jsonl", "empty.csv", "header.csv"])
def test_a_file_without_rows_has_no_blocks(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text({"blank.jsonl": "\n\n", "header.csv": "text\n"}.get(name, ""))
    assert scan(path, 10, None) == ([], [])


def test_parquet_blocks_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across row groups, and across the batches that are decoded; only the columns asked for."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("acqcore.files.data._READ_ROWS", 3)
    table = pyarrow.table({"text": [str(i) for i in range(20)], "other": list(range(20))})
    parquet.write_table(table, tmp_path / "data.parquet", row_group_size=7)
    reader = Reader(tmp_path / "data.parquet", ["text"])
    for start, rows in ((5, 11), (16, 4), (17, 2), (0, 20), (18, 1)):
        records = reader.read(Block(index=0, start=start, rows=rows, line=start + 1, offset=0))
        assert records == [Record(i + 1, {"text": str(i)}) for i in range(start, start + rows)]


def test_a_parquet_is_read_again_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    write_block(tmp_path / "data.parquet", {"text": [str(i) for i in range(5)]})
    reader = Reader(tmp_path / "data.parquet", ["text"])
    blocks, _ = scan(tmp_path / "data.parquet", 2, None)
    assert [record.values["text"] for record in reader.read(blocks[0])] == ["0", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("acqcore.files.data.Record", None)
        with pytest.raises(TypeError):
            reader.read(blocks[1])
    assert [record.values["text"] for record in reader.read(blocks[1])] == ["2", "3"]


def test_nan_is_null_or_empty(tmp_path: Path) -> None:
    table = {"x": np.array([np.nan, 1.5], dtype=np.float32), "e": ["bad", None]}
    for suffix in ("jsonl", "csv"):
        write_block(tmp_path / f"0.{suffix}", table)
        join([tmp_path / f"0.{suffix}"], tmp_path / f"a.{suffix}", list(table))
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"x": None, "e": "bad"}, {"x": 1.5, "e": None}]
    assert (tmp_path / "a.csv").read_text().split() == ["x,e", ",bad", "1.5,"]


@pytest.mark.parametrize("out", ["all.parquet", "all"])
def test_parquet_parts_get_one_schema(out: str, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    tables = [
        {"m": [[{"role": "user"}]], "error": [None]},
        {"m": [[{"role": "user", "name": "x"}]], "error": ["bad"]},
    ]
    parts = [tmp_path / f"{i}.parquet" for i in range(2)]
    for part, table in zip(parts, tables, strict=True):
        write_block(part, table)
    for _ in range(2):  # the second time in the place of the first
        join(parts, tmp_path / out, ["m", "error"])
    rows = parquet.read_table(tmp_path / out).to_pylist()
    assert rows == [
        {"m": [{"role": "user", "name": None}], "error": None},
        {"m": [{"role": "user", "name": "x"}], "error": "bad"},
    ]
    if out == "all":
        assert sorted(p.name for p in (tmp_path / out).iterdir()) == ["part-000000.parquet", "part-000001.parquet"]
    write_block(parts[0], {"m": ["text"], "error": [None]})
    with pytest.raises(TypeError, match="incompatible types"):
        join(parts, tmp_path / out, ["m", "error"])
    assert parquet.read_table(tmp_path / out).num_rows == 2


def test_unknown_extension(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"extension of data\.txt: unknown '\.txt', expected one of \.jsonl"):
        scan(tmp_path / "data.txt", 1, None)


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
    assert choose_columns(present, **names) == chosen


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
        choose_columns(["x", "y"], **names)
