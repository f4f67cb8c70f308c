"""The dropout rate at which a student's loss rises by a given share.

A fixed rate affects every student differently: 5 % in all 30 blocks of SmolLM2-135M adds 0.5 to 0.7 nats per token, far
more than the small perturbation of the weights that mutual information by dropout assumes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from acqcore.literals import Layers
from acqcore.row_stats import row_stats
from acqcore.scoring.draws import Batch
from acqcore.students.packing import OVERHEAD_TOKENS, partition
from acqcore.students.samples import Samples, encode
from acqcore.students.student import StudentLike, as_student
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
    layers: Layers = "all",
    draws: int = 4,
    batch_tokens: int = 8192,
) -> float:
    """The probability p of dropout in the last blocks at which the mean loss of ``samples`` rises by ``rise``.

    A small rise is nearly proportional to p, and masks with equal seeds are nested in p, so the rate is found by
    scaling: about four forward passes over ``draws`` times the samples. A few dozen samples of the kind to be scored
    are enough. ``rise`` is a share of the loss without dropout, kept within 5 %; ``layers`` are the last n blocks, or
    all; the loss under dropout is the mean over ``draws`` masks.

    Raises:
        ValueError: no p up to 0.5 reaches the rise.
    """
    student = as_student(student)
    head, limit = student.head, student.max_length
    with student.in_step():
        rows = encode(samples, student.tokenizer, vocab_size=head.vocab_size, limit=limit, max_length=None)
        rows = [row for row in rows if row.n_scored]
        overhead = OVERHEAD_TOKENS.get(student.device.type, OVERHEAD_TOKENS["cuda"])
        parts = partition([len(row.ids) for row in rows], max(1, batch_tokens // draws), overhead)
        batches = [Batch.of([rows[i] for i in indices]) for indices in parts]

        def losses(batch: Batch, p: float) -> torch.Tensor:
            """Losses, ``[K * N]`` float64 for K draws, ``[N]`` for p = 0."""
            ids = batch.input_ids.to(student.device)
            if p == 0:
                hidden = student.hidden(ids)[None]  # [1, B, T, D]
            else:
                hidden = TrunkDraws(student, layers, draws, p, 0, None).hidden(ids, batch.mask_keys)
            picked = hidden.flatten(1, 2).index_select(1, batch.positions.to(hidden.device)).flatten(0, 1)  # [K * N, D]
            picked = picked.to(head.weight.device, torch.promote_types(picked.dtype, head.weight.dtype))
            logprob = row_stats(picked, head, batch.targets.repeat(len(hidden)).to(picked.device)).logprob
            assert logprob is not None
            return -logprob.double().cpu()

        @cache
        def loss(p: float) -> float:
            with torch.inference_mode(False), student.scoring():
                return float(torch.cat([losses(batch, p) for batch in batches]).mean())

        return _scaled(loss, rise * loss(0.0))


def _scaled(loss: Callable[[float], float], wanted: float) -> float:
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
