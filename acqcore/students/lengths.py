"""Which samples may share a batch: some forwards depend on the padded length.

Long rope has two sets of frequencies and picks one by the longest sequence of the batch; dynamic rope scales its
frequencies by that length. A sample's values must not depend on its batch, so such lengths are kept apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

#: Entries that hold the length above which the frequencies of rope change.
LIMITS = ("original_max_position_embeddings", "max_position_embeddings")

#: Tokens of the row that is run alone and padded.
SHORT = 6

#: Largest difference between the two runs, relative to the largest hidden state.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}

# Module -> padded length, a power of two, up to which hidden states were found not to depend on it.
_CHECKED: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


class Lengths:
    """The padded lengths that a student's hidden states depend on.

    Args:
        module: the student's, None for one that is no module.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self._module = module
        self._checked = 0
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
        """Forget the longest sequence that dynamic rope has seen: it would scale the next one."""
        for module in self._caches:
            for name in vars(module):
                if name.endswith("max_seq_len_cached"):
                    setattr(module, name, 0)

    @property
    def plain(self) -> bool:
        """Whether no rule of rope, and no length tried so far, makes hidden states depend on the padded length."""
        return not self._breaks and not self._exact

    def group(self, length: int) -> int:
        """Samples may share a batch if this is the same for their lengths."""
        if self._exact or any(dynamic and length > limit for limit, dynamic in self._breaks):
            return length
        return -sum(length > limit for limit, _ in self._breaks)

    def check(self, longest: int, hidden: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Run a short row alone and padded to ``longest`` tokens: where its hidden states differ for a reason that is
        not known, only samples of the same length share a batch."""
        known = self._checked if self._module is None else _CHECKED.get(self._module, self._checked)
        if self._breaks or self._exact or longest <= max(known, SHORT):
            return
        row = torch.arange(1, SHORT + 1)[None] % 4
        alone = hidden(row)[0].double()
        padded = hidden(nn.functional.pad(row, (0, longest - SHORT)))
        error = (padded[0, :SHORT].double() - alone).abs().max()
        self._exact = not bool(error <= TOLERANCE.get(padded.dtype, 0.1) * alone.abs().max())
        self._checked = longest
        if self._module is not None and not self._exact:
            _CHECKED[self._module] = longest


def _breaks(config: Any) -> Iterator[tuple[int, bool]]:
    """Length above which the frequencies of rope change, and whether they change with each length above it."""
    for name in ("rope_parameters", "rope_scaling"):
        entry = getattr(config, name, None)
        if not isinstance(entry, Mapping):
            continue
        for rope in (entry, *entry.values()):  # by type of layer, or one for all
            kind = (rope.get("rope_type") or rope.get("type")) if isinstance(rope, Mapping) else None
            if kind in ("longrope", "dynamic"):
                # Which one the model goes by differs among models: a break too many only makes smaller batches.
                named = (rope, vars(config))
                for limit in {entry.get(key) for entry in named for key in LIMITS} - {None}:
                    yield limit, kind == "dynamic"
