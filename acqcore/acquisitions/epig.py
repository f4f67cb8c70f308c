"""Expected predictive information gain: how much a sample's answer tells about the answers to a reference set.

Under a Gaussian posterior over the weights with a small variance s^2 each, the mutual information between the tokens y
after x and y' after x' is, to leading order,

    s^4 / 2  E_{y, y'} <d log p_y / dW, d log p_y' / dW>^2  =  s^4 / 2  E_{c, c'} <G_c(x), G_c'(x')>^2

where G_c is the gradient under a random cotangent c of ``acqcore.fisher``. Unlike mutual information with the weights,
it is large only for samples that also bear on the reference set; unlike influence, it needs no labels, neither of the
sample nor of the reference set.

Sources: Bickford Smith et al. 2023, "Prediction-oriented Bayesian active learning" (EPIG); Kirsch & Gal 2022,
"Unifying approaches in active learning and active sampling via Fisher information" (the second order).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from acqcore import checks
from acqcore.acquisitions.base import register
from acqcore.acquisitions.needs import WEIGHT_VARIANCE, Options
from acqcore.gradients.need import ProbeNeed
from acqcore.gradients.reference import EpigReference
from acqcore.head import Head
from acqcore.students.student import Student


@dataclass(frozen=True)
class EpigOptions(Options):
    """Arguments of expected predictive information gain.

    Args:
        reference: from :func:`acqcore.epig_reference`, or the path of a saved one.
        variance: s^2 of a weight; only scales the values.
        probes: random cotangents per sample, one backward each. With two or more, a sample has a standard error, which
            covers only its own cotangents.

    Raises:
        TypeError: reference is neither. ValueError: not a saved reference, variance not positive, probes below 1.
            OSError: no such file.
    """

    reference: EpigReference
    variance: float = WEIGHT_VARIANCE
    probes: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "reference", EpigReference.given(self.reference))
        object.__setattr__(self, "variance", checks.positive("variance", self.variance))
        object.__setattr__(self, "probes", checks.probes(self.probes))

    def check(self, student: Student, head: Head) -> None:
        """Raise ValueError if the reference was made with another student (names the difference)."""
        self.reference.check(student)


def needs(options: EpigOptions) -> tuple[ProbeNeed, ProbeNeed]:
    return options.reference.needs(options.probes)


def reference(
    of_samples: torch.Tensor,  # [n, C, W], sqrt(p_y) d log p_y / dW of each scored token and each y
    of_reference: torch.Tensor,  # [m, C, W], the same for the reference set
    tokens: tuple[int, int],  # scored tokens of a sample and of a reference sample
    variance: float,
) -> torch.Tensor:
    """Reference definition over every pair of tokens and predictions, ``[n]``."""
    inner = torch.einsum("ncw,mdw->nmcd", of_samples, of_reference)
    return variance**2 / 2 * inner.square().sum(dim=(2, 3)).mean(dim=1) / (tokens[0] * tokens[1])


def stderr(first: torch.Tensor, second: torch.Tensor, options: EpigOptions) -> torch.Tensor:
    """Standard error of the mean over the probes, ``[B]``; NaN for a single probe."""
    squares = options.reference.squares(first, second)
    if options.probes == 1:
        return torch.full_like(squares[:, 0], torch.nan)
    return options.variance**2 / 2 * squares.std(dim=1) / options.probes**0.5


@register("epig", options=EpigOptions, needs=needs, over="average", stderr=stderr, reference=reference)
def epig(
    first: torch.Tensor,  # [B, P, dim]
    second: torch.Tensor,  # [B, P, dim]
    options: EpigOptions,
) -> torch.Tensor:
    """Expected predictive information gain of a sample's answer about the answers to a reference set, in nats.

    Per pair of a scored token of the sample and one of the reference set, to second order in the variance of the
    weights. A value may be negative if there is little to gain, as an unbiased estimate is not bounded.

    Source: Bickford Smith et al. 2023 (EPIG); Kirsch & Gal 2022 (the second order).
    """
    return options.variance**2 / 2 * options.reference.squares(first, second).mean(dim=1)
