"""A unit of work with artefacts on disk: skipped where nothing it reads has changed, resumed where it was cut off.

A unit writes into ``<stage>/<name>.partial``, and the folder takes its final name, ``<stage>/<name>``, in one step at
the end. ``stage.json`` in it tells what the artefacts were made from: the settings, the digests of the input artefacts,
and the stamps of outside files. A kill leaves the ``.partial`` folder, where the same unit finds its trainer's
checkpoints and, in the folder ``work``, its finished chunks when it starts again.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import acqcore

#: in the order of a run; a stage's folder is its place here and its name
STAGES = ("seeds", "train", "generate", "label", "fit", "evaluate", "report")

_MANIFEST = "stage.json"
_WORK = "work"
T = TypeVar("T")


class StageError(Exception):
    """A stage that can not finish; its text is one sentence for the user."""


@dataclass(frozen=True, eq=False)
class Unit:
    """One piece of work of a stage.

    Args:
        stage: one of ``STAGES``.
        name: of its folder within the stage's.
        function: does the work: called with a :class:`Work` and the arguments, writes into ``work.folder``.
        arguments: all of the recipe that the function reads; dataclasses, lists, mappings and plain values.
        inputs: role -> artefact of another unit.
        outside: paths of files and folders, not made by this run, that the function reads.
    """

    stage: str
    name: str
    function: Callable[..., None]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Artefact] = field(default_factory=dict)
    outside: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{STAGES.index(self.stage):02d}-{self.stage}/{self.name}"

    def __truediv__(self, path: str) -> Artefact:
        return Artefact(self, path)

    def settings(self) -> dict[str, Any]:
        """What decides the artefacts besides the inputs' content, as JSON reads it back."""
        function = f"{self.function.__module__}.{self.function.__qualname__}"
        settings = {"function": function, "version": acqcore.__version__, **_plain(dict(self.arguments))}
        return dict(json.loads(json.dumps(settings)))


@dataclass(frozen=True)
class Artefact:
    """A file or folder that a unit writes."""

    unit: Unit
    path: str

    def __str__(self) -> str:
        return f"{self.unit}/{self.path}"


@dataclass(frozen=True)
class Work:
    """What a unit's function is given.

    Args:
        folder: artefacts go here.
        inputs: role -> path of a finished artefact.
        say: takes a line for the user.
    """

    folder: Path
    inputs: Mapping[str, Path]
    say: Callable[[str], None]

    @property
    def kept(self) -> Path:
        """A folder whose content outlives a kill and is removed once the unit is done."""
        folder = self.folder / _WORK
        folder.mkdir(exist_ok=True)
        return folder

    def chunks(
        self, name: str, items: Sequence[T], size: int, function: Callable[[int, Sequence[T]], Any]
    ) -> Iterator[Any]:
        """``function(start, items[start : start + size])`` for each chunk, in order; a finished one is not done again.

        Args:
            name: of the chunks within this unit.
            function: gives what JSON can hold.
        """
        for start in range(0, len(items), size):
            path = self.kept / f"{name}-{start:07d}.json"
            if not path.exists():
                write_json(path, function(start, items[start : start + size]))
            # Read back, so that what follows sees the same whether or not the run was cut off.
            yield json.loads(path.read_text(encoding="utf-8"))

    def write(self, name: str, content: Any) -> None:
        """A JSON artefact."""
        write_json(self.folder / name, content)


class Store:
    """The folder of a run: runs units, and knows which are done.

    Args:
        output: the folder; made where it is missing.
        say: takes a line for the user.
    """

    def __init__(self, output: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self.output = output
        self.say = say
        self._reasons: dict[Unit, str | None] = {}  # of units seen in this process, which alone writes here

    def folder(self, unit: Unit) -> Path:
        """Where the finished unit's artefacts are."""
        return self.output / str(unit)

    def path(self, artefact: Artefact) -> Path:
        """Where an artefact of a finished unit is."""
        return self.folder(artefact.unit) / artefact.path

    def why(self, unit: Unit) -> str | None:
        """Why the unit has to run, in a few words; None where it is done and nothing that it reads has changed."""
        if unit not in self._reasons:
            self._reasons[unit] = self._why(unit)
        return self._reasons[unit]

    def _why(self, unit: Unit) -> str | None:
        manifest = _read_manifest(self.folder(unit))
        for artefact in unit.inputs.values():
            if self.why(artefact.unit) is not None:
                return "never ran" if manifest is None else f"{artefact.unit}, which it reads, has to run"
        wanted = self._wanted(unit)
        if manifest is None:
            begun = _read_json(self._partial(unit) / _MANIFEST)
            return "was cut off, goes on" if begun is not None and begun["inputs"] == wanted else "never ran"
        if (changed := _changed(manifest["inputs"], wanted)) is not None:
            return changed
        for name, (size, _) in manifest["artefacts"].items():
            path = self.folder(unit) / name
            if not path.is_file() or path.stat().st_size != size:
                return f"{name} is missing or was cut"
        return None

    def run(self, unit: Unit) -> bool:
        """Brings the unit's inputs and the unit itself up to date.

        Returns:
            whether the unit itself ran; False where it was done.

        Raises:
            StageError: the work failed for a reason the user can mend, in a sentence. Finished units stay as they are.
        """
        if unit in self._reasons and self._reasons[unit] is None:
            return False
        for artefact in unit.inputs.values():
            self.run(artefact.unit)
        self._promote(unit)
        self._reasons.pop(unit, None)  # what was said before its inputs ran no longer holds
        if (reason := self.why(unit)) is None:
            return False
        self.say(f"[{unit}] starts: {reason}")
        begin = time.perf_counter()
        partial = self._partial(unit)
        wanted = self._wanted(unit)
        with self._told(unit):
            begun = {"inputs": wanted}
            if _read_json(partial / _MANIFEST) != begun:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                write_json(partial / _MANIFEST, begun)
            inputs = {role: self.path(artefact) for role, artefact in unit.inputs.items()}
            work = Work(partial, inputs, lambda line: self.say(f"[{unit}] {line}"))
            unit.function(work, **unit.arguments)
            shutil.rmtree(partial / _WORK, ignore_errors=True)
            seconds = round(time.perf_counter() - begin, 3)
            write_json(partial / _MANIFEST, {**begun, "artefacts": _listed(partial), "seconds": seconds})
            self._promote(unit)
        self._reasons[unit] = None
        self.say(f"[{unit}] done in {time.perf_counter() - begin:.1f} s")
        return True

    def seconds(self, unit: Unit) -> float:
        """How long the finished unit ran: its last start to its end."""
        manifest = _read_manifest(self.folder(unit))
        return float(manifest["seconds"]) if manifest else 0.0

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One run at a time in a folder.

        Raises:
            StageError: another one is at work, or the folder can not be made.
        """
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            file = (self.output / ".lock").open("w")
        except OSError as error:
            raise StageError(f"output: {self.output} can not be written: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StageError(f"output: another run is at work in {self.output}") from error
            yield

    def _partial(self, unit: Unit) -> Path:
        return self.folder(unit).with_name(unit.name + ".partial")

    def _promote(self, unit: Unit) -> None:
        """Gives a partial folder that is finished its name, in the place of an older one."""
        partial, final = self._partial(unit), self.folder(unit)
        if _read_manifest(partial) is not None:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)

    def _wanted(self, unit: Unit) -> dict[str, Any]:
        """What the manifest of an up-to-date unit says it was made from; its inputs are done."""
        inputs = {role: [str(a), self._digest(a)] for role, a in unit.inputs.items()}
        outside = {path: _stamp(Path(path).expanduser()) for path in unit.outside}
        return {"settings": unit.settings(), "artefacts": inputs, "outside": outside}

    def _digest(self, artefact: Artefact) -> str:
        manifest = _read_manifest(self.folder(artefact.unit))
        files = manifest["artefacts"] if manifest else {}
        picked = {n: v for n, v in files.items() if n == artefact.path or n.startswith(artefact.path + "/")}
        if not picked:
            raise StageError(f"{artefact} was not written; remove the folder {artefact.unit} and run again")
        return hashlib.sha256(json.dumps(picked, sort_keys=True).encode()).hexdigest()

    @contextmanager
    def _told(self, unit: Unit) -> Iterator[None]:
        """Failures that the user can mend, as one sentence."""
        try:
            yield
        except StageError as error:
            raise StageError(f"{unit}: {error}") from error
        except Exception as error:
            if _disk_is_full(error):
                free = shutil.disk_usage(self.output).free / 2**20
                raise StageError(
                    f"{unit}: no space left for {self.output} ({free:.0f} MiB free); free some and run the same "
                    "command again, finished stages are kept"
                ) from error
            if isinstance(error, ValueError | TypeError | OSError | ImportError | RuntimeError):
                raise StageError(f"{unit}: {type(error).__name__}: {' '.join(str(error).split())}") from error
            raise


def write_json(path: Path, content: Any) -> None:
    """``content`` at ``path``, whole or not at all.

    Raises:
        ValueError: a number that is not finite.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _plain(value: Any) -> Any:
    """Dataclasses within ``value`` as mappings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__, **_plain(dataclasses.asdict(value))}
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value


def _read_json(path: Path) -> Any:
    """Content of a JSON file; None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """That of a finished unit; None where the folder has none or its unit was cut off."""
    manifest: dict[str, Any] | None = _read_json(folder / _MANIFEST)
    return manifest if manifest is not None and "artefacts" in manifest else None


def _listed(folder: Path) -> dict[str, tuple[int, str]]:
    """Relative path -> size and SHA-256 of every artefact below ``folder``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / _MANIFEST)
    return {str(path.relative_to(folder)): (path.stat().st_size, _sha256(path)) for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(path: Path) -> Any:
    """Changes where an outside file does: its SHA-256, or sizes and times below a folder, which may hold a model."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        return [[str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    return _sha256(path) if path.is_file() else None


def _changed(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> str | None:
    """The first key in which two manifests differ, for a person."""
    for key in [*now, *(key for key in before if key not in now)]:
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        inner = f"{path}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            return _changed(old, new, f"{inner}.")
        section, _, name = inner.partition(".")
        return f"{name or section} changed"
    return None


def _disk_is_full(error: BaseException) -> bool:
    """Libraries wrap the system's error: safetensors and Arrow keep its text, torch's archive writer not even that."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(text in str(seen) for text in ("No space left on device", "PytorchStreamWriter failed writing")):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def seconds_of(path: Path) -> float:
    """How long the unit that made an artefact ran: from its last start to its end; 0 where that is not known."""
    for folder in path.parents:
        if (manifest := _read_manifest(folder)) is not None:
            return float(manifest["seconds"])
    return 0.0
