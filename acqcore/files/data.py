"""Blocks of rows of jsonl, csv and parquet files.

Reads a block at a time, line by line, so that a bad line spoils nothing else. Writes a block at a time, and joins the
blocks into one file.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from acqcore import checks

SUFFIXES = (".jsonl", ".csv", ".parquet")

#: Columns that make a sample -> keys of the sample; the first entry whose columns are present is used.
KNOWN_COLUMNS: tuple[dict[str, str], ...] = (
    {"prompt": "prompt", "completion": "completion"},
    {"messages": "messages"},
    {"question": "prompt", "answer": "completion"},
    {"text": "text"},
)

_READ_BYTES = 1 << 20  # of a parquet column at a time
_READ_ROWS = 1024  # of a parquet at a time


@dataclass(frozen=True)
class Record:
    """One data row: its line (jsonl) or row in the file, from 1, and its values or an error."""

    line: int
    values: dict[str, Any]
    error: str | None = None


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a file, scored, retried and written together.

    Attributes:
        index: of the block.
        start: its first row, from 0.
        rows: number of rows.
        line: its first line (jsonl) or row, from 1.
        offset: its first byte, for jsonl and csv.
    """

    index: int
    start: int
    rows: int
    line: int
    offset: int


def scan(path: Path, block_rows: int, limit: int | None) -> tuple[list[Block], list[str]]:
    """The blocks of a file's first ``limit`` rows, and every column that occurs; no row is kept.

    Blank lines of a jsonl are not rows. Each block has ``block_rows`` rows, the last the remainder.

    Raises:
        ValueError: an extension not in ``SUFFIXES``, a malformed csv. OSError: the file cannot be read.
        ModuleNotFoundError: parquet without pyarrow.
    """
    checks.one_of("extension of " + path.name, path.suffix, SUFFIXES)
    path.stat()  # one error for a missing file, whatever its extension
    if path.suffix == ".parquet":
        return _scan_parquet(path, block_rows, limit)
    blocks: list[Block] = []
    columns: dict[str, None] = {}
    with _open(path) as (records, tell):
        line, offset, rows = 1, tell(), 0
        for record in islice(records, limit):
            columns.update(dict.fromkeys(record.values))
            rows += 1
            if rows == block_rows:
                blocks.append(Block(len(blocks), len(blocks) * block_rows, rows, line, offset))
                line, offset, rows = record.line + 1, tell(), 0
        if rows:
            blocks.append(Block(len(blocks), len(blocks) * block_rows, rows, line, offset))
    return blocks, list(columns)


def _scan_parquet(path: Path, block_rows: int, limit: int | None) -> tuple[list[Block], list[str]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        n_rows = file.metadata.num_rows if limit is None else min(limit, file.metadata.num_rows)
        columns = file.schema_arrow.names
    starts = range(0, n_rows, block_rows)
    return [Block(i, start, min(block_rows, n_rows - start), start + 1, 0) for i, start in enumerate(starts)], columns


class Reader:
    """Reads blocks of a file. Parquet is cheapest in order: rows in between are decoded too.

    Args:
        columns: columns to read of a parquet; other files are read whole.
    """

    def __init__(self, path: Path, columns: Collection[str]) -> None:
        self.path, self.columns = path, list(columns)
        self._batches: Iterator[Any] | None = None
        self._batch: Any = None  # the parquet batch decoded last
        self._first = 0  # its first row

    def read(self, block: Block) -> list[Record]:
        """The rows of a block, in order."""
        if self.path.suffix != ".parquet":
            with _open(self.path, block.line, block.offset) as (records, _):
                return list(islice(records, block.rows))
        try:
            return self._read_parquet(block)
        except Exception:
            self._batches = None  # the next attempt starts over
            raise

    def _read_parquet(self, block: Block) -> list[Record]:
        if self._batches is None or block.start < self._first:
            self._batches = _parquet_batches(self.path, self.columns)
            self._first, self._batch = 0, next(self._batches)
        records: list[Record] = []
        while len(records) < block.rows:
            place = block.start + len(records) - self._first
            if place >= self._batch.num_rows:
                self._first += self._batch.num_rows
                self._batch = next(self._batches)
                continue
            for values in self._batch.slice(place, block.rows - len(records)).to_pylist():
                records.append(Record(block.line + len(records), values))
        return records


def _parquet_batches(path: Path, columns: list[str]) -> Iterator[Any]:
    import pyarrow.parquet

    # Without both settings a row group's whole column is kept: 98 MiB instead of 4 for a million texts of 100 bytes.
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_READ_BYTES) as file:
        yield from file.iter_batches(_READ_ROWS, columns=columns)


@contextmanager
def _open(path: Path, line: int = 1, offset: int | None = None) -> Iterator[tuple[Iterator[Record], Callable[[], int]]]:
    """The records of a jsonl or csv from an offset on, and a function that gives the offset after the last one read."""
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            file.seek(offset or 0)
            yield _jsonl_records(file, line), file.tell
        return
    with path.open(newline="", encoding="utf-8") as text:
        lines = iter(text.readline, "")  # iterating the file itself would disable tell()
        header = next(csv.reader(lines), [])
        if offset is not None:
            text.seek(offset)
        yield _csv_records(path, lines, header, line), text.tell


def _jsonl_records(lines: Iterator[bytes], first: int) -> Iterator[Record]:
    for number, line in enumerate(lines, start=first):
        content = line.strip()
        if not content:
            continue
        try:
            values = json.loads(content)
        except json.JSONDecodeError as error:
            yield Record(number, {}, f"not JSON: {error.msg} (column {error.colno})")
            continue
        except UnicodeDecodeError as error:
            yield Record(number, {}, f"not UTF-8: {error.reason} (byte {error.start + 1})")
            continue
        if isinstance(values, dict):
            yield Record(number, values)
        else:
            yield Record(number, {}, f"expected a JSON object, got {type(values).__name__}")


def _csv_records(path: Path, lines: Iterator[str], header: Sequence[str], first: int) -> Iterator[Record]:
    number = first
    try:
        for number, values in enumerate(csv.DictReader(lines, header), start=first):
            values.pop(None, None)  # cells without a header
            yield Record(number, values)
    except csv.Error as error:
        raise ValueError(f"{path.name}: after row {number}: {error}") from error


def choose_columns(
    present: Collection[str], prompt: str | None, completion: str | None, text: str | None
) -> dict[str, str]:
    """Column -> key of a sample: the named columns, else the first of ``KNOWN_COLUMNS`` that are present.

    Raises:
        ValueError: prompt without completion or the reverse, text beside them, a named column that no row has, no known
            columns.
    """
    if (prompt is None) != (completion is None):
        raise ValueError("--prompt-column and --completion-column: expected both or neither")
    if text is not None and prompt is not None:
        raise ValueError("--text-column: expected it without --prompt-column and --completion-column")
    if prompt is not None and completion is not None:
        chosen = {prompt: "prompt", completion: "completion"}
    elif text is not None:
        chosen = {text: "text"}
    else:
        found = [known for known in KNOWN_COLUMNS if all(column in present for column in known)]
        if not found:
            raise ValueError(
                "data: expected columns prompt and completion, messages, question and answer, or text, got "
                f"{', '.join(present) or 'none'}; name them with --prompt-column and --completion-column, or "
                "--text-column"
            )
        return found[0]
    for column in chosen:
        if column not in present:
            raise ValueError(f"data: no column {column!r}, expected one of {', '.join(present) or 'none'}")
    return chosen


def write_block(path: Path, table: Mapping[str, Sequence[Any]]) -> None:
    """Write rows as one part of a file: parquet, lines of jsonl (NaN as null), or csv (NaN as an empty cell, without a
    header). The part appears atomically.

    Raises:
        ModuleNotFoundError: parquet without pyarrow.
        ValueError, TypeError: columns that parquet cannot hold (from pyarrow).
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(dict(table)), temporary)
    else:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            _write_lines(file, path.suffix, table)
    os.replace(temporary, path)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], source: Path) -> None:
    """Write rows as one file that appears atomically.

    Args:
        rows: column -> value; a jsonl keeps a missing column missing, the others leave its cell empty.
        columns: all of them, in order.
        source: the file that the rows come from; a parquet's types are kept in a parquet.

    Raises:
        ModuleNotFoundError: parquet without pyarrow.
        ValueError, TypeError: values that parquet cannot hold in one column (from pyarrow).
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            table = {
                name: pyarrow.array([row.get(name) for row in rows], kind) for name, kind in _types(source, columns)
            }
            pyarrow.parquet.write_table(pyarrow.table(table), temporary)
        else:
            with temporary.open("w", newline="", encoding="utf-8") as file:
                if path.suffix == ".csv":
                    csv.writer(file).writerow(columns)
                for row in rows:
                    present = columns if path.suffix == ".csv" else [name for name in columns if name in row]
                    _write_lines(file, path.suffix, {name: [row.get(name)] for name in present})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _types(source: Path, columns: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Each column with its type in a parquet file; None for a type that its values decide."""
    known = {}
    if source.suffix == ".parquet":
        import pyarrow.parquet

        schema = pyarrow.parquet.read_schema(source)
        known = dict(zip(schema.names, schema.types, strict=True))
    return ((name, known.get(name)) for name in columns)


def _write_lines(file: TextIO, suffix: str, table: Mapping[str, Sequence[Any]]) -> None:
    rows = zip(*(map(_plain, column) for column in table.values()), strict=True)
    if suffix == ".jsonl":
        for row in rows:
            file.write(json.dumps(dict(zip(table, row, strict=True)), ensure_ascii=False, default=str) + "\n")
        return
    writer = csv.writer(file)
    for row in rows:
        writer.writerow(
            json.dumps(cell, ensure_ascii=False, default=str) if isinstance(cell, (list, dict)) else cell
            for cell in row
        )


def _plain(value: Any) -> Any:
    """The value as JSON has it: NumPy numbers as Python's, NaN as null."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def join(blocks: Sequence[Path], out: Path, columns: Sequence[str]) -> None:
    """Join the parts that :func:`write_block` wrote into one file, or, if ``out`` has no extension, into a folder of
    parquet files with one schema. Replaces ``out`` atomically.

    Raises:
        ValueError, TypeError: no parquet schema fits the columns of all parts (from pyarrow).
    """
    temporary = out.with_name(out.name + ".tmp")
    if out.suffix in (".jsonl", ".csv"):
        if out.suffix == ".csv":
            with temporary.open("w", newline="", encoding="utf-8") as text:
                csv.writer(text).writerow(columns)
        with temporary.open("ab" if out.suffix == ".csv" else "wb") as file:
            for block in blocks:
                with block.open("rb") as part:
                    shutil.copyfileobj(part, file)
    else:
        _join_parquet(blocks, temporary, into_folder=not out.suffix)
    if out.is_dir():
        shutil.rmtree(out)
    os.replace(temporary, out)


def _join_parquet(blocks: Sequence[Path], out: Path, into_folder: bool) -> None:
    import pyarrow.parquet

    # A column that is empty in one part has the null type there.
    schema = pyarrow.unify_schemas([pyarrow.parquet.read_schema(block) for block in blocks])
    if into_folder:
        shutil.rmtree(out, ignore_errors=True)  # left by an interrupted run
        out.mkdir()
        for i, block in enumerate(blocks):
            pyarrow.parquet.write_table(_read_part(block).cast(schema), out / f"part-{i:06d}.parquet")
        return
    with pyarrow.parquet.ParquetWriter(out, schema) as writer:
        for block in blocks:
            writer.write_table(_read_part(block).cast(schema))


def _read_part(path: Path) -> Any:
    """The part as a pyarrow table. ``read_table`` would make columns of folders named ``key=value``."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read()
