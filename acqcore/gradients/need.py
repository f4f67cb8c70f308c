"""Quantities of a sample's gradient that a measure may request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from acqcore import checks
from acqcore.literals import Layers, Loss, Parameters, Positions

if TYPE_CHECKING:
    from acqcore.gradients.laplace import LaplacePosterior


@dataclass(frozen=True)
class GradientNeed:
    """The norm of each sample's gradient, ``[B]``, or a sketch of it, ``[B, dim]``; float32 on the CPU.

    Args:
        parameters, loss, predicted: as in :func:`acqcore.grad_norm`.
        dim: length of the sketch; None asks for the norm.
        seed: seed of the sketch.
    """

    parameters: Parameters = "head"
    loss: Loss = "mean"
    predicted: bool = False
    dim: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.parameters, str):
            checks.one_of("parameters", self.parameters, ("head", "trainable", "all"))
        else:
            blocks = "head, trainable, all or a number of transformer blocks"
            object.__setattr__(self, "parameters", checks.integer("parameters", self.parameters, blocks))
            if self.parameters < 1:
                raise ValueError(f"parameters: expected at least 1 transformer block, got {self.parameters}")
        checks.literal("loss", self.loss, Loss)
        checks.flag("predicted", self.predicted)
        if self.dim is not None:
            object.__setattr__(self, "dim", checks.positive_int("dim", self.dim))
        object.__setattr__(self, "seed", checks.seed(self.seed))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample's value."""
        return () if self.dim is None else (self.dim,)


@dataclass(frozen=True)
class ProbeNeed:
    """Squared gradients of a sample under P random cotangents of its logits (``acqcore.fisher``); float64 on the CPU.

    Args:
        of: ``sites``: ``sum_s p_s / (1 - p_s) sum_i (o_i g_i)^2`` over the activations o that dropout acts on and their
            gradients g, ``[B, P]``. ``weights``: the squared norm of the gradient in the weights of linear layers,
            ``[B, P]``, or its sketch, ``[B, P, dim]``. ``marginals``: name -> sums of each such weight's Fisher
            diagonal over inputs and over outputs, added up over samples. Squares are divided by the number of scored
            tokens, sketches by its square root.
        layers: the last n blocks, or ``"all"``; for sites also ``"own"``, or 0 for the last hidden state.
        probes: P.
        seed: seed of the cotangents.
        dropout: for sites, probability p in blocks and on the last hidden state.
        positions: for sites, the tokens whose activations count.
        dim, sketch_seed: length and seed of the sketch; a ``dim`` of None asks for the norm.
        posterior: its variances multiply the squared entries of a weight's gradient.
    """

    of: Literal["sites", "weights", "marginals"]
    layers: Layers
    probes: int
    seed: int
    dropout: float = 0.0
    dim: int | None = None
    sketch_seed: int = 0
    posterior: LaplacePosterior | None = None
    positions: Positions = "all"
