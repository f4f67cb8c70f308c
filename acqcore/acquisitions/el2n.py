from __future__ import annotations

import torch

from acqcore.acquisitions.base import register
from acqcore.row_stats import RowStats


def reference(z: torch.Tensor, targets: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:  # [N, V], [N], [N, D]
    """Slow reference definition, ``[N]``."""
    p = z.softmax(dim=1)
    p[torch.arange(len(z)), targets] -= 1
    return p.norm(dim=1)


@register("el2n", needs_targets=True, reference=reference)
def el2n(stats: RowStats) -> torch.Tensor:
    """Error L2-norm, ||p - e_y||_2, the norm of the loss gradient with respect to the logits.

    Source: Paul, Ganguli & Dziugaite 2021.
    """
    assert stats.residual_norm is not None
    return stats.residual_norm
