from __future__ import annotations

import torch

from acqcore.acquisitions.base import register
from acqcore.row_stats import RowStats


def reference(z: torch.Tensor, targets: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:  # [N, V], [N], [N, D]
    """Slow reference definition, ``[N]``."""
    p = z.softmax(dim=1)  # the expectation over labels, written out
    length = torch.zeros(len(z), dtype=z.dtype)
    for y in range(z.shape[1]):
        residual = p.clone()
        residual[:, y] -= 1
        length += p[:, y] * (residual.norm(dim=1) * hidden.norm(dim=1)).square()
    return length


@register("expected_gradient_length", reference=reference)
def expected_gradient_length(stats: RowStats) -> torch.Tensor:
    """Expected squared gradient length of the head under the model's own labels, ||h||^2 gini.

    E_{y~p} ||(p - e_y) h^T||_F^2 = ||h||^2 (1 - sum_v p_v^2) needs no label. The head's scale and
    softcap are not differentiated through.

    Source: Settles, Craven & Ray 2008.
    """
    assert stats.hidden_norm is not None
    return stats.hidden_norm.square() * stats.gini
