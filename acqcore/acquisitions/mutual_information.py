"""Mutual information of prediction and weights in nats, H(mean_k p_k) - mean_k H(p_k).

Source: Houlsby et al. 2011 (BALD); by MC dropout, Gal, Islam & Ghahramani 2017.
"""

from __future__ import annotations

import torch

from acqcore.acquisitions.base import register_draws
from acqcore.bayes import BayesStats


@register_draws("mutual_information")
def mutual_information(stats: BayesStats) -> torch.Tensor:
    """Mutual information of prediction and weights in nats, H(mean_k p_k) - mean_k H(p_k)."""
    return stats.mutual_information


def reference(
    p: torch.Tensor,  # [K, N, V] probabilities of every draw
) -> torch.Tensor:
    """The definition, slowly, ``[N]``."""
    m = p.mean(dim=0)
    return _entropy(m) - _entropy(p).mean(dim=0)


def _entropy(p: torch.Tensor) -> torch.Tensor:  # [..., V]
    return -(p * p.log().masked_fill(p == 0, 0)).sum(dim=-1)
