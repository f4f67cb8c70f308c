"""Influence: how well a step on a sample's gradient would also lower the loss of a reference set.

To first order a gradient step on sample i changes the loss of a reference set by ``-lr <g_i, g_ref>``. Both
gradients are seen through sketches that keep inner products (:func:`acqcore.grad_sketch`), so that
the reference set is passed through the student once and every sample is one product with its mean sketch.

Sources: Pruthi et al. 2020 (TracIn, one checkpoint); Xia et al. 2024 (LESS: cosine, sketches, Adam); Park
et al. 2023 (TRAK, sketches).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from acqcore import checks
from acqcore.ghost import grad_sketch_model
from acqcore.ghost_capture import select_parameters
from acqcore.samples import Samples
from acqcore.student import Student, StudentLike, as_student

SIMILARITIES = ("cosine", "dot")

# Added to a coordinate's root of second moments, in units of their root mean: a coordinate that a small
# reference set hardly moves weighs at most ten times the average, where Adam's 1e-8 would let it decide
# alone.
_DAMPING = 0.1


@dataclass(frozen=True, eq=False)
class Reference:
    """The mean gradient of a reference set, sketched; made by :func:`influence_reference`.

    Attributes:
        mean: ``[dim]`` float32, mean of the samples' sketches.
        n: how many samples it is the mean of.
        parameters, seed, loss: of the sketches.
        shapes: name -> shape of each parameter the gradient is in; ``head`` for the last layer.
        second_moments: ``[dim]`` float32, of the preconditioner, or None.
    """

    mean: torch.Tensor
    n: int
    parameters: str | int
    seed: int
    loss: str
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    second_moments: torch.Tensor | None = None

    @property
    def dim(self) -> int:
        """Length of a sketch."""
        return len(self.mean)

    @torch.no_grad()
    def similarity(self, sketches: torch.Tensor, similarity: str = "cosine") -> torch.Tensor:
        """Cosine or dot product of each sketch with the mean, preconditioned if there are second moments.

        Args:
            sketches: ``[n, dim]`` floating point, of the same student, parameters, dim, seed and loss; a
                row with NaN gives NaN.
            similarity: ``cosine`` (0 for a zero gradient) or ``dot``.

        Returns:
            ``[n]`` float32.

        Raises:
            TypeError: not a floating-point tensor.
            ValueError: a wrong shape, another device, an unknown similarity.
        """
        checks.one_of("similarity", similarity, SIMILARITIES)
        checks.like_vector("sketches", sketches, self.mean, "the reference")
        x, mean = sketches.double(), self.mean.double()
        if self.second_moments is not None:
            # <a, b> = sum_j a_j b_j / (sqrt(v_j) + damping), its root on each side: a cosine with itself is 1.
            root = self.second_moments.double().sqrt()
            half = (root + _DAMPING * root.square().mean().sqrt()).rsqrt()
            x, mean = x * half, mean * half
        dot = x @ mean
        if similarity == "dot":
            return dot.float()
        length = x.norm(dim=1) * mean.norm()
        return (dot / length.where(length != 0, 1.0)).float()


def influence_reference(
    student: StudentLike,
    samples: Samples,
    *,
    parameters: str | int = "all",
    dim: int = 4096,
    seed: int = 0,
    loss: str = "mean",
    precondition: str | torch.Tensor | None = None,
    tokenizer: Any = None,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    backend: str | None = None,
) -> Reference:
    """The mean gradient sketch of a reference set, such as a validation set of the target task.

    Args:
        student, samples, loss, tokenizer, batch_tokens, max_length, backend: as in
            :func:`acqcore.grad_sketch`.
        parameters: which gradients: ``all``, ``trainable``, the last n blocks, or ``head``. All by default: in
            trials with unlearnable samples (random answers) among learnable ones, influence through the head
            alone ranked the unlearnable first half of the time, through the full gradient never.
        dim: length of a sketch; the error of a cosine falls as dim grows.
        seed: of the sketch.
        precondition: None, or second moments v of the sketch coordinates: ``"reference"`` for those of this
            set, or ``[dim]`` of your own (the running mean of squared sketches of training batches).
            Coordinate j of an inner product is then divided by ``sqrt(v_j)`` (damped). This is the form of
            Adam's preconditioner (LESS), not the same: Adam divides each parameter by its own moment, which
            no sketch can do afterwards, as each of its coordinates mixes all parameters.

    Returns:
        A Reference on the CPU.

    Raises:
        TypeError, ValueError: as :func:`acqcore.grad_sketch`; no samples; a sample whose gradient is
            not finite; second moments of another shape, negative or not finite.
    """
    if precondition is not None:
        checks.positive_int("dim", dim)
        checks.preconditioner(precondition, dim)
    student = as_student(student)
    sketches = grad_sketch_model(
        student,
        samples,
        parameters,
        dim=dim,
        seed=seed,
        loss=loss,
        tokenizer=tokenizer,
        batch_tokens=batch_tokens,
        max_length=max_length,
        backend=backend,
    )
    checks.reference_sketches(sketches)
    mean = sketches.double().mean(dim=0).float()
    if isinstance(precondition, torch.Tensor):
        moments: torch.Tensor | None = precondition.detach().to("cpu", torch.float32)
    else:
        moments = None if precondition is None else sketches.double().square().mean(dim=0).float()
    return Reference(mean, len(sketches), parameters, seed, loss, _shapes(student, parameters), moments)


def influence(
    student: StudentLike,
    samples: Samples,
    reference: Reference,
    *,
    similarity: str = "cosine",
    tokenizer: Any = None,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """How much training on each sample would help the reference set, to first order; larger is more.

    The reference says in which parameters and through which sketch. It may be older than the student: what
    has to agree is the shape, not the weights.

    Args:
        student, samples, tokenizer, batch_tokens, max_length, backend: as in
            :func:`acqcore.grad_sketch`.
        reference: made by :func:`influence_reference` with this student.
        similarity: ``cosine``, which leaves out how large a sample's gradient is, or ``dot``.

    Returns:
        ``[n]`` float32 on the CPU; NaN where a token has no finite value.

    Raises:
        TypeError: reference is not a Reference. ValueError: it was made with another student (names what
            differs), an unknown similarity. Otherwise as :func:`acqcore.grad_sketch`.
    """
    checks.instance("reference", reference, Reference, "what acqcore.influence_reference gives")
    checks.one_of("similarity", similarity, SIMILARITIES)
    student = as_student(student)
    checks.same_student(reference.shapes, _shapes(student, reference.parameters))
    sketches = grad_sketch_model(
        student,
        samples,
        reference.parameters,
        dim=reference.dim,
        seed=reference.seed,
        loss=reference.loss,
        tokenizer=tokenizer,
        batch_tokens=batch_tokens,
        max_length=max_length,
        backend=backend,
    )
    return reference.similarity(sketches, similarity)


def _shapes(student: Student, parameters: str | int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the head and of each parameter asked for: the signs of a sketch go by these."""
    head = student.head
    shapes: dict[str, tuple[int, ...]] = {"head": (head.vocab_size, head.weight.shape[1])}
    if parameters != "head":
        selection = select_parameters(student, head, parameters)
        shapes.update((name, tuple(parameter.shape)) for parameter, name in selection.names.items())
    return shapes
