"""Deterministic sums over given rows."""

from __future__ import annotations

import torch

from acqcore.kept import on_device


def add_segments(
    out: torch.Tensor,  # [S, ...] float32 or float64, added to
    lengths: list[int],  # S, neighbouring rows of each segment
    values: torch.Tensor,  # [sum of lengths, ...]
    ordered: bool | None = None,  # None: on a GPU, where ``index_add_`` adds in any order
) -> None:
    """Add the sum of each segment's rows."""
    if out.is_cuda if ordered is None else ordered:
        table = on_device(torch.tensor(lengths), out.device)
        out += torch.segment_reduce(values, "sum", lengths=table, axis=0, unsafe=True)
    else:
        out.index_add_(0, torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)), values)


def add_at(
    out: torch.Tensor,  # added to
    dim: int,
    places: torch.Tensor,  # [m] int, along ``dim``
    values: torch.Tensor,  # the shape of ``out``, except m along ``dim``
) -> None:
    """Deterministic ``out.index_add_``: its atomics add in any order on a GPU, so places are sorted first there."""
    if out.device.type == "cuda":
        torch.ops.aten.index_put_(out, [*[None] * dim, places.long()], values, True)
    else:
        out.index_add_(dim, places, values)
