"""The result of ``score``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import pandas

_SHOWN_ROWS = 8


class Scores(Mapping[str, torch.Tensor]):
    """Acquisition values of n samples, in input order: a mapping name -> ``[n]`` float32 on the CPU.

    Attributes:
        n_tokens: ``[n]`` int64, scored tokens.
        valid: ``[n]`` bool, False where a value is NaN.
        stderr: name -> ``[n]`` float32, standard errors of stochastic acquisitions that estimate them (mutual
            information in its linear form, ``epig``); NaN with a single probe. Their squares are unbiased, but noisy
            with few probes: ``value +- 2 stderr`` contains the expectation with probability 70 % for two probes, 86 %
            for four, 91 % for eight and 94 % for sixteen (Student's t with P - 1 degrees of freedom).
    """

    def __init__(
        self,
        values: Mapping[str, torch.Tensor],  # name -> [n] float32
        n_tokens: torch.Tensor,  # [n] int64
        valid: torch.Tensor,  # [n] bool
        tokens: Mapping[str, list[torch.Tensor]] | None = None,  # name -> n of [n_tokens] float32
        stderr: Mapping[str, torch.Tensor] | None = None,  # name -> [n] float32
    ) -> None:
        self._values = dict(values)
        self.n_tokens = n_tokens
        self.valid = valid
        self._tokens = tokens
        self.stderr: Mapping[str, torch.Tensor] = {} if stderr is None else dict(stderr)

    @property
    def tokens(self) -> Mapping[str, list[torch.Tensor]]:
        """Per-token values: name -> a list of n float32 tensors ``[n_tokens[i]]``.

        Raises:
            ValueError: per-token values were not kept.
        """
        if self._tokens is None:
            raise ValueError("tokens: per-token values were not kept, expected score(..., keep_tokens=True)")
        return self._tokens

    # A mapping's equality would compare tensors as booleans.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __getitem__(self, name: str) -> torch.Tensor:
        if not isinstance(name, str) or name not in self._values:
            raise KeyError(f"{name!r}: expected one of {', '.join(self)}")
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def to_pandas(self) -> pandas.DataFrame:
        """One row per sample: acquisitions, any ``<name>_stderr``, ``n_tokens`` and ``valid``; no per-token values.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        import pandas

        return pandas.DataFrame(self._columns())

    def to_dataset(self) -> datasets.Dataset:
        """The same columns as a ``datasets.Dataset``.

        Raises:
            ModuleNotFoundError: datasets is not installed.
        """
        import datasets

        return datasets.Dataset.from_dict(self._columns())

    def _columns(self) -> dict[str, np.ndarray]:
        errors = {f"{name}_stderr": column for name, column in self.stderr.items()}
        columns = {**self._values, **errors, "n_tokens": self.n_tokens, "valid": self.valid}
        return {name: column.numpy() for name, column in columns.items()}

    def __repr__(self) -> str:
        n, invalid = len(self.n_tokens), int((~self.valid).sum())
        more = ["..."] if n > _SHOWN_ROWS else []
        columns = [["", *map(str, range(min(n, _SHOWN_ROWS))), *more, "mean"]]
        for name, value in self.items():
            columns.append([name, *(f"{v:.4g}" for v in value[:_SHOWN_ROWS].tolist()), *more, f"{value.nanmean():.4g}"])
        lengths, mean = self.n_tokens[:_SHOWN_ROWS].tolist(), self.n_tokens.double().mean()
        columns.append(["n_tokens", *map(str, lengths), *more, f"{mean:.4g}"])
        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in zip(*columns, strict=True)
        ]
        note = f", {invalid} not valid" if invalid else ""
        return "\n".join([f"Scores of {n} samples{note}", *lines])
