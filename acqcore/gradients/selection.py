"""Selects the parameters that a gradient is taken in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from acqcore import checks
from acqcore.gradients.rules import is_linear
from acqcore.head import Head
from acqcore.students.student import Student


@dataclass(frozen=True, eq=False)
class Selection:
    """The parameters that a gradient is taken in."""

    names: Mapping[torch.Tensor, str]  # of the head only if the trunk owns it too (tied to the embedding)
    head: str | None  # name of the head's weight, None if it is not selected; its bias comes with it


def select_parameters(student: Student, head: Head, parameters: str | int) -> Selection:
    """The parameters named by ``parameters``, see :func:`acqcore.grad_norm`.

    Raises:
        ValueError: more blocks than the trunk has, no trainable parameter, a quantised parameter, a student whose
            parameters are sharded over processes.
    """
    if parameters == "head":
        return Selection({}, "head")
    module, trunk = student._module, student.trunk
    if module is None:
        raise ValueError(
            f"parameters: {parameters!r} needs a student whose trunk is a torch.nn.Module; of any other "
            "callable only 'head' is known"
        )
    if student.sharded or head.group is not None:
        raise ValueError(
            f"parameters: {parameters!r} needs a student whose parameters are whole on each rank; of one spread over "
            "processes (tensor parallel, FSDP, ZeRO-3) only 'head' is known"
        )
    assert isinstance(trunk, nn.Module)
    names: dict[torch.Tensor, str] = {p: name for name, p in module.named_parameters()}
    if isinstance(parameters, int):
        blocks = student.blocks
        checks.enough_blocks("parameters", parameters, len(blocks))
        last = {p for block in blocks[-parameters:] for p in block.parameters()}
        names = {p: name for p, name in names.items() if p in last}
        checks.differentiable(names)
        return Selection(names, None)
    if module is trunk:  # a head given on its own is not part of the module
        for name, value in (("head.weight", head.weight), ("head.bias", head.bias)):
            if value is not None and _name(value, names) is None:
                names[value] = name
    if parameters == "trainable":
        names = {p: name for p, name in names.items() if p.requires_grad}
    if not names:
        raise ValueError(f"parameters: {parameters!r}: no parameter of the student has requires_grad=True")
    checks.differentiable(names)
    weight = _name(head.weight, names)
    bias = None if head.bias is None else _name(head.bias, names)
    if head.bias is not None and (weight is None) != (bias is None):
        alone, other = (weight, "bias") if bias is None else (bias, "weight")
        raise ValueError(f"parameters: no rule covers {alone} without the head's {other}")
    of_trunk = set(trunk.parameters())
    names = {p: name for p, name in names.items() if p in of_trunk or name not in (weight, bias)}
    return Selection(names, weight)


def select_linear(student: Student, layers: int | str) -> Selection:
    """The weights of the linear layers in the last ``layers`` blocks, or in all (``"all"``).

    Raises:
        ValueError: a trunk without blocks or with fewer, no linear layer in them, a student whose parameters are
            sharded over processes.
    """
    blocks = student.blocks
    checks.some_blocks(len(blocks))
    whole_parameters(student, "layers")
    count = len(blocks) if isinstance(layers, str) else layers
    checks.enough_blocks("layers", count, len(blocks))
    within = {module for block in blocks[len(blocks) - count :] for module in block.modules() if is_linear(module)}
    assert student._module is not None
    names = {
        module.weight: f"{name}.weight"
        for name, module in student._module.named_modules()
        if module in within and isinstance(module.weight, torch.Tensor)
    }
    if not names:
        raise ValueError("layers: expected linear layers in the student's blocks, found none")
    checks.differentiable(names)
    return Selection(names, None)


def whole_parameters(student: Student, argument: str) -> None:
    """Raise ValueError for a student whose parameters are spread over processes; ``argument`` asked for them."""
    if student.sharded:
        raise ValueError(
            f"{argument}: gradients in the trunk need a student whose parameters are whole on each rank, got one "
            "spread over processes (tensor parallel, FSDP, ZeRO-3)"
        )


def shapes_of(selection: Selection) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the parameters, on which the signs of a sketch depend."""
    return {name: tuple(parameter.shape) for parameter, name in selection.names.items()}


def same_student(made_with: Mapping[str, Sequence[int]], now: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError if a reference was made with another student: the name of the first parameter that differs, and
    its shapes there and here."""
    for name in (*made_with, *now):
        shapes = [None if name not in found else list(found[name]) for found in (made_with, now)]
        if shapes[0] != shapes[1]:
            there, here = ("no such parameter" if shape is None else str(shape) for shape in shapes)
            raise ValueError(f"reference: made with another student: {name} is {there} there, {here} here")


def _name(value: torch.Tensor, names: Mapping[torch.Tensor, str]) -> str | None:
    """Name of the parameter that shares the memory of ``value``, which may leave out its last rows."""
    for parameter, name in names.items():
        alike = parameter.dim() == value.dim() and parameter.shape[1:] == value.shape[1:]
        if alike and parameter.data_ptr() == value.data_ptr() and len(parameter) >= len(value):
            return name
    return None
