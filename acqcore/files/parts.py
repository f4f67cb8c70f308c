"""Finished blocks and batches of a scoring run on disk, from which an interrupted run resumes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Parts:
    """The folder ``<out>.parts``: the manifest of a run, and files for each block of rows.

    ========================  ===================================================================================
    ``block-000000.batches``  a line per finished batch: its rows, counted within the block, and their figures
    ``block-000000.<suffix>``  the rows of the block, as they go into the output
    ``block-000000.json``     the report; written last, it marks the block as finished
    ``block-000000.attempts`` a byte per attempt
    ``block-000000.failure``  why the block was given up
    ========================  ===================================================================================

    Processes share the folder; each block belongs to one process at a time.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out.with_name(out.name + ".parts")
        self._suffix = out.suffix or ".parquet"

    def claim(self, manifest: Mapping[str, Any]) -> None:
        """Create the folder, or resume the run that it belongs to; failed blocks may be tried again.

        Raises:
            ValueError: the folder belongs to another run (names what differs).
        """
        path = self.folder / "manifest.json"
        text = json.dumps(manifest, indent=1)
        if path.exists():
            found, wanted = json.loads(path.read_text()), json.loads(text)
            for key in (*wanted, *found):
                if found.get(key) != wanted.get(key):
                    raise ValueError(
                        f"out: {self.folder} holds a cut-off run with another {key} ({_short(found.get(key))} there, "
                        f"{_short(wanted.get(key))} here); repeat that run's command to finish it, or remove the folder"
                    )
        else:
            self.folder.mkdir(exist_ok=True)
            _write(path, text)
        for pattern in ("*.attempts", "*.failure"):
            for left in self.folder.glob(pattern):
                left.unlink()

    def load(self, block: int) -> dict[int, list[float]]:
        """Row of the block -> values, for finished batches; truncates a line that a killed process left unfinished."""
        path = self._file(block, ".batches")
        if not path.exists():
            return {}
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        done: dict[int, list[float]] = {}
        for line in whole.splitlines():
            batch = json.loads(line)
            done.update(zip(batch["rows"], batch["values"], strict=True))
        return done

    def append(self, block: int, rows: Sequence[int], values: Sequence[Sequence[float]]) -> None:
        """Record a finished batch: rows of the block, and their values."""
        with self._file(block, ".batches").open("a") as file:
            file.write(json.dumps({"rows": list(rows), "values": [list(row) for row in values]}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def attempt(self, block: int) -> int:
        """Count an attempt at a block; returns how many there were in this run, those of killed processes included."""
        with self._file(block, ".attempts").open("ab") as file:
            file.write(b".")
            file.flush()
            return file.tell()

    def path(self, block: int) -> Path:
        """The file for the rows of a block."""
        return self._file(block, self._suffix)

    def finish(self, block: int, report: Mapping[str, Any]) -> None:
        """Record the report of a block whose rows are written; the block is then finished."""
        _write(self._file(block, ".json"), json.dumps(report))
        self._file(block, ".batches").unlink(missing_ok=True)

    def report(self, block: int) -> dict[str, Any] | None:
        """The report of a block; None if it is not finished."""
        path = self._file(block, ".json")
        return json.loads(path.read_text()) if path.exists() else None

    def finished(self, block: int) -> bool:
        return self._file(block, ".json").exists()

    def fail(self, block: int, reason: str) -> None:
        """Record why a block was given up; the first line is a summary."""
        _write(self.failure(block), reason)

    def failure(self, block: int) -> Path:
        """The file with the reason why a block was given up."""
        return self._file(block, ".failure")

    def remove(self) -> None:
        """Remove the folder, once the output holds everything."""
        shutil.rmtree(self.folder)

    def remove_unused(self) -> None:
        """Remove the folder if no block has begun."""
        if not any(self.folder.glob("block-*")):
            self.remove()

    def _file(self, block: int, suffix: str) -> Path:
        return self.folder / f"block-{block:06d}{suffix}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _write(path: Path, text: str) -> None:
    """Atomically, as several processes may write the same."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
