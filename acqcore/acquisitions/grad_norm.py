from __future__ import annotations

from dataclasses import dataclass

import torch

from acqcore.acquisitions.base import register
from acqcore.acquisitions.needs import Options
from acqcore.gradients.need import GradientNeed
from acqcore.literals import Loss, Parameters


@dataclass(frozen=True)
class GradNormOptions(Options):
    """``parameters`` and ``loss`` of :func:`acqcore.grad_norm`."""

    parameters: Parameters = "head"
    loss: Loss = "mean"


def norm(options: GradNormOptions) -> GradientNeed:
    """Norm of the gradient with the written tokens as targets."""
    return GradientNeed(options.parameters, options.loss)


def reference(
    z: torch.Tensor,  # [T, V] logits of one sample
    targets: torch.Tensor,  # [T]
    hidden: torch.Tensor,  # [T, D]
) -> torch.Tensor:
    """Slow reference definition for one sample and a plain head, a scalar, from the full gradient."""
    delta = z.softmax(dim=1)
    delta[torch.arange(len(z)), targets] -= 1
    return (delta.T @ hidden / len(z)).norm()


@register("grad_norm", options=GradNormOptions, needs=norm, over="sample", needs_targets=True, reference=reference)
def grad_norm(norms: torch.Tensor) -> torch.Tensor:
    """Norm of the gradient of the sample's loss in the head, ||sum_t w_t (p_t - e_y) h_t^T||_F.

    Cross-token terms are included: it is the norm of the gradient that a training step on the sample would use for the
    head's weight and bias, or for the deeper ``parameters``.

    Source: Settles & Craven 2008 (expected gradient length), with the written tokens as labels; as a reward for
    generated data, AcquisitionSynthesis 2026.
    """
    return norms
