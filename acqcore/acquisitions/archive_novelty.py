from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from acqcore import checks
from acqcore.acquisitions.base import register
from acqcore.acquisitions.needs import SketchOptions, of_finite, sketch
from acqcore.selection.diversity import Archive


@dataclass(frozen=True)
class NoveltyOptions(SketchOptions):
    """``archive``, an archive of sketches from :func:`acqcore.grad_sketch` with the same ``parameters``, ``dim`` and
    ``seed``, or the path of its ``state_dict()`` written by ``torch.save``.

    Raises:
        TypeError, ValueError: not an archive. OSError: no such file.
    """

    archive: Archive

    def __post_init__(self) -> None:
        if isinstance(self.archive, str | os.PathLike):
            archive = Archive()
            try:
                archive.load_state_dict(torch.load(self.archive, weights_only=True))
            except OSError:
                raise
            except Exception as error:  # as in Saved.load
                path = os.fspath(self.archive)
                raise ValueError(f"archive: expected a saved state_dict() of acqcore.Archive, got {path}") from error
            object.__setattr__(self, "archive", archive)
        checks.instance("archive", self.archive, Archive, "acqcore.Archive")


def reference(
    vectors: torch.Tensor,  # [n, d] gradients
    archive: torch.Tensor,  # [m, d] gradients in the archive
    ridge: float = 0.01,
) -> torch.Tensor:
    """Slow reference definition, ``[n]``."""
    x = torch.nn.functional.normalize(vectors.double(), dim=1)
    held = torch.nn.functional.normalize(archive.double(), dim=1)
    cross = held @ x.T  # [m, n]
    kernel = held @ held.T + ridge * torch.eye(len(held), dtype=x.dtype)
    return (1 + x.square().sum(dim=1) - (cross * torch.linalg.solve(kernel, cross)).sum(dim=0)).log()


@register(
    "archive_novelty", options=NoveltyOptions, needs=sketch, over="sample", needs_targets=True, reference=reference
)
def archive_novelty(
    sketches: torch.Tensor,  # [B, dim]
    options: NoveltyOptions,
) -> torch.Tensor:
    """Log-determinant gain of the sample's gradient over an archive, log(1 + r_i).

    Scoring does not change the archive; the caller adds the samples it keeps with
    ``archive.add(acqcore.grad_sketch(student, kept, ...))``.

    Source: see ``gradient_diversity``.
    """
    return of_finite(sketches, options.archive.novelty)
