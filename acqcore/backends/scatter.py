"""Sums at given places that come out the same in every run."""

from __future__ import annotations

import torch


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
