"""Expected predictive information gain of a student's samples, and of its reference set (``acquisitions/epig.py``)."""

from __future__ import annotations

from typing import Any

import torch

from acqcore import checks
from acqcore.acquisitions import LinearOptions
from acqcore.acquisitions.epig import EpigOptions, epig as epig_of, needs as needs_of
from acqcore.acquisitions.needs import WEIGHT_VARIANCE
from acqcore.gradients.epig import EpigReference, sketch_needs, weight_shapes
from acqcore.gradients.need import ProbeNeed
from acqcore.literals import Layers
from acqcore.scoring.run import Runner
from acqcore.students.samples import Samples
from acqcore.students.student import StudentLike


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
    needs = sketch_needs(layers, probes, seed, dim, seed)
    runner = Runner(student, needs, batch_tokens, backend)
    sketches = _sketches(runner, needs, samples, tokenizer, max_length)  # [2, n, P, dim]
    if not sketches.shape[1]:
        raise ValueError("samples: expected at least one reference sample, got none")
    bad = ~sketches.isfinite().all(dim=3).all(dim=2).all(dim=0)
    if bool(bad.any()):
        raise ValueError(f"samples[{int(bad.nonzero()[0])}]: expected a finite gradient, got NaN or infinity")
    return EpigReference(sketches.flatten(1, 2), layers, seed, weight_shapes(runner.student, layers))


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
    options = EpigOptions(reference, variance, probes)
    runner = Runner(student, needs_of(options), batch_tokens, backend)
    reference.check(runner.student)
    first, second = _sketches(runner, needs_of(options), samples, tokenizer, max_length)
    return epig_of(first, second, options).float()


def _sketches(
    runner: Runner, needs: tuple[ProbeNeed, ProbeNeed], samples: Samples, tokenizer: Any, max_length: int | None
) -> torch.Tensor:
    """``[2, n, P, dim]`` float32."""
    with runner.student.in_step():
        rows = runner.encode(samples, tokenizer, max_length)
        assert needs[0].dim is not None
        found = torch.zeros(2, len(rows), needs[0].probes, needs[0].dim)
        for batch in runner.batches(rows):
            for half, need in enumerate(needs):
                found[half, batch.indices] = batch.results[need].float()
    return found
