"""Selects parameters, and catches the pieces of their gradients while a backward pass runs.

Hooks on the modules that own a selected parameter keep their inputs and see the gradients of their outputs; hooks on
dropout's sites keep the outputs themselves. No parameter requires a gradient meanwhile: autograd computes gradients of
activations only, and none before the first selected module, where activations are not kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from acqcore import checks
from acqcore.gradients.measures import GradPiece, merged
from acqcore.gradients.rules import ModuleCall, is_linear
from acqcore.head import Head
from acqcore.students.student import Student


@dataclass(frozen=True, eq=False)
class Selection:
    """The parameters that a gradient is taken in.

    Attributes:
        names: parameter -> name; the head's only if the trunk owns it too (tied to the embedding).
        head: name of the head's weight, None if it is not selected. Its bias comes with it.
    """

    names: Mapping[torch.Tensor, str]
    head: str | None


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
        checks.block_count(parameters, len(blocks))
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
    checks.enough_blocks(count, len(blocks))
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


def _name(value: torch.Tensor, names: Mapping[torch.Tensor, str]) -> str | None:
    """Name of the parameter that shares the memory of ``value``."""
    for parameter, name in names.items():
        if parameter.data_ptr() == value.data_ptr() and parameter.shape == value.shape:
            return name
    return None


class PieceTaker(Protocol):
    def takes(self, name: str) -> bool:
        """Whether it wants this parameter's gradient."""

    def add(self, name: str, piece: GradPiece) -> None:
        """The gradient of a selected parameter."""


class SiteTaker(Protocol):
    def add_site(self, module: nn.Module, value: torch.Tensor, gradient: torch.Tensor) -> None:
        """The output of a site and its gradient, ``[B, ..., D]`` or ``[B * T, D]`` each."""


class Capture:
    """Catches the pieces of the selected parameters' gradients.

    Args:
        student: whose trunk runs.
        names: parameter -> name.
        heads: names of head weights among them, which the trunk may hold without using.
        sites: modules whose outputs dropout acts on.
    """

    def __init__(
        self,
        student: Student,
        names: Mapping[torch.Tensor, str],
        heads: Collection[str | None] = (),
        sites: Collection[nn.Module] = (),
    ) -> None:
        self._student = student
        self._names = names
        self._heads = heads
        self._modules = [] if student._module is None else list(student._module.modules())
        self._owners: dict[nn.Module, dict[str, str]] = {}  # module -> attribute -> name
        for module in self._modules:
            own = {key: names[p] for key, p in module._parameters.items() if p is not None and p in names}
            if own:
                self._owners[module] = own
        self._sites = list(sites)
        self._verified = False
        self._active = False
        self._shape = (0, 0)
        self._leaves: list[torch.Tensor] = []
        self._uses: Counter[str] = Counter()
        self._ran_sites = 0
        self._pending: dict[str, list[GradPiece]] = {}
        self._last = True
        self._of_parameters: Sequence[PieceTaker] = ()
        self._of_sites: Sequence[SiteTaker] = ()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks installed and no parameter requiring a gradient; both are restored on exit."""
        parameters = {p for module in self._modules for p in module._parameters.values() if p is not None}
        required = [p for p in parameters if p.requires_grad]
        handles = []
        try:
            for parameter in required:
                parameter.requires_grad_(False)
            for owner in self._owners:
                handles.append(owner.register_forward_hook(self._after_forward, with_kwargs=True))
            for site in self._sites:
                handles.append(site.register_forward_hook(self._after_site))
            # Trainers with gradient checkpointing make the embedding's output require a gradient: the graph would begin
            # there, and modules that do not follow one of ours would see none.
            for module in self._modules:
                if isinstance(module, nn.Embedding) and module not in self._owners:
                    handles.append(module.register_forward_hook(_detach))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in required:
                parameter.requires_grad_(True)

    def forward(
        self,
        input_ids: torch.Tensor,  # [B, T] int64
    ) -> torch.Tensor:
        """The trunk's hidden states ``[B, T, D]`` with the graph that :meth:`backward` needs.

        Raises:
            ValueError: a selected parameter is used in a way that the hooks do not see; no site ran.
        """
        self._shape = (input_ids.shape[0], input_ids.shape[1])
        self._leaves.clear()
        self._uses.clear()
        self._pending.clear()
        self._ran_sites = 0
        self._active = True
        try:
            hidden = self._student.hidden(input_ids)
        finally:
            self._active = False
        if self._sites and not self._ran_sites:
            raise ValueError("layers: the student's forward went through none of the modules that dropout acts on")
        if not self._verified:
            self._verify(input_ids[:1, :2])
            self._verified = True
        return hidden

    def backward(
        self,
        hidden: torch.Tensor,  # [B, T, D] of forward
        gradient: torch.Tensor,  # [B, T, D]
        of_parameters: Sequence[PieceTaker],
        of_sites: Sequence[SiteTaker],
        last: bool = True,
    ) -> None:
        """Pass each parameter's piece to ``of_parameters`` as soon as it is complete, and each site's gradient to
        ``of_sites``; ``last`` frees the graph."""
        self._of_parameters, self._of_sites, self._last = of_parameters, of_sites, last
        if hidden.requires_grad:
            torch.autograd.grad(
                hidden, self._leaves, gradient.to(hidden.dtype), allow_unused=True, retain_graph=not last
            )
        for name in list(self._pending):  # a call that nothing depends on gets no gradient
            self._finish(name)

    def _verify(
        self,
        input_ids: torch.Tensor,  # [1, 2]
    ) -> None:
        """Ask autograd whether parameters whose modules were not called change the logits all the same."""
        silent = {p: name for p, name in self._names.items() if not self._uses[name] and name not in self._heads}
        if not silent:
            return
        student = self._student
        assert student._module is not None
        try:
            for parameter in silent:
                parameter.requires_grad_(True)
            if student._module is student.trunk:
                output = student.hidden(input_ids)
            else:
                output = student._module(input_ids=input_ids).logits
            used = []
            if output.requires_grad:
                gradients = torch.autograd.grad(output.sum(), list(silent), allow_unused=True)
                used = [n for n, g in zip(silent.values(), gradients, strict=True) if g is not None]
        finally:
            for parameter in silent:
                parameter.requires_grad_(False)
        if used:
            more = f" and {len(used) - 1} more" if len(used) > 1 else ""
            raise ValueError(
                f"parameters: no rule covers {used[0]}{more}: it is used without a call of the module that owns it"
            )

    def _after_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> torch.Tensor | None:
        if not self._active:
            return None
        names = self._owners[module]
        call = ModuleCall(module, names, args, kwargs, output, *self._shape)
        self._uses.update(names.values())
        if output.shape[0] == 1:  # shared by all samples, as positions are: a row each tells their gradients apart
            output = output.expand(self._shape[0], *output.shape[1:])
        output = self._in_graph(output.detach() if isinstance(module, nn.Embedding) else output)
        output.register_hook(partial(self._after_backward, [call]))
        return output

    def _in_graph(self, output: torch.Tensor) -> torch.Tensor:
        """``output``, or where the graph begins with it a copy: a leaf must not change in place."""
        if output.requires_grad:
            return output
        self._leaves.append(output.detach().requires_grad_())
        return self._leaves[-1].clone()

    def _after_site(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self._active:
            return None
        value = output[0] if isinstance(output, tuple) else output
        batch, length = self._shape
        if not isinstance(value, torch.Tensor) or value.dim() < 2 or value.shape[0] not in (batch, batch * length):
            raise ValueError(f"layers: dropout acts on [{batch}, T, D], got {checks.describe(value)}")
        self._ran_sites += 1
        value = self._in_graph(value)
        kept = value.detach()
        value.register_hook(partial(self._after_site_backward, module, kept, kept._version))
        return (value, *output[1:]) if isinstance(output, tuple) else value

    def _after_site_backward(
        self, module: nn.Module, value: torch.Tensor, version: int, gradient: torch.Tensor
    ) -> None:
        if value._version != version:
            raise ValueError(
                f"layers: the output of {type(module).__name__}, on which dropout acts, is changed in place"
            )
        for taker in self._of_sites:
            taker.add_site(module, value, gradient)

    def _after_backward(self, calls: list[ModuleCall], gradient: torch.Tensor) -> None:
        call = calls.pop() if self._last else calls[0]  # the last backward frees the module's input
        if not any(taker.takes(name) for name in call.names.values() for taker in self._of_parameters):
            return
        for key, piece in call.pieces(gradient).items():
            name = call.names[key]
            self._pending.setdefault(name, []).append(piece)
            if len(self._pending[name]) == self._uses[name]:
                self._finish(name)

    def _finish(self, name: str) -> None:
        piece = merged(self._pending.pop(name))
        if piece is None:
            raise ValueError(f"parameters: no rule covers {name}: layers of different kinds share it")
        for taker in self._of_parameters:
            taker.add(name, piece)


def _detach(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return output.detach() if isinstance(output, torch.Tensor) else output
