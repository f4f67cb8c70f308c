"""The files in which steps keep their results: JSON, states of rewards, and samples and tables as parquet."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch

from acqsynth.domains import Sample


def write_json(path: Path, content: Any) -> None:
    """Writes ``content`` to ``path``, completely or not at all; ValueError for a number that is not finite."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """The content of a JSON artefact; ValueError names a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable: {error}") from error


def save_state(path: Path, state: Any) -> None:
    """Writes a ``state_dict`` to ``path``, completely or not at all."""
    unfinished = path.with_suffix(".part")
    torch.save(state, unfinished)
    unfinished.replace(path)


def load_state(path: Path) -> Any:
    """Reads the result of :func:`save_state`; a crafted file runs no code."""
    return torch.load(path, weights_only=True)


def write_rows(path: Path, samples: Sequence[Sample], columns: Mapping[str, Sequence[Any]] | None = None) -> None:
    """Writes samples, one per row, and further columns; ``extra`` is stored as JSON."""
    table: dict[str, Sequence[Any]] = {
        name: [getattr(sample, name) for sample in samples] for name in ("question", "reasoning", "answer")
    }
    table["extra"] = [json.dumps(dict(sample.extra), ensure_ascii=False) for sample in samples]
    write_table(path, {**table, **(columns or {})})


def read_rows(path: Path) -> list[Sample]:
    """Reads the samples written by :func:`write_rows`, without further columns."""
    rows = pyarrow.parquet.read_table(path, columns=["question", "answer", "reasoning", "extra"]).to_pylist()
    return [Sample(**{**row, "extra": json.loads(row["extra"])}) for row in rows]


def write_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Writes columns of equal length."""
    pyarrow.parquet.write_table(pyarrow.table({name: list(values) for name, values in columns.items()}), path)


def read_table(path: Path) -> dict[str, list[Any]]:
    """The columns of a parquet file."""
    return dict(pyarrow.parquet.read_table(path).to_pydict())
