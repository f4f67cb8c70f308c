from __future__ import annotations

import torch

from acqcore.acquisitions.base import register
from acqcore.acquisitions.grad_norm import GradNormOptions, reference as of_written
from acqcore.gradients.need import GradientNeed


def norm(options: GradNormOptions) -> GradientNeed:
    """Norm of the gradient with the student's most likely tokens as targets."""
    return GradientNeed(options.parameters, options.loss, predicted=True)


def reference(
    z: torch.Tensor,  # [T, V] logits of one sample
    targets: torch.Tensor,  # [T]
    hidden: torch.Tensor,  # [T, D]
) -> torch.Tensor:
    """Slow reference definition for one sample and a plain head, a scalar; targets are the most likely tokens."""
    return of_written(z, z.argmax(dim=1), hidden)


@register("badge", options=GradNormOptions, needs=norm, over="sample", reference=reference)
def badge(norms: torch.Tensor) -> torch.Tensor:
    """Norm of the head gradient under the student's own predictions, ||sum_t w_t (p_t - e_argmax) h_t^T||_F.

    Label-free: small if the student is confident, no matter what was written. :func:`acqcore.badge_embedding`
    gives the vectors, from which batches that are both uncertain and diverse can be chosen.

    Source: Ash et al. 2020, "Deep batch active learning by diverse, uncertain gradient lower bounds", with each token
    as a separate label.
    """
    return norms
