"""Data sets by name: loaded with ``datasets`` and exported to one parquet file, from which blocks are read."""

from __future__ import annotations

import hashlib
from pathlib import Path

from acqcore import checks
from acqcore.files.atomic import atomically
from acqcore.files.data import SUFFIXES


def is_name(data: Path) -> bool:
    """Whether ``--data`` is the name of a hub data set, or a data set's folder, rather than a file."""
    return data.is_dir() or (not data.exists() and data.suffix not in SUFFIXES and len(data.parts) <= 2)


def export(data: Path, config: str | None, split: str, folder: Path) -> Path:
    """Export a split to a parquet file in ``folder``, atomically and only once.

    Raises:
        ModuleNotFoundError: datasets is not installed.
        ValueError, OSError: the data set, its configuration or its split cannot be loaded.
    """
    checks.installed("datasets", f"--data {data}", "train")
    import datasets

    key = hashlib.sha256(repr((str(data), config, split)).encode()).hexdigest()[:12]
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
