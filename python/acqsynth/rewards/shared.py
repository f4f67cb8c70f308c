"""What signals and gates of one reward call share: one draw of answers, one scoring pass, one embedding."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

_memo: ContextVar[dict[Hashable, Any] | None] = ContextVar("acqsynth_reward_call", default=None)


@contextmanager
def one_call() -> Iterator[None]:
    """Within it, :func:`once` computes each key once. The student may move between calls, so nothing outlives it."""
    token = _memo.set({})
    try:
        yield
    finally:
        _memo.reset(token)


def once(key: Hashable, compute: Callable[[], T]) -> T:
    """``compute()``, or what it gave before under ``key`` in this call; outside a call it is computed each time."""
    memo = _memo.get()
    if memo is None:
        return compute()
    if key not in memo:
        memo[key] = compute()
    value: T = memo[key]
    return value
