"""Checks of heads, hidden states, logits and targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from acqcore.checks.basic import (
    IGNORE_INDEX,
    describe,
    draws,
    finite,
    float_tensor,
    positive,
    positive_int,
    same_device,
)


def head(weight: Any, bias: Any, softcap: Any, scale: Any) -> None:
    """Arguments of :class:`acqcore.Head`."""
    float_tensor("weight", weight, "[V, D]", 2)
    if hasattr(weight, "placements"):
        raise TypeError(
            f"weight: expected a plain tensor [V, D], got a DTensor of shape {list(weight.shape)}; give its local rows "
            "with vocab_start, vocab_size and group, or the model to acqcore.Student.from_model"
        )
    if bias is not None:
        float_tensor("bias", bias, "[V]", 1)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias: expected [V] with V = {weight.shape[0]} as in weight, got {describe(bias)}")
        same_device("bias", bias, "weight", weight)
    if softcap is not None:
        positive("softcap", softcap)
    finite("scale", scale)


def vocabulary(start: int, rows: int, size: int | None, group: object) -> None:
    """``rows`` rows of a vocabulary of ``size``, beginning at ``start``; a shard of a group may have no rows."""
    if start < 0:
        raise ValueError(f"vocab_start: expected an index >= 0, got {start}")
    if group is None:
        if rows < 1:
            raise ValueError(f"weight: expected [V, D] with V >= 1, got V = {rows}")
        if size is not None and size <= start:
            raise ValueError(f"vocab_size: expected more than vocab_start = {start}, got {size}")
        return
    distributed = torch.distributed
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        raise TypeError(f"group: expected a torch.distributed.ProcessGroup or None, got {describe(group)}")
    if size is None:
        raise ValueError("vocab_size: expected the size of the whole vocabulary if a group shares it, got None")
    positive_int("vocab_size", size)


def tiling(shards: list[list[int]]) -> None:
    """Each rank's ``(start, rows, vocab_size, columns)`` cover every row of one vocabulary exactly once."""
    if len({(size, columns) for _, _, size, columns in shards}) > 1:
        shown = ", ".join(f"{size} x {columns}" for _, _, size, columns in shards)
        raise ValueError(f"head: expected one vocabulary size and width on every rank of the group, got {shown}")
    size, end = shards[0][2], 0
    for start, rows, _, _ in sorted(shard for shard in shards if shard[1] > 0):
        if start != end:
            break
        end = start + rows
    else:
        if end == size:
            return
    ranges = ", ".join(f"{start}:{start + rows}" for start, rows, _, _ in shards)
    raise ValueError(f"head: expected the ranks' rows to tile a vocabulary of {size}, got {ranges}")


def hidden(value: Any, weight: torch.Tensor) -> None:
    """Hidden states that fit a head."""
    float_tensor("hidden", value, "[N, D]", 2)
    if value.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden: expected [N, D] with D = {weight.shape[1]} as in head.weight "
            f"{list(weight.shape)}, got {describe(value)}"
        )
    same_device("hidden", value, "head.weight", weight)
    if not torch.compiler.is_compiling():
        allocated("head.weight", weight)


def allocated(name: str, value: torch.Tensor) -> None:
    """The tensor has memory: FSDP frees it between forward passes, and a kernel would then read garbage."""
    if value.numel() and value.untyped_storage().nbytes() == 0:
        raise ValueError(
            f"{name}: its storage was freed, as FSDP does between forward passes; score through acqcore.Student, "
            "which gathers it"
        )


def logits(value: Any) -> None:
    """Logits ``[N, V]`` with at least one column."""
    float_tensor("logits", value, "[N, V]", 2)
    if value.shape[1] < 1:
        raise ValueError(f"logits: expected [N, V] with V >= 1, got {describe(value)}")


def targets(value: Any, like: torch.Tensor, name: str) -> None:
    """Shape, dtype and device of targets for the rows of ``like`` (an argument called ``name``)."""
    if value is None:
        return
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int64:
        raise TypeError(f"targets: expected an int64 tensor [N], got {describe(value)}")
    if value.shape != like.shape[:1]:
        raise ValueError(f"targets: expected [N] with N = {like.shape[0]} as in {name}, got {describe(value)}")
    same_device("targets", value, name, like)


def targets_in_range(value: torch.Tensor | None, vocab_size: int) -> torch.Tensor | None:
    """Targets ``[N]`` that a backend can trust.

    On the CPU, a target outside the vocabulary raises. On other devices, reading values would make the host wait for
    all queued work in every batch, and cannot be captured in a CUDA graph. Such a target is then ignored like -100: its
    row is NaN and not valid.
    """
    if value is None:
        return None
    if value.device.type != "cpu":
        return ignored_outside(value, vocab_size)
    bad = ((value < 0) | (value >= vocab_size)) & (value != IGNORE_INDEX)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"targets: expected values in [0, {vocab_size}) or {IGNORE_INDEX} (ignored), "
            f"got {int(value[row])} at row {row}"
        )
    return value


def ignored_outside(value: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Targets ``[N]`` with values outside the vocabulary replaced by -100."""
    return value.where((value >= 0) & (value < vocab_size), IGNORE_INDEX)


def whole_head(group: object) -> None:
    if group is not None:
        raise ValueError("head: expected the whole vocabulary, got a shard of a group")


def drawn_hidden(value: Any, count: int, weights: Sequence[torch.Tensor]) -> None:
    """Hidden states of every draw ``[K, N, D]``, and the weights ``[V, D]`` of their heads: one, or K."""
    float_tensor("hidden", value, "[K, N, D]", 3)
    draws(len(value))
    if count not in (1, len(value)):
        raise ValueError(f"head: expected one, or one for each of the {len(value)} draws, got {count}")
    for k, weight in enumerate(weights):
        if weight.shape != weights[0].shape or weight.dtype != weights[0].dtype or weight.device != weights[0].device:
            raise ValueError(
                f"head: expected heads with the same shape, dtype and device, got {describe(weights[0])} and "
                f"{describe(weight)} for draw {k}"
            )


def alike(what: str, first: object, other: object, draw: int) -> None:
    if first != other:
        raise ValueError(f"head: expected heads with the same {what}, got {first} and {other} for draw {draw}")
