"""Observes a backward pass at the outputs of modules and at leaves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch


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
