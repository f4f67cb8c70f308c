"""Each sample's own gradient, in the head or in deeper layers, from one batched forward and backward.

A batched backward gives the gradient of each module's output per sample and token. With a linear layer's
inputs ``x_t`` and output gradients ``g_t`` a sample's weight gradient is ``sum_t g_t x_t^T``, of which the norm
and a sketch follow without forming it: ``||G||^2 = sum_st <g_s, g_t> <x_s, x_t>`` (the ghost norm). Padded tokens
come after the real ones of a causal model, so their gradients are zero and add nothing.

Sources: Goodfellow 2015, "Efficient per-example gradient computations"; Li et al. 2021, "Large language models
can be strong differentially private learners"; for the sketches Park et al. 2023 (TRAK).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from acqcore import checks
from acqcore.ghost_capture import Capture, Selection, select_parameters
from acqcore.ghost_measures import HeadPass, Measure, Piece, Rows, Sketch, SquaredNorm
from acqcore.head import Head
from acqcore.head_grad import LOSSES, delta_product, loss_weights
from acqcore.packing import OVERHEAD_TOKENS, collate, partition
from acqcore.row_stats import predicted_targets, row_stats
from acqcore.samples import Row, Samples, encode
from acqcore.student import Student, StudentLike, as_student

PARAMETERS = ("head", "trainable", "all")


def grad_norm(
    student: StudentLike,
    samples: Samples,
    parameters: str | int = "head",
    *,
    loss: str = "mean",
    predicted: bool = False,
    tokenizer: Any = None,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Exact norm of the gradient of each sample's own loss, from one forward and backward per batch.

    Args:
        student, samples, tokenizer, batch_tokens, max_length, backend: as in :func:`acqcore.score`. The student
            is in evaluation mode meanwhile; its modes, gradients and hooks are left as found.
        parameters: gradients in which parameters:

            - ``"head"``: the last layer's weight and bias, no backward at all; with an adapter on it, the
              weight that is its sum.
            - ``n >= 1``: the last n transformer blocks, every parameter in them (adapters too, frozen ones
              too), and nothing outside: not the final norm, not the head. Earlier blocks keep no activations.
            - ``"trainable"``: those with ``requires_grad=True``, as LoRA adapters and ``modules_to_save``.
            - ``"all"``: every parameter, frozen ones too; a tied head and embedding are one.
        loss: the sample's loss is the ``mean`` or the ``sum`` of ``-log p`` over its scored tokens.
        predicted: the student's most likely token stands in for each scored one, which then counts only as context of
            those after it.

    Returns:
        ``[n]`` float32 on the CPU, in the order of the samples; NaN where a token has no finite value.

    Raises:
        TypeError, ValueError: as :func:`acqcore.score`; an unknown loss; parameters of another kind, more blocks
            than the model has, nothing that trains; a parameter whose gradient no rule covers (named): those of
            an adapter on the head, or of a large module other than linear layers and embeddings (fused experts).
    """

    def measure(batch: int, device: torch.device) -> Measure:
        return SquaredNorm(batch, device)

    options = _Options.checked(parameters, loss, predicted, batch_tokens, backend)
    squared = _measured(student, samples, tokenizer, max_length, options, measure, ())
    return squared.clamp_min(0).sqrt().float()


def grad_sketch_model(
    student: StudentLike,
    samples: Samples,
    parameters: str | int = "head",
    *,
    dim: int = 4096,
    seed: int = 0,
    loss: str = "mean",
    predicted: bool = False,
    tokenizer: Any = None,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """A sketch of the gradient of each sample's own loss: ``E <S_i, S_j> = <G_i, G_j>`` over random signs.

    Every parameter's sketch, with signs of its own, added up in one vector. The head's is that of
    :func:`acqcore.grad_sketch`; a deeper matrix's are the hashed entries of ``sum_t (A^T g_t) (B^T x_t)^T``, A and B
    random signs that leave at most 256 rows and columns; biases and norms are hashed entry by entry. Only
    sketches of the same parameters, dim and seed can be compared. A bias of the head is left out.

    Args:
        student, samples, parameters, loss, predicted, tokenizer, batch_tokens, max_length, backend: as in
            :func:`grad_norm`.
        dim: length of a sketch.
        seed: of the signs.

    Returns:
        ``[n, dim]`` float32 on the CPU, in the order of the samples.

    Raises: as :func:`grad_norm`; ValueError for dim < 1.
    """
    checks.positive_int("dim", dim)

    def measure(batch: int, device: torch.device) -> Measure:
        return Sketch(batch, device, dim, seed)

    options = _Options.checked(parameters, loss, predicted, batch_tokens, backend)
    return _measured(student, samples, tokenizer, max_length, options, measure, (dim,)).float()


@dataclass(frozen=True)
class _Options:
    parameters: str | int
    loss: str
    predicted: bool
    batch_tokens: int
    backend: str | None

    @classmethod
    def checked(
        cls, parameters: str | int, loss: str, predicted: bool, batch_tokens: int, backend: str | None
    ) -> _Options:
        checks.gradient_parameters(parameters, PARAMETERS)
        checks.one_of("loss", loss, LOSSES)
        checks.positive_int("batch_tokens", batch_tokens)
        return cls(parameters, loss, predicted, batch_tokens, backend)


def _measured(
    student: StudentLike,
    samples: Samples,
    tokenizer: Any,
    max_length: int | None,
    options: _Options,
    measure: Callable[[int, torch.device], Measure],
    shape: tuple[int, ...],
) -> torch.Tensor:
    """The measure's values of every sample, ``[n, *shape]`` float64 on the CPU."""
    with torch.inference_mode(False):  # there autograd could not run
        student = as_student(student)
        head = student.head
        row_stats(head.weight[:0], head, backend=options.backend)  # no rows: raises what a batch would
        with student.in_step():
            rows = encode(
                samples,
                tokenizer if tokenizer is not None else student.tokenizer,
                vocab_size=head.vocab_size,
                limit=student.max_length,
                max_length=max_length,
            )
            run = _Run(student, head, options)
            values = torch.zeros(len(rows), *shape, dtype=torch.float64)
            overhead = OVERHEAD_TOKENS.get(student.device.type, OVERHEAD_TOKENS["cuda"])
            lengths = [len(row.ids) for row in rows]
            with student.scoring(), run.capture.attached():
                for indices in partition(lengths, options.batch_tokens, overhead):
                    batch = measure(len(indices), head.weight.device)
                    run.batch([rows[i] for i in indices], batch)
                    values[indices] = batch.values.cpu()
    return values


class _Run:
    """What all batches of one call share."""

    def __init__(self, student: Student, head: Head, options: _Options) -> None:
        self.student = student
        self.head = head
        self.options = options
        if options.parameters == "head":
            self.selection = Selection({}, "head")
        else:
            self.selection = select_parameters(student, head, options.parameters)
        self.capture = Capture(student, self.selection)

    def batch(self, rows: Sequence[Row], measure: Measure) -> None:
        """Add the gradients of these samples to ``measure``."""
        input_ids, positions, targets, offsets = collate(rows)
        deep = bool(self.selection.names)
        tied: list[Piece] = []

        def emit(name: str, piece: Piece) -> None:
            if name == self.selection.head:
                tied.append(piece)
            else:
                measure.add(name, piece)

        with torch.set_grad_enabled(deep):
            hidden = self.capture.forward(input_ids.to(self.student.device))  # [B, T, D]
        with torch.autocast(hidden.device.type, enabled=False):
            last = self._head_pass(hidden, positions, targets, offsets)
            if deep:
                self.capture.backward(hidden, _hidden_gradient(last, hidden, positions), emit)
            if self.selection.head is None:
                return
            if not tied:
                measure.add_head(last)
                return
            checks.embedding_use(self.selection.head, isinstance(tied[0], Rows))
            assert isinstance(tied[0], Rows)
            measure.add_tied(last, self.selection.head, tied[0])

    def _head_pass(
        self,
        hidden: torch.Tensor,  # [B, T, D]
        positions: torch.Tensor,  # [N] int64
        targets: torch.Tensor,  # [N] int64
        offsets: torch.Tensor,  # [B + 1] int64
    ) -> HeadPass:
        device, head, backend = self.head.weight.device, self.head, self.options.backend
        picked = hidden.detach().flatten(0, 1).index_select(0, positions.to(hidden.device))  # [N, D]
        # A head in float32 over a half-precision trunk (an adapter's sum): widening hidden is exact.
        picked = picked.to(device=device, dtype=torch.promote_types(hidden.dtype, head.weight.dtype))
        bounds = checks.offsets(offsets, targets)
        targets = targets.to(device)
        stats = row_stats(picked, head, targets, backend=backend)
        if self.options.predicted:
            stats = predicted_targets(stats)
        weights = loss_weights(targets, bounds, self.options.loss, None)
        return HeadPass(picked, head, stats, bounds, weights, backend)


def _hidden_gradient(
    last: HeadPass,
    hidden: torch.Tensor,  # [B, T, D]
    positions: torch.Tensor,  # [N] int64
) -> torch.Tensor:
    """Gradient of the samples' losses in ``hidden``, ``[B, T, D]``."""
    gradient = delta_product(last.hidden, last.head, last.stats, last.head.weight, 1.0, last.backend)  # [N, D]
    gradient = (gradient * last.weights[:, None].to(gradient.dtype)).to(hidden.device)
    spread = gradient.new_zeros(hidden.shape[0] * hidden.shape[1], hidden.shape[2])
    return spread.index_copy_(0, positions.to(hidden.device), gradient).view(hidden.shape)
