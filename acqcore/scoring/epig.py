"""Expected predictive information gain of samples, and its reference set (see ``acquisitions/epig.py``)."""

from __future__ import annotations

from typing import Any

import torch

from acqcore import checks
from acqcore.acquisitions import LinearOptions
from acqcore.acquisitions.epig import EpigOptions
from acqcore.acquisitions.needs import WEIGHT_VARIANCE
from acqcore.defaults import standard_defaults
from acqcore.gradients.reference import EpigReference, sketch_needs
from acqcore.gradients.selection import select_linear, shapes_of
from acqcore.literals import Layers
from acqcore.scoring.api import score
from acqcore.scoring.run import Runner, check_reference_set
from acqcore.students.samples import Samples
from acqcore.students.student import StudentLike


@standard_defaults()
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
    """Sketches of a reference set, such as prompts of the target task with answers as context.

    Args:
        student, samples, tokenizer, batch_tokens, max_length, backend: as in :func:`acqcore.score`.
        layers: the linear layers of the last n blocks, or of every block (``"all"``).
        probes: random cotangents per sample, one backward each.
        dim: length of each of two independent sketches of a gradient.
        seed: seed of cotangents and sketches.

    Returns:
        An EpigReference on the CPU.

    Raises:
        TypeError, ValueError: as :func:`acqcore.score`; no samples, a gradient that is not finite, layers that the
            student does not have.
    """
    LinearOptions("isotropic", layers, probes=probes, seed=seed)
    checks.positive_int("dim", dim)
    needs = sketch_needs(layers, probes, seed, dim, seed)
    runner = Runner(student, needs, batch_tokens, backend)
    sketches = runner.collect(
        samples, tokenizer, max_length, (2, probes, dim),
        lambda found: torch.stack([found.results[need] for need in needs], dim=1),
    )  # [n, 2, P, dim]  # fmt: skip
    check_reference_set(sketches)
    shapes = shapes_of(select_linear(runner.student, layers))
    return EpigReference(sketches.transpose(0, 1).flatten(1, 2), layers, seed, shapes)


@standard_defaults()
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

    Unbiased: cotangents of samples and reference are independent, and the two factors of a squared inner product come
    from independent sketches. A value may therefore be negative if there is little to gain.

    Args:
        student, samples, tokenizer, batch_tokens, max_length, backend: as in :func:`acqcore.score`.
        reference: made by :func:`epig_reference` with this student.
        variance: s^2 of a weight; a constant factor of the values.
        probes: random cotangents per sample, one backward each.

    Returns:
        ``[n]`` float32 on the CPU, in nats per pair of a scored token of the sample and one of the reference set; NaN
        if a token has no finite value.

    Raises:
        TypeError: reference is not an EpigReference. ValueError: it was made with another student (names the
            difference). Otherwise as :func:`acqcore.score`.
    """
    checks.instance("reference", reference, EpigReference, "a result of acqcore.epig_reference()")
    options = EpigOptions(reference, variance, probes)
    scores = score(
        student, samples, "epig", acquisition_args={"epig": options}, tokenizer=tokenizer, batch_tokens=batch_tokens,
        max_length=max_length, backend=backend, progress=False,
    )  # fmt: skip
    return scores["epig"]
