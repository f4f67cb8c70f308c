"""Hash-based random signs and places, the same on every machine, device and backend, and sums of hashed columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from acqcore.backends import cpu, extension
from acqcore.kept import kept

#: Sign tables that stay on a device as bits, 32 bytes for each row of 256 signs.
KEPT_SIGNS = 2048
#: Hashes that stay on a device: one per parameter of a sketched student, 5 bytes per column (320 KiB for a matrix).
KEPT_HASHES = 1024

_MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))  # as signed 64-bit integers
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_BITS = 64


def random_signs(
    rows: int,
    columns: int,
    seed: int,
    stream: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Independent signs ``[rows, columns]``, a function of (seed, stream, row, column).

    Every 64 columns of a row are the bits of one SplitMix64 output (Steele, Lea & Flood 2014).
    """
    device = torch.device(device)
    words = _sign_words(rows, (columns + _BITS - 1) // _BITS, seed, stream, device)
    bits = (words[:, :, None] >> _shifts(device)) & 1  # [rows, 8 words, 8]
    return bits.flatten(1)[:, :columns].to(dtype).mul_(2).sub_(1)


@kept(8)
def _shifts(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


@kept(KEPT_SIGNS)
def _sign_words(rows: int, words: int, seed: int, stream: int, device: torch.device) -> torch.Tensor:
    """The outputs as bytes, lowest first, ``[rows, 8 words]`` uint8."""
    row = torch.arange(rows, dtype=torch.int64, device=device)
    word = torch.arange(words, dtype=torch.int64, device=device)
    bits = _mix(_mix(_key(seed, stream) + (row[:, None] + 1) * _GOLDEN) + (word + 1) * _GOLDEN)  # [rows, words]
    return bits.view(torch.uint8)


def hashed_places(rows: int, places: int, seed: int, stream: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """A place and a sign for each row, ``[rows]`` int32: the place in ``[0, places)``, or ``~place`` for minus.

    A function of (seed, stream, row): the columns of a count sketch (Charikar, Chen & Farach-Colton 2002).
    """
    row = torch.arange(rows, dtype=torch.int64, device=device)
    bits = _mix(_key(seed, stream) + (row + 1) * _GOLDEN)
    place = _shift_right(bits, 1) % places
    return place.where((bits & 1) == 0, ~place).to(torch.int32)


def rotated_places(
    rows: int, places: int, seed: int, stream: int, first_row: int = 0, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Like :func:`hashed_places`, with places that a kernel can fill in order.

    Row ``g places + u`` has the place ``(u + s_g) mod places``: each group of ``places`` rows is rotated by its own
    random ``s_g``, and every row has an independent sign. Consecutive rows therefore fall into consecutive places.

    Two rows of one group never collide; two of different groups do with probability ``1 / places``, as under
    :func:`hashed_places`. In a tensor sketch with hashed columns, entries (v, d) and (v', d') with d != d' collide with
    probability ``1 / places`` for any v and v', because the columns' difference is uniform. Signs alone make the
    expectation exact; the variance is at most that of independent places.
    """
    row = torch.arange(first_row, first_row + rows, dtype=torch.int64, device=device)
    key = _key(seed, stream)
    turn = _shift_right(_mix(_mixed(_number(key)) + (row // places + 1) * _GOLDEN), 1) % places
    place = (row + turn) % places
    negative = _mix(key + (row + 1) * _GOLDEN) & 1
    return place.where(negative == 0, ~place).to(torch.int32)


@dataclass(frozen=True, eq=False)
class ColumnHash:
    """A count sketch of P columns, the same in every run on any device: the place and the sign of each."""

    dim: int
    index: torch.Tensor  # [P] int32: places as from ``hashed_places``; with ``counts`` the columns by place
    signs: torch.Tensor | None  # [P] int8, +1 or -1, in the order of ``index`` if there are counts
    counts: torch.Tensor | None  # [dim] int64, columns of each place

    @classmethod
    def of(
        cls,
        places: torch.Tensor,  # [P] int32 as from ``hashed_places``
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
    """The hash of ``hashed_places`` for ``columns`` columns."""
    return ColumnHash.of(hashed_places(columns, dim, seed, stream, device=device), dim)


def _key(seed: int, stream: int) -> int:
    return _mixed(_number(seed) * _GOLDEN + stream)


def _number(value: int) -> torch.Tensor:
    """A tensor on the CPU, because a copy to a GPU would make the host wait."""
    return torch.tensor(value, dtype=torch.int64, device="cpu")


def _mixed(number: torch.Tensor) -> int:
    return int(_mix(number))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64, elementwise (wrapping arithmetic, logical shifts)."""
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIERS[1]
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, count: int) -> torch.Tensor:
    """Logical shift; torch's operator is arithmetic on int64."""
    return (x >> count) & ((1 << (64 - count)) - 1)
