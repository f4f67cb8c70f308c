from __future__ import annotations

import torch

from acqcore.acquisitions.base import register
from acqcore.acquisitions.needs import DrawOptions, draws
from acqcore.bayes import BayesStats


def reference(p: torch.Tensor) -> torch.Tensor:  # [K, N, V] probabilities of every draw
    """Slow reference definition, ``[N]``."""
    return torch.special.entr(p.mean(dim=0)).sum(dim=-1)


@register("predictive_entropy", options=DrawOptions, needs=draws, reference=reference)
def predictive_entropy(stats: BayesStats) -> torch.Tensor:
    """Entropy of the mean prediction in nats, H(mean_k p_k).

    Source: Gal & Ghahramani 2016.
    """
    return stats.predictive_entropy
