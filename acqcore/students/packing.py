"""Groups samples into padded batches that waste few tokens, longest first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from acqcore import checks
from acqcore.students.samples import Row

# Fixed cost of a batch in tokens: avoiding a batch is worth this much padding. cuda: an unmeasured guess for the kernel
# launches of a few dozen layers.
OVERHEAD_TOKENS = {"cpu": 64, "cuda": 2048}


def partition(
    lengths: Sequence[int],  # [n], each >= 1
    batch_tokens: int,
    overhead: int,
    groups: Sequence[int] | None = None,  # [n]
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
        members: dict[int, list[int]] = {}
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
    offsets = torch.nn.functional.pad(of_row.sum(dim=1).cumsum(0), (1, 0))
    return input_ids, scored - 1, targets.flatten()[scored], offsets
