"""The draws that ``score`` takes for Bayesian acquisitions: which form, and their statistics for a batch."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from acqcore import checks
from acqcore.backends import Dropout
from acqcore.bayes import FORMS, BayesStats, dropout_stats, ensemble_stats
from acqcore.head import Head
from acqcore.samples import Row
from acqcore.student import Student, StudentLike, as_student
from acqcore.trunk_draws import TrunkDraws, member_hidden

#: Where dropout acts unless it is said, and its probability there: see the table in the README.
DEFAULT_LAYERS = "all"
HIDDEN_DROPOUT, BLOCK_DROPOUT = 0.1, 0.05


@dataclass(frozen=True)
class DrawOptions:
    """Arguments of a Bayesian acquisition.

    Args:
        layers: dropout acts on the last hidden state alone (0), in the last n blocks, in all of them (``"all"``), or in
            the student's own dropout layers at their own rates (``"own"``).
        draws: K.
        dropout: probability p; by default 0.1 on the last hidden state, 0.05 in blocks; not read for ``"own"``.
        form, block: of dropout on the last hidden state, as in :func:`acqcore.mutual_information`; giving either
            without ``layers`` stands for ``layers=0``.
        seed: of the masks.
        members: students in place of draws: models, paths, ``acqcore.Student``, all with the student's tokens.
    """

    layers: int | str
    dropout: float
    draws: int = 8
    form: str = "element"
    block: int = 64
    seed: int = 0
    members: tuple[StudentLike, ...] = ()

    @classmethod
    def checked(cls, arguments: Mapping[str, Any]) -> DrawOptions:
        """Of the arguments given for an acquisition.

        Raises:
            TypeError, ValueError: a value of a wrong kind or out of range; arguments that exclude each other.
        """
        checks.draw_arguments(arguments)
        layers = arguments.get("layers", 0 if {"form", "block"} & set(arguments) else DEFAULT_LAYERS)
        default = {"layers": layers, "dropout": HIDDEN_DROPOUT if layers == 0 else BLOCK_DROPOUT}
        options = cls(**{**default, **arguments, "members": tuple(arguments.get("members", ()))})
        checks.draw_layers(options.layers)
        checks.draws(options.draws)
        checks.dropout(options.dropout)
        checks.one_of("form", options.form, FORMS)
        checks.positive_int("block", options.block)
        checks.seed(options.seed)
        return options


@dataclass(frozen=True, eq=False)
class DrawBatch:
    """A batch of samples whose trunk has run once."""

    rows: Sequence[Row]  # B samples
    input_ids: torch.Tensor  # [B, T] int64, padded on the right
    positions: torch.Tensor  # [N] int64, of the scored tokens' predecessors in the flattened batch
    targets: torch.Tensor  # [N] int64
    offsets: torch.Tensor  # [B + 1] int64
    hidden: torch.Tensor  # [N, D] at those positions, on the head's device


class Draws:
    """Statistics of a student's draws under given options.

    Raises:
        TypeError, ValueError: members that are no students, or are spread over ranks by FSDP or ZeRO-3; layers the
            student does not have.
    """

    def __init__(
        self, student: Student, head: Head, options: DrawOptions, batch_tokens: int, backend: str | None
    ) -> None:
        self._head = head
        self._options = options
        self._batch_tokens = batch_tokens
        self._backend = backend
        self._members = [as_student(member) for member in options.members]
        checks.members_alone([member.forwards_are_collective for member in self._members])
        self._trunk: TrunkDraws | None = None
        if not self._members and options.layers != 0:
            self._trunk = TrunkDraws(student, options.layers, options.draws, options.dropout, options.seed, backend)

    def stats(self, batch: DrawBatch) -> BayesStats:
        """Of the N scored tokens. A sample's masks follow from its tokens, not from its place among others."""
        options = self._options
        samples = torch.tensor([zlib.crc32(row.ids.numpy().tobytes()) for row in batch.rows])  # [B]
        if self._trunk is None and not self._members:
            device = batch.hidden.device
            of_rows = samples.repeat_interleave(batch.offsets.diff()).to(device)
            places = (batch.positions % batch.input_ids.shape[1]).to(device)
            dropout = Dropout(options.dropout, options.form, options.block, options.seed, of_rows, places)
            targets = batch.targets.to(device)
            return dropout_stats(batch.hidden, self._head, dropout, options.draws, targets, self._backend)
        parts = [self._part(batch, samples, begin, end) for begin, end in self._parts(batch)]
        return BayesStats(
            torch.cat([part.state for part in parts], dim=1),
            torch.cat([part.votes for part in parts], dim=1),
            batch.targets.to(batch.hidden.device),
            parts[0].dtype,
        )

    def _parts(self, batch: DrawBatch) -> list[tuple[int, int]]:
        """Ranges of samples whose draws share a forward: at most ``batch_tokens`` tokens, as in any other."""
        count, length = batch.input_ids.shape
        at_once = 1 if self._members else self._options.draws
        size = max(1, self._batch_tokens // (length * at_once))
        return [(begin, min(begin + size, count)) for begin in range(0, count, size)]

    def _part(
        self,
        batch: DrawBatch,
        samples: torch.Tensor,  # [B]
        begin: int,
        end: int,
    ) -> BayesStats:
        length = batch.input_ids.shape[1]
        input_ids = batch.input_ids[begin:end]
        first, last = int(batch.offsets[begin]), int(batch.offsets[end])
        places = batch.positions[first:last] - begin * length  # [n]
        device, dtype = batch.hidden.device, batch.hidden.dtype
        heads: Head | list[Head] = self._head
        if self._members:
            hidden = member_hidden(self._members, input_ids, device)
            heads = [member.head for member in self._members]
        else:
            assert self._trunk is not None
            hidden = self._trunk.hidden(input_ids, samples[begin:end])
        picked = hidden.flatten(1, 2).index_select(1, places.to(hidden.device))  # [K, n, D]
        picked = picked.to(device=device, dtype=dtype)
        return ensemble_stats(picked, heads, batch.targets[first:last].to(device), backend=self._backend)
