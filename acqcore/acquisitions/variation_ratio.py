"""Share of draws that do not agree with the commonest prediction, 1 - max_v votes_v / K.

Source: Freeman 1965; by MC dropout, Gal & Ghahramani 2016.
"""

from __future__ import annotations

import torch

from acqcore.acquisitions.base import register_draws
from acqcore.bayes import BayesStats


@register_draws("variation_ratio")
def variation_ratio(stats: BayesStats) -> torch.Tensor:
    """Share of draws that do not agree with the commonest prediction, 1 - max_v votes_v / K."""
    return stats.variation_ratio


def reference(
    p: torch.Tensor,  # [K, N, V] probabilities of every draw
) -> torch.Tensor:
    """The definition, slowly, ``[N]``."""
    votes = torch.nn.functional.one_hot(p.argmax(dim=2), p.shape[2])  # [K, N, V]
    return 1 - votes.sum(dim=0).amax(dim=1).to(p.dtype) / len(p)
