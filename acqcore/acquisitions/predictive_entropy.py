"""Entropy of the mean prediction in nats, H(mean_k p_k).

Source: Gal & Ghahramani 2016.
"""

from __future__ import annotations

import torch

from acqcore.acquisitions.base import register_draws
from acqcore.bayes import BayesStats


@register_draws("predictive_entropy")
def predictive_entropy(stats: BayesStats) -> torch.Tensor:
    """Entropy of the mean prediction in nats, H(mean_k p_k)."""
    return stats.predictive_entropy


def reference(
    p: torch.Tensor,  # [K, N, V] probabilities of every draw
) -> torch.Tensor:
    """The definition, slowly, ``[N]``."""
    return _entropy(p.mean(dim=0))


def _entropy(p: torch.Tensor) -> torch.Tensor:  # [..., V]
    return -(p * p.log().masked_fill(p == 0, 0)).sum(dim=-1)
