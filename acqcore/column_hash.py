"""Signed sums of the columns that share a hashed place, the same in every run on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from acqcore.backends import cpu, extension
from acqcore.kept import kept
from acqcore.signs import hashed_places

#: Hashes that stay on a device: one per parameter of a sketched student, 5 bytes per column (320 KiB for a matrix).
KEPT_HASHES = 1024


@dataclass(frozen=True, eq=False)
class ColumnHash:
    """A count sketch of P columns: the place and the sign of each."""

    dim: int
    index: torch.Tensor  # [P] int32: places as from ``signs.hashed_places``; with ``counts`` the columns by place
    signs: torch.Tensor | None  # [P] int8, +1 or -1, in the order of ``index`` if there are counts
    counts: torch.Tensor | None  # [dim] int64, columns of each place

    @classmethod
    def of(
        cls,
        places: torch.Tensor,  # [P] int32 as from ``signs.hashed_places``
        dim: int,
        ordered: bool | None = None,  # None: on a GPU, where additions at places would need a sort in every call
    ) -> ColumnHash:
        if not (places.is_cuda if ordered is None else ordered):
            return cls(dim, places, None, None)
        minus = places < 0
        at = torch.where(minus, ~places, places)
        order = at.argsort(stable=True)
        ends = torch.searchsorted(at[order].long(), torch.arange(dim, device=at.device), right=True)
        signs = torch.where(minus, -1, 1).to(torch.int8)
        return cls(dim, order.int(), signs[order], ends.diff(prepend=ends.new_zeros(1)))

    def __call__(
        self,
        values: torch.Tensor,  # [N, P]
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """``[N, dim]`` in ``dtype``."""
        if self.signs is not None:
            signed = values.T.index_select(0, self.index).to(dtype) * self.signs[:, None]
            return torch.segment_reduce(signed, "sum", lengths=self.counts, axis=0, unsafe=True).T
        if dtype == torch.float32 and values.device.type == "cpu" and extension.missing() is None:
            out = values.new_empty((len(values), self.dim), dtype=dtype)
            cpu.hash_columns(values.to(dtype).contiguous(), self.index, out)
            return out
        minus = self.index < 0
        signed = values.to(dtype).where(~minus, -values)
        places = torch.where(minus, ~self.index, self.index)
        return signed.new_zeros((len(values), self.dim)).index_add_(1, places, signed)


@kept(KEPT_HASHES)
def column_hash(columns: int, dim: int, seed: int, stream: int, device: torch.device) -> ColumnHash:
    """The hash of ``signs.hashed_places`` for ``columns`` columns."""
    return ColumnHash.of(hashed_places(columns, dim, seed, stream, device=device), dim)
