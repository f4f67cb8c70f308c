from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from acqcore import checks
from acqcore.acquisitions.base import register
from acqcore.acquisitions.needs import SketchOptions, of_finite, sketch
from acqcore.selection.diversity import gradient_diversity as log_det_gain


@dataclass(frozen=True)
class DiversityOptions(SketchOptions):
    """Options of a sketch, plus ``ridge`` and ``ordered`` of :func:`acqcore.gradient_diversity`."""

    ridge: float = 0.01
    ordered: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "ridge", checks.ridge(self.ridge))
        checks.flag("ordered", self.ordered)


def reference(
    vectors: torch.Tensor,  # [n, d] gradients
    ridge: float = 0.01,
) -> torch.Tensor:
    """Slow reference definition, ``[n]``."""
    x = torch.nn.functional.normalize(vectors.double(), dim=1)
    gains = []
    for i in range(len(x)):
        rest = torch.cat([x[:i], x[i + 1 :]])
        kernel = rest @ rest.T + ridge * torch.eye(len(rest), dtype=x.dtype)
        cross = rest @ x[i]
        gains.append((1 + x[i] @ x[i] - cross @ torch.linalg.solve(kernel, cross)).log())
    return torch.stack(gains)


@register(
    "gradient_diversity", options=DiversityOptions, needs=sketch, over="set", needs_targets=True, reference=reference
)
def gradient_diversity(
    sketches: torch.Tensor,  # [n, dim]
    options: DiversityOptions,
) -> torch.Tensor:
    """Log-determinant gain of the sample's gradient over the others of the call, log(1 + r_i).

    ``r_i`` is the part of the sample's direction that the other samples' gradients leave unexplained
    (:func:`acqcore.gradient_diversity`). Copies score ~0. The order of the samples only matters with ``ordered``.

    Source: Kulesza & Taskar 2012; for gradients, Jung et al. 2025 (G-Vendi).
    """
    return of_finite(sketches, partial(log_det_gain, ridge=options.ridge, ordered=options.ordered))
