"""The backends in order: the first that is available and fits serves a call, unless one is named.

``ACQCORE_BACKEND`` names one for the whole process. Naming a backend that is unknown, unavailable or does not support
the tensors raises an error. ``eager`` runs only when named, unless the package has no compiled extension; a warning at
import then says so.

Among several GPU backends that fit, ``preference.json`` chooses. It holds a fixed order for each operation
("unmeasured") and a row for each measured class of shapes, fastest backend first:
``{"capability": "9.0", "op": "logit_stats", "dtype": "bfloat16", "rows": "many", "vocab": "large", "order": [...]}``.
Rows come from ``make gpu-check``, which prints those for its machine.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from acqcore import checks
from acqcore.backends.base import (
    Backend as Backend,
    DrawRows as DrawRows,
    Dropout as Dropout,
    FisherSums as FisherSums,
    Gram as Gram,
    HeadRows as HeadRows,
    LogitRows as LogitRows,
    Probes as Probes,
)
from acqcore.backends.cpu import Cpu
from acqcore.backends.cuda import Cuda
from acqcore.backends.eager import Eager
from acqcore.backends.extension import constant_when_compiled
from acqcore.backends.triton import Triton

PREFERENCE: dict[str, Any] = json.loads((Path(__file__).parent / "preference.json").read_text())

_BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (Cpu(), Cuda(), Triton(), Eager())}

#: Names of the backends in order of preference, available or not.
NAMES = tuple(_BACKENDS)


@dataclass(frozen=True)
class BackendInfo:
    """One row of :func:`acqcore.backends`."""

    name: str
    description: str
    available: bool
    reason: str | None  #: why it is not available
    instruction_set: str | None


def backends() -> list[BackendInfo]:
    """Every backend in order of preference, with its instruction set or the reason why it is not available."""
    rows = []
    for backend in _BACKENDS.values():
        reason = backend.unavailable()
        isa = backend.instruction_set() if reason is None else None
        rows.append(BackendInfo(backend.name, backend.description, reason is None, reason, isa))
    return rows


def get(name: str) -> Backend:
    """The backend called ``name``, which is trusted: for code below the public API."""
    return _BACKENDS[name]


def select(
    name: str | None,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    op: str = "",
    shape: tuple[int, int] = (0, 0),
) -> Backend:
    """The backend for tensors of ``device`` and ``dtypes``.

    If several GPU backends fit, ``op`` and its ``shape`` (rows, vocabulary) choose among them.

    Raises:
        ValueError: an unknown name, or a named backend that does not support these tensors.
        RuntimeError: the named backend is not available here, or no backend is chosen automatically for these tensors.
    """
    argument = "backend" if name is not None else "ACQCORE_BACKEND"
    name = name if name is not None else os.environ.get("ACQCORE_BACKEND")
    if name is not None:
        checks.one_of(argument, name, _BACKENDS)
        chosen = _BACKENDS[name]
        if reason := chosen.unavailable():
            raise RuntimeError(f"{argument}: {name!r} is not available here: {reason}")
        if reason := chosen.misfit(device, dtypes):
            raise ValueError(f"{argument}: {reason}")
        return chosen
    reasons = {n: b.misfit(device, dtypes) or b.unavailable() for n, b in _BACKENDS.items() if b.automatic}
    fitting = [candidate for candidate, reason in reasons.items() if reason is None]
    if not fitting:
        raise RuntimeError(f"{'; '.join(filter(None, reasons.values()))}. Pass backend='eager' to use plain torch.")
    if len(fitting) > 1 and device.type == "cuda":
        order = _order(op, _capabilities()[device.index], str(dtypes[0]).removeprefix("torch."), *shape)
        fitting = [candidate for candidate in order if candidate in fitting] or fitting
    return _BACKENDS[fitting[0]]


def _order(op: str, capability: str, dtype: str, rows: int, vocab: int) -> list[str]:
    """Names of backends, best first; empty for an operation that is not in the table."""
    of_rows = "few" if rows < 256 else "many"  # many fill a GPU
    of_vocab = "small" if vocab < 32768 else "large"
    key = op, capability, dtype, of_rows, of_vocab
    for row in PREFERENCE["measured"]:
        if (row["op"], row["capability"], row["dtype"], row["rows"], row["vocab"]) == key:
            return list(row["order"])
    return list(PREFERENCE["unmeasured"].get(op, []))


@constant_when_compiled
def _capabilities() -> tuple[str, ...]:
    """The compute capability of every GPU, as in "9.0". One of them alone would take an argument, which torch.compile
    of torch 2.14 does not accept."""
    found = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    return tuple(f"{major}.{minor}" for major, minor in found)
