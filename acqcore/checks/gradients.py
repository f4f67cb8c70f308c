"""Checks for per-sample gradients: packed samples, parameters, and sets of vectors such as sketches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from acqcore.checks.basic import IGNORE_INDEX, describe, finite, float_tensor, same_device


def offsets(value: Any, targets: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """Sample boundaries ``[B + 1]`` of packed rows: int64, increasing from 0 to N. Reads values once.

    They may be on the CPU for ``targets`` on any device; reading them from a GPU makes the host wait for it.

    Returns:
        ``[begin, end)`` rows of each sample, on the host.
    """
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int64:
        raise TypeError(f"offsets: expected an int64 tensor [B + 1], got {describe(value)}")
    if value.dim() != 1 or len(value) < 1:
        raise ValueError(f"offsets: expected [B + 1] with B >= 0, got {describe(value)}")
    if value.device.type != "cpu":
        same_device("offsets", value, "targets", targets)
    n, rows = len(targets), value.tolist()
    if rows[0] != 0 or rows[-1] != n:
        raise ValueError(f"offsets: expected to run from 0 to N = {n}, got {rows[0]} to {rows[-1]}")
    bounds = tuple(itertools.pairwise(rows))
    for i, (begin, end) in enumerate(bounds):
        if begin >= end:
            raise ValueError(f"offsets: expected increasing values, got {begin} then {end} (sample {i})")
    return bounds


def scored_tokens(counts: torch.Tensor) -> Callable[[], None]:
    """Checks that every sample has a scored token, given their numbers ``counts [B]``.

    On a GPU the counts are copied to the host without waiting. Call the returned function once the work that follows is
    queued: it then waits only for the work before the counts.
    """
    if counts.device.type != "cuda":
        _all_scored(counts)
        return lambda: None
    on_host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
    on_host.copy_(counts, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(counts.device))

    def check() -> None:
        arrived.synchronize()
        _all_scored(on_host)

    return check


def _all_scored(
    counts: torch.Tensor,  # [B], on the host
) -> None:
    if bool((counts == 0).any()):
        i = int((counts == 0).nonzero()[0])
        raise ValueError(f"targets: sample {i} has no scored token: all of its targets are {IGNORE_INDEX}")


def token_weights(value: Any, targets: torch.Tensor) -> None:
    """Weights ``[N]`` of the tokens' losses."""
    float_tensor("token_weights", value, "[N]", 1)
    if value.shape != targets.shape:
        raise ValueError(f"token_weights: expected [N] with N = {len(targets)}, got {describe(value)}")
    same_device("token_weights", value, "targets", targets)


def differentiable(names: Mapping[torch.Tensor, str]) -> None:
    """Every parameter is floating point: a quantised one has no gradient."""
    for parameter, name in names.items():
        if not parameter.is_floating_point():
            raise ValueError(
                f"parameters: {name} is {describe(parameter)}, which has no gradient; 'trainable' leaves out "
                "quantised parameters"
            )


def vectors(name: str, value: Any, like: torch.Tensor | None = None, like_name: str = "") -> None:
    """Finite vectors ``[n, d]`` that match the columns and device of ``like``. Reads values."""
    if like is None:
        float_tensor(name, value, "[n, d]", 2)
    else:
        like_vector(name, value, like, like_name)
    bad = ~value.isfinite().all(dim=1)
    if bool(bad.any()):
        raise ValueError(f"{name}: expected finite vectors, row {int(bad.nonzero()[0])} has NaN or infinity")


def labels(value: Any, count: int) -> None:
    """One int64 label for each of ``count`` rows."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"labels: expected int64 [{count}], got {describe(value)}")
    if value.dtype != torch.int64 or value.shape != (count,):
        raise ValueError(f"labels: expected int64 [{count}], got {describe(value)}")


def ridge(value: Any) -> None:
    """Noise on a kernel with a diagonal of ones; below 1e-9 the factorisation in float64 may fail."""
    finite("ridge", value)
    if value < 1e-9:
        raise ValueError(f"ridge: expected a number >= 1e-9, got {value}")


def like_vector(name: str, value: Any, like: torch.Tensor, like_name: str) -> None:
    """Vectors ``[n, d]`` that match the columns and device of ``like [..., d]``."""
    float_tensor(name, value, "[n, d]", 2)
    if value.shape[1] != like.shape[-1]:
        raise ValueError(f"{name}: expected [n, d] with d = {like.shape[-1]} as in {like_name}, got {describe(value)}")
    same_device(name, value, like_name, like)
