"""Norm of the gradient under the student's own predictions, ||sum_t w_t (p_t - e_argmax) h_t^T||_F in the head.

Label-free: short where the student is sure, whatever was written. Deeper parameters through
``acquisition_args={"badge": {"parameters": ...}}``. For batches that are uncertain and different,
``acqcore.badge_embedding`` gives the vectors.

Source: Ash et al. 2020, "Deep batch active learning by diverse, uncertain gradient lower bounds", with each token a
label of its own.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from acqcore.acquisitions.base import SampleBatch, register_sample
from acqcore.acquisitions.grad_norm import grad_norm
from acqcore.row_stats import predicted_targets


@register_sample("badge", needs_targets=False)
def badge(batch: SampleBatch, *, loss: str = "mean") -> torch.Tensor:
    """Norm of the head gradient under the student's own predictions, ||sum_t w_t (p_t - e_argmax) h_t^T||_F."""
    return grad_norm(replace(batch, stats=predicted_targets(batch.stats), visit=None), loss=loss)


def reference(
    z: torch.Tensor,  # [T, V] logits of one sample
    targets: torch.Tensor,  # [T]
    hidden: torch.Tensor,  # [T, D]
) -> torch.Tensor:
    """The definition for one sample and a plain head, slowly, a scalar: the gradient, formed."""
    delta = z.softmax(dim=1)
    delta[torch.arange(len(z)), z.argmax(dim=1)] -= 1
    return (delta.T @ hidden / len(z)).norm()
