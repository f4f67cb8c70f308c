from __future__ import annotations

import torch

from acqcore.acquisitions.base import register
from acqcore.row_stats import RowStats


def reference(z: torch.Tensor, targets: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:  # [N, V], [N], [N, D]
    """Slow reference definition, ``[N]``."""
    return 1 - z.softmax(dim=1).square().sum(dim=1)


@register("gini", reference=reference)
def gini(stats: RowStats) -> torch.Tensor:
    """Gini impurity, 1 - sum_v p_v^2.

    Source: Breiman et al. 1984; the quadratic (Renyi-2, Tsallis-2) entropy.
    """
    return stats.gini
