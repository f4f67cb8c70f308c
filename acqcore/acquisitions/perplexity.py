from __future__ import annotations

import torch

from acqcore.acquisitions.base import register
from acqcore.row_stats import RowStats


def reference(z: torch.Tensor, targets: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:  # [N, V], [N], [N, D]
    """Slow reference definition for single tokens, ``[N]``: the reciprocal of the probability."""
    return 1 / z.softmax(dim=1).gather(1, targets[:, None])[:, 0]


def finish(values: torch.Tensor) -> torch.Tensor:
    """exp of the values, at most the largest float32, so that the most surprising samples keep finite values."""
    return values.exp().clamp_max(torch.finfo(torch.float32).max)


@register("perplexity", needs_targets=True, finish=finish, reference=reference)
def perplexity(stats: RowStats) -> torch.Tensor:
    """Perplexity of the written tokens, exp(mean_t -log p_y).

    Source: Jelinek et al. 1977. Reduced as a loss and then exponentiated, so the mean is geometric.
    """
    assert stats.logprob is not None
    return -stats.logprob
