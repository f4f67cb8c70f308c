"""The compiled extension, or why there is none, and how tensors are handed to it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

#: The package was installed without the extension, as the wheel for any platform is.
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
        "acqcore has no compiled extension here: the backend 'eager' scores in plain torch, slower, and holds the "
        "logits. A C++17 compiler and 'pip install --no-binary acqcore acqcore' build it.",
        RuntimeWarning,
        stacklevel=2,
    )


F = TypeVar("F", bound=Callable[..., object])


def constant_when_compiled(function: F) -> F:
    """``torch.compile`` calls it once and keeps the answer: for facts of the machine that it cannot trace.

    This is what ``torch.compiler.assume_constant_result`` does, which would import torch._dynamo, one second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def missing() -> str | None:
    """Why there is no extension, or None."""
    if _IMPORT_ERROR is None:
        return None
    return (
        "the compiled extension acqcore._core is missing or does not load; build it with "
        f"'pip install .' in the source tree ({_IMPORT_ERROR})"
    )


def matrix(tensor: torch.Tensor) -> core.Matrix:
    """``tensor [rows, columns]`` as the extension sees it; the caller keeps it alive."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    rows, columns = tensor.shape
    return core.Matrix(tensor.data_ptr(), rows, columns, tensor.stride(0), tensor.stride(1), dtype)


def pointer(tensor: torch.Tensor | None) -> int:
    """Its address, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
