"""Signed sums of the columns that share a hashed place, the same in every run on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from acqcore.kept import kept
from acqcore.signs import hashed_places

#: Hashes that stay on a device: one per parameter of a sketched student, 5 bytes per column (320 KiB for a matrix).
KEPT_HASHES = 1024


@dataclass(frozen=True, eq=False)
class ColumnHash:
    """Where each of P columns goes, and with which sign (a count sketch)."""

    dim: int
    index: torch.Tensor  # [P] int32: the columns' places in [0, dim), or with ``counts`` the columns ordered by place
    signs: torch.Tensor  # [P] int8, +1 or -1, in the order of ``index``
    counts: torch.Tensor | None  # [dim] int64, columns of each place

    @classmethod
    def of(
        cls,
        places: torch.Tensor,  # [P] int32 as from ``signs.hashed_places``
        dim: int,
        ordered: bool | None = None,  # None: on a GPU, where additions at places would need a sort in every call
    ) -> ColumnHash:
        minus = places < 0
        at = torch.where(minus, ~places, places)
        signs = torch.where(minus, -1, 1).to(torch.int8)
        if not (at.is_cuda if ordered is None else ordered):
            return cls(dim, at, signs, None)
        order = at.argsort(stable=True)
        ends = torch.searchsorted(at[order].long(), torch.arange(dim, device=at.device), right=True)
        return cls(dim, order.int(), signs[order], ends.diff(prepend=ends.new_zeros(1)))

    def __call__(
        self,
        values: torch.Tensor,  # [N, P]
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """``[N, dim]`` in ``dtype``."""
        if self.counts is None:
            signed = values.to(dtype) * self.signs.to(dtype)
            return signed.new_zeros((len(values), self.dim)).index_add_(1, self.index, signed)
        signed = values.T.index_select(0, self.index).to(dtype) * self.signs[:, None]
        return torch.segment_reduce(signed, "sum", lengths=self.counts, axis=0, unsafe=True).T


@kept(KEPT_HASHES)
def column_hash(columns: int, dim: int, seed: int, stream: int, device: torch.device) -> ColumnHash:
    """The hash of ``signs.hashed_places`` for ``columns`` columns."""
    return ColumnHash.of(hashed_places(columns, dim, seed, stream, device=device), dim)
