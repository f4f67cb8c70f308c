"""The compiled extension, or the reason it is missing, and how tensors are passed to it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

#: True if the package was installed without the extension, as from the platform-independent wheel.
ABSENT = False
try:
    import acqcore._core as core
except ImportError as error:
    core = None  # type: ignore[assignment]
    _IMPORT_ERROR: str | None = str(error)
    ABSENT = isinstance(error, ModuleNotFoundError)
else:
    _IMPORT_ERROR = None
if ABSENT:
    warnings.warn(
        "acqcore has no compiled extension here: the backend 'eager' scores in plain torch, which is slower and holds "
        "the logits. To build it, install a C++17 compiler and run 'pip install --no-binary acqcore acqcore'.",
        RuntimeWarning,
        stacklevel=2,
    )


F = TypeVar("F", bound=Callable[..., object])


def constant_when_compiled(function: F) -> F:
    """Makes ``torch.compile`` call the function once and keep the result: for machine facts that it cannot trace.

    ``torch.compiler.assume_constant_result`` does the same, but imports torch._dynamo, which takes one second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def missing() -> str | None:
    """Why the extension is missing, or None if it is present."""
    if _IMPORT_ERROR is None:
        return None
    return (
        "the compiled extension acqcore._core is missing or does not load; build it with "
        f"'pip install .' in the source tree ({_IMPORT_ERROR})"
    )


def matrix(tensor: torch.Tensor) -> core.Matrix:
    """``tensor [rows, columns]`` for the extension; the caller keeps the tensor alive."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    rows, columns = tensor.shape
    return core.Matrix(tensor.data_ptr(), rows, columns, tensor.stride(0), tensor.stride(1), dtype)


def pointer(tensor: torch.Tensor | None) -> int:
    """The tensor's address; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
