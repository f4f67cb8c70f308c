"""Where a backward pass can be watched: on the outputs of modules, and on leaves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


class Tap(torch.autograd.Function):
    """Passes on a module's output, and hands its gradient to ``receive``.

    ``alias`` shares the output's memory, so that the student may change it in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,  # [B, ...], [B * T, ...], or [1, ...] where the samples share it
        leaf: torch.Tensor,  # a scalar that the backward runs towards
        batch: int,
        alias: bool,
        receive: Callable[[torch.Tensor], None],
    ) -> torch.Tensor:
        ctx.receive, ctx.device = receive, leaf.device
        ctx.shared = batch > 1 and output.shape[0] == 1
        if ctx.shared:  # such as positions: a row for each sample keeps their gradients apart
            return output.expand(batch, *output.shape[1:]).clone()
        return output.data if alias else output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        [gradient] = gradients
        ctx.receive(gradient)
        own = None
        if ctx.needs_input_grad[0]:
            own = gradient.sum(0, keepdim=True) if ctx.shared else gradient
        return own, torch.zeros((), device=ctx.device), None, None, None


@contextmanager
def streamed(
    parameters: Collection[torch.Tensor], receive: Callable[[torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Context in which gradients of leaves go to ``receive`` one by one; ``grad`` is restored on exit.

    Hooks of others that wait for an accumulated gradient are off: an optimizer in the backward would take a step.
    """
    kept = [(parameter, parameter.grad, parameter._post_accumulate_grad_hooks) for parameter in parameters]

    def arrived(parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        receive(parameter, gradient)

    with ExitStack() as stack:
        for parameter, gradient, hooks in kept:
            parameter.grad = None
            parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]  # torch's own initial value
            stack.callback(setattr, parameter, "grad", gradient)
            stack.callback(setattr, parameter, "_post_accumulate_grad_hooks", hooks)
            stack.callback(parameter.register_post_accumulate_grad_hook(arrived).remove)
        yield
