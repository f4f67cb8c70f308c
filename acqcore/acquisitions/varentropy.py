from __future__ import annotations

import torch

from acqcore.acquisitions.base import register
from acqcore.row_stats import RowStats


def reference(z: torch.Tensor, targets: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:  # [N, V], [N], [N, D]
    """Slow reference definition, ``[N]``."""
    p = z.softmax(dim=1)
    surprisal = -z.log_softmax(dim=1).masked_fill(p == 0, 0)
    mean = (p * surprisal).sum(dim=1, keepdim=True)
    return (p * (surprisal - mean).square()).sum(dim=1)


@register("varentropy", reference=reference)
def varentropy(stats: RowStats) -> torch.Tensor:
    """Varentropy in nats squared, the variance of -log p_v under p.

    Source: Kontoyiannis & Verdu 2014.
    """
    return stats.varentropy
