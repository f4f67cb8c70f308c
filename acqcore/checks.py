"""Every validation of public arguments. Each function raises ValueError or TypeError that names the argument,
what was given and what was expected; code below the public edge trusts its input. A leaf: imports torch only."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable

import torch

IGNORE_INDEX = -100

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(value: object) -> str:
    """Short text for an error message: dtype and shape of a tensor, else the type's name."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return type(value).__name__


def float_tensor(name: str, value: object, shape: str, dims: int) -> None:
    """``value`` is a floating-point tensor with ``dims`` dimensions; ``shape`` is how the message writes them."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {describe(value)}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name}: expected float32, bfloat16, float16 or float64 {shape}, got {describe(value)}"
        )
    if value.dim() != dims:
        raise ValueError(f"{name}: expected shape {shape}, got {describe(value)}")


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
            raise ValueError(
                f"bias: expected [V] with V = {weight.shape[0]} as in weight, got {describe(bias)}"
            )
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
        raise ValueError(
            f"targets: expected [N] with N = {like.shape[0]} as in {name}, got {describe(value)}"
        )
    same_device("targets", value, name, like)


def target_range(value: torch.Tensor, vocab_size: int) -> None:
    """Every target is an index into the vocabulary or −100. Reads values, so it runs inside the op."""
    bad = ((value < 0) | (value >= vocab_size)) & (value != IGNORE_INDEX)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"targets: expected values in [0, {vocab_size}) or {IGNORE_INDEX} (ignored), "
            f"got {int(value[row])} at row {row}"
        )


def same_device(name: str, value: torch.Tensor, other: str, tensor: torch.Tensor) -> None:
    if value.device != tensor.device:
        raise ValueError(f"{name}: is on {value.device} but {other} is on {tensor.device}")


def finite(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def positive(name: str, value: object) -> None:
    finite(name, value)
    if value <= 0:  # type: ignore[operator]
        raise ValueError(f"{name}: expected a number > 0, got {value}")


def positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {describe(value)}")
    if value < 1:
        raise ValueError(f"{name}: expected an int >= 1, got {value}")


def one_of(name: str, value: object, known: Collection[str]) -> None:
    """``value`` is one of the ``known`` names; the message lists them and the nearest."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {', '.join(known)}, got {describe(value)}")
    if value not in known:
        near = difflib.get_close_matches(value, list(known), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: unknown {value!r}, expected one of {', '.join(known)}{hint}")


def names(name: str, values: object, known: Collection[str]) -> tuple[str, ...]:
    """A non-empty sequence of known names, or one of them as a plain string."""
    if isinstance(values, str):
        values = (values,)
    if not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected a sequence of names, got {describe(values)}")
    result = tuple(values)
    if not result:
        raise ValueError(f"{name}: expected at least one of {', '.join(known)}, got none")
    for value in result:
        one_of(name, value, known)
    if len(set(result)) != len(result):
        raise ValueError(f"{name}: a name is given twice in {result}")
    return result
