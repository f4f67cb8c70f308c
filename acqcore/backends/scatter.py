"""Sums at given places that come out the same in every run, and the tables of places."""

from __future__ import annotations

import torch


def on_device(
    table: torch.Tensor,  # of the host
    device: torch.device,
) -> torch.Tensor:
    """A copy on ``device``; unlike ``table.to``, it does not wait for what a GPU has queued."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def add_at(
    out: torch.Tensor,  # added to
    dim: int,
    places: torch.Tensor,  # [m] int, along ``dim``
    values: torch.Tensor,  # the shape of ``out`` but for m along ``dim``
) -> None:
    """``out.index_add_``, whose atomics on a GPU add in any order; there places are sorted first."""
    if out.device.type == "cuda":
        torch.ops.aten.index_put_(out, [*[None] * dim, places.long()], values, True)
    else:
        out.index_add_(dim, places, values)
