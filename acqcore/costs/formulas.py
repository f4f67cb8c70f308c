"""Memory and time computed from sizes alone, for a model that cannot run here."""

from __future__ import annotations

import torch

from acqcore.costs.shape import Shape
from acqcore.costs.work import Work, passes

MIB = 1 << 20
#: Bounds on the memory of a head pass. cpu: 16 MiB of packed hidden states, 8 MiB of row states, a tile per thread;
#: with draws, 128 MiB of kept logits and 16 MiB more of states. Elsewhere: chunks of 64 MiB.
HEAD_SCRATCH, DRAWS_SCRATCH, CHUNKED_SCRATCH = 25 * MIB, 170 * MIB, 64 * MIB


def activation_bytes(shape: Shape, work: Work, on_cpu: bool = True) -> int:
    """Peak bytes beyond weights and libraries while a full batch of P padded tokens is scored.

    Without gradients, a block holds the residual stream, its norm, and three tensors of the MLP's inner width (gate,
    up, their product): ``P (2 D + 3 F)`` numbers. Eager attention adds scores ``[B, heads, T, T]``, once in the model's
    dtype and once in float32. To these add two copies of the N scored rows ``[N, D]`` and the head's scratch. For a
    backward pass, each of its blocks keeps ``P (8 D + 4 F)`` numbers: inputs of norms and products, queries, keys and
    values, and the MLP's inner activations.
    """
    size = getattr(torch, shape.dtype).itemsize
    batch = work.batch_rows * work.tokens
    at_once = batch
    if work.most_draws > 1:
        at_once = max(batch, min(batch * work.most_draws, max(work.batch_tokens, work.most_draws * work.tokens)))
    block = at_once * (2 * shape.hidden + 3 * shape.widest) * size
    if shape.attention == "eager":
        block += at_once * work.tokens * shape.heads * (size + 4)
    kept = passes(shape, work).kept_blocks * batch * (8 * shape.hidden + 4 * shape.widest) * size
    rows = 2 * work.batch_rows * work.scored * shape.hidden * size
    draws = bool(work.plan.draws)
    scratch = (DRAWS_SCRATCH if draws else HEAD_SCRATCH) if on_cpu else CHUNKED_SCRATCH
    return block + kept + rows + scratch


def batch_seconds(shape: Shape, work: Work, flops: float, bandwidth: float) -> tuple[float, float]:
    """Seconds of a full batch in the trunk and in the head, on a device that achieves ``flops`` multiplications and
    additions and moves ``bandwidth`` bytes per second; each part takes the longer of its two times.

    A forward pass takes ``2 P`` operations per parameter of the blocks plus, for causal attention, ``2 P T D`` per
    block; the head takes ``2 N D V``. The bytes are those of the weights, read once per forward pass.
    """
    size = getattr(torch, shape.dtype).itemsize
    count = passes(shape, work)
    batch = work.batch_rows * work.tokens
    scored = work.batch_rows * work.scored
    trunk = 2 * batch * (shape.block_parameters + work.tokens * shape.hidden * shape.blocks)
    head = 2 * scored * shape.hidden * shape.vocabulary
    trunk_seconds = max(trunk / flops, shape.block_parameters * size / bandwidth)
    head_seconds = max(head / flops, shape.head_bytes / bandwidth)
    return count.trunk * trunk_seconds, count.head * head_seconds
