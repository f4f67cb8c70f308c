"""Decides which samples may share a batch, as some forwards depend on the padded length.

Long rope picks one of two sets of frequencies by the longest sequence of the batch; dynamic rope scales its frequencies
by that length. A sample's values must not depend on its batch, so such lengths are batched separately.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

#: Config entries that hold the length above which rope frequencies change.
LIMITS = ("original_max_position_embeddings", "max_position_embeddings")

#: Tokens of the test row, which is run alone and padded.
SHORT = 6

#: Largest allowed difference between the two runs, relative to the largest hidden state.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}

# Module -> padded length, a power of two, up to which hidden states were found to be independent of padding. A student
# without a module is entered by its own Lengths.
_CHECKED: WeakKeyDictionary[object, int] = WeakKeyDictionary()


class Lengths:
    """How a student's hidden states depend on the padded length.

    Args:
        module: the student's module; None if it has none.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self._key: object = self if module is None else module
        self._exact = False
        self._breaks: set[tuple[int, bool]] = set()
        self._caches: list[nn.Module] = []
        if module is not None:
            modules = list(module.modules())
            configs = {id(c): c for c in (getattr(m, "config", None) for m in modules) if c is not None}
            self._breaks = {found for config in configs.values() for found in _breaks(config)}
            if any(dynamic for _, dynamic in self._breaks):
                self._caches = [m for m in modules if hasattr(m, "max_seq_len_cached")]

    def reset(self) -> None:
        """Forget the longest sequence that dynamic rope has seen, as it would scale the next one."""
        for module in self._caches:
            for name in vars(module):
                if name.endswith("max_seq_len_cached"):
                    setattr(module, name, 0)

    @property
    def plain(self) -> bool:
        """Whether hidden states are independent of the padded length, by rope's rules and in all checks so far."""
        return not self._breaks and not self._exact

    def group(self, length: int) -> int:
        """Group of a length; samples may share a batch if their groups are equal."""
        if self._exact or any(dynamic and length > limit for limit, dynamic in self._breaks):
            return length
        return -sum(length > limit for limit, _ in self._breaks)

    def check(self, longest: int, hidden: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Run a short row alone and padded to ``longest`` tokens. If its hidden states differ for an unknown reason,
        only samples of the same length share a batch."""
        if self._breaks or self._exact or longest <= max(_CHECKED.get(self._key, 0), SHORT):
            return
        row = torch.arange(1, SHORT + 1)[None] % 4
        alone = hidden(row)[0].double()
        padded = hidden(nn.functional.pad(row, (0, longest - SHORT)))
        error = (padded[0, :SHORT].double() - alone).abs().max()
        self._exact = not bool(error <= TOLERANCE.get(padded.dtype, 0.1) * alone.abs().max())
        if not self._exact:
            _CHECKED[self._key] = longest


def _breaks(config: Any) -> Iterator[tuple[int, bool]]:
    """Lengths above which rope frequencies change, and whether they change with each further token."""
    for name in ("rope_parameters", "rope_scaling"):
        entry = getattr(config, name, None)
        if not isinstance(entry, Mapping):
            continue
        for rope in (entry, *entry.values()):  # one per layer type, or one for all
            kind = (rope.get("rope_type") or rope.get("type")) if isinstance(rope, Mapping) else None
            if kind in ("longrope", "dynamic"):
                # Models differ in which one they use; an extra break only makes batches smaller.
                named = (rope, vars(config))
                for limit in {entry.get(key) for entry in named for key in LIMITS} - {None}:
                    yield limit, kind == "dynamic"
