"""Keeps a scoring run's finished blocks and batches on disk, so that an interrupted run can resume, and checks whether
its output may be written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from acqcore import checks
from acqcore.files.data import SUFFIXES
from acqcore.files.table import atomically, holds_parts_alone

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LOCK = "lock"
_MANIFEST = "manifest.json"


class Parts:
    """The folder ``<out>.parts``: the manifest of a run, and files for each block of rows.

    ========================  ===================================================================================
    ``block-000000.batches``  a line per finished batch: its row numbers within the block and their values
    ``block-000000.<suffix>``  the rows of the block, ready to be joined into the output
    ``block-000000.json``     the report; written last, it marks the block as finished
    ``block-000000.attempts`` a byte per attempt
    ``block-000000.failure``  the reason why the block was given up
    ``lock``                  locked by the reporting process
    ``dataset-*.parquet``     the rows of a data set given by name, see ``acqcore.files.data``
    ========================  ===================================================================================

    Processes of a run share the folder; each block belongs to one process at a time. Other files in it are not touched.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out.with_name(out.name + ".parts")
        self._suffix = out.suffix or ".parquet"
        self._locked: TextIO | None = None

    @property
    def begun(self) -> bool:
        """Whether a run has claimed this folder."""
        return (self.folder / _MANIFEST).is_file()

    def claim(self, manifest: Mapping[str, Any]) -> None:
        """Create the folder or resume its run; failed blocks may be retried.

        Raises:
            ValueError: the folder belongs to another run (the message names the difference), to no run, or to a process
                that is still running.
        """
        path, folder = self.folder / _MANIFEST, self.folder
        text = json.dumps(manifest, indent=1)
        if folder.exists() and not self.begun and (not folder.is_dir() or any(map(_foreign, folder.iterdir()))):
            raise ValueError(f"out: {folder} exists and was not left by a run; rename it or choose another output")
        folder.mkdir(exist_ok=True)
        self._lock()
        if self.begun:
            found, wanted = _manifest(path), json.loads(text)
            for key in (*wanted, *found):
                if found.get(key) != wanted.get(key):
                    raise ValueError(
                        f"out: {folder} holds an interrupted run with different {key} ({found.get(key)!r:.60} there, "
                        f"{wanted.get(key)!r:.60} here); repeat its command to finish it, or remove the folder"
                    )
        else:
            self._clear("block-")  # of a run that was killed while it removed its files
            _write(path, text)
        for pattern in ("*.attempts", "*.failure"):
            for left in folder.glob(pattern):
                left.unlink()

    def release(self) -> None:
        """Let another process claim the folder."""
        if self._locked is not None:
            self._locked.close()
            self._locked = None

    def _lock(self) -> None:
        self._locked = (self.folder / _LOCK).open("w")
        if fcntl is None:
            return
        try:
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):  # other errors: a file system without locks
                self.release()
                raise ValueError(f"out: another process is writing to {self.folder}") from error

    def load(self, block: int) -> dict[int, tuple[list[float], list[list[float]]]]:
        """Map rows of finished batches to their values and their tokens' values; truncates a line that a killed process
        left incomplete."""
        path = self._file(block, ".batches")
        if not path.exists():
            return {}
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        done: dict[int, tuple[list[float], list[list[float]]]] = {}
        for line in whole.splitlines():
            batch = json.loads(line)
            tokens = batch.get("tokens") or [[] for _ in batch["rows"]]
            done.update(zip(batch["rows"], zip(batch["values"], tokens, strict=True), strict=True))
        return done

    def append(
        self,
        block: int,
        rows: Sequence[int],
        values: Sequence[Sequence[float]],  # [B][A]
        tokens: Sequence[Sequence[Sequence[float]]] | None = None,  # [B][token acquisitions][scored tokens], if kept
    ) -> None:
        """Record a finished batch of B rows of the block."""
        batch = {"rows": list(rows), "values": [list(row) for row in values]} | ({"tokens": tokens} if tokens else {})
        with self._file(block, ".batches").open("a") as file:
            file.write(json.dumps(batch) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def attempt(self, block: int) -> int:
        """Record an attempt at a block; returns the number in this run, including attempts of killed processes."""
        with self._file(block, ".attempts").open("ab") as file:
            file.write(b".")
            file.flush()
            return file.tell()

    def path(self, block: int) -> Path:
        """The file for the rows of a block."""
        return self._file(block, self._suffix)

    def finish(self, block: int, report: Mapping[str, Any]) -> None:
        """Record the report of a block whose rows are written; this marks the block as finished."""
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
        """Remove the run's files once the output is complete."""
        (self.folder / _MANIFEST).unlink(missing_ok=True)  # first: without it, the rest cannot be resumed
        self._clear(_MANIFEST, "block-", "dataset-")
        self.release()
        self._clear(_LOCK)
        with contextlib.suppress(OSError):  # it contains other files
            self.folder.rmdir()

    def remove_unclaimed(self) -> None:
        """Remove the folder if no run claimed it; raises ValueError if another process is just doing so."""
        if self.folder.is_dir() and not self.begun:
            self._lock()
            self.remove()

    def remove_unused(self) -> None:
        """Remove the folder if no block has begun."""
        if not any(self.folder.glob("block-*")):
            self.remove()

    def _file(self, block: int, suffix: str) -> Path:
        return self.folder / f"block-{block:06d}{suffix}"

    def _clear(self, *beginnings: str) -> None:
        """Remove the files whose names have one of these beginnings."""
        for path in list(self.folder.iterdir()):
            if path.is_file() and path.name.startswith(beginnings):
                path.unlink(missing_ok=True)


def check_output(out: Path, data: Path, overwrite: bool) -> None:
    """Check that ``out`` is a file of a known format, or, without an extension, a folder of parquet files, and may be
    written."""
    if out.suffix and out.suffix not in SUFFIXES:
        raise ValueError(
            f"extension of {out.name}: unknown {out.suffix!r}, expected one of {', '.join(SUFFIXES)}, or "
            "none for a folder of parquet files"
        )
    if out.suffix and out.is_dir():
        raise ValueError(f"out: {out} is a folder; for a folder of parquet files, use a name without an extension")
    if not out.suffix and out.is_file():
        raise ValueError(f"out: {out} is a file; a name without an extension means a folder of parquet files")
    if out.suffix in ("", ".parquet"):
        checks.installed("pyarrow", "parquet", "train")
    check_replaceable(out, data, overwrite)


def check_replaceable(out: Path, data: Path, overwrite: bool) -> None:
    """Check that writing to ``out`` loses nothing: it is new, is empty or may be overwritten, and is not the data."""
    if not out.absolute().parent.is_dir():
        raise ValueError(f"out: the folder {out.parent} does not exist")
    if out.exists() and data.exists() and (out.samefile(data) or out.resolve() in data.resolve().parents):
        raise ValueError(f"out: {out} is or contains the data, which would be lost; choose another output")
    if out.exists() and not out.is_file() and not out.is_dir():
        raise ValueError(f"out: {out} is neither a file nor a folder")
    if out.is_dir() and not holds_parts_alone(out):
        raise ValueError(f"out: the folder {out} contains files other than parts of an output")
    kept = out.exists() and (any(out.iterdir()) if out.is_dir() else out.stat().st_size > 0)
    if kept and not overwrite:
        raise ValueError(f"out: {out} exists; --overwrite replaces it")


def _foreign(path: Path) -> bool:
    return not (path.name == _LOCK or path.name.startswith((_MANIFEST, "block-", "dataset-")))


def _manifest(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"out: {path} is not readable; remove its folder to start over") from error


def _write(path: Path, text: str) -> None:
    with atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
