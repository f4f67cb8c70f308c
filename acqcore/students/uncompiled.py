"""Runs code compiled by ``torch.compile`` eagerly."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from acqcore.defaults import ProcessSetting


def _force_eager() -> Callable[[], None]:
    stance = torch.compiler.set_stance("force_eager")
    return lambda: stance.__exit__(None, None, None)


_eager = ProcessSetting(_force_eager)


def uncompiled() -> AbstractContextManager[None]:
    """Re-entrant context in which compiled code runs eagerly: once compiled, a module ignores hooks added to it."""
    # Without torch._dynamo nothing is compiled, and importing it takes a second.
    return _eager() if "torch._dynamo" in sys.modules else nullcontext()
