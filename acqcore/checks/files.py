"""Data files, engines and unfinished results of the command line."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def column_options(prompt: str | None, completion: str | None, text: str | None) -> None:
    if (prompt is None) != (completion is None):
        raise ValueError("--prompt-column and --completion-column: expected both or neither")
    if text is not None and prompt is not None:
        raise ValueError("--text-column: expected it without --prompt-column and --completion-column")


def known_columns(found: Sequence[object], present: Iterable[str]) -> None:
    if not found:
        raise ValueError(
            "data: expected columns prompt and completion, messages, question and answer, or text, got "
            f"{', '.join(present) or 'none'}; name them with --prompt-column and --completion-column, or "
            "--text-column"
        )


def columns_present(chosen: Iterable[str], present: Collection[str]) -> None:
    for column in chosen:
        if column not in present:
            raise ValueError(f"data: no column {column!r}, expected one of {', '.join(present) or 'none'}")


def output_columns(columns: Iterable[str], written: Collection[str]) -> None:
    for column in columns:
        if column in written:
            raise ValueError(f"data: the column {column!r} has the name of an output column; rename it")


def same_manifest(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """A folder of finished batches belongs to this very run."""
    for key in (*wanted, *found):
        if found.get(key) != wanted.get(key):
            raise ValueError(
                f"out: {folder} holds a cut-off run with another {key} "
                f"({_short(found.get(key))} there, {_short(wanted.get(key))} here); repeat that run's "
                "command to finish it, or remove the folder"
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def data_rows(path: Path, n_rows: int) -> None:
    if n_rows == 0:
        raise ValueError(f"data: {path} has no rows")


def output_place(out: Path, suffixes: Collection[str], started: bool) -> None:
    """A file of a known kind, or, without an extension, a folder to make; ``started`` where this run began it."""
    if not out.absolute().parent.is_dir():
        raise ValueError(f"out: the folder {out.parent} does not exist")
    if out.suffix and out.suffix not in suffixes:
        raise ValueError(
            f"extension of {out.name}: unknown {out.suffix!r}, expected one of {', '.join(suffixes)}, or none for a "
            "folder of parquet files"
        )
    if out.suffix and out.is_dir():
        raise ValueError(f"out: {out} is a folder; to write one of parquet files give it a name without an extension")
    if not out.suffix and out.is_file():
        raise ValueError(f"out: {out} is a file; a name without an extension is a folder of parquet files")
    if not out.suffix and not started and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"out: the folder {out} is not empty")


def engine_options(name: str, workers: int | None, address: str | None, device: str | None, n_processes: int) -> None:
    if n_processes > 1 and name != "accelerate":
        raise ValueError(f"engine: {n_processes} processes were launched, expected --engine accelerate, got {name}")
    for option, value in (("--workers", workers), ("--ray-address", address)):
        if value is not None and name != "ray":
            raise ValueError(f"{option}: expected it with --engine ray, got --engine {name}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers: expected an int >= 1, got {workers}")
    if name == "ray" and device not in (None, "cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda with --engine ray, which gives each worker one, got {device}")


def installed(module: str, what: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"{what} needs {module}: run 'pip install acqcore[{extra}]'")
