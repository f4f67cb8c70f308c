"""Captures the pieces of the selected parameters' gradients during a backward pass.

The output of each module that owns a selected parameter passes through a :class:`Tap`, as do the outputs that dropout
acts on. The backward targets only the taps' leaf, even if other tensors require gradients (gradient checkpointing and
PEFT make embeddings do so). Parameters require no gradient during the pass, so autograd computes only gradients of
activations, and before the first tap it neither computes them nor keeps activations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from acqcore import checks
from acqcore.gradients.measures import DenseGrad, GradPiece, RowGrad, SiteSquares, merged
from acqcore.gradients.rules import ModuleCall, Uncovered, is_linear
from acqcore.head import compute_dtype
from acqcore.students.blocks import first_tensor, with_first
from acqcore.students.student import Student


class OneByOne(Exception):  # noqa: N818
    """A module mixes the samples of a batch, so batches must hold one sample."""


class PieceTaker(Protocol):
    def takes(self, name: str) -> bool:
        """Whether this parameter's gradient is wanted."""

    def add(
        self,
        name: str,
        piece: GradPiece,
        factor: torch.Tensor | None,  # [B]
    ) -> None:
        """Receive the gradient of a wanted parameter, not yet multiplied by each sample's ``factor``."""


@dataclass
class Rules:
    """How each parameter's gradient can be captured: results of a probe, without references to the model."""

    one_by_one: bool = False  # whether batches must hold one sample
    #: Names of parameters left to autograd, such as those without a tested rule; a batch that reaches one must hold one
    #: sample.
    by_autograd: set[str] = field(default_factory=set)
    touched: set[str] = field(default_factory=set)  # names of parameters with any gradient, which may be 0
    nonzero: set[str] = field(default_factory=set)  # with one that is not 0
    used: set[str] = field(default_factory=set)  # with one that exceeds rounding
    #: Index of a module in the model -> forms of its inputs and outputs.
    forms: dict[int, set[tuple[str, str]]] = field(default_factory=dict)


class Capture:
    """Captures the pieces of the selected parameters' gradients; prepared by :class:`acqcore.gradients.probe.Probe`.

    Args:
        student: its trunk runs the forward.
        names: parameter -> name.
        tied: the names that are head weights; their gradient adds the embedding's rows to the head's.
        sites: modules whose outputs dropout acts on.
        whole: names of parameters that may not run with gradients in one place and without in another.
    """

    def __init__(
        self,
        student: Student,
        names: Mapping[torch.Tensor, str],
        tied: Collection[str | None] = (),
        sites: Collection[nn.Module] = (),
        whole: Collection[str] = (),
    ) -> None:
        self._student = student
        self._whole = set(whole)
        self._tied = tied
        self._sites = list(sites)
        self.names = names
        self.modules = [] if student._module is None else list(student._module.modules())
        self._indices = {module: i for i, module in enumerate(self.modules)}
        #: Module -> attribute -> name of the selected parameters that it owns.
        self.owners: dict[nn.Module, dict[str, str]] = {}
        for module in self.modules:
            own = {key: names[p] for key, p in module._parameters.items() if p is not None and p in names}
            if own:
                self.owners[module] = own
        #: Weight of a linear layer -> whether its rows are outputs.
        self._linear: dict[torch.Tensor | None, bool] = {
            m._parameters["weight"]: isinstance(m, nn.Linear)
            for m, own in self.owners.items()
            if "weight" in own and is_linear(m)
        }
        parameters = [p for module in self.modules for p in module._parameters.values() if p is not None]
        self.half = any(p.dtype in (torch.float16, torch.bfloat16) for p in parameters)
        self.rules = Rules()
        self._failed: set[str] | None = None  # during the probe: names that fit no rule
        # State of a forward.
        self._active = False
        self._recomputing = False  # during the backward, when checkpointing reruns modules
        self._shape = (0, 0)
        self._device = "cpu"
        self._leaf = torch.zeros(())
        self._uses: Counter[str] = Counter()
        self._with_graph: set[str] = set()  # names of parameters used with gradients enabled
        self._without_graph: set[str] = set()
        self._ran_sites = 0
        # State of a backward.
        self._reached_site = False
        self._of_parameters: Sequence[PieceTaker] = ()
        self._of_sites: Sequence[SiteSquares] = ()
        self._last = True
        self._pending: dict[str, list[GradPiece]] = {}
        self._arrived: set[str] = set()
        #: ``[B]``, divisor of each sample's gradient in the backward; None without scaling.
        self.factor: torch.Tensor | None = None

    @contextmanager
    def probing(self, failed: set[str]) -> Iterator[None]:
        """Context that captures every parameter and computes its autograd gradient too; adds the names of parameters
        that fit no rule to ``failed``."""
        self._of_sites = ()
        self.rules.by_autograd, self._failed = set(self.names.values()), failed
        try:
            yield
        finally:
            self.rules.by_autograd, self._failed = set(), None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Context with hooks installed and ``requires_grad`` set only on parameters left to autograd."""
        places = [
            (m, key, p.requires_grad, self.names.get(p) in self.rules.by_autograd)
            for m in self.modules
            for key, p in m._parameters.items()
            if p is not None
        ]
        with ExitStack() as stack:
            for module, key, required, wanted in places:  # not by parameter: a forward replaces offloaded ones
                if required != wanted:
                    _require(module, key, wanted)
                    stack.callback(_require, module, key, required)
            for owner in self.owners:  # before other hooks, which may change the output by its values
                hook = owner.register_forward_hook(self._after_forward, prepend=True, with_kwargs=True)
                stack.callback(hook.remove)
            for site in self._sites:
                stack.callback(site.register_forward_hook(self._after_site).remove)
            yield

    def forward(
        self,
        input_ids: torch.Tensor,  # [B, T] int64
        start: int = 0,
    ) -> torch.Tensor:
        """The trunk's hidden states ``[B, T, D]`` from token ``start`` on, with the graph that :meth:`backward` needs.

        Raises:
            OneByOne: a module mixes samples. ValueError: a module fits no rule; no site ran; a parameter of ``whole``
                also ran without gradients.
        """
        self._shape = (input_ids.shape[0], input_ids.shape[1] - start)
        self._device = input_ids.device.type
        self._leaf = torch.zeros((), requires_grad=True)
        self._uses.clear()
        self._with_graph.clear()
        self._without_graph.clear()
        self._pending.clear()
        self._ran_sites = 0
        if start:
            hidden = self._student.hidden_after(input_ids, start, self._catching())
        else:
            with self._catching():
                hidden = self._student.hidden(input_ids)
        if self._sites and not self._ran_sites:
            raise ValueError("layers: the student's forward went through none of the modules that dropout acts on")
        if partly := sorted(self._whole & self._with_graph & self._without_graph):
            raise ValueError(
                f"layers: {partly[0]} also runs without gradients, so values would miss part of its effect"
            )
        return hidden

    @contextmanager
    def _catching(self) -> Iterator[None]:
        """Context of a forward with tapped modules."""
        self._active = True
        try:
            with torch.enable_grad():
                yield
        finally:
            self._active = False

    def backward(
        self,
        hidden: torch.Tensor,  # [B, T, D] of forward
        gradient: torch.Tensor,  # [B, T, D]
        of_parameters: Sequence[PieceTaker],
        of_sites: Sequence[SiteSquares],
        last: bool = True,
    ) -> None:
        """Pass each parameter's piece to ``of_parameters`` as soon as it is complete, and each site's gradient to
        ``of_sites``; ``last`` frees the graph."""
        self._of_sites, self._reached_site = of_sites, False
        by_autograd = [p for p, name in self.names.items() if name in self.rules.by_autograd]
        self.run_backward(hidden, gradient, of_parameters, last, by_autograd, self._after_autograd)
        if self._sites and not self._reached_site:
            raise ValueError(
                "layers: the modules that dropout acts on got no gradient, which the linear form needs; is the trunk's "
                "output detached?"
            )
        silent = [n for n in self.rules.used if self._uses[n] and n not in self._arrived and self._taken(n)]
        if silent:
            raise ValueError(
                f"parameters: {silent[0]} took part in the forward and got no gradient; "
                "is part of the student detached or run without gradients?"
            )

    def run_backward(
        self,
        hidden: torch.Tensor,  # [B, T, D]
        gradient: torch.Tensor,  # [B, T, D]
        of_parameters: Sequence[PieceTaker],
        last: bool,
        whole: Collection[torch.Tensor],
        receive: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> None:
        """Pass pieces to ``of_parameters`` and autograd's gradients of the parameters ``whole`` to ``receive``."""
        self._of_parameters, self._last = of_parameters, last
        self._arrived.clear()
        self.factor = None
        if self.half:
            # A mean over many tokens would underflow in half precision.
            largest = gradient.flatten(1).abs().amax(1).double()
            exponent = torch.frexp(largest.where(largest.isfinite() & (largest > 0), 1.0)).exponent
            self.factor = torch.ldexp(torch.ones_like(largest), exponent)  # [B]
            gradient = gradient / self.factor[:, None, None].to(gradient)
        if hidden.requires_grad:
            with streamed(whole, receive):
                self._recomputing = True
                try:
                    gradient = gradient.to(hidden.dtype)
                    leaves = [self._leaf, *whole]
                    torch.autograd.grad(hidden, leaves, gradient, retain_graph=not last, allow_unused=True)
                except (torch.OutOfMemoryError, ValueError, OneByOne):
                    raise
                except Exception as error:  # raised by the student's backward
                    name = next(iter(self.names.values()), "a layer's output")  # the linear form takes no parameters
                    raise ValueError(
                        f"parameters: cannot compute the gradient of {name} and others: {str(error) or repr(error)}"
                    ) from error
                finally:
                    self._recomputing = False
        for name in list(self._pending):  # calls whose output went unused get no gradient
            self._finish(name)

    def _after_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> torch.Tensor | None:
        self.half |= torch.is_autocast_enabled(self._device)  # may be the model's own, as accelerate prepares it
        if self._active and self._whole:
            used = self._with_graph if torch.is_grad_enabled() else self._without_graph
            used.update(self.owners[module].values())
        probing = self._failed is not None
        left_out = set() if probing else self.rules.by_autograd
        names = {key: name for key, name in self.owners[module].items() if name not in left_out}
        if not names:
            return None
        if not self._active:
            return self._tapped_again(output)
        try:
            call = ModuleCall(module, names, args, kwargs, output, *self._shape)
        except Uncovered as error:
            if self._failed is not None:
                self._failed.update(names.values())
                return None
            if self._shape[0] > 1:
                raise OneByOne from error
            raise
        index = self._indices[module]
        # Reject shapes the probe did not see: an expert may be routed as many tokens as there are samples, which looks
        # like one row per sample.
        if self._shape[0] > 1 and not probing and call.forms not in self.rules.forms.get(index, ()):
            raise OneByOne
        if probing:
            self.rules.forms.setdefault(index, set()).add(call.forms)
        self._uses.update(names.values())
        # A linear layer's backward does not need its output, which may change in place; other outputs are copied.
        alias = is_linear(module) and output._base is None
        receive = partial(self._after_backward, [call])
        return Tap.apply(output, self._leaf, self._shape[0], alias, receive)

    def _after_site(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self.half |= torch.is_autocast_enabled(self._device)
        if not self._active:
            return self._tapped_again(output)
        if not torch.is_grad_enabled():  # as HRM runs all but its last cycles
            name = type(module).__name__
            raise ValueError(f"layers: {name} runs without gradients, so the linear form misses its noise; set draws")
        value = first_tensor(output)
        batch, length = self._shape
        if value is None or value.dim() < 2 or value.shape[0] not in (batch, batch * length):
            raise ValueError(f"layers: dropout acts on [{batch}, T, D], got {checks.describe(value)}")
        self._ran_sites += 1
        receive = partial(self._after_site_backward, module, value.detach(), value._version)
        return with_first(output, Tap.apply(value, self._leaf, batch, False, receive))

    def _tapped_again(self, output: Any) -> Any:
        """Tap the output again when checkpointing recomputes it. The recomputation must save the same tensors as the
        forward, whose graph starts no later than at a tap."""
        value = first_tensor(output) if self._recomputing else None
        if value is None:
            return None
        return with_first(output, Tap.apply(value, self._leaf, self._shape[0], False, lambda _: None))

    def _after_site_backward(
        self, module: nn.Module, value: torch.Tensor, version: int, gradient: torch.Tensor
    ) -> None:
        if value._version != version:  # through an alias, such as the input of a dropout layer
            raise ValueError(f"layers: the output of {type(module).__name__} was changed in place")
        self._reached_site = True
        for taker in self._of_sites:
            taker.add_site(module, value, gradient, self.factor)

    def _taken(self, name: str) -> bool:
        return any(taker.takes(name) for taker in self._of_parameters)

    def _after_backward(self, calls: list[ModuleCall], gradient: torch.Tensor) -> None:
        call = calls.pop() if self._last else calls[0]  # the last backward frees the input
        if not any(map(self._taken, call.names.values())):
            return
        self._recomputing = False  # forming pieces may call the module; that is not a checkpoint's rerun
        try:
            pieces = call.pieces(gradient)
        except Uncovered:
            if self._failed is None:
                raise
            self._failed.update(call.names.values())
            return
        finally:
            self._recomputing = True
        for key, piece in pieces.items():
            name = call.names[key]
            self._pending.setdefault(name, []).append(piece)
            if len(self._pending[name]) == self._uses[name]:
                self._finish(name)

    def unfinished(self, name: str) -> GradPiece | None:
        """The sum of a parameter's pieces if the outputs of some of its uses got no gradient."""
        return merged(self._pending[name]) if name in self._pending else None

    def transposed(self, parameter: torch.Tensor) -> bool:
        """Whether the parameter is the weight of a linear layer whose rows are inputs."""
        return not self._linear.get(parameter, True)

    def _after_autograd(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        if self._shape[0] > 1:
            raise OneByOne
        name = self.names[parameter]
        gradient = gradient.to(compute_dtype(gradient.dtype))
        if parameter in self._linear:
            piece: GradPiece = DenseGrad((gradient if self._linear[parameter] else gradient.T)[None])
        else:
            piece = DenseGrad(gradient.reshape(1, -1))
        if name in self._tied:
            rows = torch.arange(len(gradient), device=gradient.device)[None]
            piece = RowGrad(rows, gradient[None], len(gradient))
        self._pending[name] = [piece]
        self._finish(name)

    def _finish(self, name: str) -> None:
        piece = merged(self._pending.pop(name))
        if piece is None:
            if self._failed is None:
                raise ValueError(f"parameters: no rule covers {name}: layers of different kinds share it")
            self._failed.add(name)
            return
        self._arrived.add(name)
        for taker in self._of_parameters:
            if taker.takes(name):
                taker.add(name, piece, self.factor)


class Tap(torch.autograd.Function):
    """Forwards a module's output and hands its gradient to ``receive``.

    ``alias`` shares the output's memory, so the student may change it in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,  # [B, ...], [B * T, ...], or [1, ...] if shared by the samples
        leaf: torch.Tensor,  # scalar target of the backward
        batch: int,
        alias: bool,
        receive: Callable[[torch.Tensor], None],
    ) -> torch.Tensor:
        ctx.receive = receive
        ctx.shared = batch > 1 and output.shape[0] == 1
        if ctx.shared:  # e.g. positions: one row per sample separates the gradients
            return output.expand(batch, *output.shape[1:]).clone()
        return output.data if alias else output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        [gradient] = gradients
        ctx.receive(gradient)
        own = None
        if ctx.needs_input_grad[0]:
            own = gradient.sum(0, keepdim=True) if ctx.shared else gradient
        return own, None, None, None, None  # the leaf only marks where the backward ends


def _require(module: nn.Module, key: str, gradient: bool) -> None:
    """Set a parameter's ``requires_grad``."""
    parameter = module._parameters[key]
    assert parameter is not None
    parameter.requires_grad_(gradient)


@contextmanager
def streamed(
    parameters: Collection[torch.Tensor], receive: Callable[[torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Context in which ``torch.autograd.grad`` hands each leaf's gradient to ``receive`` and keeps none.

    Other hooks on the leaves are disabled. Hooks on the accumulated gradient (DeepSpeed, DDP, optimizers that step in
    the backward) never run under ``torch.autograd.grad``.
    """

    def arrived(parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        receive(parameter, gradient.detach())
        return gradient.new_zeros(()).expand(gradient.shape)  # takes no memory

    with ExitStack() as stack:
        for parameter in parameters:
            hooks = parameter._backward_hooks
            if hooks:
                stack.callback(hooks.update, dict(hooks))
                hooks.clear()
            stack.callback(parameter.register_hook(partial(arrived, parameter)).remove)
        yield
