"""Finished blocks and batches of a scoring run on disk, so that a run that was cut off goes on where it stopped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Parts:
    """The folder ``<out>.parts``: a manifest of what is being computed, and files for each block of rows.

    ========================  ===================================================================================
    ``block-000000.batches``  a line for each finished batch: its rows, counted within the block, and their values
    ``block-000000.<out's>``  the rows of the block as they go into the output
    ``block-000000.json``     written last: the block is finished; what its rows came to
    ``block-000000.attempts`` a byte for each time that its scoring began
    ``block-000000.failure``  why no further attempt is made
    ========================  ===================================================================================

    Processes share the folder; each block belongs to one at a time.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out.with_name(out.name + ".parts")
        self._suffix = out.suffix or ".parquet"

    def claim(self, manifest: Mapping[str, Any]) -> None:
        """Make the folder, or go on with what is there; blocks that failed are to be tried again.

        Raises:
            ValueError: the folder belongs to a run with another manifest; names what differs.
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
        """Row of the block -> its values, for the batches that are finished; a line that a kill left unfinished is cut
        off."""
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
        """Keep a finished batch: for each of ``rows`` its values."""
        with self._file(block, ".batches").open("a") as file:
            file.write(json.dumps({"rows": list(rows), "values": [list(row) for row in values]}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def attempt(self, block: int) -> int:
        """Note that the scoring of a block begins, and for which time in this run; a process that dies has counted."""
        with self._file(block, ".attempts").open("ab") as file:
            file.write(b".")
            file.flush()
            return file.tell()

    def path(self, block: int) -> Path:
        """Where the rows of a block go."""
        return self._file(block, self._suffix)

    def finish(self, block: int, report: Mapping[str, Any]) -> None:
        """Keep what a block came to, whose rows are written: it is finished."""
        _write(self._file(block, ".json"), json.dumps(report))
        self._file(block, ".batches").unlink(missing_ok=True)

    def report(self, block: int) -> dict[str, Any] | None:
        """What a finished block came to; None of another."""
        path = self._file(block, ".json")
        return json.loads(path.read_text()) if path.exists() else None

    def finished(self, block: int) -> bool:
        return self._file(block, ".json").exists()

    def fail(self, block: int, reason: str) -> None:
        """Keep why a block is given up; the first line says it in short."""
        _write(self.failure(block), reason)

    def failure(self, block: int) -> Path:
        """The file that says why a block was given up."""
        return self._file(block, ".failure")

    def remove(self) -> None:
        """Remove the folder, once everything in it stands in the output."""
        shutil.rmtree(self.folder)

    def remove_unused(self) -> None:
        """Remove the folder where it holds nothing of any block."""
        if not any(self.folder.glob("block-*")):
            self.remove()

    def _file(self, block: int, suffix: str) -> Path:
        return self.folder / f"block-{block:06d}{suffix}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _write(path: Path, text: str) -> None:
    """In one step, whichever process comes first."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
