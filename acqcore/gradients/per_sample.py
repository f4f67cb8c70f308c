"""Several measures of each sample's gradient from one forward and as few backwards as their targets allow.

A batched backward gives the gradient of each module's output per sample and token. With a linear layer's inputs
``x_t`` and output gradients ``g_t`` a sample's weight gradient is ``sum_t g_t x_t^T``, whose norm and sketch need not
form it: ``||G||^2 = sum_st <g_s, g_t> <x_s, x_t>`` (the ghost norm). The student is causal and padding comes last, so
the gradients of padded tokens are zero.

Sources: Goodfellow 2015, "Efficient per-example gradient computations"; Li et al. 2021, "Large language models can be
strong differentially private learners"; for the sketches Park et al. 2023 (TRAK).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from acqcore.gradients.capture import Capture
from acqcore.gradients.head_pass import HeadPass
from acqcore.gradients.measures import GradPiece, Measure, RowGrad, Sketch, SquaredNorm
from acqcore.gradients.need import GradientNeed
from acqcore.gradients.selection import select_parameters
from acqcore.head import Head
from acqcore.literals import Loss, Parameters
from acqcore.students.student import Student


class SampleGradients:
    """Gradients of a student's samples.

    Args:
        needs: at least one.

    Raises:
        ValueError: parameters that the student does not have, or whose gradient is not known.
    """

    def __init__(self, student: Student, head: Head, needs: Sequence[GradientNeed]) -> None:
        self._needs = needs
        self._selections = {
            p: select_parameters(student, head, p) for p in dict.fromkeys(need.parameters for need in needs)
        }
        names = {p: name for selection in self._selections.values() for p, name in selection.names.items()}
        self._student = student
        self._capture = Capture(student, names, [selection.head for selection in self._selections.values()])
        #: Whether the forward must keep a graph.
        self.deep = bool(names)
        written = [need.loss for need in needs if not need.predicted]
        #: Loss that weighs the written tokens.
        self.loss: Loss = written[0] if written else "mean"
        #: Whether the norm of the head's gradient under the written targets is among the needs.
        self.of_head = any(
            need.dim is None and not need.predicted and self._selections[need.parameters].head for need in needs
        )

    @property
    def one_by_one(self) -> bool:
        """Whether batches must be of one sample; known once :meth:`prepare` ran."""
        return self.deep and self._capture.one_by_one

    def prepare(
        self,
        input_ids: torch.Tensor,  # [n, T] int64, of real samples
    ) -> None:
        """What a few tokens tell of the student; call it before batches are made.

        Raises:
            ValueError: selected parameters none of which has a gradient.
        """
        if not self.deep:
            return
        self._capture.prepare(input_ids)
        for parameters, selection in self._selections.items():
            if selection.names and selection.head is None and self._capture.used.isdisjoint(selection.names.values()):
                name = next(iter(selection.names.values()))
                raise ValueError(
                    f"parameters: {parameters!r}: {name} and the others have no gradient: the student's forward does "
                    "not use them, as those of a merged or disabled adapter"
                )

    def take_one_by_one(self) -> None:
        """From here on batches are of one sample."""
        self._capture.take_one_by_one()

    @contextmanager
    def forward(
        self,
        input_ids: torch.Tensor,  # [B, T] int64
    ) -> Iterator[torch.Tensor]:
        """The trunk's hidden states ``[B, T, D]``, within the context with the graph that :meth:`measure` needs."""
        if not self.deep:
            yield self._student.hidden(input_ids)
            return
        with self._capture.attached():
            with torch.enable_grad():
                hidden = self._capture.forward(input_ids)
            yield hidden

    def measure(
        self,
        hidden: torch.Tensor,  # [B, T, D], of forward
        positions: torch.Tensor,  # [N] int64, of the scored tokens' predecessors in the flattened batch
        written: HeadPass,
    ) -> dict[GradientNeed, torch.Tensor]:
        """Values of each need, given the head's pass over the written targets."""
        values: dict[GradientNeed, torch.Tensor] = {}
        by_targets = {predicted: [n for n in self._needs if n.predicted == predicted] for predicted in (False, True)}
        backwards = [predicted for predicted, needs in by_targets.items() if self._reaches_trunk(needs)]
        for predicted, needs in by_targets.items():
            if not needs:
                continue
            head_pass = written.predicted(needs[0].loss) if predicted else written
            measured = {key: self._measured(key, head_pass) for key in dict.fromkeys(map(_measure_of, needs))}
            if predicted in backwards:
                gradient = head_pass.hidden_gradient(hidden, positions)

                def emit(name: str, piece: GradPiece, among: Sequence[_Measured] = tuple(measured.values())) -> None:
                    for each in among:
                        each.add(name, piece)

                self._capture.backward(hidden, gradient, emit, last=predicted == backwards[-1])
            for each in measured.values():
                each.add_head(head_pass)
            counts = torch.tensor([end - begin for begin, end in head_pass.bounds], device=head_pass.hidden.device)
            for need in needs:
                values[need] = _finished(need, head_pass.loss, measured[_measure_of(need)].measure, counts)
        return values

    def _reaches_trunk(self, needs: Sequence[GradientNeed]) -> bool:
        return any(self._selections[need.parameters].names for need in needs)

    def _measured(self, key: _Key, head_pass: HeadPass) -> _Measured:
        parameters, dim, seed = key
        selection = self._selections[parameters]
        batch, device = len(head_pass.bounds), head_pass.hidden.device
        measure = SquaredNorm(batch, device) if dim is None else Sketch(batch, device, dim, seed)
        return _Measured(measure, frozenset(selection.names.values()), selection.head)


_Key = tuple[Parameters, int | None, int]


def _measure_of(need: GradientNeed) -> _Key:
    """What tells apart the measures of one backward."""
    return need.parameters, need.dim, need.seed if need.dim is not None else 0


@dataclass(frozen=True, eq=False)
class _Measured:
    """A measure, and whose pieces it takes."""

    measure: Measure
    names: frozenset[str]
    head: str | None
    _tied: list[GradPiece] = field(default_factory=list)  # of a weight that is both embedding and head

    def add(self, name: str, piece: GradPiece) -> None:
        if name == self.head:
            self._tied.append(piece)
        elif name in self.names:
            self.measure.add(name, piece)

    def add_head(self, head_pass: HeadPass) -> None:
        if self.head is None:
            return
        if not self._tied:
            self.measure.add_head(head_pass)
            return
        [piece] = self._tied
        if not isinstance(piece, RowGrad):
            raise ValueError(
                f"parameters: no rule covers {self.head}: the head shares it with a layer that is no embedding"
            )
        self.measure.add_tied(head_pass, self.head, piece)


def _finished(
    need: GradientNeed,
    loss: Loss,
    measure: Measure,
    counts: torch.Tensor,  # [B]
) -> torch.Tensor:
    """``[B]`` or ``[B, dim]`` of what was measured under ``loss``: the other loss differs by the token count."""
    values = measure.values.clamp_min(0).sqrt() if need.dim is None else measure.values
    if need.loss != loss:
        scale = counts.double() if need.loss == "sum" else counts.double().reciprocal()
        values = values * (scale if need.dim is None else scale[:, None])
    return values.float().cpu()
