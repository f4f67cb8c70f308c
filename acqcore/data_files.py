"""Rows of jsonl, csv and parquet files, read line by line so that one bad line spoils nothing else."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

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


@dataclass(frozen=True)
class Record:
    """One data row: where it stands in its file (line of a jsonl, else row, from 1), and its values or an
    error."""

    line: int
    values: dict[str, Any]
    error: str | None = None


def read(path: Path, limit: int | None) -> list[Record]:
    """The first ``limit`` rows of a file; blank lines of a jsonl are not rows.

    Raises:
        ValueError: another extension than ``SUFFIXES``. OSError: the file cannot be read.
        ModuleNotFoundError: parquet without pyarrow.
    """
    checks.one_of("extension of " + path.name, path.suffix, SUFFIXES)
    reader = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}[path.suffix]
    records: list[Record] = []
    for record in reader(path):
        if limit is not None and len(records) == limit:
            break
        records.append(record)
    return records


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
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


def _read_csv(path: Path) -> Iterator[Record]:
    with path.open(newline="", encoding="utf-8") as file:
        for number, values in enumerate(csv.DictReader(file), start=1):
            yield Record(number, values)


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        for values in batch.to_pylist():
            number += 1
            yield Record(number, values)


def choose_columns(
    records: Sequence[Record], prompt: str | None, completion: str | None, text: str | None
) -> dict[str, str]:
    """Column -> key of a sample: those named, else the first of ``KNOWN_COLUMNS`` that some row has.

    Raises:
        ValueError: only one of prompt and completion, both kinds, a named column that no row has, or none
            known.
    """
    checks.column_options(prompt, completion, text)
    present = {column: None for record in records for column in record.values}
    if prompt is not None and completion is not None:
        chosen = {prompt: "prompt", completion: "completion"}
    elif text is not None:
        chosen = {text: "text"}
    else:
        found = [known for known in KNOWN_COLUMNS if all(column in present for column in known)]
        checks.known_columns(found, present)
        return found[0]
    checks.columns_present(chosen, present)
    return chosen


def write(path: Path, columns: dict[str, Sequence[Any]]) -> None:
    """A table as jsonl (NaN as null), csv (NaN as an empty cell) or parquet, in one step: never half a file.

    Raises:
        ModuleNotFoundError: parquet without pyarrow.
        ValueError: columns that parquet cannot hold (from pyarrow).
    """
    temporary = path.with_name(path.name + ".tmp")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), temporary)
    else:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            _write_lines(file, "csv" if path.suffix == ".csv" else "jsonl", columns)
    os.replace(temporary, path)


def _write_lines(file: TextIO, kind: Literal["csv", "jsonl"], columns: dict[str, Sequence[Any]]) -> None:
    rows = zip(*(map(_plain, column) for column in columns.values()), strict=True)
    if kind == "jsonl":
        for row in rows:
            file.write(json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n")
        return
    writer = csv.writer(file)
    writer.writerow(columns)
    for row in rows:
        writer.writerow(json.dumps(cell, ensure_ascii=False) if isinstance(cell, list) else cell for cell in row)


def _plain(value: Any) -> Any:
    """A value that JSON knows: NumPy numbers as Python's, NaN as null."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
