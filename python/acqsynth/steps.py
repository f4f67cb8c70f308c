"""The steps of a run on disk: skipped if their inputs are unchanged, resumed if they were killed.

A step writes into ``<stage>/<name>.partial``. When it finishes, the folder is renamed to ``<stage>/<name>``. Its
``stage.json`` records what the artefacts were made from: the settings, the digests of the input artefacts and the
stamps of files outside the run. A killed step leaves its ``.partial`` folder behind; when the same step starts again,
it finds the trainer's checkpoints there and, in the subfolder ``work``, the finished chunks.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel

import acqcore
from acqsynth import models
from acqsynth.artefacts import load_state, read_json, save_state, write_json
from acqsynth.config import Source
from acqsynth.domains.classification import INTENTS, intents_path

#: In the order of a run; a stage's folder is numbered by its position.
STAGES = ("seeds", "train", "generate", "label", "fit", "evaluate", "report")
LAYOUT = 3  #: version of ``stage.json``

_MANIFEST = "stage.json"
_WORK = "work"
T = TypeVar("T")


class StepError(Exception):
    """A step cannot finish; the message is one sentence for the user."""


class Model(str):
    """A model that the recipe names. The step's function receives the path or hub id for ``from_pretrained``, and the
    step runs again when the files at that path change."""


@dataclass(frozen=True, eq=False)
class Step:
    """A function, its arguments and the folder it fills.

    Args:
        stage: one of ``STAGES``.
        name: name of the folder within the stage.
        function: called as ``function(context, **arguments)``; writes into ``context.folder``.
        arguments: everything that the function reads. Mappings, lists and dataclasses may hold other steps and their
            artefacts, which the function receives as paths, and :class:`Model`. All else must be recipe sections or
            JSON values.
    """

    stage: str
    name: str
    function: Callable[..., None]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{STAGES.index(self.stage):02d}-{self.stage}/{self.name}"

    def __truediv__(self, path: str) -> Artefact:
        return Artefact(self, path)

    @property
    def inputs(self) -> list[Artefact]:
        """The artefacts of other steps that this one reads, in the order of the arguments."""
        return [leaf for leaf in _leaves(self.arguments) if isinstance(leaf, Artefact)]

    @property
    def outside(self) -> list[str]:
        """Files, folders and hub ids outside the run that the step reads."""
        found = [leaf for leaf in _leaves(self.arguments) if not isinstance(leaf, Artefact)]
        return [leaf.source if isinstance(leaf, Source) else str(leaf) for leaf in found]

    def settings(self) -> dict[str, Any]:
        """Everything but the inputs' content that determines the artefacts, after a round trip through JSON."""
        settings = {"function": self.function.__qualname__, "version": acqcore.__version__, **_plain(self.arguments)}
        return dict(json.loads(json.dumps(settings)))


@dataclass(frozen=True)
class Artefact:
    """A file or folder that a step writes; an empty path means all of them."""

    step: Step
    path: str

    def __str__(self) -> str:
        return f"{self.step}/{self.path}" if self.path else str(self.step)


def _nothing(line: str) -> None:
    """Prints nothing."""


@dataclass(frozen=True)
class StepContext:
    """The context passed to a step's function besides its arguments.

    Args:
        folder: destination of the artefacts.
        say: prints a line for the user.
        status: shows a line until the next one, if the output is a terminal.
    """

    folder: Path
    say: Callable[[str], None] = _nothing
    status: Callable[[str], None] = _nothing

    @property
    def scratch(self) -> Path:
        """A folder that survives a kill and is removed when the step finishes."""
        folder = self.folder / _WORK
        folder.mkdir(exist_ok=True)
        return folder

    def chunks(
        self, name: str, items: Sequence[T], size: int, function: Callable[[int, Sequence[T]], Any], state: Any = None
    ) -> Iterator[Any]:
        """Yields ``function(start, items[start : start + size])`` for each chunk, in order. Chunks finished before a
        kill are not computed again.

        Args:
            name: name of the chunks within this step.
            function: its results must be JSON values.
            state: an object with ``state_dict`` that the function changes. Its state is saved with each chunk and
                restored before the first chunk that is computed after finished ones.
        """
        last: Path | None = None
        behind = False
        for start in range(0, len(items), size):
            path = self.scratch / f"{name}-{start:07d}.json"
            if path.exists():
                behind = True
            else:
                if state is not None and behind and last is not None:
                    state.load_state_dict(load_state(last))
                behind = False
                result = function(start, items[start : start + size])
                if state is not None:
                    save_state(path.with_suffix(".pt"), state.state_dict())
                write_json(path, result)
                if state is not None and last is not None:
                    last.unlink(missing_ok=True)
            last = path.with_suffix(".pt")
            # Read back, so that a resumed run sees exactly the same values.
            yield read_json(path)

    def write(self, name: str, content: Any) -> None:
        """Writes a JSON artefact."""
        write_json(self.folder / name, content)


@dataclass(eq=False)
class Store:
    """The folder of a run: runs steps and tracks which are done.

    Args:
        output: the folder, created if missing.
        say, status: as in :class:`StepContext`.
    """

    output: Path
    say: Callable[[str], None] = _nothing
    status: Callable[[str], None] = _nothing
    # Valid because only this process writes to the folder.
    _reasons: dict[Step, str | None] = field(default_factory=dict, init=False)

    def path(self, artefact: Step | Artefact) -> Path:
        """Path of a finished step's folder or of one of its artefacts."""
        return self.output / str(artefact)

    def reason(self, step: Step) -> str | None:
        """Why the step has to run, in a few words; None if it is done and its inputs are unchanged."""
        if step not in self._reasons:
            self._reasons[step] = self._reason(step)
        return self._reasons[step]

    def _reason(self, step: Step) -> str | None:
        manifest = _read_manifest(self.path(step))
        for artefact in step.inputs:
            if self.reason(artefact.step) is not None:
                return "never ran" if manifest is None else f"{artefact.step}, which it reads, has to run"
        expected = self._made_from(step)
        if manifest is None:
            begun = _read_stage(self._partial(step))
            return "was interrupted, resumes" if begun and begun["made_from"] == expected else "never ran"
        if manifest["made_from"] != expected:
            return f"{_first_change(manifest['made_from'], expected).split('.', 1)[-1]} changed"
        last = self.path(step) / _MANIFEST
        written = newest = last.stat().st_mtime_ns
        for name, (size, digest) in manifest["artefacts"].items():
            path = self.path(step) / name
            if not path.is_file() or path.stat().st_size != size:
                return f"{name} is missing or truncated"
            if (since := path.stat().st_mtime_ns) > written:
                newest = max(newest, since)
                if _sha256(path) != digest:
                    return f"{name} was edited"
        if written < newest < time.time_ns():  # a copy without times, which is hashed once
            with suppress(OSError):  # of another user
                os.utime(last, ns=(newest, newest))
        return None

    def run(self, step: Step) -> bool:
        """Brings the inputs of the step and then the step itself up to date; whether the step itself ran. If it fails
        for a reason that the user can fix, raises StepError; finished steps are kept."""
        if step in self._reasons and self._reasons[step] is None:
            return False
        for artefact in step.inputs:
            self.run(artefact.step)
        self._commit(step)
        self._reasons.pop(step, None)  # the inputs may have changed
        if (reason := self.reason(step)) is None:
            return False
        self.say(f"[{step}] starts: {reason}")
        begin = time.perf_counter()
        partial = self._partial(step)
        made_from = self._made_from(step)
        begun = {"layout": LAYOUT, "made_from": made_from}
        with self._user_errors(step):
            earlier = _read_stage(partial)
            if earlier is None or earlier["made_from"] != made_from:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                write_json(partial / _MANIFEST, begun)
            for unfinished in partial.rglob("*.tmp"):  # a kill left it
                unfinished.unlink()
            context = StepContext(
                partial, lambda line: self.say(f"[{step}] {line}"), lambda line: self.status(f"[{step}] {line}")
            )
            step.function(context, **_replaced(step.arguments, self._resolve))
            shutil.rmtree(partial / _WORK, ignore_errors=True)
            seconds = round(time.perf_counter() - begin, 3)
            write_json(partial / _MANIFEST, {**begun, "artefacts": _digests(partial), "seconds": seconds})
            self._commit(step)
        self._reasons[step] = None
        self.say(f"[{step}] done in {time.perf_counter() - begin:.1f} s")
        return True

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs out of the folder."""
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            held = FileLock(self.output / ".lock", blocking=False).acquire()  # ends with the process
        except Timeout as error:
            raise StepError(f"output: another run is using {self.output}") from error
        except OSError as error:
            raise StepError(f"output: cannot write to {self.output}: {error.strerror}") from error
        with held:
            yield

    def _partial(self, step: Step) -> Path:
        return self.path(step).with_name(step.name + ".partial")

    def _commit(self, step: Step) -> None:
        """Renames a finished partial folder, replacing an older result."""
        partial, final = self._partial(step), self.path(step)
        if _read_manifest(partial) is not None:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)

    def _resolve(self, leaf: Any) -> Any:
        """The value that the function receives for a leaf of its arguments."""
        if isinstance(leaf, Artefact):
            return self.path(leaf)
        if not isinstance(leaf, Model):
            return leaf
        try:
            return models.resolve(leaf)
        except FileNotFoundError as error:
            raise StepError(f"model: {error}") from error

    def _made_from(self, step: Step) -> dict[str, Any]:
        """The entry ``made_from`` of an up-to-date manifest; the inputs must be done."""
        return {
            "settings": step.settings(),
            "inputs": {str(artefact): self._digest(artefact) for artefact in step.inputs},
            "outside": {name: _stamp(name) for name in step.outside},
        }

    def _digest(self, artefact: Artefact) -> str:
        manifest = _read_manifest(self.path(artefact.step))
        files = manifest["artefacts"] if manifest else {}
        below = f"{artefact.path}/" if artefact.path else ""
        picked = {name: file for name, file in files.items() if name == artefact.path or name.startswith(below)}
        if not picked:
            raise StepError(f"{artefact} was not written; remove the folder {artefact.step} and run again")
        return hashlib.sha256(json.dumps(picked, sort_keys=True).encode()).hexdigest()

    @contextmanager
    def _user_errors(self, step: Step) -> Iterator[None]:
        """Turns failures that the user can fix into one sentence."""
        try:
            yield
        except StepError as error:
            raise StepError(f"{step}: {error}") from error
        except Exception as error:
            if _disk_is_full(error):
                free = shutil.disk_usage(self.output).free / 2**20
                raise StepError(
                    f"{step}: no space left for {self.output} ({free:.0f} MiB free); free some and run the same "
                    "command again, finished steps are kept"
                ) from error
            if isinstance(error, ValueError | TypeError | OSError | ImportError | RuntimeError):
                raise StepError(f"{step}: {type(error).__name__}: {' '.join(str(error).split())}") from error
            raise


def seconds_of(folder: Path) -> float:
    """Seconds from the last start to the end of the step that filled the folder."""
    return float(read_json(folder / _MANIFEST)["seconds"])


# --- arguments and manifests ------------------------------------------------------------------------------------------


def _replaced(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """``value`` with ``leaf`` applied to every artefact, model and source within."""
    if isinstance(value, Step):
        value = Artefact(value, "")
    if isinstance(value, Artefact | Model | Source):
        return leaf(value)
    if isinstance(value, Mapping):
        return {key: _replaced(part, leaf) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(part, leaf) for part in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **_replaced(vars(value), leaf))
    if isinstance(value, BaseModel):  # a section may hold sources; it is returned unchanged
        for _, part in value:
            _replaced(part, leaf)
    return value


def _leaves(value: Any) -> list[Any]:
    """Every artefact, model and source within ``value``."""
    found: list[Any] = []
    _replaced(value, found.append)
    return found


def _plain(value: Any) -> Any:
    """``value`` in JSON-compatible form, with artefacts as their names."""
    if isinstance(value, Step | Artefact):
        return str(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value


def _read_stage(folder: Path) -> dict[str, Any] | None:
    """``stage.json`` of a started or finished step; None if there is none."""
    damaged = StepError(f"{folder / _MANIFEST} is damaged; remove the folder {folder} and run again")
    try:
        stage = dict(read_json(folder / _MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError):
        raise damaged from None
    if stage.get("layout") != LAYOUT:
        output = folder.parent.parent
        raise StepError(f"output: {output} holds a run of an older version; remove it or set another output")
    artefacts = stage.get("artefacts", {})
    if not isinstance(stage.get("made_from"), dict) or not isinstance(artefacts, dict):
        raise damaged
    if any(not isinstance(entry, list) or len(entry) != 2 for entry in artefacts.values()):
        raise damaged
    return stage


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """``stage.json`` of a finished step; None if there is none or the step was killed."""
    stage = _read_stage(folder)
    return stage if stage is not None and "artefacts" in stage else None


def _digests(folder: Path) -> dict[str, tuple[int, str]]:
    """Relative path -> size and SHA-256 of every artefact below ``folder``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / _MANIFEST)
    return {str(path.relative_to(folder)): (path.stat().st_size, _sha256(path)) for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(name: str) -> Any:
    """A value that changes with an outside file: its SHA-256, or sizes and times of the files below a folder, which
    may hold a large model."""
    path = intents_path(name) if name.startswith(INTENTS) else Path(name).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        return [[str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    return _sha256(path) if path.is_file() else None


def _first_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The dotted key at which two unequal mappings first differ."""
    key = next(key for key in [*now, *before] if [key in before, before.get(key)] != [key in now, now.get(key)])
    old, new = before.get(key), now.get(key)
    return f"{key}.{_first_change(old, new)}" if isinstance(old, Mapping) and isinstance(new, Mapping) else key


def _disk_is_full(error: BaseException) -> bool:
    """Whether the disk, a quota or the largest file is full. Libraries wrap the error: safetensors and Arrow keep its
    text, torch's archive writer does not, and words it by version."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        texts = ("No space left on device", "File too large (os error", "PytorchStreamWriter failed writing")
        if any(text in str(seen) for text in (*texts, "basic_ios::clear: iostream error")):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
