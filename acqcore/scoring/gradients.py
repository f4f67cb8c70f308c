"""Gradients of a student's samples: norms, sketches, and comparisons with a reference set."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any, overload

import torch

from acqcore import checks, head_grad
from acqcore.acquisitions import LinearOptions
from acqcore.acquisitions.epig import EpigOptions
from acqcore.acquisitions.influence import InfluenceOptions
from acqcore.acquisitions.needs import WEIGHT_VARIANCE
from acqcore.defaults import standard_defaults
from acqcore.gradients.laplace import LaplacePosterior
from acqcore.gradients.need import GradientNeed, ProbeNeed
from acqcore.gradients.reference import EpigReference, Reference, parameter_shapes, sketch_needs
from acqcore.gradients.selection import select_linear, shapes_of
from acqcore.head import Head
from acqcore.literals import Layers, Loss, Parameters, Similarity
from acqcore.scoring.api import score
from acqcore.scoring.run import Runner
from acqcore.students.samples import Samples
from acqcore.students.student import StudentLike


@standard_defaults()
def grad_norm(
    student: StudentLike,
    samples: Samples,
    parameters: Parameters = "head",
    *,
    loss: Loss = "mean",
    predicted: bool = False,
    tokenizer: Any = None,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Exact norm of the gradient of each sample's loss, from one forward and backward per batch.

    Args:
        student, samples, tokenizer, batch_tokens, max_length, backend: as in :func:`acqcore.score`. The student is
            switched to evaluation mode during the call; its modes, gradients and hooks are restored afterwards.
        parameters: the parameters to differentiate:

            - ``"head"``: the last layer's weight and bias, without a backward; with an adapter on the head, the sum of
              both weights.
            - ``n >= 1``: every parameter of the last n transformer blocks, including adapters and frozen ones, but not
              the final norm or the head. Earlier blocks keep no activations.
            - ``"trainable"``: parameters with ``requires_grad=True``, such as LoRA adapters and ``modules_to_save``.
            - ``"all"``: every parameter, including frozen ones; a tied head and embedding count as one.
        loss: the sample's loss is the ``mean`` or the ``sum`` of ``-log p`` over its scored tokens.
        predicted: use the student's most likely token as each target; the written tokens serve only as context.

    Returns:
        ``[n]`` float32 on the CPU, in the order of the samples; NaN if a token has no finite value.

    Raises:
        TypeError, ValueError: as :func:`acqcore.score`; an unknown loss; parameters of the wrong type, more blocks than
            the model has, nothing trainable; a parameter whose gradient no rule covers (named), such as an adapter on
            the head or a large module other than a linear layer or embedding (fused experts).
    """
    need = GradientNeed(parameters, loss, predicted)
    return _of_samples(need, Runner(student, (need,), batch_tokens, backend), samples, tokenizer, max_length)


@overload
def grad_sketch(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    offsets: torch.Tensor,
    *,
    dim: int = 4096,
    seed: int = 0,
    loss: Loss = "mean",
    token_weights: torch.Tensor | None = None,
    temperature: float = 1.0,
    backend: str | None = None,
) -> torch.Tensor: ...


@overload
def grad_sketch(
    student: StudentLike,
    samples: Samples,
    parameters: Parameters = "head",
    *,
    dim: int = 4096,
    seed: int = 0,
    loss: Loss = "mean",
    tokenizer: Any = None,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    backend: str | None = None,
) -> torch.Tensor: ...


def grad_sketch(*arguments: Any, **options: Any) -> torch.Tensor:
    """A sketch of each sample's gradient that preserves inner products: ``E <S_i, S_j> = <G_i, G_j>``.

    Two forms: ``grad_sketch(hidden, head, targets, offsets, ...)`` for the head's gradient of hidden states, and
    ``grad_sketch(student, samples, parameters="head"|n|"trainable"|"all", ...)`` for a student's samples, from one
    batched forward and backward.

    The head, without its bias, contributes a tensor sketch (Pham & Pagh 2013). Other matrices contribute the hashed
    entries of ``sum_t (A^T g_t) (B^T x_t)^T``, where A and B are random signs that leave at most 256 rows and columns;
    biases and norms are hashed entry by entry. Signs and hashes of the parameters are independent.

    Args:
        hidden, head, targets, offsets, token_weights, temperature: as in :func:`acqcore.head_grad_norm`.
        student, samples, parameters, tokenizer, batch_tokens, max_length: as in :func:`grad_norm`.
        loss, backend: as in both.
        dim: length of a sketch.
        seed: seed of signs and hashes; only sketches with the same parameters, dim and seed are comparable.

    Returns:
        ``[B, dim]`` float32 (float64 for float64 hidden states); a student's on the CPU, in the order of the samples.

    Raises: as :func:`acqcore.head_grad_norm` and :func:`grad_norm`; ValueError for dim < 1.
    """
    of_hidden = isinstance(arguments[0], torch.Tensor) if arguments else "hidden" in options
    function: Any = head_grad.grad_sketch if of_hidden else _student_sketch
    return function(*arguments, **options)


@standard_defaults()
def _student_sketch(
    student: StudentLike,
    samples: Samples,
    parameters: Parameters = "head",
    *,
    dim: int = 4096,
    seed: int = 0,
    loss: Loss = "mean",
    tokenizer: Any = None,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    need = GradientNeed(parameters, loss, dim=checks.positive_int("dim", dim), seed=seed)
    return _of_samples(need, Runner(student, (need,), batch_tokens, backend), samples, tokenizer, max_length)


@standard_defaults()
def badge_embedding(
    student: StudentLike,
    samples: Samples,
    parameters: Parameters = "head",
    *,
    dim: int = 4096,
    seed: int = 0,
    loss: Loss = "mean",
    tokenizer: Any = None,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Sketch of each sample's gradient with the student's most likely tokens as the targets.

    It is short where the student is confident, so k-means++ on it (``acqcore.select(..., method="badge")``) chooses
    samples that are both uncertain and diverse. It needs no labels: the written tokens serve only as context.

    Args:
        student, samples, parameters, dim, seed, loss, tokenizer, batch_tokens, max_length, backend: as in
            :func:`acqcore.grad_sketch`.

    Returns:
        ``[n, dim]`` float32 on the CPU, in the order of the samples.

    Raises: as :func:`acqcore.grad_sketch`.

    Source: Ash et al. 2020, "Deep batch active learning by diverse, uncertain gradient lower bounds", with each
    token treated as a separate label.
    """
    need = GradientNeed(parameters, loss, True, checks.positive_int("dim", dim), seed)
    return _of_samples(need, Runner(student, (need,), batch_tokens, backend), samples, tokenizer, max_length)


@standard_defaults()
def influence_reference(
    student: StudentLike,
    samples: Samples,
    *,
    parameters: Parameters = "all",
    dim: int = 4096,
    seed: int = 0,
    loss: Loss = "mean",
    precondition: str | torch.Tensor | None = None,
    tokenizer: Any = None,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    backend: str | None = None,
) -> Reference:
    """The mean gradient sketch of a reference set, such as a validation set of the target task.

    Args:
        student, samples, loss, tokenizer, batch_tokens, max_length, backend: as in :func:`acqcore.grad_sketch`.
        parameters: ``all``, ``trainable``, the last n blocks, or ``head``. All by default: among learnable and
            unlearnable samples (random answers), influence through the head alone ranked an unlearnable one first half
            of the time; influence through all parameters never did.
        dim: length of a sketch. The standard error of a cosine is about ``1 / sqrt(dim)``, 0.016 at 4096. As matrices
            are first projected to 256 rows and columns, no dim takes it below about 0.02 for a single block, or 0.008
            for all parameters of SmolLM2-135M. Ranks are reliable if the samples' cosines differ by more. On random
            rows, whose cosines had a standard deviation of 0.018, ranks at dim 4096 had a Spearman correlation of 0.78,
            at 16384 0.91, at 65536 0.98.
        seed: seed of the sketch.
        precondition: None, or second moments v of the sketch coordinates: ``"reference"`` for those of this set, or
            a tensor ``[dim]`` (the running mean of squared sketches of training batches). Coordinate j of an inner
            product is then divided by ``sqrt(v_j)``, damped. This has the form of Adam's preconditioner (LESS) but
            differs: Adam divides each parameter by its own moment, and a sketch coordinate mixes all parameters.

    Returns:
        A Reference on the CPU.

    Raises:
        TypeError, ValueError: as :func:`acqcore.grad_sketch`; no samples; a sample whose gradient is not finite; second
            moments of the wrong shape, negative or not finite.
    """
    dim = checks.positive_int("dim", dim)
    if isinstance(precondition, str):
        checks.one_of("precondition", precondition, ("reference",))
    elif precondition is not None:
        checks.float_tensor("precondition", precondition, "[dim] or 'reference'", 1)
        if len(precondition) != dim:
            raise ValueError(f"precondition: expected [dim] with dim = {dim}, got {checks.describe(precondition)}")
        if not bool((precondition.isfinite() & (precondition >= 0)).all()) or not bool(precondition.any()):
            raise ValueError("precondition: expected finite second moments >= 0, not all of them 0")
    need = GradientNeed(parameters, loss, dim=dim, seed=seed)
    runner = Runner(student, (need,), batch_tokens, backend)
    total, squares = torch.zeros(2, dim, dtype=torch.float64)
    with runner.student.in_step():
        rows = runner.encode(samples, tokenizer, max_length)
        for found in runner.batches(rows):  # not collected: each sketch has dim numbers
            sketches = found.results[need].double()
            _check_finite(sketches, found.indices)
            total += sketches.sum(dim=0)
            squares += sketches.square().sum(dim=0)
    _check_some(rows)
    if not bool(squares.any()):
        raise ValueError("samples: expected a reference set with nonzero gradients, all are zero")
    if isinstance(precondition, torch.Tensor):
        moments: torch.Tensor | None = precondition.detach().to("cpu", torch.float32)
    else:
        moments = None if precondition is None else (squares / len(rows)).float()
    shapes = parameter_shapes(runner.student, runner.head, need.parameters)
    return Reference((total / len(rows)).float(), len(rows), need.parameters, need.seed, loss, shapes, moments)


@standard_defaults()
def influence(
    student: StudentLike,
    samples: Samples,
    reference: Reference,
    *,
    similarity: Similarity = "cosine",
    tokenizer: Any = None,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """How much training on each sample would help the reference set, to first order; larger is more.

    Parameters, sketch and loss are those of the reference, which may come from an earlier checkpoint: only parameter
    shapes must match.

    Args:
        student, samples, tokenizer, batch_tokens, max_length, backend: as in :func:`acqcore.grad_sketch`.
        reference: made by :func:`influence_reference` with this student.
        similarity: ``cosine``, which ignores the length of a sample's gradient, or ``dot``.

    Returns:
        ``[n]`` float32 on the CPU; NaN if a token has no finite value.

    Raises:
        TypeError: reference is not a Reference. ValueError: it was made with another student (names the difference),
            an unknown similarity. Otherwise as :func:`acqcore.grad_sketch`.
    """
    checks.instance("reference", reference, Reference, "a result of acqcore.influence_reference()")
    options = InfluenceOptions(reference, similarity)
    scores = score(
        student, samples, "influence", acquisition_args={"influence": options}, tokenizer=tokenizer,
        batch_tokens=batch_tokens, max_length=max_length, backend=backend, progress=False,
    )  # fmt: skip
    return scores["influence"]


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
    options = LinearOptions("isotropic", layers, probes=probes, seed=seed)
    layers, probes, seed = options.layers, options.probes, options.seed
    dim = checks.positive_int("dim", dim)
    needs = sketch_needs(layers, probes, seed, dim, seed)
    runner = Runner(student, needs, batch_tokens, backend)
    sketches = runner.collect(
        samples, tokenizer, max_length, (2, probes, dim),
        lambda found: torch.stack([found.results[need] for need in needs], dim=1),
    )  # [n, 2, P, dim]  # fmt: skip
    _check_some(sketches)
    _check_finite(sketches, range(len(sketches)))
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


@standard_defaults()
def laplace_posterior(
    student: StudentLike,
    samples: Samples,
    *,
    layers: Layers = "all",
    probes: int = 2,
    seed: int = 0,
    observations: float = 1e6,
    damping: float = 0.1,
    tokenizer: Any = None,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    backend: str | None = None,
) -> LaplacePosterior:
    """Weight variances from a Laplace approximation, for mutual information with ``posterior="laplace"``.

    Args:
        student, samples, tokenizer, batch_tokens, max_length, backend: as in :func:`acqcore.score`. The samples
            represent the student's training data; their Fisher information needs no labels.
        layers: the linear layers of the last n blocks, or of every block (``"all"``).
        probes: random cotangents per sample, one backward each.
        seed: seed of the cotangents.
        observations: number of tokens that the posterior has seen; the variances scale with its inverse.
        damping: damping of each factor, relative to its mean.

    Returns:
        A LaplacePosterior on the CPU.

    Raises:
        TypeError, ValueError: as :func:`acqcore.score`; no samples, a gradient that is not finite, layers that the
            student does not have, nonpositive observations or damping.
    """
    options = LinearOptions("isotropic", layers, probes=probes, seed=seed)
    observations, damping = checks.positive("observations", observations), checks.positive("damping", damping)
    # Other cotangents than those of mutual information with this seed: it would be too small for these samples.
    need = ProbeNeed("marginals", options.layers, options.probes, options.seed ^ (1 << 62))
    runner = Runner(student, (need,), batch_tokens, backend)
    sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    with runner.student.in_step():
        rows = runner.encode(samples, tokenizer, max_length)
        for found in runner.batches(rows):
            for name, (of_rows, of_columns) in found.results[need].items():
                before = sums.get(name, (torch.zeros_like(of_rows), torch.zeros_like(of_columns)))
                sums[name] = before[0] + of_rows, before[1] + of_columns
    _check_some(sums)
    for name, (of_rows, of_columns) in sums.items():
        if not bool(of_rows.isfinite().all() & of_columns.isfinite().all()):
            raise ValueError(f"samples: expected finite gradients, got NaN or infinity in {name}")
    for name, (outputs, inputs) in shapes_of(select_linear(runner.student, options.layers)).items():
        sums.setdefault(name, (torch.zeros(outputs), torch.zeros(inputs)))  # only picks indices, or saw no token
    marginals = {name: (of_rows / len(rows), of_columns / len(rows)) for name, (of_rows, of_columns) in sums.items()}
    return LaplacePosterior.of(marginals, options.layers, observations, damping)


def _of_samples(
    need: GradientNeed, runner: Runner, samples: Samples, tokenizer: Any, max_length: int | None
) -> torch.Tensor:
    """The need's values for all samples, ``[n]`` or ``[n, dim]``."""
    return runner.collect(samples, tokenizer, max_length, need.shape, lambda found: found.results[need])


def _check_some(found: Sized) -> None:
    """Raise ValueError if there is no reference sample."""
    if not len(found):
        raise ValueError("samples: expected at least one reference sample, got none")


def _check_finite(
    gradients: torch.Tensor,  # [n, ...]
    indices: Sequence[int],  # [n], of the samples
) -> None:
    """Raise ValueError if a gradient is not finite (names the first such sample)."""
    finite = gradients.isfinite().flatten(1).all(dim=1).tolist()
    bad = [index for index, known in zip(indices, finite, strict=True) if not known]
    if bad:
        raise ValueError(f"samples[{min(bad)}]: expected a finite gradient, got NaN or infinity")
