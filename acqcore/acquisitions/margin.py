from __future__ import annotations

import torch

from acqcore.acquisitions.base import register
from acqcore.row_stats import RowStats


def reference(z: torch.Tensor, targets: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:  # [N, V], [N], [N, D]
    """Slow reference definition, ``[N]``."""
    p = z.softmax(dim=1)
    if p.shape[1] == 1:
        return 1 - p[:, 0]
    top = p.topk(2, dim=1).values
    return 1 - (top[:, 0] - top[:, 1])


@register("margin", reference=reference)
def margin(stats: RowStats) -> torch.Tensor:
    """Margin between the two most likely tokens, as 1 - (p_1 - p_2).

    Source: Scheffer et al. 2001. 1 - (p_1 - p_2) is computed as (1 - p_1) + p_2, which is exact for confident rows.
    """
    return stats.least_confidence + stats.top2_prob
