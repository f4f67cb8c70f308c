"""Row statistics of existing logits, read once and folded as in ``row_stats.py``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from acqcore.kernels.config import Strips
from acqcore.kernels.fold import empty_state, fold, holds_target, merge, store_state, widen
from acqcore.kernels.row_stats import SCRATCH_BYTES


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["targets"])
def logit_fold(
    logits,  # [n, vocab]
    targets,  # [n] int64, -100 ignored; or None
    position,  # [n] int32, written if HAS_TARGETS: the row's number, -1 if ignored
    partial,  # [7, splits, n] float32, written
    partial_index,  # [splits, n] int32, written
    n,
    vocab,
    logits_row,
    logits_column,
    splits,
    split_columns,
    scale,  # multiplies the logits, if HAS_SCALE
    HAS_TARGETS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    split = tl.program_id(0) % splits
    rows = tl.program_id(0) // splits * ROWS + tl.arange(0, ROWS)
    scored = rows < n
    row_targets = rows
    if HAS_TARGETS:
        wide_targets = tl.load(targets + rows, mask=scored, other=-100)
        if split == 0:
            tl.store(position + rows, tl.where(wide_targets != -100, rows, -1), mask=scored)
        scored = scored & (wide_targets != -100)  # ignored rows are not read
        row_targets = wide_targets.to(tl.int32)
    start = logits + rows.to(tl.int64)[:, None] * logits_row
    state = empty_state(ROWS)
    first = split * split_columns
    last = min(first + split_columns, vocab)
    for begin in range(first, last, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        mask = scored[:, None] & (columns < last)[None, :]
        z = widen(tl.load(start + columns.to(tl.int64)[None, :] * logits_column, mask=mask, other=float("-inf")))
        if HAS_SCALE:
            z *= scale
        holds = False
        if HAS_TARGETS:
            holds = holds_target(row_targets, begin, COLUMNS)
        state, _, _ = fold(z, begin, row_targets, holds, state, HAS_TARGETS, True)
    store_state(partial, partial_index, split, splits, n, rows, state)


def logit_stats(
    logits: torch.Tensor,  # [N, V] float32, bfloat16 or float16
    targets: torch.Tensor | None,  # [N] int64, -100 ignored
    temperature: float,
    state: torch.Tensor,  # [7, N] float64, written
    index: torch.Tensor,  # [N] int64, written
    strips: Strips,
) -> None:
    """Fill ``state`` and ``index`` of ``acqcore.row_stats.RowStats``; arguments are trusted."""
    n, vocab = logits.shape
    columns = min(strips.columns, triton.next_power_of_2(vocab))
    split_columns = triton.cdiv(strips.split_columns, columns) * columns
    splits = triton.cdiv(vocab, split_columns)
    rows_at_once = SCRATCH_BYTES // (32 * splits + 4)
    for first in range(0, n, rows_at_once):
        part = logits[first : first + rows_at_once]
        part_targets = position = None
        if targets is not None:
            part_targets = targets[first : first + rows_at_once].contiguous()
            position = torch.empty(len(part), dtype=torch.int32, device=logits.device)
        partial = torch.empty((7, splits, len(part)), dtype=torch.float32, device=logits.device)
        partial_index = torch.empty((splits, len(part)), dtype=torch.int32, device=logits.device)
        logit_fold[(triton.cdiv(len(part), strips.rows) * splits,)](
            part, part_targets, position, partial, partial_index, len(part), vocab, *part.stride(), splits,
            split_columns, 1 / temperature, HAS_TARGETS=targets is not None, HAS_SCALE=temperature != 1,
            ROWS=strips.rows, COLUMNS=columns, num_warps=strips.warps, enable_fp_fusion=True,
        )  # fmt: skip
        merge(partial, partial_index, position, state, index, first, 0)
