"""Checks of sets of vectors: sketches, embeddings and references."""

from __future__ import annotations

import torch

from acqcore.checks.basic import describe, finite, float_tensor, same_device


def vectors(name: str, value: object, like: torch.Tensor | None = None, like_name: str = "") -> None:
    """Finite vectors ``[n, d]`` that match the columns and device of ``like``. Reads values."""
    float_tensor(name, value, "[n, d]", 2)
    assert isinstance(value, torch.Tensor)
    if like is not None:
        like_vector(name, value, like, like_name)
    bad = ~value.isfinite().all(dim=1)
    if bool(bad.any()):
        raise ValueError(f"{name}: expected finite vectors, row {int(bad.nonzero()[0])} has NaN or infinity")


def labels(value: object, count: int) -> None:
    """One int64 label for each of ``count`` rows."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"labels: expected int64 [{count}], got {describe(value)}")
    if value.dtype != torch.int64 or value.shape != (count,):
        raise ValueError(f"labels: expected int64 [{count}], got {describe(value)}")


def ridge(value: object) -> None:
    """Noise on a kernel with a diagonal of ones; below 1e-9 the factorisation in float64 may fail."""
    finite("ridge", value)
    if value < 1e-9:  # type: ignore[operator]
        raise ValueError(f"ridge: expected a number >= 1e-9, got {value}")


def like_vector(name: str, value: object, like: torch.Tensor, like_name: str) -> None:
    """Vectors ``[n, d]`` that match the columns and device of ``like [..., d]``."""
    float_tensor(name, value, "[n, d]", 2)
    assert isinstance(value, torch.Tensor)
    if value.shape[1] != like.shape[-1]:
        raise ValueError(f"{name}: expected [n, d] with d = {like.shape[-1]} as in {like_name}, got {describe(value)}")
    same_device(name, value, like_name, like)
