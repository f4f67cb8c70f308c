from __future__ import annotations

from dataclasses import dataclass

import torch

from acqcore import checks
from acqcore.acquisitions.base import register
from acqcore.acquisitions.needs import Options
from acqcore.gradients.need import GradientNeed
from acqcore.gradients.reference import Reference
from acqcore.head import Head
from acqcore.literals import Similarity
from acqcore.students.student import Student


@dataclass(frozen=True)
class InfluenceOptions(Options):
    """``reference``, from :func:`acqcore.influence_reference` or a saved one's path, and the ``similarity`` to it.

    Raises:
        TypeError: reference is neither. ValueError: unknown similarity, not a saved reference. OSError: no such file.
    """

    reference: Reference
    similarity: Similarity = "cosine"

    def __post_init__(self) -> None:
        object.__setattr__(self, "reference", Reference.given(self.reference))
        checks.literal("similarity", self.similarity, Similarity)

    def check(self, student: Student, head: Head) -> None:
        """Raise ValueError if the reference was made with another student (names the difference)."""
        self.reference.check(student, head)


def sketch(options: InfluenceOptions) -> GradientNeed:
    """Sketches with the settings of the reference."""
    made = options.reference
    return GradientNeed(made.parameters, made.loss, dim=made.dim, seed=made.seed)


def reference(
    gradients: torch.Tensor,  # [n, P] of the samples
    of_reference: torch.Tensor,  # [m, P] of the reference set
) -> torch.Tensor:
    """Reference definition from full gradients, ``[n]``."""
    return torch.nn.functional.cosine_similarity(gradients, of_reference.mean(dim=0)[None], dim=1)


@register("influence", options=InfluenceOptions, needs=sketch, over="sample", needs_targets=True, reference=reference)
def influence(
    sketches: torch.Tensor,  # [B, dim]
    options: InfluenceOptions,
) -> torch.Tensor:
    """Influence on a reference set, the cosine of gradients cos(G_i, mean_r G_r).

    To first order, how much a gradient step on the sample lowers the reference set's loss; ``dot`` keeps the norms.

    Source: TracIn (Pruthi et al. 2020); LESS (Xia et al. 2024) for the cosine of projected gradients.
    """
    return options.reference.similarity(sketches, options.similarity)
