"""The dropout rate at which a student's loss rises by a given share.

A fixed rate affects every student differently: 5 % in all 30 blocks of SmolLM2-135M adds 0.5 to 0.7 nats per token, far
more than the small perturbation of the weights that mutual information by dropout assumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from acqcore import checks
from acqcore.acquisitions import DrawOptions
from acqcore.row_stats import row_stats
from acqcore.scoring.draws import Batch
from acqcore.students.packing import OVERHEAD_TOKENS, partition
from acqcore.students.samples import Row, Samples, encode
from acqcore.students.student import Student, StudentLike, as_student
from acqcore.students.trunk_draws import TrunkDraws

LARGEST = 0.5  #: a block that loses more than half its outputs is effectively another network
_TOLERANCE = 0.05  # relative to the rise
_TRIES = 16
_STEP = 8.0  # largest factor between successive rates


def calibrate_dropout(
    student: StudentLike,
    samples: Samples,
    *,
    rise: float = 0.02,
    layers: int | str = "all",
    draws: int = 4,
    seed: int = 0,
    tokenizer: Any = None,
    max_length: int | None = None,
    batch_tokens: int = 8192,
    backend: str | None = None,
) -> float:
    """The probability p of dropout in the last blocks at which the mean loss of ``samples`` rises by ``rise``.

    A small rise is nearly proportional to p, and masks with equal seeds are nested in p, so the rate is found by
    scaling: about four forward passes over ``draws`` times the samples. A few dozen samples of the kind to be scored
    are enough.

    Args:
        student, samples, tokenizer, max_length, batch_tokens, backend: as in :func:`acqcore.score`.
        rise: desired rise as a share of the loss without dropout, above 0.
        layers: the last n blocks, or ``"all"``.
        draws: number of masks over which the loss under dropout is averaged.
        seed: seed of the masks.

    Returns:
        p, with a rise within 5 % of the requested one.

    Raises:
        TypeError, ValueError: as :func:`acqcore.score`; ``rise`` is not above 0; ``layers`` does not name blocks; there
            are no samples; no p up to 0.5 reaches the rise.
    """
    checks.positive("rise", rise)
    if layers in (0, "own"):
        raise ValueError(f"layers: expected a number of blocks or 'all', got {layers!r}")
    options = DrawOptions(layers=layers, draws=draws, seed=seed)  # type: ignore[arg-type]
    checks.positive_int("batch_tokens", batch_tokens)
    student = as_student(student)
    tokenizer = tokenizer if tokenizer is not None else student.tokenizer
    limit = student.max_length
    with student.in_step():
        rows = encode(samples, tokenizer, vocab_size=student.head.vocab_size, limit=limit, max_length=max_length)
        rows = [row for row in rows if row.n_scored]
        if not rows:
            raise ValueError("samples: expected at least one with a scored token")
        loss = _Loss(student, rows, options, batch_tokens, backend)
        return _scaled(loss, rise * loss(0.0))


def _scaled(loss: _Loss, wanted: float) -> float:
    """p at which the loss exceeds that at 0 by ``wanted``."""
    base = loss(0.0)
    low, high = 0.0, LARGEST
    bracketed = False
    p = 0.01
    for _ in range(_TRIES):
        found = loss(p) - base
        if abs(found - wanted) <= _TOLERANCE * wanted:
            break
        if found >= wanted:
            high, bracketed = p, True
        elif p == LARGEST:
            raise ValueError(f"rise: dropout of {LARGEST} adds {found:.3g} to a loss of {base:.3g}, not {wanted:.3g}")
        else:
            low = p
        p *= min(_STEP, max(1 / _STEP, wanted / found)) if found > 0 else _STEP
        if not bracketed:
            p = min(p, LARGEST)
        elif not low < p < high:  # the rise is not proportional
            p = (max(low, high / _STEP) * high) ** 0.5
    return p


class _Loss:
    """Mean loss of the scored tokens of ``rows`` as a function of p; each p is computed once."""

    def __init__(
        self, student: Student, rows: Sequence[Row], options: DrawOptions, batch_tokens: int, backend: str | None
    ) -> None:
        self._student, self._options, self._backend = student, options, backend
        overhead = OVERHEAD_TOKENS.get(student.device.type, OVERHEAD_TOKENS["cuda"])
        size = max(1, batch_tokens // options.draws)
        picked = partition([len(row.ids) for row in rows], size, overhead)
        self._batches = [Batch.of([rows[i] for i in indices]) for indices in picked]
        self._known: dict[float, float] = {}

    def __call__(self, p: float) -> float:
        if p not in self._known:
            with torch.inference_mode(False), self._student.scoring():
                losses = torch.cat([self._of(batch, p) for batch in self._batches])
            self._known[p] = float(losses.mean())
        return self._known[p]

    def _of(self, batch: Batch, p: float) -> torch.Tensor:
        """Losses, ``[K * N]`` float64 for K draws, ``[N]`` for p = 0."""
        options, student, head = self._options, self._student, self._student.head
        assert options.layers is not None
        if p == 0:
            hidden = student.hidden(batch.input_ids.to(student.device))[None]  # [1, B, T, D]
        else:
            trunk = TrunkDraws(student, options.layers, options.draws, p, options.seed, self._backend)
            hidden = trunk.hidden(batch.input_ids.to(student.device), batch.mask_keys)
        picked = hidden.flatten(1, 2).index_select(1, batch.positions.to(hidden.device)).flatten(0, 1)  # [K * N, D]
        picked = picked.to(head.weight.device, torch.promote_types(picked.dtype, head.weight.dtype))
        targets = batch.targets.repeat(len(hidden)).to(picked.device)
        logprob = row_stats(picked, head, targets, backend=self._backend).logprob
        assert logprob is not None
        return -logprob.double().cpu()
