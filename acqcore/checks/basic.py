"""Checks of numbers, names and tensors in general."""

from __future__ import annotations

import difflib
import importlib.util
import math
from collections.abc import Collection, Iterable
from typing import Any, get_args

import torch

IGNORE_INDEX = -100
MOST_DRAWS = 2**16 - 1  # a draw takes half a word of a mask's counter
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(value: object) -> str:
    """Short text for an error message: dtype and shape of a tensor, else the type's name."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return type(value).__name__


def float_tensor(name: str, value: Any, shape: str, dims: int) -> None:
    """``value`` is a floating-point tensor with ``dims`` dimensions, which the message writes as ``shape``."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {describe(value)}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64 {shape}, got {describe(value)}")
    if value.dim() != dims:
        raise ValueError(f"{name}: expected shape {shape}, got {describe(value)}")


def same_device(name: str, value: torch.Tensor, other: str, tensor: torch.Tensor) -> None:
    if value.device != tensor.device:
        raise ValueError(f"{name}: is on {value.device} but {other} is on {tensor.device}")


def finite(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def positive(name: str, value: Any) -> None:
    finite(name, value)
    if value <= 0:
        raise ValueError(f"{name}: expected a number > 0, got {value}")


def integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {describe(value)}")


def positive_int(name: str, value: Any) -> None:
    integer(name, value)
    if value < 1:
        raise ValueError(f"{name}: expected an int >= 1, got {value}")


def within(name: str, value: Any, least: int, most: int) -> None:
    """``value`` is an int from ``least`` to ``most``."""
    integer(name, value)
    if not least <= value <= most:
        raise ValueError(f"{name}: expected {least} to {most}, got {value}")


def draws(value: Any) -> None:
    within("draws", value, 2, MOST_DRAWS)


def dropout(value: Any) -> None:
    finite("dropout", value)
    if not 0 <= value < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {value}")


def seed(value: Any) -> None:
    within("seed", value, 0, 2**63 - 1)


def some_blocks(count: int) -> None:
    if not count:
        raise ValueError("layers: no list of transformer blocks found in the student's trunk; layers=0 needs none")


def layers(value: Any) -> None:
    if isinstance(value, str):
        if value not in ("all", "own"):
            raise ValueError(f"layers: expected a number of blocks, 'all' or 'own', got {value!r}")
    elif isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"layers: expected a number of blocks, 'all' or 'own', got {describe(value)}")
    elif value < 0:
        raise ValueError(f"layers: expected at least 0 blocks, got {value}")


def enough_blocks(name: str, asked: int, present: int) -> None:
    if asked > present:
        raise ValueError(f"{name}: expected at most {present} transformer blocks, got {asked}")


def probes(value: Any) -> None:
    within("probes", value, 1, MOST_DRAWS)


def one_of(name: str, value: Any, known: Collection[str]) -> None:
    """``value`` is one of the ``known`` names; the message lists them and suggests the nearest."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {', '.join(known)}, got {describe(value)}")
    if value not in known:
        near = difflib.get_close_matches(value, list(known), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: unknown {value!r}, expected one of {', '.join(known)}{hint}")


def literal(name: str, value: Any, of: Any) -> None:
    """``value`` is one of the strings of a Literal."""
    one_of(name, value, get_args(of))


def names(name: str, values: Any, known: Collection[str]) -> tuple[str, ...]:
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


def module(name: str, value: Any) -> None:
    if not isinstance(value, torch.nn.Module):
        raise TypeError(
            f"{name}: expected acqcore.Student, a transformers or PEFT causal language model, or the path or "
            f"hub id of one, got {describe(value)}"
        )


def instance(name: str, value: Any, kind: type, expected: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")


def given(name: str, value: Any) -> None:
    """``value`` is required here, though it is optional elsewhere."""
    if value is None:
        raise TypeError(f"{name}: expected a tensor, got None")


def at_most(name: str, value: int, limit: int, what: str) -> None:
    if value > limit:
        raise ValueError(f"{name}: expected at most {limit} ({what}), got {value}")


def installed(module: str, what: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f'{what} needs {module}: run pip install "acqcore[{extra}]"')


def device(name: str, value: Any) -> None:
    """A device that this machine has; None leaves the choice to the caller."""
    if value is None:
        return
    try:
        found = torch.device(value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected cpu, cuda or cuda:1, got {value!r}") from error
    if found.type == "cpu":
        return
    module = getattr(torch, found.type, None)
    if module is None or not hasattr(module, "is_available"):
        raise ValueError(f"{name}: expected a compute device, got {value!r}")
    count = module.device_count() if module.is_available() else 0
    if count == 0:
        raise ValueError(f"{name}: {value!r} is not available: this machine or this build of torch has none")
    if found.index is not None and found.index >= count:
        raise ValueError(f"{name}: {value!r} is not available, this machine has {count}")


def max_length(value: Any, limit: int | None) -> None:
    """At least 2 (a scored token and its predecessor) and at most ``limit``, the student's maximum."""
    if value is None:
        return
    positive_int("max_length", value)
    if value < 2:
        raise ValueError(f"max_length: expected at least 2 (a scored token and its predecessor), got {value}")
    if limit is not None and value > limit:
        raise ValueError(f"max_length: the student takes at most {limit} tokens, got {value}")


def acquisition_values(name: str, values: Any, n: int) -> None:
    """The values of an acquisition for ``n`` tokens or samples."""
    if not isinstance(values, torch.Tensor) or values.shape != (n,):
        raise ValueError(f"acquisition {name!r}: expected it to return a tensor [{n}], got {describe(values)}")
