"""The cache of models made on this machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The folder ``name`` in ``ACQCORE_CACHE``, else ``~/.cache/acqcore``; ``make(folder)`` fills it if it is missing.

    The folder appears atomically, so an interrupted or concurrent call leaves nothing half-written.
    """
    target = Path(os.environ.get("ACQCORE_CACHE") or "~/.cache/acqcore").expanduser() / name
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="making-") as temporary:
            folder = Path(temporary) / name
            folder.mkdir()
            make(folder)
            try:
                folder.rename(target)
            except OSError:
                if not target.is_dir():  # otherwise another process finished first
                    raise
    return target
