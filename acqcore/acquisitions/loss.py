from __future__ import annotations

import torch

from acqcore.acquisitions.base import register
from acqcore.row_stats import RowStats


def reference(z: torch.Tensor, targets: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:  # [N, V], [N], [N, D]
    """Slow reference definition, ``[N]``."""
    return -z.log_softmax(dim=1).gather(1, targets[:, None])[:, 0]


@register("loss", needs_targets=True, reference=reference)
def loss(stats: RowStats) -> torch.Tensor:
    """Negative log-likelihood of the written token in nats, -log p_y.

    Source: Shannon's surprisal; the training loss itself (Settles 2009, section 3.1, as uncertainty of the label).
    """
    assert stats.logprob is not None
    return -stats.logprob
