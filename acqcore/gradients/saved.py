"""Saves reference sets to files."""

from __future__ import annotations

import os
import pickle
from dataclasses import fields
from typing import Any, ClassVar, Self

import torch

from acqcore import checks


class Saved:
    """Base of dataclasses of tensors and plain values that can be saved.

    Attributes:
        maker: acqcore function that creates an instance.
        written_by: writer of its files, for messages.
    """

    maker: ClassVar[str]
    written_by: ClassVar[str]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, for ``acqcore score --acquisition-args``."""
        torch.save({field.name: getattr(self, field.name) for field in fields(self)}, path)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file written by :meth:`save`.

        Raises:
            OSError: the file cannot be read. ValueError: the file is not a saved reference.
        """
        try:
            return cls(**torch.load(path, weights_only=True))
        except (TypeError, EOFError, pickle.UnpicklingError, RuntimeError) as error:
            raise ValueError(f"reference: expected a file from {cls.written_by}, got {os.fspath(path)}") from error

    @classmethod
    def given(cls, reference: Any) -> Self:
        """Return ``reference``, loaded first if it is a path. Raises TypeError for other types."""
        if isinstance(reference, str | os.PathLike):
            return cls.load(reference)
        checks.instance("reference", reference, cls, f"a result of acqcore.{cls.maker}()")
        return reference
