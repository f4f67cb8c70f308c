"""Data files and unfinished results of the command line."""

from __future__ import annotations

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


def parent_folder(name: str, path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{name}: the folder {path.parent} does not exist")


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


def one_pass(others: Sequence[str]) -> None:
    """``others``: acquisitions asked for that the head pass of a batch does not give."""
    if others:
        raise ValueError(
            f"acquisitions: {others[0]!r} needs all samples at once or arguments: call acqcore.score from Python"
        )
