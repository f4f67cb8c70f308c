"""A Laplace posterior over the weights of linear layers, from the Fisher information of a reference set.

The diagonal of a layer's Fisher information is approximated by the rank-one matrix with the same marginals,
``F_ij ~ F r_i c_j``, where r and c have mean 1. K-FAC's diagonal agrees if activations and gradients are independent.
After n tokens the posterior variance, with each factor damped, is ``1 / (n F (r_i + d) (c_j + d))``. It has rank one,
so ``sum_ij var_ij G_ij^2`` is the ghost norm of scaled inputs and output gradients. A layer without Fisher information,
such as the first factor of an adapter whose second is still 0, has variance 0: it adds nothing.

Sources: MacKay 1992 (Laplace approximation); Martens & Grosse 2015 (K-FAC, factored damping).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from acqcore.gradients.selection import same_student, select_linear, shapes_of
from acqcore.literals import Layers
from acqcore.students.student import Student


@dataclass(frozen=True, eq=False)
class LaplacePosterior:
    """Variances of the weights of a student's linear layers; made by :func:`acqcore.laplace_posterior`.

    Attributes:
        factors: name of a weight with P outputs and Q inputs -> ``[P]`` and ``[Q]`` float32, whose outer product is the
            variances.
        layers: the blocks that hold the weights.
    """

    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(repr=False)
    layers: Layers

    @classmethod
    def of(
        cls,
        marginals: Mapping[str, tuple[torch.Tensor, torch.Tensor]],  # name -> [P], [Q] of the Fisher diagonal
        layers: Layers,
        observations: float,
        damping: float,
    ) -> LaplacePosterior:
        """Build from the sums of each weight's Fisher diagonal over its inputs ``[P]`` and outputs ``[Q]``."""
        factors = {}
        for name, (rows, columns) in marginals.items():
            if not rows.any():
                factors[name] = torch.zeros(len(rows)), torch.zeros(len(columns))
                continue
            mean = rows.sum() / (len(rows) * len(columns))
            of_rows = observations * mean * (rows / rows.mean() + damping)
            factors[name] = of_rows.reciprocal().float(), (columns / columns.mean() + damping).reciprocal().float()
        return cls(factors, layers)

    def check(self, student: Student) -> None:
        """Raise ValueError if it was made with another student (names the difference)."""
        shapes = shapes_of(select_linear(student, self.layers))
        here = {name: sorted(shape) for name, shape in shapes.items()}
        same_student({name: sorted(map(len, factors)) for name, factors in self.factors.items()}, here)
