"""Expected predictive information gain: what a sample's answer would tell about those to a reference set.

Under a Gaussian posterior over the weights, of variance s^2 each and small, the mutual information between the tokens y
after x and y' after x' is to leading order

    s^4 / 2  E_{y, y'} <d log p_y / dW, d log p_y' / dW>^2  =  s^4 / 2  E_{c, c'} <G_c(x), G_c'(x')>^2

with G_c the gradient under a random cotangent c of ``acqcore.fisher``. Unlike mutual information with the weights
themselves it is large only for what also bears on the reference set, and unlike influence it needs no labels, neither
of the sample nor of the reference set.

Sources: Bickford Smith et al. 2023, "Prediction-oriented Bayesian active learning" (EPIG); Kirsch & Gal 2022,
"Unifying approaches in active learning and active sampling via Fisher information" (the second order).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from acqcore import checks
from acqcore.acquisitions import LinearOptions
from acqcore.acquisitions.needs import WEIGHT_VARIANCE
from acqcore.gradients.need import ProbeNeed
from acqcore.gradients.selection import same_student, select_linear, shapes_of
from acqcore.literals import Layers
from acqcore.scoring.collect import check_reference_set, collect
from acqcore.scoring.run import Found, Runner
from acqcore.students.samples import Samples
from acqcore.students.student import Student, StudentLike


@dataclass(frozen=True, eq=False)
class EpigReference:
    """Sketched gradients of a reference set under random cotangents; made by :func:`epig_reference`.

    Attributes:
        sketches: ``[2, m, dim]`` float32, two independent sketches of m gradients, probe by probe, each gradient
            divided by the root of the number of its sample's scored tokens.
        layers, seed: of the gradients.
        shapes: name -> shape of each weight the gradients are taken in.
    """

    sketches: torch.Tensor
    layers: Layers
    seed: int
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

    @property
    def dim(self) -> int:
        """Length of a sketch."""
        return self.sketches.shape[2]

    def check(self, student: Student) -> None:
        """Raise ValueError if the reference was made with another student (names what differs)."""
        same_student(self.shapes, shapes_of(select_linear(student, self.layers)))


def epig_reference(
    student: StudentLike,
    samples: Samples,
    *,
    layers: Layers = "all",
    probes: int = 2,
    dim: int = 2048,
    seed: int = 0,
    tokenizer: Any = None,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    backend: str | None = None,
) -> EpigReference:
    """Sketches of a reference set, such as prompts of the target task with answers that give the context.

    Args:
        student, samples, tokenizer, batch_tokens, max_length, backend: as in :func:`acqcore.score`.
        layers: the linear layers of the last n blocks, or of every block (``"all"``).
        probes: random cotangents of each sample, a backward each.
        dim: length of each of two independent sketches of a gradient.
        seed: of cotangents and sketches.

    Returns:
        An EpigReference on the CPU.

    Raises:
        TypeError, ValueError: as :func:`acqcore.score`; no samples, a gradient that is not finite, layers that the
            student does not have.
    """
    LinearOptions("isotropic", layers, probes=probes, seed=seed)
    checks.positive_int("dim", dim)
    needs = _needs(layers, probes, seed, dim, seed)
    runner = Runner(student, needs, batch_tokens, backend)
    sketches = _sketches(runner, needs, samples, tokenizer, max_length)  # [n, 2, P, dim]
    check_reference_set(sketches)
    shapes = shapes_of(select_linear(runner.student, layers))
    return EpigReference(sketches.transpose(0, 1).flatten(1, 2), layers, seed, shapes)


def epig(
    student: StudentLike,
    samples: Samples,
    reference: EpigReference,
    *,
    variance: float = WEIGHT_VARIANCE,
    probes: int = 2,
    tokenizer: Any = None,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Expected predictive information gain of each sample towards a reference set; larger is more.

    Without bias: cotangents of samples and reference are independent, and the two factors of a squared inner product
    come from independent sketches. A value may so come out negative where there is little to gain.

    Args:
        student, samples, tokenizer, batch_tokens, max_length, backend: as in :func:`acqcore.score`.
        reference: made by :func:`epig_reference` with this student.
        variance: s^2 of a weight; a constant factor of the values.
        probes: random cotangents of each sample, a backward each.

    Returns:
        ``[n]`` float32 on the CPU, nats for each pair of a scored token of the sample and one of the reference set; NaN
        where a token has no finite value.

    Raises:
        TypeError: reference is not an EpigReference. ValueError: it was made with another student (names what differs).
            Otherwise as :func:`acqcore.score`.
    """
    checks.instance("reference", reference, EpigReference, "what acqcore.epig_reference gives")
    LinearOptions("isotropic", reference.layers, variance=variance, probes=probes)
    needs = _needs(reference.layers, probes, reference.seed + 1, reference.dim, reference.seed)
    runner = Runner(student, needs, batch_tokens, backend)
    reference.check(runner.student)
    sketches = _sketches(runner, needs, samples, tokenizer, max_length)  # [n, 2, P, dim]
    halves = sketches.transpose(0, 1).double().contiguous()
    inner = torch.einsum("hnpd,hmd->hnpm", halves, reference.sketches.double())
    return (variance**2 / 2 * inner.prod(dim=0).mean(dim=(1, 2))).float()


def _needs(layers: Layers, probes: int, seed: int, dim: int, sketch_seed: int) -> tuple[ProbeNeed, ProbeNeed]:
    """Two independent sketches of the same gradients."""
    first, second = (
        ProbeNeed("weights", layers, probes, seed, dim=dim, sketch_seed=2 * sketch_seed + i) for i in (0, 1)
    )
    return first, second


def _sketches(
    runner: Runner, needs: tuple[ProbeNeed, ProbeNeed], samples: Samples, tokenizer: Any, max_length: int | None
) -> torch.Tensor:
    """``[n, 2, P, dim]`` float32, divided by the root of the number of scored tokens."""
    assert needs[0].dim is not None

    def of_batch(found: Found) -> torch.Tensor:
        root = torch.tensor(found.counts, dtype=torch.float64).sqrt()[:, None, None, None]
        return torch.stack([found.results[need] for need in needs], dim=1) / root

    shape = (2, needs[0].probes, needs[0].dim)
    return collect(runner, samples, tokenizer, max_length, shape, of_batch)
