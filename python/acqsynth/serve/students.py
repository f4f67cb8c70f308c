"""The student of a server, which can be replaced while requests are served."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import acqcore
from acqcore import Reduction
from acqcore.students.samples import EMPTY
from acqcore.students.tables import kind_of
from acqsynth.rewards.scoring import finite
from acqsynth.serve.middleware import ServiceError
from acqsynth.serve.options import Limits

Kind = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Loaded:
    """A served student. A request keeps the student it was tokenized for, even if another is loaded.

    Raises:
        ValueError: the student has no tokenizer.
    """

    name: str  #: as requested
    version: int  #: 1 for the initial student
    fingerprint: str  #: hash of its parameters
    student: acqcore.Student

    def __post_init__(self) -> None:
        if self.student.tokenizer is None:
            raise ValueError(f"student: {self.name} has no tokenizer")

    @functools.cached_property
    def vocab_size(self) -> int:
        """Read once: the head waits for requests that are being scored."""
        return self.student.head.vocab_size

    def described(self) -> dict[str, Any]:
        return {"name": self.name, "version": self.version, "fingerprint": self.fingerprint}

    def encode(
        self, samples: Sequence[Any], limits: Limits, max_length: int | None, kind: Kind | None
    ) -> tuple[list[acqcore.Row], dict[int, str]]:
        """Rows of n samples, and errors of those that cannot be scored: index -> message; their rows are empty.

        Args:
            limits: ``max_length`` and ``max_characters`` limit each sample.
            max_length: truncate to this many tokens, as in ``acqcore.score``.
            kind: that of the request's samples; others are errors.
        """
        most = limits.max_characters
        limit = min(limits.max_length, self.student.max_length or limits.max_length)
        sizes = [text_size(sample) for sample in samples]
        errors = {i: f"{size} characters, at most {most} are tokenized" for i, size in enumerate(sizes) if size > most}
        for i, sample in enumerate(samples):
            if (other := kind_of_sample(sample)) not in (None, kind):
                expected, got = (" and ".join(keys or ()) or "a string" for keys in (kind, other))
                errors.setdefault(i, f"expected {expected} as in the samples before it, got {got}")
        fit = [i for i in range(len(samples)) if i not in errors]
        faults: dict[int, str] = {}
        found = acqcore.encode(
            [samples[i] for i in fit],
            self.student.tokenizer,
            vocab_size=self.vocab_size,
            limit=limit,
            max_length=None if max_length is None else min(max_length, limit),
            errors=faults,
        )
        errors |= {fit[k]: message for k, message in faults.items()}
        rows = dict(zip(fit, found, strict=True))
        return [rows.get(i, EMPTY) for i in range(len(samples))], errors


def kind_of_sample(sample: Any) -> Kind | None:
    """The keys that define a sample's kind, none for a string; None for an unknown kind."""
    if isinstance(sample, str):
        return ()
    return kind_of(sample) if isinstance(sample, Mapping) else None


class Values(NamedTuple):
    """Values of one row; None if not finite."""

    values: tuple[float | None, ...]  #: one per acquisition
    stderr: Mapping[str, float | None]  #: standard errors of acquisitions estimated by random draws


@dataclass(frozen=True)
class Question:
    """What to compute; samples with the same question can share a batch."""

    acquisitions: tuple[str, ...]
    reduction: Reduction
    arguments: str  #: ``acquisition_args`` of ``acqcore.score`` as JSON

    def values(self, loaded: Loaded, rows: list[acqcore.Row], batch_tokens: int, backend: str | None) -> list[Values]:
        """Values of each row, with their standard errors."""
        scores = acqcore.score(
            loaded.student,
            rows,
            self.acquisitions,
            acquisition_args=json.loads(self.arguments),
            reduction=self.reduction,
            batch_tokens=batch_tokens,
            backend=backend,
            progress=False,
        )
        columns = [finite(scores[name]) for name in self.acquisitions]
        errors = {name: finite(column) for name, column in scores.stderr.items()}
        return [
            Values(row, {name: column[i] for name, column in errors.items()})
            for i, row in enumerate(zip(*columns, strict=True))
        ]


class Students:
    """Holds the student for new requests, initially ``first``.

    Args:
        root: folder from which other students are loaded; None forbids reloading.
        device: device for loaded students.
    """

    def __init__(
        self, first: acqcore.Student, name: str, *, root: Path | None = None, device: str | None = None
    ) -> None:
        self.current = Loaded(name, 1, fingerprint(first), first)
        self._root = None if root is None else root.resolve()
        self._device = device
        self._loading = asyncio.Lock()

    async def load(self, path: str) -> Loaded:
        """Switches to another student; the previous one is freed when its last request is answered.

        Args:
            path: path of a saved model below the root, relative to it.

        Raises:
            ServiceError: ``forbidden``, there is no root; ``invalid_request``, no such model, or it cannot be loaded
                (the current student is kept); ``reload_in_progress``, another student is being loaded.
        """
        if self._root is None:
            raise ServiceError(
                "forbidden", "the student cannot be changed: the server was started without --student-root"
            )
        if self._loading.locked():
            raise ServiceError("reload_in_progress", "another student is being loaded")
        async with self._loading:
            folder = _inside(self._root, path)
            try:
                student = await asyncio.to_thread(acqcore.Student.load, folder, device=self._device)
                mark = await asyncio.to_thread(fingerprint, student)
                self.current = Loaded(path, self.current.version + 1, mark, student)
            except Exception as error:  # transformers raises arbitrary exceptions for broken files
                reason = str(error).strip().split("\n")[0].replace(str(self._root), "")
                raise ServiceError("invalid_request", f"path: {path!r} cannot be loaded: {reason}") from error
            return self.current


def text_size(value: Any) -> int:
    """Number of characters of all text in a sample."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(text_size(key) + text_size(item) for key, item in value.items())
    if isinstance(value, Sequence):
        return sum(map(text_size, value))
    return 0


def _inside(root: Path, path: str) -> Path:
    """Resolves a folder below the root that holds a complete model, following symbolic links."""
    try:
        folder = (root / path).resolve()
        inside = folder.is_relative_to(root)
        # An adapter refers to its base model, which may be anywhere.
        whole = inside and (folder / "config.json").is_file() and not (folder / "adapter_config.json").exists()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, a link cycle
        inside = whole = False
    if not inside:
        raise ServiceError("invalid_request", "path: expected a folder below the student root")
    if not whole:
        raise ServiceError(
            "invalid_request", f"path: expected a folder with a complete model (config.json, no adapter), got {path!r}"
        )
    return folder


def fingerprint(student: acqcore.Student) -> str:
    """Identifies a student: 16 hexadecimal digits of SHA-256 over the parameters of trunk and head."""
    digest = hashlib.sha256()
    head = student.head
    tensors = [head.weight, *([] if head.bias is None else [head.bias])]
    if isinstance(student.trunk, torch.nn.Module):
        tensors += [tensor.detach() for tensor in student.trunk.state_dict().values()]
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
