"""Which samples share a trunk forward, and how: batches that waste few padded tokens, longest first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from acqcore import checks
from acqcore.students.samples import Row

# What a batch costs beyond its tokens, in tokens: fewer, larger batches are worth this much padding each.
# cuda: a guess for kernel launches of some tens of layers, not measured.
OVERHEAD_TOKENS = {"cpu": 64, "cuda": 2048}


def partition(
    lengths: Sequence[int],  # [n], each >= 1
    batch_tokens: int,
    overhead: int,
) -> list[list[int]]:
    """Indices of the samples of each batch, a batch being padded to its longest sample.

    Sorted by length, longest first (what does not fit in memory fails at once), and cut into contiguous runs
    that minimise the sum of padded tokens plus ``overhead`` per batch, each at most ``batch_tokens`` padded
    tokens; a sample longer than that is a batch of its own. Exact, by dynamic programming over the sorted
    list; equal lengths keep their order, so the result is a function of the arguments.
    """
    n = len(lengths)
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    sizes = np.arange(1, n + 1)
    cost = np.zeros(n + 1)  # of the best partition of order[i:]
    first = np.zeros(n, dtype=np.int64)  # size of its first batch
    for i in range(n - 1, -1, -1):
        longest = lengths[order[i]]
        most = min(max(1, batch_tokens // longest), n - i)
        total = cost[i + 1 : i + 1 + most] + sizes[:most] * longest
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
    """Token ids ``[B, T]`` padded on the right; of the N scored tokens the flat positions before them,
    themselves, and the samples' offsets ``[B + 1]``."""
    input_ids = pad_sequence([row.ids for row in rows], batch_first=True)
    targets = pad_sequence([row.targets for row in rows], batch_first=True, padding_value=checks.IGNORE_INDEX)
    of_row = targets.ne(checks.IGNORE_INDEX)
    scored = of_row.flatten().nonzero()[:, 0]
    offsets = torch.nn.functional.pad(of_row.sum(dim=1).cumsum(0), (1, 0))
    return input_ids, scored - 1, targets.flatten()[scored], offsets
