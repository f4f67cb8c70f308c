"""Data files are read row by row, and written whole or not at all."""

from __future__ import annotations

import bz2
import csv
import datetime
import decimal
import gzip
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

import acqcore
from acqcore.files.data import Block, Reader, Record, choose_columns, records, scan
from acqcore.files.table import join, write_block

ROWS = [{"text": "a\nb", "n": 1}, {"text": 'ç, "d"', "n": 2}, {"text": "", "n": 3}, {"text": "e\r\nf", "n": 4}]
#: Python 3.13 parses 5,000 levels; earlier ones give up.
TOO_DEEP = "not JSON: maximum recursion depth" if sys.version_info < (3, 13) else "nested deeper than 200"


def read_all(path: Path, block_rows: int = 4096, limit: int | None = None) -> list[Record]:
    """The file's rows, read block by block from the last block to the first."""
    blocks, _ = scan(path, block_rows, limit)
    assert [block.index for block in blocks] == list(range(len(blocks)))
    assert [block.start for block in blocks] == [i * block_rows for i in range(len(blocks))]
    reader = Reader(path)
    pieces = [reader.read(block) for block in reversed(blocks)]
    assert [len(piece) for piece in pieces] == [block.rows for block in reversed(blocks)]
    return [record for piece in reversed(pieces) for record in piece]


@pytest.mark.parametrize("block_rows", [1, 2, 3, 10])
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_what_is_written_is_read(suffix, block_rows, tmp_path):
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


def test_bad_lines_are_records_with_an_error(tmp_path):
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


def test_cells_beyond_the_header_are_an_error(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("text,n\na, b,1\n\nb\n")
    assert scan(path, 1, None)[1] == ["text", "n"]
    found = read_all(path, 1)
    assert [record.error for record in found] == ["expected 2 cells as in the header, got 3", None]
    assert [record.line for record in found] == [1, 2]
    assert found[1].values == {"text": "b", "n": None}


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_pipe_is_refused(suffix, tmp_path):
    path = tmp_path / f"data.{suffix}"
    os.mkfifo(path)
    with pytest.raises(ValueError, match=rf"data\.{suffix}: expected a file, which is read several times, got a pipe"):
        scan(path, 1, None)


@pytest.mark.parametrize("block_rows", [1, 2, 10])
@pytest.mark.parametrize(
    ("line", "n", "error"),
    [
        (b'{"text": "b", "n": ' + b"9" * 5000 + b"}", "9" * 5000, None),
        (b'{"text": "b", "n": -' + b"1" * 4400 + b"}", "-" + "1" * 4400, None),
        (b'{"text": "b", "n": 1e400}', float("inf"), None),
        (b'{"text": "b", "n": ' + b"[" * 5000 + b"]" * 5000 + b"}", None, TOO_DEEP),
        (b'{"text": "b", "n": ' + b'{"a": ' * 300 + b"1" + b"}" * 301, None, "nested deeper than 200"),
        (b'{"text": "\xff\xfe"}', None, "not UTF-8: invalid start byte"),
        (b'{"text": "b", "text": "d"}', None, "key 'text' is repeated"),
        (b'{"text": "b", "n": [{"a": 1, "\\u0061": 2}]}', None, "key 'a' is repeated"),
        (b"\x00", None, "not JSON: Expecting value"),
        (b"nan", None, "not JSON"),
    ],
)
def test_whatever_a_line_holds(line, n, error, block_rows, tmp_path):
    """A line that breaks JSON readers affects no other line; its readable values are kept."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "c"}\n')
    found = read_all(path, block_rows)
    assert [record.values.get("text") for record in found] == ["a", None if error else "b", "c"]
    assert found[1].values.get("n") == n
    if error is None:
        assert found[1].error is None
    else:
        assert str(found[1].error).startswith(error)


@pytest.mark.parametrize("block_rows", [1, 2, 10])
@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"text,id\na,1\n" + b"b" * 140_000 + b",2\nc,3\n", ["a", "b" * 140_000, "c"]),
        (b"\xef\xbb\xbftext,id\na,1\nb,2\nc,3\n", ["a", "b", "c"]),
        (b'\xef\xbb\xbf"text","id"\n"a",1\n"b\nb",2\nc,3\n', ["a", "b\nb", "c"]),
        (b"text,id\na,1\ncaf\xe9,2\nc,3\n", ["a", "caf\udce9", "c"]),
        ("text,id\na,1\n日本,2\nc,3\n".encode(), ["a", "日本", "c"]),
        (b"\n\r\ntext,id\na,1\n\nb,2\nc,3\n", ["a", "b", "c"]),
    ],
)
def test_whatever_a_csv_holds(content, texts, block_rows, tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(content)
    assert scan(path, 1, None)[1] == ["text", "id"]
    found = read_all(path, block_rows)
    assert [record.values["text"] for record in found] == texts
    assert [record.values["id"] for record in found] == ["1", "2", "3"]
    assert [record.values for record in records(path)] == [record.values for record in found]


def test_a_cell_without_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr("acqcore.files.data._CELL", 100)
    path = tmp_path / "data.csv"
    path.write_text("text\na\n" + "b" * 101 + "\nc\n")
    found = read_all(path)
    assert [record.values.get("text") for record in found] == ["a", None, "c"]
    assert [record.line for record in found] == [1, 2, 3]
    assert found[1].error == "not csv: field larger than field limit (100)"
    assert csv.field_size_limit() == 131_072
    path.write_text('"text\na\n' + "b" * 101)
    with pytest.raises(ValueError, match=r"data\.csv: the header is not csv: field larger than field limit \(100\)"):
        scan(path, 10, None)


def test_text_of_a_parquet_that_is_not_utf8(tmp_path):
    texts = pyarrow.array([b"a", b"\xff\xfe", b"c"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts, "id": [1, 2, 3]}), tmp_path / "data.parquet")
    found = read_all(tmp_path / "data.parquet")
    assert [record.values for record in found] == [{"text": "a", "id": 1}, {"id": 2}, {"text": "c", "id": 3}]
    assert str(found[1].error).startswith("text: not readable: ")


@pytest.mark.parametrize("name", ["empty.jsonl", "blank.jsonl", "empty.csv", "header.csv"])
def test_a_file_without_rows_has_no_blocks(name, tmp_path):
    path = tmp_path / name
    path.write_text({"blank.jsonl": "\n\n", "header.csv": "text\n"}.get(name, ""))
    assert scan(path, 10, None) == ([], [])


def test_a_damaged_parquet_is_read_or_names_itself(tmp_path):
    """Any damaged byte gives rows or a one-sentence error; one such error is a row count that is too high."""
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"text": "a fox", "n": 1, "of": {"x": [1.5]}}] * 3), path)
    whole = path.read_bytes()
    told = set()
    for place in range(len(whole)):
        for flipped in (0x01, 0x02, 0xFF):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ flipped]) + whole[place + 1 :])
            try:
                list(records(path))
            except ValueError as error:
                message = str(error)
                assert message.startswith(f"{path}: not readable: ")
                assert "\n" not in message
                told.add(message.removeprefix(f"{path}: not readable: "))
    assert "it has fewer rows than its metadata says" in told
    assert len(told) > 20


def test_parquet_blocks_in_any_order(tmp_path, monkeypatch):
    """Blocks span row groups and decoded batches."""
    monkeypatch.setattr("acqcore.files.data._READ_ROWS", 3)
    table = pyarrow.table({"text": [str(i) for i in range(20)], "other": list(range(20))})
    parquet.write_table(table, tmp_path / "data.parquet", row_group_size=7)
    reader = Reader(tmp_path / "data.parquet")
    for start, rows in ((5, 11), (16, 4), (17, 2), (0, 20), (18, 1)):
        records = reader.read(Block(index=0, start=start, rows=rows, line=start + 1, offset=0))
        assert records == [Record(i + 1, {"text": str(i), "other": i}) for i in range(start, start + rows)]


def test_a_parquet_is_read_again_after_an_error(tmp_path, monkeypatch):
    write_block(tmp_path / "data.parquet", {"text": [str(i) for i in range(5)]})
    reader = Reader(tmp_path / "data.parquet")
    blocks, _ = scan(tmp_path / "data.parquet", 2, None)
    assert [record.values["text"] for record in reader.read(blocks[0])] == ["0", "1"]
    with monkeypatch.context() as patch:
        patch.setattr("acqcore.files.data.Record", None)
        with pytest.raises(TypeError):
            reader.read(blocks[1])
    assert [record.values["text"] for record in reader.read(blocks[1])] == ["2", "3"]


def test_nan_is_null_or_empty(tmp_path):
    table = {"x": np.array([np.nan, 1.5], dtype=np.float32), "e": ["bad", None]}
    for suffix in ("jsonl", "csv"):
        write_block(tmp_path / f"0.{suffix}", table)
        join([tmp_path / f"0.{suffix}"], tmp_path / f"a.{suffix}", list(table))
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"x": None, "e": "bad"}, {"x": 1.5, "e": None}]
    assert (tmp_path / "a.csv").read_text().split() == ["x,e", ",bad", "1.5,"]


@pytest.mark.parametrize("out", ["all.parquet", "all"])
def test_parquet_parts_get_one_schema(out, tmp_path):
    tables = [{"m": [[{"role": "user"}]], "error": [None]}, {"m": [[{"role": "user", "name": "x"}]], "error": ["bad"]}]
    parts = [tmp_path / f"{i}.parquet" for i in range(2)]
    for part, table in zip(parts, tables, strict=True):
        write_block(part, table)
    for _ in range(2):  # the second join replaces the first
        join(parts, tmp_path / out, ["m", "error"])
    rows = parquet.read_table(tmp_path / out).to_pylist()
    assert rows == [
        {"m": [{"role": "user", "name": None}], "error": None},
        {"m": [{"role": "user", "name": "x"}], "error": "bad"},
    ]
    if out == "all":
        assert sorted(p.name for p in (tmp_path / out).iterdir()) == ["part-000000.parquet", "part-000001.parquet"]
    write_block(parts[0], {"m": ["text"], "error": [None]})
    join(parts, tmp_path / out, ["m", "error"])
    texts = parquet.read_table(tmp_path / out).column("m").to_pylist()
    assert [texts[0], json.loads(texts[1])] == ["text", [{"role": "user", "name": "x"}]]


def _nested(levels: int) -> list[Any]:
    value: list[Any] = [1]
    for _ in range(levels - 1):
        value = [value]
    return value


#: Columns that have no Arrow type, or no single type across parts.
MIXED: list[list[Any]] = [
    [{"x": 1}, {"x": "one"}],
    [[1], [{"x": 2}]],
    [{}, {}],
    [{"extra": {}}, {"extra": {"y": 1}}],
    [2**70, 1],
    ["a \ud83d", "b"],
    [1, "one"],
    [1, 0.5],
    [2**60 + 1, 0.5],
    [None, 1],
    [True, 1],
    [[None], ["a"]],
    [{"x": float("nan")}, {"x": [1]}],
    [[None, None], [None]],
    [[{"x": None}, {"x": None}], [{"x": None}]],
    [[{"x": None}, {"x": None}], [{"x": [1]}, {"x": None}]],
    [_nested(60), _nested(99)],
]


def without_nulls(value: Any) -> Any:
    """Drops null and NaN entries, because an Arrow struct has the keys of all rows."""
    if isinstance(value, list):
        return [without_nulls(part) for part in value]
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None and v == v}
    return value


@pytest.mark.parametrize("values", MIXED, ids=repr)
@pytest.mark.parametrize("n_parts", [1, 2])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_no_value_is_refused(suffix, n_parts, values, tmp_path):
    parts = [tmp_path / f"{i}.{suffix}" for i in range(n_parts)]
    for part, some in zip(parts, [values] if n_parts == 1 else [values[:1], values[1:]], strict=True):
        write_block(part, {"v": some, "score": np.ones(len(some), dtype=np.float32)})
    join(parts, tmp_path / f"all.{suffix}", ["v", "score"])
    found = read_all(tmp_path / f"all.{suffix}")
    assert [float(record.values["score"]) for record in found] == [1.0, 1.0]
    for value, record in zip(values, found, strict=True):
        got, expected = record.values["v"], value
        if isinstance(value, str):
            expected = value if suffix == "jsonl" else value.encode(errors="backslashreplace").decode()
        elif isinstance(got, str):
            got = None if got == "" else json.loads(got.lower() if isinstance(value, bool) else got)
        if isinstance(value, dict):
            got, expected = without_nulls(got), without_nulls(value)
        assert got == expected


def test_a_type_that_arrow_cannot_build(tmp_path):
    kind = pyarrow.fixed_shape_tensor(pyarrow.float32(), [2], permutation=[0])
    write_block(tmp_path / "0.parquet", {"v": [[1.0, 2.0], None]}, {"v": kind})
    write_block(tmp_path / "1.parquet", {"v": [[3.0, 4.0]]}, {"v": kind})
    join([tmp_path / f"{i}.parquet" for i in range(2)], tmp_path / "all.parquet", ["v"])
    assert parquet.read_table(tmp_path / "all.parquet")["v"].to_pylist() == [[1.0, 2.0], None, [3.0, 4.0]]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_any_name_of_a_column(suffix, tmp_path):
    names = ["", "a.b", "\ud83d", "caf\udce9", "a\nb"]
    write_block(tmp_path / f"0.{suffix}", {name: [i] for i, name in enumerate(names)})
    join([tmp_path / f"0.{suffix}"], tmp_path / f"all.{suffix}", names)
    [record] = read_all(tmp_path / f"all.{suffix}")
    written = [name if suffix == "jsonl" else name.encode(errors="backslashreplace").decode() for name in names]
    assert {name: int(value) for name, value in record.values.items()} == {n: i for i, n in enumerate(written)}


@pytest.mark.parametrize("block_rows", [1, 10])
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_equal_names_of_columns(suffix, block_rows, tmp_path):
    """All values are kept, and the name refers to the first column."""
    path, rows = tmp_path / f"data.{suffix}", ["a", "b"]
    if suffix == "csv":
        path.write_text("text,text,,id,\n" + "".join(f"{row},not {row},x,1,y\n" for row in rows))
        more = {"": "x", "id": "1", ".1": "y"}
    else:
        columns = [pyarrow.array(rows), pyarrow.array([f"not {row}" for row in rows]), pyarrow.array([1, 1])]
        parquet.write_table(pyarrow.Table.from_arrays(columns, names=["text", "text", "id"]), path)
        more = {"id": 1}
    found = read_all(path, block_rows)
    assert [record.values for record in found] == [{"text": row, "text.1": f"not {row}", **more} for row in rows]


@pytest.mark.parametrize("content", ['{"text": "a"}\n', "text\na\n"])
def test_a_file_that_lost_rows(content, tmp_path):
    path = tmp_path / ("data.csv" if content[0] == "t" else "data.jsonl")
    path.write_text(content + content)
    [block], _ = scan(path, 10, None)
    path.write_text(content)
    with pytest.raises(ValueError, match=r"data\.(csv|jsonl): has fewer rows than when the run began"):
        Reader(path).read(block)


@pytest.mark.parametrize("block_rows", [1, 2, 10])
@pytest.mark.parametrize("last", ['"b,2\nc,3\n', '"b,2\nc,3', '"b",2\n"c,3\n\n'])
def test_a_quote_that_is_never_closed(last, block_rows, tmp_path):
    path = tmp_path / "data.csv"
    path.write_text(f"text,id\na,1\n{last}")
    *sound, bad = read_all(path, block_rows)
    assert [record.values["text"] for record in sound] == ["a", "b"][: len(sound)]
    assert str(bad.error).startswith("not csv: a quote in this row is never closed, so the last 2 lines form one")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ('{"text": "caf\xe9"}'.encode("latin-1"), "not UTF-8: invalid continuation byte (byte 14)"),
        (b'[{"text": "a"}]', "expected a JSON object, got list"),
        (b'{"text": "a"}\r{"text": "b"}', "not JSON: Extra data (column 15)"),
    ],
)
def test_a_file_none_of_whose_rows_is_readable(content, error, tmp_path):
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"data.jsonl: no row is readable; first error: {error}")):
        scan(tmp_path / "data.jsonl", 10, None)


PLAIN = b"text,n\na,1\nb,2\n"


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("content", "found"),
    [
        *((PLAIN.decode().encode(name), name[:6].upper()) for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")),
        (gzip.compress(PLAIN, mtime=0), "a gzip file"),
        (bz2.compress(PLAIN), "a bzip2 file"),
        (b"PAR1\x15\x04", "a parquet file"),
        (bytes(100), "UTF-16 or binary data"),
    ],
)
def test_a_file_in_another_encoding_is_named(content, found, suffix, tmp_path):
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(content)
    for read in (lambda: scan(path, 10, None), lambda: list(records(path))):
        with pytest.raises(ValueError, match=rf"data\.{suffix}: expected text in UTF-8, got {found}"):
            read()


def test_values_of_parquet_that_json_has_not(tmp_path):
    values = {
        "day": [datetime.date(2026, 1, 2)],
        "bytes": [b"\x00\xff"],
        "sum": [decimal.Decimal("1.50")],
        "array": [np.array([1, 2])],
        "nested": [[{"at": datetime.datetime(2026, 1, 2, 3)}]],
    }
    for suffix in ("jsonl", "csv"):
        write_block(tmp_path / f"0.{suffix}", values)
        join([tmp_path / f"0.{suffix}"], tmp_path / f"all.{suffix}", list(values))
    [line] = read_all(tmp_path / "all.jsonl")
    assert line.values == {
        "day": "2026-01-02",
        "bytes": "AP8=",
        "sum": "1.50",
        "array": [1, 2],
        "nested": [{"at": "2026-01-02T03:00:00"}],
    }
    [row] = read_all(tmp_path / "all.csv")
    assert row.values == line.values | {"array": "[1, 2]", "nested": '[{"at": "2026-01-02T03:00:00"}]'}


@pytest.mark.parametrize("read", [lambda path: scan(path, 1, None), lambda path: next(acqcore.records(path))])
def test_unknown_extension(read, tmp_path):
    (tmp_path / "data.json").write_text('{"text": "a"}')
    with pytest.raises(ValueError, match=r"extension of data\.json: unknown '\.json', expected one of \.jsonl"):
        read(tmp_path / "data.json")


@pytest.mark.parametrize(
    ("present", "options", "chosen"),
    [
        (["prompt", "completion", "text"], {}, {"prompt": "prompt", "completion": "completion"}),
        (["id", "messages"], {}, {"messages": "messages"}),
        (["question", "answer"], {}, {"question": "question", "answer": "answer"}),
        (["tools", "messages"], {}, {"messages": "messages", "tools": "tools"}),
        (["image", "text"], {}, {"text": "text", "image": "image"}),
        (["text"], {}, {"text": "text"}),
        (["q", "a", "text"], {"prompt": "q", "completion": "a"}, {"q": "prompt", "a": "completion"}),
        (["q", "a", "tools"], {"prompt": "q", "completion": "a"}, {"q": "prompt", "a": "completion", "tools": "tools"}),
        (["tools", "a"], {"prompt": "tools", "completion": "a"}, {"tools": "prompt", "a": "completion"}),
        (["q", "a", "text", "tools"], {"text": "a"}, {"a": "text"}),
    ],
)
def test_columns(present, options, chosen):
    names: dict[str, Any] = {"prompt": None, "completion": None, "text": None, **options}
    assert choose_columns(present, **names) == chosen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "data: expected columns prompt and completion, or messages, or question and answer, or text, got x, y"),
        ({"prompt": "x"}, "--prompt-column and --completion-column: expected both or neither"),
        ({"prompt": "x", "completion": "y", "text": "x"}, "--text-column: cannot be combined with"),
        ({"prompt": "x", "completion": "x"}, "--completion-column: expected a column other than --prompt-column"),
        ({"text": "z"}, "data: no column 'z', expected one of x, y"),
    ],
)
def test_bad_columns(options, message):
    names: dict[str, Any] = {"prompt": None, "completion": None, "text": None, **options}
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_columns(["x", "y"], **names)


def test_records_of_a_path_or_its_name(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    for name in (path, str(path)):
        assert [record.values["text"] for record in acqcore.records(name)] == ["a", "b"]
    with pytest.raises(FileNotFoundError):
        next(acqcore.records(str(tmp_path / "missing.jsonl")))
