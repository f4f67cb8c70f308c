"""Samples as parquet: one row each, what only their domain reads as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from acqsynth.domains.base import Sample


def write(path: Path, samples: Sequence[Sample], columns: Mapping[str, Sequence[Any]] | None = None) -> None:
    """Samples, and further columns of one value each.

    Raises:
        ValueError: a column of another length. OSError: the file can not be written.
    """
    table = {
        "question": [sample.question for sample in samples],
        "reasoning": [sample.reasoning for sample in samples],
        "answer": [sample.answer for sample in samples],
        "extra": [json.dumps(dict(sample.extra), ensure_ascii=False) for sample in samples],
    }
    write_table(path, table | {name: list(values) for name, values in (columns or {}).items()})


def read(path: Path) -> list[Sample]:
    """The samples, without further columns."""
    table = read_table(path)
    keys = ("question", "answer", "reasoning", "extra")
    return [
        Sample(question, answer, reasoning, json.loads(extra))
        for question, answer, reasoning, extra in zip(*(table[key] for key in keys), strict=True)
    ]


def write_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Columns of equal length as parquet.

    Raises:
        ValueError: columns of different length. OSError: the file can not be written.
    """
    pyarrow.parquet.write_table(pyarrow.table({name: list(values) for name, values in columns.items()}), path)


def read_table(path: Path) -> dict[str, list[Any]]:
    """The columns of a parquet file."""
    return dict(pyarrow.parquet.read_table(path).to_pydict())


def count(path: Path) -> int:
    """Rows of a parquet file."""
    return int(pyarrow.parquet.read_metadata(path).num_rows)
