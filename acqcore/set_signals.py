"""Set-level acquisitions of ``score``: gradient sketches of the samples, and what each adds to a set."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from acqcore import checks
from acqcore.diversity import Archive, gradient_diversity
from acqcore.ghost import grad_sketch_model
from acqcore.samples import Samples
from acqcore.student import StudentLike


def batch_diversity(
    student: StudentLike,
    samples: Samples,
    *,
    parameters: str | int = "head",
    dim: int = 4096,
    seed: int = 0,
    ridge: float = 0.01,
    ordered: bool = False,
    **options: Any,
) -> torch.Tensor:
    """:func:`acqcore.gradient_diversity` of the samples' sketches, ``[n]`` float32.

    Args:
        student, samples, parameters, dim, seed: as in :func:`acqcore.grad_sketch`.
        ridge, ordered: as in :func:`acqcore.gradient_diversity`.
        options: the rest of what :func:`acqcore.grad_sketch` takes.

    Raises: as both.
    """
    checks.ridge(ridge)
    sketches = grad_sketch_model(student, samples, parameters, dim=dim, seed=seed, **options)
    return _of_finite(sketches, partial(gradient_diversity, ridge=ridge, ordered=ordered))


def archive_novelty(
    student: StudentLike,
    samples: Samples,
    archive: Archive,
    *,
    parameters: str | int = "head",
    dim: int = 4096,
    seed: int = 0,
    **options: Any,
) -> torch.Tensor:
    """``archive.novelty`` of the samples' sketches, ``[n]`` float32; the archive stays as it is.

    Args:
        student, samples, parameters, dim, seed: as in :func:`acqcore.grad_sketch`.
        archive: of sketches with the same student, parameters, dim and seed.
        options: the rest of what :func:`acqcore.grad_sketch` takes.

    Raises: as :func:`acqcore.grad_sketch` and :meth:`acqcore.Archive.novelty`; TypeError for another archive.
    """
    checks.instance("archive", archive, Archive, "acqcore.Archive")
    sketches = grad_sketch_model(student, samples, parameters, dim=dim, seed=seed, **options)
    return _of_finite(sketches, archive.novelty)


def _of_finite(
    sketches: torch.Tensor,  # [n, dim]
    signal: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The signal of the finite rows, ``[n]``; NaN for the others, which take no part."""
    finite = sketches.isfinite().all(dim=1)
    values = torch.full((len(sketches),), torch.nan)
    values[finite] = signal(sketches[finite])
    return values
