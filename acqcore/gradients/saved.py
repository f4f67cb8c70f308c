"""Reference sets that are written to a file and read back."""

from __future__ import annotations

import os
import pickle
from dataclasses import fields
from typing import Any, ClassVar, Self

import torch


class Saved:
    """Base of a dataclass of tensors and plain values, whose file holds its fields by name."""

    #: What writes such files, for the message.
    written_by: ClassVar[str]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the reference to a file, for ``acqcore score --acquisition-args``."""
        of_self: Any = self
        torch.save({field.name: getattr(self, field.name) for field in fields(of_self)}, path)

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
