from __future__ import annotations

import torch

from acqcore.acquisitions.base import register
from acqcore.row_stats import RowStats


def reference(z: torch.Tensor, targets: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:  # [N, V], [N], [N, D]
    """Slow reference definition, ``[N]``."""
    return 1 - z.softmax(dim=1).amax(dim=1)


@register("least_confidence", reference=reference)
def least_confidence(stats: RowStats) -> torch.Tensor:
    """Least confidence, 1 - max_v p_v.

    Source: Lewis & Gale 1994; Culotta & McCallum 2005 for sequences.
    """
    return stats.least_confidence
