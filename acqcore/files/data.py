"""Rows of jsonl, csv and parquet files in blocks: read a block at a time, and line by line, so that one bad line spoils
nothing else; written a block at a time, and joined into one file."""

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

#: Columns that make a sample, in the order in which they are looked for, and the sample's keys they stand
#: for.
KNOWN_COLUMNS: tuple[dict[str, str], ...] = (
    {"prompt": "prompt", "completion": "completion"},
    {"messages": "messages"},
    {"question": "prompt", "answer": "completion"},
    {"text": "text"},
)

_READ_BYTES = 1 << 20  # of a parquet's column at a time
_READ_ROWS = 1024  # of a parquet at a time


@dataclass(frozen=True)
class Record:
    """One data row: where it stands in its file (line of a jsonl, else row, from 1), and its values or an
    error."""

    line: int
    values: dict[str, Any]
    error: str | None = None


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a file, scored, tried again and written as one.

    Attributes:
        index: of the block.
        start: its first row in the file, from 0.
        rows: how many it has.
        line: where it begins: line of a jsonl, else row, from 1.
        offset: the same in bytes, for jsonl and csv.
    """

    index: int
    start: int
    rows: int
    line: int
    offset: int


def scan(path: Path, block_rows: int, limit: int | None) -> tuple[list[Block], list[str]]:
    """The blocks of a file's first ``limit`` rows and the columns that some row has; no row is kept.

    Blank lines of a jsonl are not rows. Each block has ``block_rows`` rows, the last one what is left.

    Raises:
        ValueError: another extension than ``SUFFIXES``, a csv that is none. OSError: the file cannot be read.
        ModuleNotFoundError: parquet without pyarrow.
    """
    checks.one_of("extension of " + path.name, path.suffix, SUFFIXES)
    path.stat()  # a missing file is told alike for every extension
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
    """Reads blocks of a file, those of a parquet cheapest in their order: what lies between is decoded.

    Args:
        columns: what is read of a parquet; of other files all is.
    """

    def __init__(self, path: Path, columns: Collection[str]) -> None:
        self.path, self.columns = path, list(columns)
        self._batches: Iterator[Any] | None = None
        self._batch: Any = None  # of a parquet, the one last decoded
        self._first = 0  # its first row

    def read(self, block: Block) -> list[Record]:
        """The rows of a block, in order."""
        if self.path.suffix != ".parquet":
            with _open(self.path, block.line, block.offset) as (records, _):
                return list(islice(records, block.rows))
        try:
            return self._read_parquet(block)
        except Exception:
            self._batches = None  # a next attempt begins anew
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

    # Without both settings a row group's whole column is held: 98 MiB instead of 4 for a million texts of 100 bytes.
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_READ_BYTES) as file:
        yield from file.iter_batches(_READ_ROWS, columns=columns)


@contextmanager
def _open(path: Path, line: int = 1, offset: int | None = None) -> Iterator[tuple[Iterator[Record], Callable[[], int]]]:
    """The records of a jsonl or csv from a place on, and how to tell the place after the last one taken."""
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            file.seek(offset or 0)
            yield _jsonl_records(file, line), file.tell
        return
    with path.open(newline="", encoding="utf-8") as text:
        lines = iter(text.readline, "")  # not the file itself: while it is iterated it does not tell its place
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
            values.pop(None, None)  # cells beyond the header's
            yield Record(number, values)
    except csv.Error as error:
        raise ValueError(f"{path.name}: after row {number}: {error}") from error


def choose_columns(
    present: Collection[str], prompt: str | None, completion: str | None, text: str | None
) -> dict[str, str]:
    """Column -> key of a sample: those named, else the first of ``KNOWN_COLUMNS`` that are present.

    Raises:
        ValueError: only one of prompt and completion, both kinds, a named column that no row has, or none
            known.
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
    """Rows as a part of a file to come: parquet, or lines of jsonl (NaN as null) or csv (NaN as an empty cell, no
    header); in one step, never half a part.

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


def _write_lines(file: TextIO, suffix: str, table: Mapping[str, Sequence[Any]]) -> None:
    rows = zip(*(map(_plain, column) for column in table.values()), strict=True)
    if suffix == ".jsonl":
        for row in rows:
            file.write(json.dumps(dict(zip(table, row, strict=True)), ensure_ascii=False) + "\n")
        return
    writer = csv.writer(file)
    for row in rows:
        writer.writerow(json.dumps(cell, ensure_ascii=False) if isinstance(cell, list) else cell for cell in row)


def _plain(value: Any) -> Any:
    """A value that JSON knows: NumPy numbers as Python's, NaN as null."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def join(blocks: Sequence[Path], out: Path, columns: Sequence[str]) -> None:
    """Parts that :func:`write_block` wrote, a part at a time, into one file, or, where ``out`` has no extension, into
    a folder of parquet files with one schema; in one step, replacing what is there.

    Raises:
        ValueError, TypeError: parts whose columns no parquet schema holds together (from pyarrow).
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

    # A column without a value in one part has the null type there.
    schema = pyarrow.unify_schemas([pyarrow.parquet.read_schema(block) for block in blocks])
    if into_folder:
        shutil.rmtree(out, ignore_errors=True)  # of a run that was cut off here
        out.mkdir()
        for i, block in enumerate(blocks):
            pyarrow.parquet.write_table(_read_part(block).cast(schema), out / f"part-{i:06d}.parquet")
        return
    with pyarrow.parquet.ParquetWriter(out, schema) as writer:
        for block in blocks:
            writer.write_table(_read_part(block).cast(schema))


def _read_part(path: Path) -> Any:
    """The part as a pyarrow table; no column is made of folders named ``key=value``, as ``read_table`` does."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read()
