"""Shields the library from process-wide changes to torch's defaults for new tensors and for products."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch


class ProcessSetting:
    """A setting of the whole process: the first of the threads that use it replaces it, the last one restores it."""

    def __init__(self, replace: Callable[[], Callable[[], None]]) -> None:
        """``replace`` makes the change and returns a function that undoes it."""
        self._replace, self._lock, self._callers = replace, threading.Lock(), 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._callers:
                self._restore = self._replace()
            self._callers += 1
        try:
            yield
        finally:
            with self._lock:
                self._callers -= 1
                if not self._callers:
                    self._restore()


def _float32_default() -> Callable[[], None]:
    own = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    return lambda: torch.set_default_dtype(own)


_standard_dtype = ProcessSetting(_float32_default)


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


def _full_precision() -> Callable[[], None]:
    """Sets torch's products to full precision. torch has one older and several newer settings, and raises if the older
    is read while they disagree."""
    newer = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, older = [setting.fp32_precision for setting in newer], None
    with suppress(RuntimeError):  # they disagree already
        older = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # also sets the newer ones

    def restore() -> None:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for setting, own in zip(newer, before, strict=True):
            setting.fp32_precision = own

    return restore


_highest = ProcessSetting(_full_precision)


@contextmanager
def float32_products() -> Iterator[None]:
    """Context or decorator in which torch multiplies float32 in float32.

    Trainers enable TF32 (or bfloat16 on a CPU) process-wide, which costs 1e-3 of a logit, and call rewards under
    autocast, which rounds to half precision.
    """
    with _highest(), ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
