"""Statistics of a student's draws, or of an ensemble's members, for a batch."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from acqcore.acquisitions import DrawOptions
from acqcore.backends import Dropout
from acqcore.backends.base import DrawRows
from acqcore.bayes import BayesStats, dropout_rows, ensemble_stats, mixture_stats
from acqcore.head import Head
from acqcore.head_grad import Bounds
from acqcore.students.packing import collate
from acqcore.students.samples import Row
from acqcore.students.student import Student, as_student
from acqcore.students.trunk_draws import TrunkDraws, member_hidden


@dataclass(frozen=True, eq=False)
class Batch:
    """B samples that share a trunk forward, padded on the right; as the student is causal, no token sees padding."""

    rows: Sequence[Row]
    input_ids: torch.Tensor  # [B, T] int64
    positions: torch.Tensor  # [N] int64, predecessors of the scored tokens in the flattened batch
    targets: torch.Tensor  # [N] int64, the scored tokens
    offsets: torch.Tensor  # [B + 1] int64

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Batch:
        return cls(rows, *collate(rows))

    @cached_property
    def bounds(self) -> Bounds:
        """Range [begin, end) of each sample within the N tokens."""
        return tuple(pairwise(self.offsets.tolist()))

    @cached_property
    def mask_keys(self) -> torch.Tensor:
        """``[B]`` int64, hashes of the samples' tokens, so masks do not depend on the place in the batch."""
        return torch.tensor([zlib.crc32(row.ids.numpy().tobytes()) for row in self.rows])

    @property
    def first(self) -> torch.Tensor:
        """Position that predicts each sample's first scored token, ``[B]`` int64."""
        return self.positions[self.offsets[:-1]] % self.input_ids.shape[1]

    @property
    def keys_and_places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask key of each scored token's sample, and the position that predicts the token, each ``[N]`` int64."""
        keys = self.mask_keys.repeat_interleave(self.offsets.diff())
        return keys, self.positions % self.input_ids.shape[1]


class Draws:
    """Computes statistics under given options."""

    def __init__(
        self, student: Student, head: Head, options: DrawOptions, batch_tokens: int, backend: str | None
    ) -> None:
        self._head = head
        self._options = options
        self._batch_tokens = batch_tokens
        self._backend = backend
        self.members = [as_student(member) for member in options.members]
        for i, member in enumerate(self.members):
            if member.forwards_are_collective:  # only the student's forwards are in step across ranks
                raise ValueError(
                    f"members: expected models that each rank runs independently, got one under FSDP or ZeRO-3 at {i}"
                )
            shapes = [list(m.head.weight.shape) for m in (self.members[0], member)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"members: expected heads of one shape, got {shapes[0]} and {shapes[1]} at {i}")
        self._trunk: TrunkDraws | None = None
        if not self.members and not options.on_hidden:
            assert options.layers is not None
            assert options.dropout is not None
            self._trunk = TrunkDraws(student, options.layers, options.draws, options.dropout, options.seed, backend)

    def of_hidden(
        self,
        batch: Batch,
        hidden: torch.Tensor,  # [N, D] of the scored tokens, on the head's device
    ) -> BayesStats:
        """Statistics under dropout on the last hidden state (``options.on_hidden``)."""
        dropout, targets = self._dropout(batch, hidden.device), batch.targets.to(hidden.device)
        return mixture_stats(hidden, (self._head,), dropout, self._options.draws, targets, self._backend)

    def rows_of_hidden(
        self,
        batch: Batch,
        hidden: torch.Tensor,  # [N, D] of the scored tokens, on the head's device
    ) -> tuple[DrawRows, BayesStats]:
        """The same for a pass over the head's weights that also gives the rows' own statistics."""
        dropout, targets = self._dropout(batch, hidden.device), batch.targets.to(hidden.device)
        return dropout_rows(hidden, self._head, dropout, self._options.draws, targets)

    def _dropout(self, batch: Batch, device: torch.device) -> Dropout:
        options = self._options
        assert options.dropout is not None
        assert options.form is not None
        assert options.block is not None
        keys, places = (value.to(device) for value in batch.keys_and_places)
        return Dropout(options.dropout, options.form, options.block, options.seed, keys, places)

    def of_forwards(self, batch: Batch) -> BayesStats:
        """Statistics under dropout inside the trunk, or of an ensemble, from additional forwards."""
        count, length = batch.input_ids.shape
        at_once = 1 if self.members else self._options.draws
        size = max(1, self._batch_tokens // (length * at_once))  # samples whose draws share a forward
        parts = [self._part(batch, begin, min(begin + size, count)) for begin in range(0, count, size)]
        return BayesStats(
            torch.cat([part.state for part in parts], dim=1),
            torch.cat([part.votes for part in parts], dim=1),
            batch.targets.to(self._head.weight.device),
            parts[0].dtype,
        )

    def _part(self, batch: Batch, begin: int, end: int) -> BayesStats:
        """Statistics of the samples from ``begin`` to ``end``."""
        length = batch.input_ids.shape[1]
        input_ids = batch.input_ids[begin:end]
        first, last = int(batch.offsets[begin]), int(batch.offsets[end])
        places = batch.positions[first:last] - begin * length  # [n]
        device = self._head.weight.device
        heads: Head | list[Head] = self._head
        if self._trunk is None:
            hidden = member_hidden(self.members, input_ids, device)
            heads = [member.head for member in self.members]
        else:
            hidden = self._trunk.hidden(input_ids, batch.mask_keys[begin:end])
        picked = hidden.flatten(1, 2).index_select(1, places.to(hidden.device))  # [K, n, D]
        picked = picked.to(device=device, dtype=torch.promote_types(hidden.dtype, self._head.weight.dtype))
        return ensemble_stats(picked, heads, batch.targets[first:last].to(device), backend=self._backend)
