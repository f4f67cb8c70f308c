"""Sums at given places that are the same in every run, and copies of tables of places to a device."""

from __future__ import annotations

import torch


def on_device(
    table: torch.Tensor,  # on the host
    device: torch.device,
) -> torch.Tensor:
    """A copy on ``device``; unlike ``table.to``, it does not wait for work queued on a GPU."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


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
