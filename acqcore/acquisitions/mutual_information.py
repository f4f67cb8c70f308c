from __future__ import annotations

import torch

from acqcore.acquisitions.base import Over, register
from acqcore.acquisitions.needs import DrawOptions, InformationOptions, LinearOptions
from acqcore.bayes import BayesStats
from acqcore.gradients.need import ProbeNeed


def reference(p: torch.Tensor) -> torch.Tensor:  # [K, N, V] probabilities of every draw
    """Slow reference definition, ``[N]``."""
    m = p.mean(dim=0)
    return torch.special.entr(m).sum(dim=-1) - torch.special.entr(p).sum(dim=-1).mean(dim=0)


def needs(options: DrawOptions | LinearOptions) -> DrawOptions | ProbeNeed:
    return options.need if isinstance(options, LinearOptions) else options


def over(options: DrawOptions | LinearOptions) -> Over:
    """The linear form has no per-token values, as noise before a token affects all tokens after it."""
    return "average" if isinstance(options, LinearOptions) else "token"


def stderr(found: BayesStats | torch.Tensor, options: DrawOptions | LinearOptions) -> torch.Tensor | None:
    """Standard error of the mean over the probes, ``[B]``; NaN for a single probe."""
    if not isinstance(options, LinearOptions):
        return None
    assert isinstance(found, torch.Tensor)
    if options.probes == 1:
        return torch.full_like(found[:, 0], torch.nan)
    return options.factor * found.std(dim=1) / options.probes**0.5


@register("mutual_information", options=InformationOptions, needs=needs, over=over, stderr=stderr, reference=reference)
def mutual_information(
    found: BayesStats | torch.Tensor,  # statistics of draws, or squares of each probe [B, P]
    options: DrawOptions | LinearOptions,
) -> torch.Tensor:
    """Mutual information of prediction and weights in nats per token, H(mean_k p_k) - mean_k H(p_k).

    The linear form is its limit for small noise of variance s^2 on activations or weights theta (delta method):
    ``1/2 sum_i s_i^2 E_{y ~ p} (d log p_y / d theta_i)^2``, averaged over a sample's scored tokens, or summed with
    ``reduction="sum"``. An estimate below 0, which few probes of a single token can give, becomes 0.

    Source: Houlsby et al. 2011 (BALD); by MC dropout, Gal, Islam & Ghahramani 2017.
    """
    if isinstance(options, LinearOptions):
        assert isinstance(found, torch.Tensor)
        return options.factor * found.mean(dim=1).clamp_min(0)
    assert isinstance(found, BayesStats)
    return found.mutual_information
