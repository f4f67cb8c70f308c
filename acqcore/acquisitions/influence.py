"""Influence on a reference set: how far a gradient step on the sample moves the reference loss, to first order.

``cos(G_i, mean_r G_r)`` over the parameters the reference names, between sketches that keep inner products; ``dot``
leaves the norms in. It needs a forward and backward pass of its own: ``score`` takes the reference from
``acquisition_args={"influence": {"reference": ...}}`` and calls ``acqcore.influence``.

Source: TracIn (Pruthi et al. 2020); LESS (Xia et al. 2024) for the cosine of projected gradients.
"""

from __future__ import annotations

import torch

from acqcore.acquisitions.base import REGISTRY, Acquisition

REGISTRY["influence"] = Acquisition(
    "influence", "Influence on a reference set, the cosine of gradients cos(G_i, mean_r G_r).", needs_targets=True
)


def reference(
    gradients: torch.Tensor,  # [n, P] of the samples
    of_reference: torch.Tensor,  # [m, P] of the reference set
) -> torch.Tensor:
    """The definition, from gradients themselves, ``[n]``."""
    return torch.nn.functional.cosine_similarity(gradients, of_reference.mean(dim=0)[None], dim=1)
