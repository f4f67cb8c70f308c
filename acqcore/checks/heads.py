"""Heads, hidden states, logits and targets."""

from __future__ import annotations

import torch

from acqcore.checks.basic import IGNORE_INDEX, describe, finite, float_tensor, positive, same_device


def head(weight: object, bias: object, softcap: object, scale: object) -> None:
    """Arguments of :class:`acqcore.Head`."""
    float_tensor("weight", weight, "[V, D]", 2)
    assert isinstance(weight, torch.Tensor)
    if weight.shape[0] < 1:
        raise ValueError(f"weight: expected [V, D] with V >= 1, got {describe(weight)}")
    if bias is not None:
        float_tensor("bias", bias, "[V]", 1)
        assert isinstance(bias, torch.Tensor)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias: expected [V] with V = {weight.shape[0]} as in weight, got {describe(bias)}")
        same_device("bias", bias, "weight", weight)
    if softcap is not None:
        positive("softcap", softcap)
    finite("scale", scale)


def vocabulary(start: int, end: int, size: int | None) -> None:
    """A head covering rows ``start:end`` of a vocabulary of ``size``."""
    if start < 0:
        raise ValueError(f"vocab_start: expected an index >= 0, got {start}")
    if size is not None and size < end:
        raise ValueError(f"vocab_size: expected at least vocab_start + V = {end}, got {size}")


def hidden(value: object, weight: torch.Tensor) -> None:
    """Hidden states that fit a head."""
    float_tensor("hidden", value, "[N, D]", 2)
    assert isinstance(value, torch.Tensor)
    if value.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden: expected [N, D] with D = {weight.shape[1]} as in head.weight "
            f"{list(weight.shape)}, got {describe(value)}"
        )
    same_device("hidden", value, "head.weight", weight)


def logits(value: object) -> None:
    """Logits ``[N, V]`` with at least one column."""
    float_tensor("logits", value, "[N, V]", 2)
    assert isinstance(value, torch.Tensor)
    if value.shape[1] < 1:
        raise ValueError(f"logits: expected [N, V] with V >= 1, got {describe(value)}")


def targets(value: object, like: torch.Tensor, name: str) -> None:
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

    On the CPU one outside the vocabulary raises. On other devices reading values would make the host wait for all that
    is queued, in every batch, and can not be captured in a CUDA graph: there it is ignored as -100 is, so that its row
    is NaN and not valid.
    """
    if value is None:
        return None
    if value.device.type != "cpu":
        return ignored_outside(value, vocab_size)
    target_range(value, vocab_size)
    return value


def ignored_outside(value: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Targets ``[N]`` with -100 in place of what is outside the vocabulary."""
    return value.where((value >= 0) & (value < vocab_size), IGNORE_INDEX)


def target_range(value: torch.Tensor, vocab_size: int) -> None:
    """Every target is an index into the vocabulary or −100. Reads values, so it runs inside the op."""
    bad = ((value < 0) | (value >= vocab_size)) & (value != IGNORE_INDEX)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"targets: expected values in [0, {vocab_size}) or {IGNORE_INDEX} (ignored), "
            f"got {int(value[row])} at row {row}"
        )
