"""Per-sample gradients: packed samples, parameters, and what the rules of ``ghost_rules`` can differentiate."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch

from acqcore.checks.basic import IGNORE_INDEX, describe, float_tensor, one_of, same_device


def offsets(value: object, targets: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """Sample boundaries ``[B + 1]`` of packed rows: int64, from 0, increasing, ending at N. Reads values once.

    Returns:
        ``[begin, end)`` rows of each sample, on the host.
    """
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int64:
        raise TypeError(f"offsets: expected an int64 tensor [B + 1], got {describe(value)}")
    if value.dim() != 1 or len(value) < 1:
        raise ValueError(f"offsets: expected [B + 1] with B >= 0, got {describe(value)}")
    same_device("offsets", value, "targets", targets)
    n, rows = len(targets), value.tolist()
    if rows[0] != 0 or rows[-1] != n:
        raise ValueError(f"offsets: expected to run from 0 to N = {n}, got {rows[0]} to {rows[-1]}")
    bounds = tuple(itertools.pairwise(rows))
    for i, (begin, end) in enumerate(bounds):
        if begin >= end:
            raise ValueError(f"offsets: expected increasing, got {begin} then {end} (sample {i})")
    return bounds


def scored_tokens(counts: torch.Tensor) -> None:
    """``counts [B]``: every sample has a token that is scored."""
    if bool((counts == 0).any()):
        i = int((counts == 0).nonzero()[0])
        raise ValueError(f"targets: sample {i} has no scored token: all of its targets are {IGNORE_INDEX}")


def token_weights(value: object, targets: torch.Tensor) -> None:
    """Weights ``[N]`` of the tokens' losses."""
    float_tensor("token_weights", value, "[N]", 1)
    assert isinstance(value, torch.Tensor)
    if value.shape != targets.shape:
        raise ValueError(f"token_weights: expected [N] with N = {len(targets)}, got {describe(value)}")
    same_device("token_weights", value, "targets", targets)


def gradient_parameters(value: object) -> None:
    """``parameters`` of a gradient: a name, or a number of blocks."""
    known = ("head", "trainable", "all")
    if isinstance(value, str):
        one_of("parameters", value, known)
    elif isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"parameters: expected {', '.join(known)} or a number of transformer blocks, got {describe(value)}"
        )
    elif value < 1:
        raise ValueError(f"parameters: expected at least 1 transformer block, got {value}")


def whole_parameters(parameters: object, sharded: bool) -> None:
    if sharded:
        raise ValueError(
            f"parameters: {parameters!r} needs a student whose parameters are whole on each rank; of one spread over "
            "processes (tensor parallel, FSDP, ZeRO-3) only 'head' is known"
        )


def trunk_parameters(parameters: object, module: object) -> None:
    if module is None:
        raise ValueError(
            f"parameters: {parameters!r} needs a student whose trunk is a torch.nn.Module; of any other "
            "callable only 'head' is known"
        )


def block_count(asked: int, present: int) -> None:
    if asked > present:
        raise ValueError(f"parameters: expected at most {present} transformer blocks, got {asked}")


def some_parameters(parameters: object, count: int) -> None:
    if not count:
        raise ValueError(f"parameters: {parameters!r}: no parameter of the student has requires_grad=True")


def differentiable(names: Mapping[torch.Tensor, str]) -> None:
    """Every parameter is floating point: a quantised one has no gradient."""
    for parameter, name in names.items():
        if not parameter.is_floating_point():
            raise ValueError(
                f"parameters: {name} is {describe(parameter)}, which has no gradient; 'trainable' leaves out "
                "what is quantised"
            )


def whole_head(weight: str | None, bias: str | None, has_bias: bool) -> None:
    """Weight and bias of the head are asked for together, by name, or not at all."""
    if has_bias and (weight is None) != (bias is None):
        alone, other = (weight, "bias") if bias is None else (bias, "weight")
        raise ValueError(f"parameters: no rule covers {alone} without the head's {other}")


def covered(used: Sequence[str]) -> None:
    """``used``: parameters that change the logits, but not through a call of the module that owns them."""
    if used:
        more = f" and {len(used) - 1} more" if len(used) > 1 else ""
        raise ValueError(
            f"parameters: no rule covers {used[0]}{more}: it is used without a call of the module that owns it"
        )


def _first(names: Mapping[str, str]) -> str:
    return next(iter(names.values()))


def tensor_by_sample(names: Mapping[str, str], kind: str, value: object, batch: int, length: int) -> None:
    """Input or output of a module that owns the parameters ``names`` tells the samples of a batch apart."""
    if not isinstance(value, torch.Tensor) or value.dim() < 1:
        raise ValueError(
            f"parameters: no rule covers {_first(names)}: its {kind} takes or gives {describe(value)} "
            "where one tensor was expected"
        )
    if value.shape[0] not in (1, batch, batch * length):
        raise ValueError(
            f"parameters: no rule covers {_first(names)}: its {kind} takes or gives a {describe(value)}, in "
            f"which the {batch} samples of {length} tokens can not be told apart"
        )


def small_module(names: Mapping[str, str], kind: str, size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(
            f"parameters: no rule covers {_first(names)}: {kind} is neither a linear layer nor an embedding, "
            f"and its {size} parameters are more than the {limit} that are differentiated sample by sample"
        )


def no_derivative(names: Mapping[str, str], kind: str, error: Exception) -> NoReturn:
    raise ValueError(
        f"parameters: no rule covers {_first(names)}: {kind} could not be differentiated sample by sample: {error}"
    ) from error


def embedding_input(names: Mapping[str, str], ids: torch.Tensor) -> None:
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"parameters: no rule covers {_first(names)}: its embedding takes {describe(ids)}, not token ids"
        )


def embedding_output(names: Mapping[str, str], fits: bool) -> None:
    if not fits:
        raise ValueError(
            f"parameters: no rule covers {_first(names)}: its embedding does not give a multiple of the rows of "
            "its weight"
        )


def unchanged_input(names: Mapping[str, str], unchanged: bool) -> None:
    if not unchanged:
        raise ValueError(f"parameters: no rule covers {_first(names)}: the input of its module is changed in place")


def one_kind_of_use(name: str, piece: object) -> None:
    if piece is None:
        raise ValueError(f"parameters: no rule covers {name}: layers of different kinds share it")


def embedding_use(name: str, is_embedding: bool) -> None:
    if not is_embedding:
        raise ValueError(f"parameters: no rule covers {name}: the head shares it with a layer that is no embedding")
