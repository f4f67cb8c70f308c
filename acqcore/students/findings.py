"""Results of tests of a model, kept until other code may have changed it.

A reward is called with the model at each training step, so each test runs once per state of the model, not per call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

T = TypeVar("T")

#: Most states per model and question; a training run may change a model's state any number of times.
KEPT_STATES = 16

# Per question, as ranks that share a model must forget the answers to a question at the same call.
_FINDINGS: WeakKeyDictionary[object, dict[str, dict[Any, Any]]] = WeakKeyDictionary()


class _Bounded(dict[Any, Any]):
    def __setitem__(self, state: Any, finding: Any) -> None:
        if len(self) == KEPT_STATES and state not in self:
            self.clear()
        super().__setitem__(state, finding)


def findings(model: object, question: str) -> dict[Any, Any]:
    """State -> finding. A state is hashable and, like a finding, holds no strong reference to the model."""
    return _FINDINGS.setdefault(model, {}).setdefault(question, _Bounded())


def remembered(model: nn.Module, question: str, state: Any, find: Callable[[], T]) -> T:
    """The result of ``find``, which runs once per ``question`` and state of the model."""
    known = findings(model, question)
    if state not in known:
        known[state] = find()
    found: T = known[state]
    return found


def alterations(module: nn.Module) -> tuple[Any, ...]:
    """Changes that other code can make to a module's call: its class, the ids of its hooks, which are never reused,
    and a forward set on the instance. A weak reference names the module, as another one may get a freed one's id."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    own = module.__dict__.get("forward")
    key: Any
    try:
        key = own if own is None else weakref.ref(own)
        hash(key)
    except TypeError:  # a callable that cannot be hashed or referenced weakly
        key = id(own)
    return weakref.ref(module), type(module), *map(tuple, hooks), key


def altered(module: nn.Module) -> tuple[Any, ...]:
    """The modules in ``module``, and alterations of those that have hooks or a replaced forward."""
    modules = list(module.modules())
    found = (m for m in modules if m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__)
    return *map(weakref.ref, modules), *map(alterations, found)
