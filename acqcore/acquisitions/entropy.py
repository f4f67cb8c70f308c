from __future__ import annotations

import torch

from acqcore.acquisitions.base import register
from acqcore.row_stats import RowStats


def reference(z: torch.Tensor, targets: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:  # [N, V], [N], [N, D]
    """Slow reference definition, ``[N]``."""
    p = z.softmax(dim=1)
    return -(p * z.log_softmax(dim=1).masked_fill(p == 0, 0)).sum(dim=1)


@register("entropy", reference=reference)
def entropy(stats: RowStats) -> torch.Tensor:
    """Predictive entropy in nats, -sum_v p_v log p_v.

    Source: Shannon 1948; as an acquisition function, Dagan & Engelson 1995.
    """
    return stats.entropy
