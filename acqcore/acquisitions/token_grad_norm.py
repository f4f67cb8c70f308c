from __future__ import annotations

import torch

from acqcore.acquisitions.base import register
from acqcore.row_stats import RowStats


def reference(z: torch.Tensor, targets: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:  # [N, V], [N], [N, D]
    """Slow reference definition, ``[N]``."""
    p = z.softmax(dim=1)
    p[torch.arange(len(z)), targets] -= 1
    return torch.stack([torch.outer(d, h).norm() for d, h in zip(p, hidden, strict=True)])


@register("token_grad_norm", needs_targets=True, reference=reference)
def token_grad_norm(stats: RowStats) -> torch.Tensor:
    """Norm of one token's head gradient, ||p - e_y||_2 ||h||_2.

    Source: the gradient of -log p_y in W is the outer product (p - e_y) h^T, whose Frobenius norm is the product of
    norms (Goodfellow 2015). The head's scale and softcap are not differentiated through.
    """
    assert stats.residual_norm is not None
    assert stats.hidden_norm is not None
    return stats.residual_norm * stats.hidden_norm
