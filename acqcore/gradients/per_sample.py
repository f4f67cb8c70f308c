"""Computes several measures of each sample's gradient from one forward and as few backwards as possible.

A batched backward gives the gradient of each module's output per sample and token. With a linear layer's inputs
``x_t`` and output gradients ``g_t``, a sample's weight gradient is ``sum_t g_t x_t^T``. Its norm and sketch can be
computed without forming it: ``||G||^2 = sum_st <g_s, g_t> <x_s, x_t>`` (the ghost norm). The student is causal and
padding comes last, so the gradients of padded tokens are zero.

Sources: Goodfellow 2015, "Efficient per-example gradient computations"; Li et al. 2021, "Large language models can be
strong differentially private learners"; Park et al. 2023 (TRAK) for the sketches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from acqcore import checks
from acqcore.gradients.capture import Capture, PieceTaker
from acqcore.gradients.head_pass import HeadPass, spread
from acqcore.gradients.measures import (
    GradPiece,
    Marginals,
    Measure,
    OuterGrad,
    RowGrad,
    SiteSquares,
    Sketch,
    SquaredNorm,
    WeightedNorm,
    scaled,
)
from acqcore.gradients.need import GradientNeed, ProbeNeed
from acqcore.gradients.probe import Probe
from acqcore.gradients.selection import name_of, select_linear, select_parameters, whole_parameters
from acqcore.head import Head
from acqcore.literals import Loss
from acqcore.students.student import Student
from acqcore.students.trunk_draws import DropoutSites


class SampleGradients:
    """Computes gradient needs of a student's samples, batch by batch."""

    def __init__(self, student: Student, head: Head, needs: Sequence[GradientNeed | ProbeNeed]) -> None:
        self._needs = [need for need in needs if isinstance(need, GradientNeed)]
        self._probed = [need for need in needs if isinstance(need, ProbeNeed)]
        self._selections = {
            p: select_parameters(student, head, p) for p in dict.fromkeys(need.parameters for need in self._needs)
        }
        if any(need.layers != 0 for need in self._probed):
            whole_parameters(student)
        if self._probed:
            checks.whole_head(len(head.weight), head.vocab_size, head.group)
        self._linear = {
            layers: select_linear(student, layers)
            for layers in dict.fromkeys(need.layers for need in self._probed if need.of != "sites")
        }
        for selection in self._linear.values():
            if shared := name_of(head.weight, selection.names):
                raise ValueError(f"layers: the head shares {shared}, so its noise would change the logits, too")
        self._sites: dict[ProbeNeed, dict[nn.Module, float]] = {}
        for need in self._probed:
            if need.of == "sites" and need.layers != 0:
                found = DropoutSites.of(student, need.layers, need.dropout)
                self._sites[need] = {module: p for _, module, p in found.sites}
        chosen = [*self._selections.values(), *self._linear.values()]
        names = {p: name for selection in chosen for p, name in selection.names.items()}
        modules = {module for sites in self._sites.values() for module in sites}
        self._student = student
        tied = [selection.head for selection in chosen]
        whole = {name for selection in self._linear.values() for name in selection.names.values()}
        self._capture = Capture(student, names, tied, modules, whole)
        self._probe = Probe(self._capture, student, tied)
        self._left = 0  # backwards left for the current batch
        self._first = torch.zeros(0, dtype=torch.int64)  # [B], first position that predicts a scored token
        self._length = 0  # tokens that have a gradient
        of_trunk = [need for need in self._probed if need.layers != 0]
        #: Whether gradients are confined to completions.
        self._of_completions = not names and all(need.positions == "completion" for need in of_trunk)
        #: Whether the forward must keep a graph.
        self._deep = bool(names or modules)
        written = [need for need in self._needs if not need.predicted]
        #: Loss that weights the written tokens.
        self.loss: Loss = written[0].loss if written else "mean"
        #: Whether a backward under the written targets reaches the trunk.
        self.of_trunk = self._reaches_trunk(written)
        #: Seed of random cotangents -> number needed.
        self.probes: dict[int, int] = {}
        for need in self._probed:
            self.probes[need.seed] = max(need.probes, self.probes.get(need.seed, 0))
        of_head = [need for need in written if self._selections[need.parameters].head]
        #: Whether a need asks for the norm of the head's gradient under the written targets.
        self.of_head = any(need.dim is None for need in of_head)
        #: Length and seed of a sketch of it, if a need asks for one.
        self.head_sketch = next(((need.dim, need.seed) for need in of_head if need.dim is not None), None)

    @property
    def one_by_one(self) -> bool:
        """Whether batches must hold one sample; known after :meth:`prepare`."""
        return self._capture.rules.one_by_one

    @property
    def backwards_of_completions(self) -> int:
        """Number of backwards over a batch's completions if gradients reach no further, else 0."""
        return self._backwards() if self._deep and self._of_completions and self._student.cuts_prompts else 0

    def prepare(
        self,
        input_ids: torch.Tensor,  # [n, T] int64, of real samples
    ) -> None:
        """Find out which rules hold for the student; call before forming batches."""
        if not self._deep:
            return
        self._probe.prepare(input_ids)
        chosen = [(f"parameters: {p!r}", s) for p, s in self._selections.items() if s.names and s.head is None]
        for argument, selection in (*chosen, *((f"layers: {n!r}", s) for n, s in self._linear.items())):
            if self._capture.rules.touched.isdisjoint(selection.names.values()):
                name = next(iter(selection.names.values()))
                raise ValueError(
                    f"{argument}: {name} and the others have no gradient: the forward of the first "
                    "samples does not use them (merged or disabled adapters, tokens that do not occur) or runs "
                    "without gradients (checkpointing with use_reentrant=True)"
                )

    def take_one_by_one(self) -> None:
        """Use batches of one sample from now on."""
        self._probe.take_one_by_one()

    @contextmanager
    def forward(
        self,
        input_ids: torch.Tensor,  # [B, T] int64
        first: torch.Tensor,  # [B] int64, position that predicts the first scored token
    ) -> Iterator[torch.Tensor]:
        """Context that yields the trunk's hidden states ``[B, T, D]`` and keeps the graph for :meth:`measure`."""
        if not self._deep:
            yield self._student.hidden(input_ids)
            return
        start = int(first.min()) if self.backwards_of_completions else 0
        self._first, self._length = first - start, input_ids.shape[1] - start
        with self._capture.attached():
            yield self._capture.forward(input_ids, start)

    def measure(
        self,
        hidden: torch.Tensor,  # [B, T, D], of forward
        positions: torch.Tensor,  # [N] int64, of the scored tokens' predecessors in the flattened batch
        written: HeadPass,
    ) -> dict[GradientNeed | ProbeNeed, Any]:
        """Values of each need, given the head pass over the written targets."""
        self._left = self._backwards()
        values: dict[GradientNeed | ProbeNeed, Any] = {}
        for predicted in (False, True):
            needs = [need for need in self._needs if need.predicted == predicted]
            if needs:
                head_pass = written.predicted(needs[0].loss) if predicted else written
                values.update(self._under_targets(hidden, positions, needs, head_pass).items())
        for seed in self.probes:
            probed = [need for need in self._probed if need.seed == seed]
            values.update(self._under_probes(hidden, positions, probed, written).items())
        return values

    def _under_targets(
        self,
        hidden: torch.Tensor,  # [B, T, D]
        positions: torch.Tensor,  # [N] int64
        needs: Sequence[GradientNeed],
        head_pass: HeadPass,
    ) -> dict[GradientNeed, torch.Tensor]:
        """Values of needs of the loss gradient, from one backward."""
        measured: dict[GradientNeed, _Measured] = {}
        for key in dict.fromkeys(map(_but_loss, needs)):
            selection, measure = self._selections[key.parameters], _measure(head_pass, key.dim, key.seed)
            measured[key] = _Measured(measure, frozenset(selection.names.values()), selection.head)
        if self._reaches_trunk(needs):
            self._backward(hidden, head_pass.hidden_gradient(hidden, positions), list(measured.values()), ())
        for each in measured.values():
            each.add_head(head_pass)
        counts = torch.tensor(head_pass.counts, device=head_pass.hidden.device)
        return {need: _finished(need, head_pass.loss, measured[_but_loss(need)].measure, counts) for need in needs}

    def _under_probes(
        self,
        hidden: torch.Tensor,  # [B, T, D]
        positions: torch.Tensor,  # [N] int64
        needs: Sequence[ProbeNeed],  # of one seed
        head_pass: HeadPass,
    ) -> dict[ProbeNeed, Any]:
        """Values of needs under random cotangents, one backward per cotangent."""
        carried = head_pass.fisher_grads(self.probes[needs[0].seed], needs[0].seed)
        # Needs that differ only in the number of probes share the probes they have in common.
        widest = {_but_probes(need): need for need in sorted(needs, key=lambda need: need.probes)}
        measured = list(widest.values())
        found: dict[ProbeNeed, list[torch.Tensor]] = {need: [] for need in measured if need.of != "marginals"}
        marginals = {
            need: Marginals(head_pass, self._linear[need.layers].names.values())
            for need in measured
            if need.of == "marginals"
        }
        for k, gradient in enumerate(carried.gradients):
            asked = [need for need in measured if k < need.probes]
            of_weights = {need: self._weights_measure(need, head_pass) for need in asked if need.of == "weights"}
            of_sites = {need: self._site_squares(need, head_pass) for need in asked if need.of == "sites"}
            if any(need.layers != 0 for need in asked):
                whole = spread(gradient, hidden, positions)
                takers: list[PieceTaker] = [*of_weights.values(), *(marginals[n] for n in asked if n in marginals)]
                self._backward(hidden, whole, takers, list(of_sites.values()))
            for need, squares in of_sites.items():
                if need.layers == 0:
                    squares.add_rows(head_pass.hidden, gradient, need.dropout)
                found[need].append(squares.values)
            for need, measure in of_weights.items():
                found[need].append(measure.measure.values)
        excess = head_pass.excess(carried).cpu()
        counts = torch.tensor(head_pass.counts, dtype=torch.float64)[:, None]
        of_probes = {need: torch.stack(values, dim=1).cpu() for need, values in found.items()}
        values: dict[ProbeNeed, Any] = {}
        for need in needs:
            if need in marginals:
                sums = marginals[need].found.items()
                values[need] = {name: (rows / need.probes, columns / need.probes) for name, (rows, columns) in sums}
                continue
            first = of_probes[widest[_but_probes(need)]][:, : need.probes]
            if need.dim is None:
                values[need] = controlled(first / counts, excess[:, : need.probes])
            else:
                values[need] = first / counts.sqrt()[:, :, None]
        return values

    def _backward(
        self,
        hidden: torch.Tensor,  # [B, T, D]
        gradient: torch.Tensor,  # [B, T, D]
        of_parameters: Sequence[PieceTaker],
        of_sites: Sequence[SiteSquares],
    ) -> None:
        """Run one of a batch's backwards; the last frees the graph."""
        self._left -= 1
        self._capture.backward(hidden, gradient, of_parameters, of_sites, last=self._left == 0)

    def _backwards(self) -> int:
        """Number of backwards through the trunk per batch."""
        by_targets = ([n for n in self._needs if n.predicted == predicted] for predicted in (False, True))
        count = sum(self._reaches_trunk(needs) for needs in by_targets)
        for seed in dict.fromkeys(need.seed for need in self._probed):
            count += max([0, *(n.probes for n in self._probed if n.seed == seed and n.layers != 0)])
        return count

    def _reaches_trunk(self, needs: Sequence[GradientNeed]) -> bool:
        return any(self._selections[need.parameters].names for need in needs)

    def _site_squares(self, need: ProbeNeed, head_pass: HeadPass) -> SiteSquares:
        first = self._first if need.positions == "completion" else None
        return SiteSquares(head_pass, self._sites.get(need, {}), first, self._length)

    def _weights_measure(self, need: ProbeNeed, head_pass: HeadPass) -> _Measured:
        names = frozenset(self._linear[need.layers].names.values())
        if need.posterior is None:
            return _Measured(_measure(head_pass, need.dim, need.sketch_seed), names, None)
        batch, device = len(head_pass.bounds), head_pass.hidden.device
        return _Measured(WeightedNorm(batch, device, need.posterior.factors), names, None)


def controlled(
    squares: torch.Tensor,  # [B, P]
    excess: torch.Tensor,  # [B, P]
) -> torch.Tensor:
    """Squares corrected by a control variate for the size of each probe's cotangents, in the shape of ``squares``.

    ``excess`` is the relative deviation of the squared norm of a probe's gradient in the hidden states from its
    expectation. It has mean 0 and correlates with the squares. Its coefficient is the mean over the other probes, which
    is independent of it, so the control adds no bias. A single probe has no control.
    """
    probes = squares.shape[1]
    if probes == 1:
        return squares
    others = (squares.sum(dim=1, keepdim=True) - squares) / (probes - 1)
    return squares - others * excess


def _but_probes(need: ProbeNeed) -> ProbeNeed:
    """Key equal for needs that differ only in the number of probes; marginals, summed over probes, keep theirs."""
    return need if need.of == "marginals" else replace(need, probes=1)


def _but_loss(need: GradientNeed) -> GradientNeed:
    """Key equal for needs that share a measure within a backward."""
    return replace(need, loss="mean", predicted=False, seed=0 if need.dim is None else need.seed)


def _measure(head_pass: HeadPass, dim: int | None, seed: int) -> Measure:
    batch, device = len(head_pass.bounds), head_pass.hidden.device
    return SquaredNorm(batch, device) if dim is None else Sketch(batch, device, dim, seed)


@dataclass(frozen=True, eq=False)
class _Measured:
    """A measure and the parameters whose pieces it takes."""

    measure: Measure
    names: frozenset[str]
    head: str | None
    _tied: list[GradPiece] = field(default_factory=list)  # gradient of a weight shared by embedding and head

    def takes(self, name: str) -> bool:
        return name == self.head or name in self.names

    def add(self, name: str, piece: GradPiece, factor: torch.Tensor | None) -> None:
        if name == self.head:
            self._tied.append(piece if isinstance(piece, OuterGrad) else scaled(piece, factor))
        else:
            self.measure.add(name, piece, factor)

    def add_head(self, head_pass: HeadPass) -> None:
        if self.head is None:
            return
        if not self._tied:
            self.measure.add_head(head_pass)
            return
        [piece] = self._tied
        if not isinstance(piece, RowGrad):
            raise ValueError(
                f"parameters: no rule covers {self.head}: the head shares it with a layer that is not an embedding"
            )
        self.measure.add_tied(head_pass, self.head, piece)


def _finished(
    need: GradientNeed,
    loss: Loss,
    measure: Measure,
    counts: torch.Tensor,  # [B]
) -> torch.Tensor:
    """Convert a measure under ``loss`` to the need's loss (a factor of the token count); ``[B, ...]``."""
    values = measure.values.clamp_min(0).sqrt() if need.dim is None else measure.values
    if need.loss != loss:
        scale = counts.double() if need.loss == "sum" else counts.double().reciprocal()
        values = values * (scale if need.dim is None else scale[:, None])
    return values.float().cpu()
