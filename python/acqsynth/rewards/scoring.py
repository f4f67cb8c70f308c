"""Acquisition values of samples for one student: the scoring behind every acquisition reward and signal."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast
from weakref import WeakValueDictionary

import torch

import acqcore
from acqcore import Reduction
from acqcore.acquisitions import REGISTRY
from acqcore.students.tables import listed
from acqsynth import checks
from acqsynth.domains import Domain, Sample
from acqsynth.models import load_tokenizer
from acqsynth.rewards.batch import Batch, require_samples

logger = logging.getLogger(__name__)

STUDENT_VARIABLE = "ACQSYNTH_STUDENT"

#: Arguments of ``acqcore.influence_reference`` that may accompany influence's reference samples.
REFERENCE = ("parameters", "dim", "seed")

#: Arguments that may be the path of a file.
SAVED = ("reference", "archive")

#: Scoring switches the student's mode, so threads must take turns (AsyncGRPO runs several).
_scoring = threading.Lock()


class Scored(NamedTuple):
    """Scores of n samples; None for a sample without a value."""

    values: dict[str, list[float | None]]  #: acquisition -> values
    lengths: list[int]  #: scored tokens
    stderr: dict[str, list[float | None]]  #: randomly estimated acquisition -> standard errors


class Scorer:
    """Computes one or more acquisitions for one student in a single ``acqcore.score`` call.

    Args:
        student: as :class:`acqsynth.rewards.AcquisitionReward`.
        acquisitions: one or more names from ``acqcore.acquisitions()``.
        domain: if given, samples are :class:`acqsynth.domains.Sample`, scored in the format that the student is trained
            on; otherwise samples are those of ``acqcore.score``.
        arguments: acquisition -> its arguments, as in ``acquisition_args`` of ``acqcore.score``. Instead of an
            ``acqcore.Reference``, influence also accepts samples, with ``parameters``, ``dim`` and ``seed`` of
            ``acqcore.influence_reference``; their gradient is computed on the first call.
        name: shown in the message if the student is missing.
        reduction, tokenizer, backend, batch_tokens, max_length, device: as AcquisitionReward.

    Raises:
        ValueError, TypeError: as ``acqcore.score``; also a model without a tokenizer, or a max_length below 2.
    """

    def __init__(
        self,
        student: Any,
        acquisitions: str | Iterable[str],
        *,
        domain: Domain | None = None,
        arguments: Mapping[str, Mapping[str, Any]] | None = None,
        name: str = "a scorer",
        reduction: Reduction = "mean",
        tokenizer: Any = None,
        backend: str | None = None,
        batch_tokens: int = 8192,
        max_length: int = 2048,
        device: str | None = None,
    ) -> None:
        self.acquisitions = (acquisitions,) if isinstance(acquisitions, str) else tuple(acquisitions)
        if not self.acquisitions:
            raise ValueError("acquisitions: expected at least one name")
        for acquisition in self.acquisitions:
            if not isinstance(acquisition, str) or acquisition not in REGISTRY:
                raise ValueError(f"acquisition: unknown {acquisition!r}, expected one of {', '.join(REGISTRY)}")
        if not isinstance(max_length, int) or max_length < 2:
            raise ValueError(f"max_length: expected at least 2 tokens, got {max_length!r}")
        self.tokenizer = tokenizer
        self.student: Any = None
        self._reference: acqcore.Reference | None = None
        self._shared: SharedStudent | None = None
        self._special: frozenset[str] | None = None
        self.refresh(student)
        self.domain = domain
        self.arguments = dict(arguments or {})
        checked = self._arguments(_placeholder)
        acqcore.check_request(
            self.acquisitions, checked, reduction=reduction, batch_tokens=batch_tokens, backend=backend, device=device
        )
        self.arguments = {name: self._opened(name, given or {}) for name, given in self.arguments.items()}
        self.name = name
        self.reduction = reduction
        self.backend = backend
        self.batch_tokens = batch_tokens
        self.max_length = max_length
        self.device = device

    def _arguments(self, reference: Callable[..., acqcore.Reference]) -> dict[str, dict[str, Any]]:
        """The arguments for ``acqcore.score``; ``reference`` maps influence's reference samples and their options."""
        given = {name: dict(options) for name, options in self.arguments.items() if options}
        influence = given.get("influence", {})
        if "reference" in influence and not isinstance(influence["reference"], acqcore.Reference):
            options = {name: influence.pop(name) for name in REFERENCE if name in influence}
            influence["reference"] = reference(influence["reference"], **options)
        return given

    def _opened(self, acquisition: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """The arguments with a saved reference or archive in place of its path, so that all calls share it, and with
        reference samples as a list."""
        paths = [name for name, value in given.items() if isinstance(value, os.PathLike | str) and name in SAVED]
        options = REGISTRY[acquisition].options.of(acquisition, given) if paths else None
        opened = {**given, **{name: getattr(options, name) for name in paths}}
        if acquisition == "influence" and not isinstance(opened.get("reference"), acqcore.Reference):
            try:
                opened["reference"] = listed(opened["reference"])
            except (TypeError, ValueError) as error:
                raise type(error)(f"reference: {error}") from None
            if not opened["reference"]:
                raise ValueError("reference: expected at least one sample, got none")
            if self.domain is not None:
                require_samples("reference", opened["reference"])
        return opened

    def check(self) -> None:
        """Loads the student."""
        with _scoring:
            self._student()

    def special_tokens(self) -> frozenset[str]:
        """The student's special tokens in brackets; others, such as a padding token ``!``, are also plain text."""
        if self._special is None:
            tokenizer = self.tokenizer or self._tokenizer()
            if tokenizer is None:
                raise ValueError("tokenizer: expected one, as the student has none")
            special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
            self._special = frozenset(token for token in special if token[0] in "<[" and token[-1] in ">]")
        return self._special

    def __call__(self, samples: Sequence[Any]) -> Scored:
        """Scores n samples; callers that pass the same samples of a :class:`Batch` share one pass."""
        if not isinstance(samples, Batch):
            return self._score(samples)
        [scored] = samples.each(self, [samples], lambda new: [self._score(new[0])], lambda batch: tuple(map(id, batch)))
        return cast(Scored, scored)

    def sketches(self, samples: Sequence[Any], **options: Any) -> torch.Tensor:
        """``acqcore.grad_sketch`` of n samples, ``[n, dim]``; takes its options ``parameters``, ``dim``, ``seed``."""
        with _scoring:
            student = self._student()
            tokenizer = self.tokenizer or student.tokenizer
            rows = self._rows(samples, tokenizer)
            return acqcore.grad_sketch(student, rows, **options, **self._passes(student, tokenizer))

    def refresh(self, student: Any) -> None:
        """Switches to another student; the gradient of reference samples is recomputed. ValueError for a model if the
        scorer has no tokenizer."""
        if isinstance(student, torch.nn.Module) and self.tokenizer is None:
            raise ValueError("tokenizer: expected the student's tokenizer, as student is a model, which has none")
        with _scoring:  # a thread may be loading the previous student
            self.student = student
            self._reference = self._shared = self._special = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shared": None}  # each process loads its own

    def _score(self, samples: Sequence[Any]) -> Scored:
        samples = listed(samples)
        errors: dict[int, str] = {}
        with _scoring:
            student = self._student()
            tokenizer = self.tokenizer or student.tokenizer
            passes = self._passes(student, tokenizer)
            rows = self._rows(samples, tokenizer)

            def reference(samples: Sequence[Any], **options: Any) -> acqcore.Reference:
                if self._reference is None:
                    aim = self._rows(samples, tokenizer)
                    self._reference = acqcore.influence_reference(student, aim, **options, **passes)
                return self._reference

            scores = acqcore.score(
                student,
                rows,
                self.acquisitions,
                acquisition_args=self._arguments(reference),
                reduction=self.reduction,
                progress=False,
                errors=errors,
                **passes,
            )
        for i, message in errors.items():
            if message.startswith("tokenizer: "):
                raise ValueError(message)
            if not isinstance(rows[i], str):  # plain text of one token has nothing to score
                logger.warning("%s: samples[%d] cannot be scored: %s", self.name, i, message)
        return Scored(
            {name: finite(scores[name]) for name in self.acquisitions},
            scores.n_tokens.tolist(),
            {name: finite(column) for name, column in scores.stderr.items()},
        )

    def _passes(self, student: acqcore.Student, tokenizer: Any) -> dict[str, Any]:
        return {
            "tokenizer": tokenizer,
            "batch_tokens": self.batch_tokens,
            "max_length": min(self.max_length, student.max_length or self.max_length),
            "backend": self.backend,
        }

    def _rows(self, samples: Sequence[Any], tokenizer: Any) -> Sequence[Any]:
        if self.domain is None:
            return samples
        chat = getattr(tokenizer, "chat_template", None) is not None
        return [training_row(self.domain, sample, chat) for sample in samples]

    def _named(self) -> Any:
        """The student as given, or the one that the environment names."""
        if self.student is not None:
            return self.student
        if not (path := os.environ.get(STUDENT_VARIABLE)):
            raise RuntimeError(
                f"{STUDENT_VARIABLE} is not set: {self.name!r} expects it to hold the student's path or hub id"
            )
        return path

    def _tokenizer(self) -> Any:
        """The student's own tokenizer; a student that is a path is not loaded for it."""
        student = self._named()
        return load_tokenizer(os.fspath(student)) if isinstance(student, str | os.PathLike) else student.tokenizer

    def _student(self) -> acqcore.Student:
        student = self._named()
        if isinstance(student, str | os.PathLike):
            if self._shared is None:
                self._shared = load_student(os.fspath(student), self.device)
            return self._shared.student
        return student if isinstance(student, acqcore.Student) else acqcore.Student.from_model(student)


def _placeholder(samples: Any, parameters: Any = "all", dim: Any = 1, seed: Any = 0) -> acqcore.Reference:
    """Carries the options of a reference whose gradient is computed on the first call, so that they can be checked."""
    checks.positive_int("dim", dim)
    return acqcore.Reference(torch.ones(dim), 1, parameters, seed, "mean", {})


def finite(
    column: torch.Tensor,  # [n]
) -> list[float | None]:
    """The values; None where not finite."""
    return [value if math.isfinite(value) else None for value in column.tolist()]


def training_row(domain: Domain, sample: Sample, chat: bool) -> dict[str, Any]:
    """The sample in the student's training format, for ``acqcore.score``: the solution is scored given the prompt."""
    prompt, solution = domain.student_prompt(sample.question), domain.solution(sample)
    if chat:
        return {"prompt": prompt, "completion": [{"role": "assistant", "content": solution}]}
    return {"prompt": "\n".join(message["content"] for message in prompt) + "\n", "completion": solution}


@dataclass(frozen=True, eq=False)
class SharedStudent:
    """A loaded student: ``model`` generates, and ``student`` scores with the same weights."""

    model: Any
    student: acqcore.Student


#: (path, saved weights, device) -> student, kept alive only while a scorer or an engine holds it.
_students: WeakValueDictionary[tuple[object, ...], SharedStudent] = WeakValueDictionary()


def load_student(path: str, device: str | None) -> SharedStudent:
    """The student at ``path``, shared by all its current users; loaded again once other weights are saved there."""
    key = (path, _saved(path), device)
    shared = _students.get(key)
    if shared is None:
        model = acqcore.load_model(path)
        model = (model if device is None else model.to(device)).eval()
        student = acqcore.Student.from_model(model, tokenizer=load_tokenizer(path))
        _students[key] = shared = SharedStudent(model, student)
    return shared


def _saved(path: str) -> frozenset[tuple[str, int, int]]:
    """Name, time and size of the weight files in a folder; empty for a hub id."""
    files = [(file.name, file.stat()) for kind in ("*.safetensors", "*.bin") for file in Path(path).glob(kind)]
    return frozenset((name, stat.st_mtime_ns, stat.st_size) for name, stat in files)
