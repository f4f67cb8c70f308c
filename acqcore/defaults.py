"""Shields the library from process-wide changes to torch's defaults for new tensors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

# The dtype is one for all threads: the first caller replaces it and the last one restores it.
_lock = threading.Lock()
_callers = 0
_own = torch.float32


@contextmanager
def standard_defaults() -> Iterator[None]:
    """Context or decorator in which new tensors default to float32 on the CPU.

    ``torch.set_default_dtype(torch.bfloat16)`` would round sums to three digits, and ``torch.set_default_device`` would
    put tensors on a different device from the generators that fill them.
    """
    with _standard_dtype(), ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def _standard_dtype() -> Iterator[None]:
    global _callers, _own
    with _lock:
        if not _callers:
            _own = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        _callers += 1
    try:
        yield
    finally:
        with _lock:
            _callers -= 1
            if not _callers:
                torch.set_default_dtype(_own)
