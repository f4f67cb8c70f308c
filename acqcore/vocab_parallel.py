"""Collectives between ranks that share a vocabulary: they exchange a few numbers per row, never logits.

A head with a ``group`` holds some rows of the weight, and every rank of the group passes the same hidden states through
its own rows. Collectives run on the head's device, in float64, in the order of the caller's calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
import torch.distributed as dist

from acqcore import checks
from acqcore.head import Head

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Heads whose ranks are known to tile the vocabulary.
_TILED: WeakSet[Head] = WeakSet()


def gathered(
    values: torch.Tensor,  # [...], the same shape on every rank
    group: ProcessGroup,
) -> torch.Tensor:
    """The values of every rank, ``[ranks, ...]``, in the group's order; bitwise the same on every rank."""
    values = values.contiguous()
    out = values.new_empty((dist.get_world_size(group), *values.shape))
    dist.all_gather(list(out.unbind()), values, group=group)
    return out


def summed(
    values: torch.Tensor,  # [...], the same shape on every rank
    group: ProcessGroup | None,
) -> torch.Tensor:
    """Sum over the ranks; without a group, the values themselves."""
    if group is None:
        return values
    values = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(values, group=group)
    return values


def check_tiling(head: Head) -> None:
    """Checks at a head's first use that the ranks' rows cover every row of the vocabulary exactly once.

    The constructor cannot check this: a rank that builds a head on its own would wait for the others.

    Raises:
        ValueError: on every rank, naming each rank's rows.
    """
    if head.group is None or head in _TILED:
        return
    rows, depth = head.weight.shape
    own = torch.tensor([head.vocab_start, rows, head.vocab_size, depth], device=head.weight.device)
    checks.tiling(gathered(own, head.group).tolist())
    _TILED.add(head)


def group_ranks(head: Head) -> tuple[int, ...] | None:
    """The ranks that share the head's vocabulary, None where it is whole."""
    return None if head.group is None else tuple(dist.get_process_group_ranks(head.group))
