"""Data sets by name: loaded with ``datasets`` and exported to one parquet file, from which blocks are read."""

from __future__ import annotations

import hashlib
from pathlib import Path

from acqcore import checks
from acqcore.files.data import SUFFIXES
from acqcore.files.table import atomically


def local(data: Path, config: str | None, split: str, folder: Path) -> Path:
    """The file that ``--data`` names. A split of a data set, given by its hub id or its folder, is exported to a
    parquet file in ``folder``, atomically and only once.

    Raises:
        ModuleNotFoundError: datasets is not installed.
        ValueError, OSError: the data set, its configuration or its split cannot be loaded.
    """
    if not data.is_dir() and (data.exists() or data.suffix in SUFFIXES or len(data.parts) > 2):
        return data
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
