from __future__ import annotations

import torch

from acqcore.acquisitions.base import register
from acqcore.acquisitions.needs import DrawOptions, draws
from acqcore.bayes import BayesStats


def reference(p: torch.Tensor) -> torch.Tensor:  # [K, N, V] probabilities of every draw
    """Slow reference definition, ``[N]``."""
    return torch.special.entr(p).sum(dim=-1).mean(dim=0)


@register("expected_entropy", options=DrawOptions, needs=draws, reference=reference)
def expected_entropy(stats: BayesStats) -> torch.Tensor:
    """Mean entropy of the draws in nats, mean_k H(p_k): the uncertainty that would remain with known weights.

    Source: Gal, Islam & Ghahramani 2017; Depeweg et al. 2018 (aleatoric uncertainty).
    """
    return stats.expected_entropy
