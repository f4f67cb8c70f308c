"""Norm of the sample's whole gradient, ||sum_t w_t (p_t - e_y) h_t^T||_F in the head.

Source: Settles & Craven 2008 (expected gradient length), with the written tokens for labels; as a reward for generated
data, AcquisitionSynthesis 2026. Cross-token terms are included: it is the norm of the gradient that a training step on
the sample would take in the head, weight and bias. Deeper parameters: ``acqcore.grad_norm``, and in ``score`` through
``acquisition_args={"grad_norm": {"parameters": ...}}``.
"""

from __future__ import annotations

import torch

from acqcore import checks
from acqcore.acquisitions.base import SampleBatch, register_sample
from acqcore.head_grad import LOSSES, head_grad_norm_from, loss_weights


@register_sample("grad_norm", needs_gram=True)
def grad_norm(batch: SampleBatch, *, loss: str = "mean") -> torch.Tensor:
    """Norm of the gradient of the sample's loss in the head, ||sum_t w_t (p_t - e_y) h_t^T||_F."""
    checks.one_of("loss", loss, LOSSES)
    targets = batch.stats.targets
    assert targets is not None
    weights = loss_weights(targets, batch.bounds, loss, None)
    if batch.visit is not None:
        return batch.visit.grad_norm(weights)
    return head_grad_norm_from(batch.hidden, batch.head, batch.stats, batch.bounds, weights, 1.0, batch.backend)


def reference(
    z: torch.Tensor,  # [T, V] logits of one sample
    targets: torch.Tensor,  # [T]
    hidden: torch.Tensor,  # [T, D]
) -> torch.Tensor:
    """The definition for one sample and a plain head, slowly, a scalar: the gradient, formed."""
    delta = z.softmax(dim=1)
    delta[torch.arange(len(z)), targets] -= 1
    return (delta.T @ hidden / len(z)).norm()
