"""Selects the parameters to differentiate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from acqcore import checks
from acqcore.gradients.rules import is_linear
from acqcore.head import Head
from acqcore.students.causal_lm import innermost, runnable
from acqcore.students.student import Student


@dataclass(frozen=True, eq=False)
class Selection:
    """Parameters to differentiate."""

    names: Mapping[torch.Tensor, str]  # includes the head only if tied to the embedding
    head: str | None  # name of the head's weight if head and bias are selected, else None


def select_parameters(student: Student, head: Head, parameters: str | int) -> Selection:
    """The parameters specified by ``parameters``; see :func:`acqcore.grad_norm`."""
    if parameters == "head":
        return Selection({}, "head")
    module, trunk = student._module, student.trunk
    if module is None:
        raise ValueError(
            f"parameters: {parameters!r} needs a student whose trunk is a torch.nn.Module; for any other "
            "callable only 'head' is supported"
        )
    if student.sharded or head.group is not None:
        raise ValueError(
            f"parameters: {parameters!r} needs a student with unsharded parameters; for a sharded one "
            "(tensor parallel, FSDP, ZeRO-3) only 'head' is supported"
        )
    assert isinstance(trunk, nn.Module)
    with student.alone():  # a backward of another thread replaces the parameters of norms
        blocks = student.blocks if isinstance(parameters, int) else []  # first: a forward replaces offloaded parameters
        names = _names_of(module)
        if isinstance(parameters, int):
            checks.enough_blocks("parameters", parameters, len(blocks))
            last = {p for block in blocks[-parameters:] for p in block.parameters()}
            names = {p: name for p, name in names.items() if p in last}
            checks.differentiable(names)
            return Selection(names, None)
        if module is trunk:  # a head passed separately is not part of the module
            for name, value in (("head.weight", head.weight), ("head.bias", head.bias)):
                if value is not None and name_of(value, names) is None:
                    names[value] = name
        if parameters == "trainable":
            names = {p: name for p, name in names.items() if p.requires_grad}
        if not names:
            raise ValueError(f"parameters: {parameters!r}: no parameter of the student has requires_grad=True")
        checks.differentiable(names)
        weight = name_of(head.weight, names)
        bias = None if head.bias is None else name_of(head.bias, names)
        if head.bias is not None and (weight is None) != (bias is None):
            alone, other = (weight, "bias") if bias is None else (bias, "weight")
            raise ValueError(f"parameters: no rule covers {alone} without the head's {other}")
        of_trunk = set(trunk.parameters())
        layer = getattr(innermost(module), "get_output_embeddings", lambda: None)() if weight is None else None
        for parameter in () if layer is None else layer.parameters():
            if parameter in names and parameter in of_trunk:
                name = names[parameter]
                raise ValueError(f"parameters: no rule covers {name}: the head's weight is computed from it")
        return Selection({p: name for p, name in names.items() if p in of_trunk or name not in (weight, bias)}, weight)


def select_linear(student: Student, layers: int | str) -> Selection:
    """The weights of the linear layers in the last ``layers`` blocks, or in every block (``"all"``)."""
    with student.alone():  # a backward of another thread replaces the parameters of norms
        blocks = student.blocks
        checks.some_blocks(len(blocks))
        whole_parameters(student)
        count = len(blocks) if isinstance(layers, str) else layers
        checks.enough_blocks("layers", count, len(blocks))
        members = {module for block in blocks[len(blocks) - count :] for module in block.modules()}
        within = set(filter(is_linear, members))
        assert student._module is not None
        named, names = _names_of(student._module), dict[torch.Tensor, str]()
        for name, module in student._module.named_modules():
            if module in within:
                weight = module._parameters.get("weight")
                if weight is None:
                    raise ValueError(
                        f"layers: the weight of {name} is computed from other parameters, as by weight norm or "
                        "pruning; make it a parameter first"
                    )
                names[weight] = named[weight]
        if not names:
            others = sorted({type(module).__name__ for module in members if isinstance(module, nn.Linear)})
            found = f"only {', '.join(others)} with a custom forward" if others else "none"
            raise ValueError(f"layers: expected linear layers in the student's blocks, found {found}")
        checks.differentiable(names)
        return Selection(names, None)


def whole_parameters(student: Student) -> None:
    """Raise ValueError if the student's parameters are sharded over processes."""
    if student.sharded:
        raise ValueError(
            "layers: gradients in the trunk need a student with unsharded parameters, got a sharded one "
            "(tensor parallel, FSDP, ZeRO-3)"
        )


def shapes_of(selection: Selection) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each parameter; the signs of a sketch depend on them."""
    return {name: tuple(parameter.shape) for parameter, name in selection.names.items()}


def same_student(made_with: Mapping[str, Sequence[int]], now: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError if a reference was made with another student, naming the first parameter that differs and both
    shapes."""
    for name in (*made_with, *now):
        shapes = [None if name not in found else list(found[name]) for found in (made_with, now)]
        if shapes[0] != shapes[1]:
            there, here = ("missing" if shape is None else str(shape) for shape in shapes)
            raise ValueError(f"reference: made with another student: {name} is {there} in the reference, {here} here")


def _names_of(module: nn.Module) -> dict[torch.Tensor, str]:
    """Parameter -> name. Sketches depend on it, so it is the same inside torch.compile and data-parallel wrappers."""
    return {p: name.replace("_orig_mod.", "") for name, p in runnable(module).named_parameters()}


def name_of(value: torch.Tensor, names: Mapping[torch.Tensor, str]) -> str | None:
    """Name of the parameter that shares memory with ``value``; ``value`` may omit its last rows."""
    for parameter, name in names.items():
        alike = parameter.dim() == value.dim() and parameter.shape[1:] == value.shape[1:]
        if alike and parameter.data_ptr() == value.data_ptr() and len(parameter) >= len(value):
            return name
    return None
