"""Shields the library from process-wide changes to torch's defaults for new tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def standard_defaults() -> Iterator[None]:
    """Context or decorator in which new tensors default to float32 on the CPU.

    ``torch.set_default_dtype(torch.bfloat16)`` would round sums to three digits, and ``torch.set_default_device`` would
    put tensors on a different device from the generators that fill them.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
