from __future__ import annotations

import torch

from acqcore.acquisitions.base import register
from acqcore.acquisitions.needs import DrawOptions, draws
from acqcore.bayes import BayesStats


def reference(p: torch.Tensor) -> torch.Tensor:  # [K, N, V] probabilities of every draw
    """Slow reference definition, ``[N]``."""
    return (p.square().sum(dim=2).mean(dim=0) / p.mean(dim=0).square().sum(dim=1)).log()


@register("bald_quadratic", options=DrawOptions, needs=draws, reference=reference)
def bald_quadratic(stats: BayesStats) -> torch.Tensor:
    """Mutual information with Renyi-2 entropies in nats, log(mean_k sum_v p_k^2 / sum_v (mean_k p_k)^2).

    Source: Renyi 1961, as a Jensen divergence of order 2; see ``BayesStats.quadratic_mutual_information``.
    """
    return stats.quadratic_mutual_information
