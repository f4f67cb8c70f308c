"""What a sample's gradient adds to the others of the call, log(1 + r_i) of gradient directions.

A set-level value: ``r_i`` is what the other samples' gradients leave open of this one's direction (``diversity.py``).
It needs gradient sketches of a pass of their own, over ``parameters`` (the head by default), which ``score`` takes from
``acquisition_args={"gradient_diversity": ...}``. Copies score ~0; the order of the samples does not matter unless
``ordered`` is asked for.

Source: Kulesza & Taskar 2012; of gradients, Jung et al. 2025 (G-Vendi).
"""

from __future__ import annotations

import torch

from acqcore.acquisitions.base import REGISTRY, Acquisition

REGISTRY["gradient_diversity"] = Acquisition(
    "gradient_diversity",
    "Log-determinant gain of the sample's gradient over the others of the call, log(1 + r_i).",
    needs_targets=True,
)


def reference(
    vectors: torch.Tensor,  # [n, d] gradients
    ridge: float = 0.01,
) -> torch.Tensor:
    """The definition, slowly, ``[n]``."""
    x = torch.nn.functional.normalize(vectors.double(), dim=1)
    gains = []
    for i in range(len(x)):
        rest = torch.cat([x[:i], x[i + 1 :]])
        kernel = rest @ rest.T + ridge * torch.eye(len(rest), dtype=x.dtype)
        cross = rest @ x[i]
        gains.append((1 + x[i] @ x[i] - cross @ torch.linalg.solve(kernel, cross)).log())
    return torch.stack(gains)
