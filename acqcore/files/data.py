"""Reads jsonl, csv and parquet files in blocks of rows.

Rows are read independently: a bad row becomes a record with an error and does not affect the others.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from acqcore import checks
from acqcore.files.table import UNFIT, atomically, distinct, long_cells
from acqcore.students.tables import KINDS, OPTIONAL, kind_of

SUFFIXES = (".jsonl", ".csv", ".parquet")
BLOCK_ROWS = 4096  # bounds memory; larger blocks would hardly pack better

_DEEPEST = 200  # maximum nesting of a JSON value, well within Python's limit
_DIGITS = 4000  # maximum digits of an integer; Python's limit is 4,300
_CELL = 1 << 24  # maximum characters of a csv cell; an unclosed quote would turn the rest of the file into one cell
_OTHERS = {  # by first bytes
    b"\xff\xfe\0\0": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "a gzip file",
    b"PK\3\4": "a zip file", b"BZh91AY": "a bzip2 file", b"(\xb5/\xfd": "a zstd file", b"PAR1\x15": "a parquet file",
}  # fmt: skip
_READ_BYTES = 1 << 20  # bytes of a parquet column read at a time
_READ_ROWS = 1024  # parquet rows read at a time


@dataclass(frozen=True)
class Record:
    """A data row: its line (jsonl) or row number in the file, from 1, and its values or an error."""

    line: int
    values: dict[str, Any]
    error: str | None = None
    from_csv: bool = False  # so lists are JSON text


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a file that are scored, retried and written together."""

    index: int
    start: int  # first row, from 0
    rows: int
    line: int  # first line (jsonl) or row, from 1
    offset: int  # first byte, for jsonl and csv


def located(path: Path, line: int, message: str) -> str:
    """``message`` prefixed with the record's place in the file: ``data.jsonl: line 3: ...``."""
    return f"{path}: {'line' if path.suffix == '.jsonl' else 'row'} {line}: {message}"


def local_file(data: Path, config: str | None, split: str, folder: Path) -> Path:
    """The file that ``--data`` names. For a data set, given by its hub id or its folder, a split is exported atomically
    to a parquet file in ``folder``: once, and again whenever the files of its folder change."""
    if not data.is_dir() and (data.exists() or data.suffix in SUFFIXES or len(data.parts) > 2):
        if config is not None or split != "train":
            raise ValueError(f"--data-config and --split: apply only to data sets, but {data} is read as a file")
        return data
    checks.installed("datasets", f"--data {data}", "train")
    import datasets

    key = hashlib.sha256(repr((str(data), config, split, listing(data, folder))).encode()).hexdigest()[:12]
    target = folder / f"dataset-{key}.parquet"
    if not target.exists():
        try:
            rows = datasets.load_dataset(str(data), config, split=split)
        except Exception as error:  # builders raise errors of any type
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"data: {data} is neither a file nor a loadable data set: {reason}") from error
        folder.mkdir(exist_ok=True)
        with atomically(target) as temporary:
            rows.to_parquet(temporary)
    return target


def listing(folder: Path, parts: Path) -> list[list[Any]]:
    """The names, sizes and times of a folder's files, at any depth; empty if it is not a folder. Files in an output's
    ``parts``, which may lie within the folder, are left out."""
    files = sorted(folder.rglob("*")) if folder.is_dir() else []
    kept = [f for f in files if f.is_file() and parts.name not in f.parts]
    return [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in kept]


def check_extension(path: Path) -> None:
    """Check that the file's format is known."""
    checks.one_of("extension of " + path.name, path.suffix, SUFFIXES)


def scan(path: Path, block_rows: int, limit: int | None) -> tuple[list[Block], list[str]]:
    """The blocks of a file's first ``limit`` rows, and all columns that occur; keeps no rows in memory.

    Blank jsonl lines are not rows. Each block has ``block_rows`` rows, the last one the remainder.
    """
    check_extension(path)
    path.stat()  # same error for a missing file of any extension
    if path.suffix == ".parquet":
        return _scan_parquet(path, block_rows, limit)
    blocks: list[Block] = []
    columns: dict[str, None] = {}
    error = None
    with _open(path) as (records, tell):
        line, offset, rows = 1, tell(), 0
        for record in islice(records, limit):
            error = error or record.error
            columns.update(dict.fromkeys(record.values))
            rows += 1
            if rows == block_rows:
                blocks.append(Block(len(blocks), len(blocks) * block_rows, rows, line, offset))
                line, offset, rows = record.line + 1, tell(), 0
        if rows:
            blocks.append(Block(len(blocks), len(blocks) * block_rows, rows, line, offset))
    if error is not None and not columns:
        raise ValueError(f"{path}: no row is readable; first error: {error}")
    return blocks, list(columns)


def _scan_parquet(path: Path, block_rows: int, limit: int | None) -> tuple[list[Block], list[str]]:
    checks.installed("pyarrow", "parquet", "train")
    import pyarrow.parquet

    with _named(path), pyarrow.parquet.ParquetFile(path) as file:
        n_rows = file.metadata.num_rows if limit is None else min(limit, file.metadata.num_rows)
        columns = distinct(file.schema_arrow.names)
    starts = range(0, n_rows, block_rows)
    return [Block(i, start, min(block_rows, n_rows - start), start + 1, 0) for i, start in enumerate(starts)], columns


def records(path: str | os.PathLike[str]) -> Iterator[Record]:
    """The rows of a .jsonl, .csv or .parquet file in order, read lazily.

    Returns:
        An iterator of records: ``line``, the line (jsonl) or row in the file, from 1; ``values``, column -> value; and
        ``error``, the reason why the row is not readable, or None.

    Raises:
        ValueError: an invalid parquet file; a jsonl or csv that is compressed, binary, UTF-16 or a pipe; another
            extension.
        OSError: the file cannot be read. ModuleNotFoundError: parquet without pyarrow.
    """
    path = Path(path)
    check_extension(path)
    if path.suffix != ".parquet":
        with _open(path) as (found, _):
            yield from found
        return
    reader = Reader(path)
    for block in _scan_parquet(path, _READ_ROWS, None)[0]:
        yield from reader.read(block)


class Reader:
    """Reads blocks of a file. Parquet blocks are cheapest to read in order, as skipped rows are decoded too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._batches: Iterator[Any] | None = None
        self._batch: Any = None  # last decoded parquet batch
        self._first = 0  # its first row

    def read(self, block: Block) -> list[Record]:
        """The rows of a block, in order."""
        if self.path.suffix != ".parquet":
            with _open(self.path, block.line, block.offset) as (records, _):
                found = list(islice(records, block.rows))
            if len(found) < block.rows:
                raise ValueError(f"{self.path}: has fewer rows than when the run began")
            return found
        try:
            return self._read_parquet(block)
        except Exception:
            self._batches = None  # the next attempt starts over
            raise

    def _read_parquet(self, block: Block) -> list[Record]:
        if self._batches is None or block.start < self._first:
            self._batches = _parquet_batches(self.path)
            self._first, self._batch = 0, next(self._batches)
        records: list[Record] = []
        while len(records) < block.rows:
            place = block.start + len(records) - self._first
            if place >= self._batch.num_rows:
                self._first += self._batch.num_rows
                self._batch = next(self._batches)
                continue
            records += _parquet_records(self._batch.slice(place, block.rows - len(records)), block.line + len(records))
        return records


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Context that converts pyarrow's errors about a damaged file to a ValueError that names it."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # from the operating system: no such file
            raise
        raise ValueError(f"{path}: not readable: {' '.join(str(error).split())}") from error


def _parquet_records(batch: Any, line: int) -> list[Record]:
    try:
        return [Record(line + i, values) for i, values in enumerate(batch.to_pylist())]
    except UNFIT:  # text that is not UTF-8, a date out of Python's range
        return [_parquet_record(batch.slice(i, 1), line + i) for i in range(batch.num_rows)]


def _parquet_record(row: Any, line: int) -> Record:
    """The record of a row that has an unreadable cell, with the cells that are readable."""
    values: dict[str, Any] = {}
    error = None
    for name, cell in zip(row.schema.names, row.columns, strict=True):
        try:
            [values[name]] = cell.to_pylist()
        except UNFIT as reason:
            error = f"{name}: not readable: {reason}"
    return Record(line, values, error)


def _parquet_batches(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    # Without both settings a row group's whole column is kept: 98 MiB instead of 4 for a million 100-byte texts.
    with _named(path), pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_READ_BYTES) as file:
        for batch in file.iter_batches(_READ_ROWS):
            yield batch.rename_columns(distinct(batch.schema.names))
    raise ValueError(f"{path}: not readable: it has fewer rows than its metadata says")


def _check_utf8(path: Path) -> None:
    """Raises ValueError for a pipe, or if the first bytes are those of another encoding or a compressed file."""
    if path.is_fifo():
        raise ValueError(f"{path}: expected a file, which is read several times, got a pipe")
    with path.open("rb") as file:
        start = file.read(8)
    zeros = "UTF-16 or binary data" if 0 in start[:2] else None
    if found := next((name for first, name in _OTHERS.items() if start.startswith(first)), zeros):
        raise ValueError(f"{path}: expected text in UTF-8, got {found}")


@contextmanager
def _open(path: Path, line: int = 1, offset: int | None = None) -> Iterator[tuple[Iterator[Record], Callable[[], int]]]:
    """The records of a jsonl or csv from an offset on, and a function that returns the offset after the last one."""
    _check_utf8(path)
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            file.seek(offset or 0)
            yield _jsonl_records(file, line), file.tell
        return
    # Bytes that are not UTF-8 become lone surrogates; a row is rejected only if its scored text has one.
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as text, long_cells(_CELL):
        lines = iter(text.readline, "")  # iterating the file itself would disable tell()
        try:
            header = distinct(next(filter(None, csv.reader(lines)), []))  # after blank lines
        except csv.Error as error:
            raise ValueError(f"{path}: the header is not csv: {error}") from error
        if offset is not None:
            text.seek(offset)
        yield _csv_records(lines, header, line), text.tell


def parse_json(text: str | bytes) -> Any:
    """Parse JSON text. Integers of more than ``_DIGITS`` digits are read as text.

    Raises:
        ValueError: invalid JSON or UTF-8, a repeated key, excessive nesting.
    """
    try:
        value = json.loads(text, parse_int=_integer, object_pairs_hook=checks.unique_keys)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} (byte {error.start + 1})") from None
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"not JSON: {error}") from None
    opened = text.count(b"[") + text.count(b"{") if isinstance(text, bytes) else text.count("[") + text.count("{")
    if opened > _DEEPEST and _depth(value) > _DEEPEST:
        raise ValueError(f"nested deeper than {_DEEPEST} levels")
    return value


def _integer(digits: str) -> int | str:
    return int(digits) if len(digits) <= _DIGITS else digits


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        inner = [v for v in level if isinstance(v, (dict, list))]
        level = [part for v in inner for part in (v.values() if isinstance(v, dict) else v)]
    return depth


def _jsonl_records(lines: Iterator[bytes], first: int) -> Iterator[Record]:
    for number, line in enumerate(lines, start=first):
        if not (content := line.strip()):
            continue
        try:
            values = parse_json(content)
            if not isinstance(values, dict):
                raise ValueError(f"expected a JSON object, got {type(values).__name__}")
            yield Record(number, values)
        except ValueError as error:
            yield Record(number, {}, str(error))


def _csv_records(lines: Iterator[str], header: Sequence[str], first: int) -> Iterator[Record]:
    number, taken, ended = first - 1, 0, False

    def counted() -> Iterator[str]:
        nonlocal taken, ended
        for line in lines:
            taken += 1
            yield line
        ended = True

    rows = csv.DictReader(counted(), header)
    while True:
        number += 1
        taken = 0
        try:
            values = next(rows)
            if ended:  # the file ended inside the row
                raise csv.Error(f"a quote in this row is never closed, so the last {taken} lines form one row")
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(number, {}, f"not csv: {error}")
            continue
        beyond = values.pop(None, None)  # cells without a header; an unquoted comma would cut the text
        if beyond is not None:
            yield Record(number, {}, f"expected {len(header)} cells as in the header, got {len(header) + len(beyond)}")
            continue
        yield Record(number, values, from_csv=True)


def choose_columns(
    present: Collection[str], prompt: str | None, completion: str | None, text: str | None
) -> dict[str, str]:
    """Map columns to keys of a sample: the named columns, else the first of ``KINDS`` that is present, plus the columns
    that a chat template also reads and those of images, unless a text is named."""
    if (prompt is None) != (completion is None):
        raise ValueError("--prompt-column and --completion-column: expected both or neither")
    if text is not None and prompt is not None:
        raise ValueError("--text-column: cannot be combined with --prompt-column and --completion-column")
    if prompt is not None and prompt == completion:
        raise ValueError(f"--completion-column: expected a column other than --prompt-column, got {prompt!r} for both")
    beside = {name: name for name in OPTIONAL if name in present}
    if prompt is not None and completion is not None:
        chosen = {prompt: "prompt", completion: "completion"}
    elif text is not None:
        chosen, beside = {text: "text"}, {}
    else:
        kind = kind_of(present)
        if kind is None:
            raise ValueError(
                f"data: expected columns {', or '.join(' and '.join(known) for known in KINDS)}, got "
                f"{', '.join(present) or 'none'}; name them with --prompt-column and --completion-column, or "
                "--text-column"
            )
        chosen = {column: column for column in kind}
    for column in chosen:
        if column not in present:
            raise ValueError(f"data: no column {column!r}, expected one of {', '.join(present) or 'none'}")
    return {**beside, **chosen}
