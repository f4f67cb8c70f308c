"""Finished batches of a scoring run on disk, so that a run that was cut off goes on where it stopped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from acqcore import checks


class Parts:
    """The folder ``<out>.parts``: a manifest of what is being computed and one file per chunk of rows.

    A line of a chunk's file is a finished batch: its rows, counted within the chunk, and their values. A line
    that a kill left unfinished is cut off when the chunk is opened again.

    Raises:
        ValueError: the folder belongs to a run with another manifest; names what differs.
    """

    def __init__(self, out: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = out.with_name(out.name + ".parts")
        path = self.folder / "manifest.json"
        text = json.dumps(manifest, indent=1)
        if path.exists():
            checks.same_manifest(self.folder, json.loads(path.read_text()), json.loads(text))
        else:
            self.folder.mkdir(exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(text)
            temporary.replace(path)

    def load(self, chunk: int) -> dict[int, list[float]]:
        """Row of the chunk -> its values, for the batches that are finished."""
        path = self._path(chunk)
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

    def append(self, chunk: int, rows: Sequence[int], values: Sequence[Sequence[float]]) -> None:
        """Keep a finished batch: for each of ``rows`` its values."""
        with self._path(chunk).open("a") as file:
            file.write(json.dumps({"rows": list(rows), "values": [list(row) for row in values]}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Remove the folder, once everything in it stands in the output."""
        shutil.rmtree(self.folder)

    def _path(self, chunk: int) -> Path:
        return self.folder / f"chunk-{chunk:06d}.jsonl"
