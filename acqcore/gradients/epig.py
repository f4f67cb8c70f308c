"""Reference set for expected predictive information gain: sketched gradients under random cotangents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from acqcore.gradients.need import ProbeNeed
from acqcore.gradients.saved import Saved
from acqcore.gradients.selection import same_student, select_linear, shapes_of
from acqcore.literals import Layers
from acqcore.students.student import Student


@dataclass(frozen=True, eq=False)
class EpigReference(Saved):
    """Sketched gradients of a reference set under random cotangents; made by :func:`epig_reference`.

    Attributes:
        sketches: ``[2, m, dim]`` float32, two independent sketches of m gradients (one per sample and probe), each
            gradient divided by the square root of its sample's scored-token count.
        layers, seed: settings of the gradients.
        shapes: name -> shape of each differentiated weight.
    """

    maker: ClassVar[str] = "epig_reference"
    written_by: ClassVar[str] = "EpigReference.save"

    sketches: torch.Tensor
    layers: Layers
    seed: int
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

    @property
    def dim(self) -> int:
        """Length of a sketch."""
        return self.sketches.shape[2]

    def check(self, student: Student) -> None:
        """Raise ValueError if the reference was made with another student (names the difference)."""
        same_student(self.shapes, shapes_of(select_linear(student, self.layers)))

    def needs(self, probes: int) -> tuple[ProbeNeed, ProbeNeed]:
        """Needs for sketches comparable with the reference's, under independent cotangents."""
        return sketch_needs(self.layers, probes, self.seed + 1, self.dim, self.seed)

    def squares(
        self,
        first: torch.Tensor,  # [B, P, dim]
        second: torch.Tensor,  # [B, P, dim]
    ) -> torch.Tensor:
        """Mean squared inner product with the reference set's gradients, ``[B, P]`` float64.

        Unbiased: the two factors of each square come from independent sketches.
        """
        inner = torch.einsum("hnpd,hmd->hnpm", torch.stack([first, second]).double(), self.sketches.double())
        return inner.prod(dim=0).mean(dim=2)


def sketch_needs(layers: Layers, probes: int, seed: int, dim: int, sketch_seed: int) -> tuple[ProbeNeed, ProbeNeed]:
    """Needs for two independent sketches of the same gradients."""
    first, second = (
        ProbeNeed("weights", layers, probes, seed, dim=dim, sketch_seed=2 * sketch_seed + i) for i in (0, 1)
    )
    return first, second
