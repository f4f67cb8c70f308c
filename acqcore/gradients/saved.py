"""Reference sets that are kept in a file."""

from __future__ import annotations

import os
import pickle
from dataclasses import fields
from typing import Any, ClassVar, Self

import torch

from acqcore import checks


class Saved:
    """A dataclass of tensors and plain values.

    Attributes:
        maker: function of acqcore that makes one.
        written_by: what writes its files, for messages.
    """

    maker: ClassVar[str]
    written_by: ClassVar[str]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, for ``acqcore score --acquisition-args``."""
        torch.save({field.name: getattr(self, field.name) for field in fields(self)}, path)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            OSError: the file cannot be read. ValueError: it is not a saved reference.
        """
        try:
            return cls(**torch.load(path, weights_only=True))
        except (TypeError, EOFError, pickle.UnpicklingError, RuntimeError) as error:
            raise ValueError(f"reference: expected a file from {cls.written_by}, got {os.fspath(path)}") from error

    @classmethod
    def given(cls, reference: Any) -> Self:
        """The argument ``reference``, one of these or the path of a file. Raises TypeError for anything else."""
        if isinstance(reference, str | os.PathLike):
            return cls.load(reference)
        checks.instance("reference", reference, cls, f"what acqcore.{cls.maker} gives")
        return reference
