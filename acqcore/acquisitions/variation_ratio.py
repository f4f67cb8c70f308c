from __future__ import annotations

import torch

from acqcore.acquisitions.base import register
from acqcore.acquisitions.needs import DrawOptions, draws
from acqcore.bayes import BayesStats


def reference(p: torch.Tensor) -> torch.Tensor:  # [K, N, V] probabilities of every draw
    """Slow reference definition, ``[N]``."""
    votes = torch.nn.functional.one_hot(p.argmax(dim=2), p.shape[2])  # [K, N, V]
    return 1 - votes.sum(dim=0).amax(dim=1).to(p.dtype) / len(p)


@register("variation_ratio", options=DrawOptions, needs=draws, reference=reference)
def variation_ratio(stats: BayesStats) -> torch.Tensor:
    """Share of draws that disagree with the most common prediction, 1 - max_v votes_v / K.

    Source: Freeman 1965; by MC dropout, Gal & Ghahramani 2016.
    """
    return stats.variation_ratio
