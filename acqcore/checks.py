"""Validation of public arguments, shared by several callers.

Each function raises ValueError or TypeError naming the argument, the value given and the value expected. Code below the
public API trusts its input. This module imports only torch.
"""

from __future__ import annotations

import difflib
import importlib.util
import itertools
import numbers
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, as ``object_pairs_hook`` of ``json.loads``, which by default keeps the last of equal keys."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is repeated")
    return values


def float_tensor(name: str, value: Any, shape: str, dims: int) -> None:
    """``value`` is a floating-point tensor with ``dims`` dimensions, which the message writes as ``shape``."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {describe(value)}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64 {shape}, got {describe(value)}")
    if value.layout is not torch.strided or value.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got layout {'nested' if value.is_nested else value.layout}")
    if value.dim() != dims:
        raise ValueError(f"{name}: expected shape {shape}, got {describe(value)}")


def same_device(name: str, value: torch.Tensor, other: str, tensor: torch.Tensor) -> None:
    if value.device != tensor.device:
        raise ValueError(f"{name}: is on {value.device} but {other} is on {tensor.device}")


def finite(name: str, value: Any) -> float:
    """``value`` as a number of Python; it may be a scalar of NumPy, or an array or tensor without dimensions."""
    number = value.item() if getattr(value, "shape", None) == () else value
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    if not abs(number) <= sys.float_info.max:  # math.isfinite fails on larger ints
        raise ValueError(f"{name}: expected a finite number, got {number}")
    return number


def positive(name: str, value: Any) -> float:
    value = finite(name, value)
    if value <= 0:
        raise ValueError(f"{name}: expected a number > 0, got {value}")
    return value


def integer(name: str, value: Any, expected: str = "an int") -> int:
    """``value`` as a Python int. NumPy integers are converted, because their arithmetic can overflow."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")
    return int(value)


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def positive_int(name: str, value: Any) -> int:
    value = integer(name, value)
    if value < 1:
        raise ValueError(f"{name}: expected an int >= 1, got {value}")
    if value >= 2**63:  # beyond the kernels' integers
        raise ValueError(f"{name}: expected an int below 2**63, got {value}")
    return value


def within(name: str, value: Any, least: int, most: int) -> int:
    """``value`` is an int from ``least`` to ``most``."""
    value = integer(name, value)
    if not least <= value <= most:
        raise ValueError(f"{name}: expected {least} to {most}, got {value}")
    return value


def draws(value: Any) -> int:
    return within("draws", value, 2, MOST_DRAWS)


def dropout(value: Any) -> float:
    value = finite("dropout", value)
    if not 0 <= value < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {value}")
    return value


def seed(value: Any) -> int:
    return within("seed", value, 0, 2**63 - 1)


def some_blocks(count: int) -> None:
    if not count:
        raise ValueError("layers: no list of transformer blocks found in the student's trunk; layers=0 needs none")


def layers(value: Any) -> Any:
    if isinstance(value, str):
        if value not in ("all", "own"):
            raise ValueError(f"layers: expected a number of blocks, 'all' or 'own', got {value!r}")
        return value
    value = integer("layers", value, "a number of blocks, 'all' or 'own'")
    if value < 0:
        raise ValueError(f"layers: expected at least 0 blocks, got {value}")
    return value


def enough_blocks(name: str, asked: int, present: int) -> None:
    if asked > present:
        raise ValueError(f"{name}: expected at most {present} transformer blocks, got {asked}")


def probes(value: Any) -> int:
    return within("probes", value, 1, MOST_DRAWS)


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
    if not isinstance(values, Iterable) or isinstance(values, Mapping):  # whose values would be ignored
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
    expected = "acqcore.Student, a transformers or PEFT causal language model, or the path or hub id of one"
    instance(name, value, torch.nn.Module, expected)


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


def max_length(value: Any, limit: int | None) -> int | None:
    """At least 2 (a scored token and its predecessor) and at most ``limit``, the student's maximum."""
    if value is None:
        return None
    value = positive_int("max_length", value)
    if value < 2:
        raise ValueError(f"max_length: expected at least 2 (a scored token and its predecessor), got {value}")
    if limit is not None and value > limit:
        raise ValueError(f"max_length: the student takes at most {limit} tokens, got {value}")
    return value


def acquisition_values(name: str, values: Any, n: int) -> None:
    """The values of an acquisition for ``n`` tokens or samples."""
    if not isinstance(values, torch.Tensor) or values.shape != (n,):
        raise ValueError(f"acquisition {name!r}: expected it to return a tensor [{n}], got {describe(values)}")


# Heads, hidden states, logits and targets.


def head(weight: Any, bias: Any, softcap: Any, scale: Any) -> tuple[float | None, float]:
    """Arguments of :class:`acqcore.Head`; returns softcap and scale."""
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
    return None if softcap is None else positive("softcap", softcap), finite("scale", scale)


def vocabulary(start: Any, rows: int, size: Any, group: object) -> tuple[int, int]:
    """First row and size of a vocabulary with ``rows`` rows here; a shard of a group may have no rows."""
    start = integer("vocab_start", start)
    if size is not None:
        size = integer("vocab_size", size)
    if start < 0:
        raise ValueError(f"vocab_start: expected an index >= 0, got {start}")
    if group is None:
        if rows < 1:
            raise ValueError(f"weight: expected [V, D] with V >= 1, got V = {rows}")
        if size is not None and size <= start:
            raise ValueError(f"vocab_size: expected more than vocab_start = {start}, got {size}")
        return start, start + rows if size is None else size
    distributed = torch.distributed
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        raise TypeError(f"group: expected a torch.distributed.ProcessGroup or None, got {describe(group)}")
    if size is None:
        raise ValueError("vocab_size: expected the size of the whole vocabulary if a group shares it, got None")
    return start, positive_int("vocab_size", size)


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
    if not torch.compiler.is_compiling() and weight.numel() and weight.untyped_storage().nbytes() == 0:
        raise ValueError(  # a kernel would read garbage
            "head.weight: its storage was freed, as FSDP does between forward passes; score through acqcore.Student, "
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
    all queued work in every batch, and cannot be captured in a CUDA graph. A backend then ignores such a target like
    -100, so that its row is NaN and not valid; the caller makes the gradients and sketches of its sample NaN.
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


def whole_head(rows: int, size: int, group: object) -> None:
    if group is not None or rows != size:
        raise ValueError(f"head: expected the whole vocabulary, got a shard of {rows} of {size} rows")


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


# Per-sample gradients: packed samples, parameters, and sets of vectors such as sketches.


def offsets(value: Any, targets: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """Sample boundaries ``[B + 1]`` of packed rows: int64, increasing from 0 to N. Reads values once.

    They may be on the CPU for ``targets`` on any device; reading them from a GPU makes the host wait for it.
    Returns the rows ``[begin, end)`` of each sample.
    """
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int64:
        raise TypeError(f"offsets: expected an int64 tensor [B + 1], got {describe(value)}")
    if value.dim() != 1 or len(value) < 1:
        raise ValueError(f"offsets: expected [B + 1] with B >= 0, got {describe(value)}")
    if value.device.type != "cpu":
        same_device("offsets", value, "targets", targets)
    n, rows = len(targets), value.tolist()
    if rows[0] != 0 or rows[-1] != n:
        raise ValueError(f"offsets: expected to run from 0 to N = {n}, got {rows[0]} to {rows[-1]}")
    bounds = tuple(itertools.pairwise(rows))
    for i, (begin, end) in enumerate(bounds):
        if begin >= end:
            raise ValueError(f"offsets: expected increasing values, got {begin} then {end} (sample {i})")
    return bounds


def scored_tokens(counts: torch.Tensor) -> Callable[[], None]:
    """Checks that every sample has a scored token, given their numbers ``counts [B]``.

    On a GPU the counts are copied to the host without waiting. Call the returned function once the work that follows is
    queued: it then waits only for the work before the counts.
    """
    if counts.device.type != "cuda":
        _all_scored(counts)
        return lambda: None
    on_host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
    on_host.copy_(counts, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(counts.device))

    def check() -> None:
        arrived.synchronize()
        _all_scored(on_host)

    return check


def _all_scored(
    counts: torch.Tensor,  # [B], on the host
) -> None:
    if bool((counts == 0).any()):
        i = int((counts == 0).nonzero()[0])
        raise ValueError(f"targets: sample {i} has no scored token: all of its targets are {IGNORE_INDEX}")


def token_weights(value: Any, targets: torch.Tensor) -> None:
    """Weights ``[N]`` of the tokens' losses."""
    float_tensor("token_weights", value, "[N]", 1)
    if value.shape != targets.shape:
        raise ValueError(f"token_weights: expected [N] with N = {len(targets)}, got {describe(value)}")
    same_device("token_weights", value, "targets", targets)


def differentiable(names: Mapping[torch.Tensor, str]) -> None:
    """Every parameter is floating point and on a device: a quantised or an offloaded one has no gradient."""
    for parameter, name in names.items():
        if parameter.is_meta:
            raise ValueError(
                f"parameters: {name} is offloaded, and offloaded weights have no gradients; load the student without "
                "a device_map, on a device with enough memory"
            )
        if not parameter.is_floating_point():
            raise ValueError(
                f"parameters: {name} is {describe(parameter)}, which has no gradient; 'trainable' leaves out "
                "quantised parameters"
            )


def vectors(name: str, value: Any, like: torch.Tensor | None = None, like_name: str = "") -> None:
    """Finite vectors ``[n, d]`` that match the columns and device of ``like``. Reads values."""
    if like is None:
        float_tensor(name, value, "[n, d]", 2)
    else:
        like_vector(name, value, like, like_name)
    bad = ~value.isfinite().all(dim=1)
    if bool(bad.any()):
        raise ValueError(f"{name}: expected finite vectors, row {int(bad.nonzero()[0])} has NaN or infinity")


def labels(value: Any, count: int) -> None:
    """One int64 label for each of ``count`` rows."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"labels: expected int64 [{count}], got {describe(value)}")
    if value.dtype != torch.int64 or value.shape != (count,):
        raise ValueError(f"labels: expected int64 [{count}], got {describe(value)}")


def ridge(value: Any) -> float:
    """Noise on a kernel with a diagonal of ones; below 1e-9 the factorisation in float64 may fail."""
    value = finite("ridge", value)
    if value < 1e-9:
        raise ValueError(f"ridge: expected a number >= 1e-9, got {value}")
    return value


def like_vector(name: str, value: Any, like: torch.Tensor, like_name: str) -> None:
    """Vectors ``[n, d]`` that match the columns and device of ``like [..., d]``."""
    float_tensor(name, value, "[n, d]", 2)
    if value.shape[1] != like.shape[-1]:
        raise ValueError(f"{name}: expected [n, d] with d = {like.shape[-1]} as in {like_name}, got {describe(value)}")
    same_device(name, value, like_name, like)
