"""Mean entropy of the draws in nats, mean_k H(p_k): what stays uncertain whatever the weights.

Source: Gal, Islam & Ghahramani 2017; Depeweg et al. 2018 (aleatoric uncertainty).
"""

from __future__ import annotations

import torch

from acqcore.acquisitions.base import register_draws
from acqcore.bayes import BayesStats


@register_draws("expected_entropy")
def expected_entropy(stats: BayesStats) -> torch.Tensor:
    """Mean entropy of the draws in nats, mean_k H(p_k): what stays uncertain whatever the weights."""
    return stats.expected_entropy


def reference(
    p: torch.Tensor,  # [K, N, V] probabilities of every draw
) -> torch.Tensor:
    """The definition, slowly, ``[N]``."""
    return _entropy(p).mean(dim=0)


def _entropy(p: torch.Tensor) -> torch.Tensor:  # [..., V]
    return -(p * p.log().masked_fill(p == 0, 0)).sum(dim=-1)
