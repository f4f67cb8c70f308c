"""Checks that an output may be written."""

from __future__ import annotations

from pathlib import Path

from acqcore.files.data import SUFFIXES
from acqcore.files.parts import Parts
from acqcore.files.table import holds_parts_alone


def check_output(out: Path, data: Path, overwrite: bool) -> None:
    """Check that ``out`` is a file of a known format, or, without an extension, a folder of parquet files. It must be
    new, belong to an unfinished run, or be replaceable, and must not be the data.

    Raises:
        ValueError: a condition is violated.
    """
    if not out.absolute().parent.is_dir():
        raise ValueError(f"out: the folder {out.parent} does not exist")
    if out.suffix and out.suffix not in SUFFIXES:
        raise ValueError(
            f"extension of {out.name}: unknown {out.suffix!r}, expected one of {', '.join(SUFFIXES)}, or "
            "none for a folder of parquet files"
        )
    if out.suffix and out.is_dir():
        raise ValueError(f"out: {out} is a folder; for a folder of parquet files, use a name without an extension")
    if not out.suffix and out.is_file():
        raise ValueError(f"out: {out} is a file; a name without an extension means a folder of parquet files")
    if out.exists() and data.exists() and (out.samefile(data) or out.resolve() in data.resolve().parents):
        raise ValueError(f"out: {out} is or contains the data, which would be lost; choose another output")
    if out.is_dir() and not holds_parts_alone(out):
        raise ValueError(f"out: the folder {out} contains files other than parts of an output")
    kept = out.exists() and (any(out.iterdir()) if out.is_dir() else out.stat().st_size > 0)
    if kept and not overwrite and not Parts(out).begun:
        raise ValueError(f"out: {out} exists; --overwrite replaces it")
