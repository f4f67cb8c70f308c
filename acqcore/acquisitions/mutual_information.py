from __future__ import annotations

import torch

from acqcore.acquisitions.base import register
from acqcore.acquisitions.needs import DrawOptions, draws
from acqcore.bayes import BayesStats


def reference(p: torch.Tensor) -> torch.Tensor:  # [K, N, V] probabilities of every draw
    """The definition, slowly, ``[N]``."""
    m = p.mean(dim=0)
    return torch.special.entr(m).sum(dim=-1) - torch.special.entr(p).sum(dim=-1).mean(dim=0)


@register("mutual_information", options=DrawOptions, needs=draws, reference=reference)
def mutual_information(stats: BayesStats) -> torch.Tensor:
    """Mutual information of prediction and weights in nats, H(mean_k p_k) - mean_k H(p_k).

    Source: Houlsby et al. 2011 (BALD); by MC dropout, Gal, Islam & Ghahramani 2017.
    """
    return stats.mutual_information
