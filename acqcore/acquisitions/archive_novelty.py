"""What a sample's gradient adds to an archive of earlier ones, log(1 + r_i) of gradient directions.

As ``gradient_diversity``, but against ``acqcore.Archive``, which ``score`` takes from
``acquisition_args={"archive_novelty": {"archive": ...}}``. ``score`` leaves the archive as it is: the caller adds
what it keeps, ``archive.add(acqcore.grad_sketch(student, kept, ...))``, with the same parameters, dim and seed.

Source: as ``gradient_diversity``.
"""

from __future__ import annotations

import torch

from acqcore.acquisitions.base import REGISTRY, Acquisition

REGISTRY["archive_novelty"] = Acquisition(
    "archive_novelty",
    "Log-determinant gain of the sample's gradient over an archive, log(1 + r_i).",
    needs_targets=True,
)


def reference(
    vectors: torch.Tensor,  # [n, d] gradients
    archive: torch.Tensor,  # [m, d] gradients held
    ridge: float = 0.01,
) -> torch.Tensor:
    """The definition, slowly, ``[n]``."""
    x = torch.nn.functional.normalize(vectors.double(), dim=1)
    held = torch.nn.functional.normalize(archive.double(), dim=1)
    cross = held @ x.T  # [m, n]
    kernel = held @ held.T + ridge * torch.eye(len(held), dtype=x.dtype)
    return (1 + x.square().sum(dim=1) - (cross * torch.linalg.solve(kernel, cross)).sum(dim=0)).log()
