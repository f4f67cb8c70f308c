"""Runs code compiled by ``torch.compile`` eagerly."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_open = 0  # contexts
_stance: Any = None  # of the first


@contextmanager
def uncompiled() -> Iterator[None]:
    """Re-entrant context in which compiled code runs eagerly: once compiled, a module ignores hooks added to it.

    The setting belongs to the process, so of threads whose contexts overlap the last restores it.
    """
    global _open, _stance
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes a second
        yield
        return
    with _lock:
        if not _open:
            _stance = torch.compiler.set_stance("force_eager")
        _open += 1
    try:
        yield
    finally:
        with _lock:
            _open -= 1
            if not _open:
                _stance.__exit__(None, None, None)
