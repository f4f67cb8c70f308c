from __future__ import annotations

import torch

from acqcore.acquisitions.base import register
from acqcore.acquisitions.grad_norm import GradNormOptions, reference as of_written
from acqcore.gradients.need import GradientNeed


def norm(options: GradNormOptions) -> GradientNeed:
    """Under the tokens that the student finds most likely."""
    return GradientNeed(options.parameters, options.loss, predicted=True)


def reference(
    z: torch.Tensor,  # [T, V] logits of one sample
    targets: torch.Tensor,  # [T]
    hidden: torch.Tensor,  # [T, D]
) -> torch.Tensor:
    """The definition for one sample and a plain head, slowly, a scalar: the targets are the most likely tokens."""
    return of_written(z, z.argmax(dim=1), hidden)


@register("badge", options=GradNormOptions, needs=norm, over="sample", reference=reference)
def badge(norms: torch.Tensor) -> torch.Tensor:
    """Norm of the head gradient under the student's own predictions, ||sum_t w_t (p_t - e_argmax) h_t^T||_F.

    Label-free: small where the student is confident, whatever was written. :func:`acqcore.badge_embedding` gives the
    vectors, for batches that are both uncertain and diverse.

    Source: Ash et al. 2020, "Deep batch active learning by diverse, uncertain gradient lower bounds", with each token a
    label of its own.
    """
    return norms
