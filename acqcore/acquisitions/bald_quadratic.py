"""Mutual information with Renyi-2 entropies in nats, log(mean_k sum_v p_k^2 / sum_v (mean_k p_k)^2).

Source: Renyi 1961, as a Jensen divergence of order 2; see ``BayesStats.quadratic_mutual_information``.
"""

from __future__ import annotations

import torch

from acqcore.acquisitions.base import register_draws
from acqcore.bayes import BayesStats


@register_draws("bald_quadratic")
def bald_quadratic(stats: BayesStats) -> torch.Tensor:
    """Mutual information with Renyi-2 entropies in nats, log(mean_k sum_v p_k^2 / sum_v (mean_k p_k)^2)."""
    return stats.quadratic_mutual_information


def reference(
    p: torch.Tensor,  # [K, N, V] probabilities of every draw
) -> torch.Tensor:
    """The definition, slowly, ``[N]``."""
    return (p.square().sum(dim=2).mean(dim=0) / p.mean(dim=0).square().sum(dim=1)).log()
