"""The precision of torch's own products."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def float32_products() -> Iterator[None]:
    """Disables TF32 for torch's products on a GPU: trainers enable it process-wide, and it costs 1e-3 of a logit.

    torch has an older and a newer setting, and raises if one is read while they disagree: both are set and restored.
    """
    settings = torch.backends.cuda.matmul
    before, older = settings.fp32_precision, None
    with contextlib.suppress(RuntimeError):  # they disagree already
        older = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # also sets the newer one
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        settings.fp32_precision = before
