"""One value per sample of a call, and what a reference set must hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from acqcore.scoring.run import Found, Runner
from acqcore.students.samples import Samples


def collect(
    runner: Runner,
    samples: Samples,
    tokenizer: Any,
    max_length: int | None,
    shape: tuple[int, ...],
    value: Callable[[Found], torch.Tensor],
) -> torch.Tensor:
    """``value [B, *shape]`` of every batch, in the order of the samples, ``[n, *shape]`` float32 on the CPU.

    Raises: as :func:`acqcore.score`.
    """
    with runner.student.in_step():
        rows = runner.encode(samples, tokenizer, max_length)
        values = torch.zeros(len(rows), *shape)
        for found in runner.batches(rows):
            values[found.indices] = value(found).float()
    return values


def check_reference_set(
    gradients: torch.Tensor,  # [n, ...]
) -> None:
    """Raise ValueError unless there is a sample and each one's gradient is finite (names the first that is not)."""
    if not len(gradients):
        raise ValueError("samples: expected at least one reference sample, got none")
    bad = ~gradients.isfinite().flatten(1).all(dim=1)
    if bool(bad.any()):
        raise ValueError(f"samples[{int(bad.nonzero()[0])}]: expected a finite gradient, got NaN or infinity")
