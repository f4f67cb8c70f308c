"""Groups samples into padded batches that waste few tokens, longest first.

Not all samples may share a batch: some forwards depend on the padded length. Long rope picks one of two sets of
frequencies by the longest sequence of the batch; dynamic rope scales its frequencies by that length. A sample's values
must not depend on its batch, so such lengths are batched separately. Where a forward depends on its batch in any other
way, as experts of a limited capacity and per-tensor scales of quantised activations do, each sample runs alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from acqcore import checks
from acqcore.students.findings import altered, findings
from acqcore.students.samples import Row

# Fixed cost of a batch in tokens: avoiding a batch is worth this much padding. cuda: an unmeasured guess for the kernel
# launches of a few dozen layers.
OVERHEAD_TOKENS = {"cpu": 64, "cuda": 2048}

#: Config entries that hold the length above which rope frequencies change.
LIMITS = ("original_max_position_embeddings", "max_position_embeddings")

#: Most tokens of the test row, which is run alone and padded beside another.
SHORT = 6

#: Largest allowed difference between the two runs, relative to the largest hidden state.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}


def partition(
    lengths: Sequence[int],  # [n], each >= 1
    batch_tokens: int,
    overhead: int,
    groups: Sequence[Hashable] | None = None,  # [n]
    starts: Sequence[int] | None = None,  # [n], each below the length
    repeats: int = 0,
) -> list[list[int]]:
    """Sample indices of each batch. A batch is padded to its longest sample and never mixes groups.

    Samples are sorted by length, longest first, so that memory runs out early if at all, and cut into contiguous runs
    of at most ``batch_tokens`` padded tokens; a longer sample gets its own batch. Dynamic programming minimizes the
    padded tokens plus ``overhead`` per batch. The sort is stable, so the result depends only on the arguments.

    With ``starts``, a batch's tokens from its earliest start on are computed ``repeats`` more times, which adds to its
    cost. Samples are then sorted by start first, latest first, so a short prompt does not lengthen others' repeats.
    """
    if groups is not None and len(set(groups)) > 1:
        members: dict[Hashable, list[int]] = {}
        for i, group in enumerate(groups):
            members.setdefault(group, []).append(i)
        batches = []
        for own in sorted(members.values(), key=lambda own: -max(lengths[i] for i in own)):
            own_starts = None if starts is None else [starts[i] for i in own]
            parts = partition([lengths[i] for i in own], batch_tokens, overhead, None, own_starts, repeats)
            batches += [[own[i] for i in part] for part in parts]
        return batches
    n = len(lengths)
    begins = np.zeros(n, dtype=np.int64) if starts is None else np.asarray(starts, dtype=np.int64)
    ends = np.asarray(lengths, dtype=np.int64)
    order = np.lexsort((-ends, -begins))
    begins, ends = begins[order], ends[order]
    sizes = np.arange(1, n + 1)
    cost = np.zeros(n + 1)  # of the best partition of order[i:]
    first = np.zeros(n, dtype=np.int64)  # size of its first batch
    for i in range(n - 1, -1, -1):
        most = min(max(1, batch_tokens // int(ends[i])), n - i)
        longest = np.maximum.accumulate(ends[i : i + most])
        most = max(1, int((sizes[:most] * longest <= batch_tokens).sum()))
        longest = longest[:most]
        again = repeats * (longest - begins[i : i + most])  # the last sample of a run starts first
        total = cost[i + 1 : i + 1 + most] + sizes[:most] * (longest + again)
        best = int(total.argmin())
        first[i] = best + 1
        cost[i] = total[best] + overhead
    batches = []
    i = 0
    while i < n:
        batches.append(order[i : i + first[i]].tolist())
        i += int(first[i])
    return batches


def collate(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded token ids ``[B, T]``; for the N scored tokens, the flat positions of their predecessors, the tokens
    themselves, and the samples' offsets ``[B + 1]``."""
    input_ids = pad_sequence([row.ids for row in rows], batch_first=True)
    targets = pad_sequence([row.targets for row in rows], batch_first=True, padding_value=checks.IGNORE_INDEX)
    of_row = targets.ne(checks.IGNORE_INDEX)
    scored = of_row.flatten().nonzero()[:, 0]
    offsets = nn.functional.pad(of_row.sum(dim=1).cumsum(0), (1, 0))
    return input_ids, scored - 1, targets.flatten()[scored], offsets


class Lengths:
    """How a student's hidden states depend on the batch; ``module`` is None if the student has none."""

    def __init__(self, module: nn.Module | None) -> None:
        self._key: object = self if module is None else module
        self._alone = False
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
        """Whether hidden states are independent of the batch, by rope's rules and in all checks so far."""
        return not self._breaks and not self._alone

    def groups(self, lengths: Sequence[int]) -> list[int]:
        """Group of each sample, by length; samples may share a batch if their groups are equal."""
        if self._alone:
            return list(range(len(lengths)))
        dynamic = min((limit for limit, dynamic in self._breaks if dynamic), default=math.inf)
        return [n if n > dynamic else -sum(n > limit for limit, _ in self._breaks) for n in lengths]

    def check(self, longest: int, vocab_size: int, hidden: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Run a short row alone, then padded to ``longest`` tokens in a batch with another row, some of whose tokens
        are the same. If its hidden states differ, in half precision also those of a second row, samples do not share
        batches. If rope changes with the length, the padded row ends where the short one's frequencies do."""
        longest = min([longest, *(limit for limit, _ in self._breaks)])
        # Padded length up to which hidden states were found to be independent of the batch.
        known = findings(self._key, "independent up to")
        state = altered(self._key) if isinstance(self._key, nn.Module) else ()
        if self._alone or longest <= known.get(state, 0):
            return
        ids, short = torch.arange(longest), min(SHORT, longest - longest // 3)
        for start in (vocab_size // 2, vocab_size // 3):  # ordinary tokens: special ones can amplify rounding
            row = (start + torch.arange(short) % 4) % vocab_size
            other = torch.where(ids % 3 == 0, ids, start + ids % 4) % vocab_size
            alone = hidden(row[None])[0].double()
            beside = hidden(torch.stack([other, nn.functional.pad(row, (0, longest - short))]))[1, :short]
            error = (beside.double() - alone).abs().max()
            self._alone = not bool(error <= TOLERANCE.get(beside.dtype, 0.1) * alone.abs().max())
            if not self._alone or beside.dtype not in (torch.float16, torch.bfloat16):
                break
        if not self._alone:
            known[state] = longest


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
