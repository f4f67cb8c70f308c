"""Runs prompts separately from completions: if noise acts only on completions, prompts need no autograd graph.

A student is causal, so a gradient in a completion's activations never passes through its prompt. The prompt runs first,
without a graph, and fills a key-value cache; the completion runs on that cache. Values equal those of one forward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

#: Tokens of the test row, on which the two parts are compared with one forward, and the position of the cut.
LENGTH, CUT = 8, 3

#: Largest allowed difference between the two, relative to the largest hidden state.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}

# Module -> whether its forward may be cut, so that a reward called at each step pays for the comparison once.
_KNOWN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

#: Token ids ``[B, T]`` and a cache or None -> hidden states ``[B, T, D]`` and the cache after them.
Continued = Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]]


def may_cut(
    module: nn.Module,
    continued: Continued,
    whole: Callable[[torch.Tensor], torch.Tensor],  # ids [B, T] -> hidden states [B, T, D]
    ids: torch.Tensor,  # [1, LENGTH] int64
) -> bool:
    """Whether running ``ids`` in two parts gives the same hidden states as one forward."""
    if module not in _KNOWN:
        _KNOWN[module] = _agree(continued, whole(ids), ids)
    return _KNOWN[module]


def _agree(continued: Continued, expected: torch.Tensor, ids: torch.Tensor) -> bool:
    try:
        found = in_parts(continued, ids, CUT)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # from the student's own code, which may not accept its own cache
        return False
    error = (found.double() - expected.double()).abs().max()
    return bool(error <= TOLERANCE[expected.dtype] * expected.double().abs().max())


def in_parts(
    continued: Continued,
    input_ids: torch.Tensor,  # [B, T] int64
    start: int,
    within: AbstractContextManager[Any] | None = None,
) -> torch.Tensor:
    """Hidden states ``[B, T, D]``. Tokens before ``start`` run without a graph, the rest in the context ``within``."""
    with torch.no_grad():
        before, cache = continued(input_ids[:, :start], None)
    with within or nullcontext():
        after, _ = continued(input_ids[:, start:], cache)
        return torch.cat([before, after], dim=1)
