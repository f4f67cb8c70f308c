"""Rows to score, the passes through trunk and head that they need, and memory and time computed from sizes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import torch

from acqcore import checks
from acqcore.acquisitions import DrawOptions, GradientNeed, ProbeNeed
from acqcore.costs.shape import Shape
from acqcore.gradients.reference import EpigReference, Reference
from acqcore.head_grad import SKETCH_ROWS
from acqcore.scoring.plan import Plan
from acqcore.selection.diversity import Archive

MIB = 1 << 20
#: Bounds on the memory of a head pass. cpu: 16 MiB of packed hidden states, 8 MiB of row states, a tile per thread;
#: with draws, 128 MiB of kept logits and 16 MiB more of states. Elsewhere: chunks of 64 MiB.
HEAD_SCRATCH, DRAWS_SCRATCH, CHUNKED_SCRATCH = 25 * MIB, 170 * MIB, 64 * MIB

Objects: TypeAlias = Mapping[str, Mapping[str, Callable[[], object]]]

#: Acquisition -> required arguments that only a run can create -> stand-ins that cost the same.
STAND_INS: Objects = {
    "influence": {"reference": lambda: Reference(torch.zeros(4096), 1, "all", 0, "mean", {})},
    "epig": {"reference": lambda: EpigReference(torch.zeros(2, 2, 2048), "all", 0, {})},
    "archive_novelty": {"archive": Archive},
}


@dataclass(frozen=True)
class Work:
    """Rows to score, all of the same length, and the acquisitions to compute."""

    rows: int
    tokens: int  # T, of each row
    scored: int  # of a row's tokens, at most T - 1
    batch_tokens: int
    acquisitions: tuple[str, ...]
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def checked(
        cls,
        shape: Shape,
        rows: int,
        tokens: int,
        scored: int | None,
        batch_tokens: int,
        acquisitions: Sequence[str],
        arguments: Mapping[str, Mapping[str, Any]] | None,
    ) -> Work:
        """Raises ValueError or TypeError for work that cannot be scored or planned."""
        if tokens < 2:
            raise ValueError(f"tokens: expected at least 2 (a scored token and its predecessor), got {tokens}")
        if shape.max_tokens is not None and tokens > shape.max_tokens:
            raise ValueError(f"tokens: the student takes at most {shape.max_tokens} tokens, got {tokens}")
        scored = tokens - 1 if scored is None else scored
        if scored >= tokens:
            raise ValueError(f"scored: expected at most {tokens - 1} of a row of {tokens} tokens, got {scored}")
        work = cls(rows, tokens, scored, batch_tokens, tuple(acquisitions), {} if arguments is None else arguments)
        for entry, options in work.plan.asked:  # raises the errors of ``score``
            for need in entry.needed(options):
                if isinstance(need, DrawOptions) and need.members:
                    raise ValueError(f"acquisition_args[{entry.name!r}]: members cannot be planned; plan one of them")
                if isinstance(need, GradientNeed) and need.parameters == "trainable":
                    raise ValueError(
                        f"acquisition_args[{entry.name!r}]: 'trainable' depends on adapters that a configuration does "
                        "not describe; 'all' is an upper bound"
                    )
                name = "parameters" if isinstance(need, GradientNeed) else "layers"
                if isinstance(last := getattr(need, name, None), int):
                    checks.enough_blocks(name, last, shape.blocks)
        return work

    @cached_property
    def plan(self) -> Plan:
        """The plan that ``score`` would make, with stand-ins for objects."""
        arguments = self.arguments
        if isinstance(arguments, Mapping):
            arguments = with_objects(self.acquisitions, arguments, STAND_INS)
        return Plan.of(self.acquisitions, arguments, batch_tokens=self.batch_tokens)

    @property
    def batch_rows(self) -> int:
        """Rows of a full batch."""
        return min(self.rows, max(1, self.batch_tokens // self.tokens))

    @property
    def fewest_blocks(self) -> int:
        """Blocks that a model must have for the request, which may refer to the last n."""
        named = [getattr(need, "parameters", getattr(need, "layers", None)) for need in self.plan.needs]
        return max([1, *(n for n in named if isinstance(n, int))])

    @property
    def most_draws(self) -> int:
        """The largest number of draws in the trunk, or 1 without any."""
        return max([1, *(need.draws for need in self.plan.draws if not need.on_hidden)])


def with_objects(acquisitions: Sequence[str], arguments: Mapping[str, Any], objects: Objects) -> dict[str, Any]:
    """The arguments, with missing required ones filled in from ``objects``."""
    filled = dict(arguments)
    for name in set(acquisitions) & set(objects):
        if isinstance(given := arguments.get(name, {}), Mapping):  # else the plan raises
            filled[name] = {**{key: make() for key, make in objects[name].items()}, **given}
    return filled


@dataclass(frozen=True)
class Passes:
    """Forward passes of the whole trunk and products with the head's weight, both possibly fractional, and the number
    of blocks that keep activations for a backward pass."""

    trunk: float
    head: float
    kept_blocks: int


def passes(shape: Shape, work: Work, on_cpu: bool = True) -> Passes:
    """The passes of a batch, read off the plan.

    - One forward pass without dropout and one product for the statistics, if any need reads them.
    - K draws: K products on a CPU, 2 K on a GPU, two in the block form; with dropout in the last n of L blocks, also
      one forward pass of the others and K of these.
    - Gradients for one kind of target: a backward pass through the blocks of the deepest need (of activations only,
      which costs a forward pass) and two products; each norm or sketch costs the same again through its own blocks. In
      the head, a sketch takes one product; a norm T / 2D of one beside the statistics, plus one for predicted targets.
      The statistics come with the first sketch or, on a CPU and without probes, with the gradient of the hidden states;
      there, these two share a product as well, on up to eight threads.
    - P probes of one seed: P + 2 products, on a GPU P + 3, and for each probe a backward pass through the blocks of the
      deepest need; a norm or sketch of weights costs the same again through its own blocks. The first seed also gives
      the statistics, unless a norm or sketch of the head already does.
    """
    plan = work.plan
    on_hidden = any(need.on_hidden for need in plan.draws)
    undropped = len(plan.needs) > len(plan.draws)
    trunk, head = float(undropped or on_hidden), float(undropped)
    for draw in plan.draws:
        head += 2 if draw.form == "block" else draw.draws * (1 if on_cpu else 2)
        if not draw.on_hidden:
            last = _blocks(draw.layers, shape)
            trunk += 1 - last / shape.blocks + draw.draws * last / shape.blocks
    kept = 0
    probed = [need for need in plan.needs if isinstance(need, ProbeNeed)]
    for predicted in (False, True):
        needs = [n for n in plan.needs if isinstance(n, GradientNeed) and n.predicted == predicted]
        depths = {n: 0 if n.parameters == "head" else _blocks(n.parameters, shape) for n in needs}
        deepest = max(depths.values(), default=0)
        trunk += (deepest + sum(depths.values())) / shape.blocks
        head += 2 * (deepest > 0)
        gram = min(1.0, work.scored / (2 * shape.hidden))
        of_head = {(need.dim, need.dim and need.seed) for need in needs if isinstance(need.parameters, str)}
        head += sum(1 if dim is not None else gram + predicted for dim, _ in of_head)
        kept = max(kept, deepest)
        if predicted:
            continue
        if any(dim is not None for dim, _ in of_head):
            head -= 1 + (on_cpu and deepest > 0)
        elif (on_cpu and deepest and not probed) or (probed and not of_head):
            head -= 1
    for seed in {need.seed for need in probed}:
        of_seed = [need for need in probed if need.seed == seed]
        most = max(need.probes for need in of_seed)
        head += most + 2 + (not on_cpu)
        for k in range(most):
            asked = [need for need in of_seed if k < need.probes]
            deepest = max(_blocks(need.layers, shape) for need in asked)
            again = sum(_blocks(need.layers, shape) for need in asked if need.of != "sites")
            trunk += (deepest + again) / shape.blocks
            kept = max(kept, deepest)
    return Passes(trunk, head, kept)


def _blocks(last: int | str | None, shape: Shape) -> int:
    """Number of blocks: the last n, or all."""
    return last if isinstance(last, int) else shape.blocks


def activation_bytes(shape: Shape, work: Work, on_cpu: bool = True) -> int:
    """Peak bytes beyond weights and libraries while a full batch of P padded tokens is scored.

    Without gradients, a block holds the residual stream, its norm, and three tensors of the MLP's inner width (gate,
    up, their product): ``P (2 D + 3 F)`` numbers. Eager attention adds scores ``[B, heads, T, T]``, once in the model's
    dtype and once in float32. To these add two copies of the N scored rows ``[N, D]`` and the head's scratch. For a
    backward pass, each of its blocks keeps ``P (8 D + 4 F)`` numbers: inputs of norms and products, queries, keys and
    values, and the MLP's inner activations. It also holds gradients in the hidden states, in float32: ``[N, D]`` for
    the loss and for each of the probes plus one, and one more spread over the batch. A sketch of the head holds hashes
    and spectra of up to 1024 rows, 12 bytes per row and entry of the sketch.
    """
    size = getattr(torch, shape.dtype).itemsize
    batch = work.batch_rows * work.tokens
    at_once = max(batch, min(batch * work.most_draws, max(work.batch_tokens, work.most_draws * work.tokens)))
    block = at_once * (2 * shape.hidden + 3 * shape.widest) * size
    if shape.attention == "eager":
        block += at_once * work.tokens * shape.heads * (size + 4)
    deep = passes(shape, work).kept_blocks
    kept = deep * batch * (8 * shape.hidden + 4 * shape.widest) * size
    scored = work.batch_rows * work.scored
    rows = 2 * scored * shape.hidden * size
    of_targets = [need for need in work.plan.needs if isinstance(need, GradientNeed)]
    probes = max((need.probes + 1 for need in work.plan.needs if isinstance(need, ProbeNeed)), default=0)
    cotangents = probes + any(need.parameters != "head" for need in of_targets)
    gradients = 4 * shape.hidden * (scored * cotangents + (batch if deep else 0))
    dims = [need.dim for need in of_targets if need.dim is not None and isinstance(need.parameters, str)]
    hashed = 12 * min(scored, SKETCH_ROWS) * max(dims, default=0)
    scratch = (DRAWS_SCRATCH if work.plan.draws else HEAD_SCRATCH) if on_cpu else CHUNKED_SCRATCH
    return block + kept + rows + gradients + hashed + scratch


def batch_seconds(shape: Shape, work: Work, flops: float, bandwidth: float, on_cpu: bool = True) -> tuple[float, float]:
    """Seconds of a full batch in the trunk and in the head, on a device that achieves ``flops`` multiplications and
    additions and moves ``bandwidth`` bytes per second; each part takes the longer of its two times.

    A forward pass takes ``2 P`` operations per parameter of the blocks plus, for causal attention, ``2 P T D`` per
    block; the head takes ``2 N D V``. The bytes are those of the weights, read once per forward pass.
    """
    size = getattr(torch, shape.dtype).itemsize
    count = passes(shape, work, on_cpu)
    batch = work.batch_rows * work.tokens
    scored = work.batch_rows * work.scored
    trunk = 2 * batch * (shape.block_parameters + work.tokens * shape.hidden * shape.blocks)
    head = 2 * scored * shape.hidden * shape.vocabulary
    trunk_seconds = max(trunk / flops, shape.block_parameters * size / bandwidth)
    head_seconds = max(head / flops, shape.head_bytes / bandwidth)
    return count.trunk * trunk_seconds, count.head * head_seconds
