"""Folds logit tiles into row states and merges states, by the algebra of ``acqcore/row_stats.py``.

A program loops over one range of the vocabulary and keeps in float32 registers, for each of its rows,

    top      the largest logit so far            index    its column
    second   the largest of all others           target   the target's logit
    r, s1, s2, s11   sums over all columns but ``index`` of e, e x, e^2, e x^2; x = z - top, e = 2^40 exp(x)

The factor 2^40 keeps e^2 a normal float32 for a runner-up at 1e-20. Impossible tokens (-inf) add nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-140.0)  # replaces -inf: its exponential is exactly 0, and 0 * LOWEST is 0
NO_INDEX = tl.constexpr(2**31 - 1)
SCALE = tl.constexpr(2.0**40)
INV_SCALE = tl.constexpr(2.0**-40)

#: States per program of ``merge_splits``.
MERGE_TILE = 2048


@triton.jit
def widen(x):
    """``x`` in float32. bfloat16 is converted bitwise, since Triton's interpreter loses subnormals otherwise."""
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def empty_state(ROWS: tl.constexpr):
    """The state of ``ROWS`` rows before any column: top, second, r, s1, s2, s11, index, target, each ``[ROWS]``."""
    low = tl.full((ROWS,), float("-inf"), tl.float32)
    zero = tl.zeros((ROWS,), tl.float32)
    index = tl.full((ROWS,), -1, tl.int32)
    return low, low, zero, zero, zero, zero, index, low


@triton.jit
def holds_target(
    targets,  # [ROWS] int32
    begin,
    COLUMNS: tl.constexpr,
):
    """Whether a tile that starts at column ``begin`` holds a row's target (rare)."""
    local = targets - begin
    return tl.max(((local >= 0) & (local < COLUMNS)).to(tl.int32), axis=0) > 0


@triton.jit
def fold(
    z,  # [ROWS, COLUMNS] float32; -inf outside the vocabulary
    begin,  # the first column's index
    targets,  # [ROWS] int32, numbered like ``begin``; other values: no target here
    holds,  # whether the tile holds a target, if HAS_TARGETS
    state,  # of the rows, as from :func:`empty_state`
    HAS_TARGETS: tl.constexpr,
    MAY_BE_ABSENT: tl.constexpr,  # some logits may be -inf
):
    """The state after the columns of ``z``; e ``[ROWS, COLUMNS]``, including the new maximum's term; c ``[ROWS]``.

    c rescales quantities relative to the old maximum to the new one; it is exactly 1 if the maximum did not rise. The
    reference implementation is ``acqcore.backends.eager.fold``.
    """
    COLUMNS: tl.constexpr = z.shape[1]
    column = tl.arange(0, COLUMNS)[None, :]
    top, second, r, s1, s2, s11, index, target = state
    if HAS_TARGETS:
        if holds:
            hit = tl.where(column == (targets - begin)[:, None], z, float("-inf"))
            target = tl.maximum(target, tl.max(hit, axis=1))
    tile_top = tl.max(z, axis=1)
    rises = tile_top > top  # false for NaN, which shows in the sums
    new_top = tl.where(rises, tile_top, top)
    reference = tl.where(new_top == float("-inf"), 0.0, new_top)

    # Exclude a new maximum from the sums, at its first occurrence.
    first = tl.min(tl.where(z == tile_top[:, None], column, COLUMNS), axis=1)
    out = tl.where(rises, first, COLUMNS)
    z = tl.where(column == out[:, None], (reference + LOWEST)[:, None], z)
    second = tl.maximum(tl.where(rises, top, second), tl.max(z, axis=1))
    index = tl.where(rises, begin + first, index)

    # Rescale to the new maximum; the old one joins the sums as a separate term.
    d = tl.maximum(top - reference, LOWEST)
    c = tl.exp2(d * LOG2E)
    joins = tl.where(rises, c * SCALE, 0.0)
    s11 = (s11 + 2 * d * s1 + d * d * r) * c + joins * d * d
    s1 = (s1 + d * r) * c + joins * d
    s2 = s2 * c * c + joins * joins
    r = r * c + joins

    x = z - reference[:, None]
    if MAY_BE_ABSENT:
        x = tl.maximum(x, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    # Fusing the factor into the multiply-add saves an instruction but makes Triton 3.9 spill 512 bytes on sm_90.
    e = tl.exp2(x * LOG2E) * SCALE
    ex = e * x
    r += tl.sum(e, axis=1)
    s1 += tl.sum(ex, axis=1)
    s2 += tl.sum(e * e, axis=1)
    s11 += tl.sum(ex * x, axis=1)
    e = tl.where(column == out[:, None], SCALE, e)  # compiled out if e is unused
    return (new_top, second, r, s1, s2, s11, index, target), e, c


@triton.jit
def store_state(
    partial,  # [7, splits, n] float32: top, second, r, s1, s2, s11, target
    partial_index,  # [splits, n] int32
    split,
    splits,
    n,
    rows,  # [ROWS]
    state,  # of the rows, as from :func:`empty_state`
):
    """Write the state of one split."""
    top, second, r, s1, s2, s11, index, target = state
    inside = rows < n
    at = split * n + rows
    plane = splits * n
    tl.store(partial + at, top, mask=inside)
    tl.store(partial + plane + at, second, mask=inside)
    tl.store(partial + 2 * plane + at, r, mask=inside)
    tl.store(partial + 3 * plane + at, s1, mask=inside)
    tl.store(partial + 4 * plane + at, s2, mask=inside)
    tl.store(partial + 5 * plane + at, s11, mask=inside)
    tl.store(partial + 6 * plane + at, target, mask=inside)
    tl.store(partial_index + at, index, mask=inside)


@triton.jit(
    do_not_specialize=["first_row", "all_rows", "n"],
    do_not_specialize_on_alignment=["position", "destination", "index"],
)
def merge_splits(
    partial,  # [7, splits, n] float32
    partial_index,  # [splits, n] int32
    position,  # [n] int32: location of a row's state, -1 for an ignored row; None: the row number
    destination,  # [n] int32: output row, -1 for none; None: the row number
    state,  # [7, rows of all chunks] float64, written from first_row on
    index,  # [rows of all chunks] int64, written from first_row on
    first_row,
    all_rows,
    n,
    splits,
    vocab_start,
    HAS_POSITION: tl.constexpr,
    HAS_DESTINATION: tl.constexpr,
    SPLITS: tl.constexpr,  # splits, rounded up to a power of two
    ROWS: tl.constexpr,
):
    """Merge the splits of each row in float64, in an order that depends only on ``SPLITS`` (``RowStats.merge``)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    out_rows = first_row + rows
    if HAS_DESTINATION:
        out_rows = tl.load(destination + rows, mask=inside, other=-1)
        inside = inside & (out_rows >= 0)
    at = rows
    if HAS_POSITION:
        at = tl.load(position + rows, mask=inside, other=-1)
    scored = inside & (at >= 0)
    split = tl.arange(0, SPLITS)[:, None]
    here = (split < splits) & scored[None, :]
    at = split * n + at[None, :]  # [SPLITS, ROWS]
    plane = splits * n

    top = tl.load(partial + at, mask=here, other=float("-inf")).to(tl.float64)
    new_top = tl.max(top, axis=0)
    at_split = tl.load(partial_index + at, mask=here, other=NO_INDEX)
    best = tl.min(tl.where(top == new_top[None, :], at_split, NO_INDEX), axis=0)  # ties go to the lowest index
    wins = (top == new_top[None, :]) & (at_split == best[None, :])
    absent = top == float("-inf")
    d = tl.where(absent, 0.0, top - new_top[None, :])
    c = tl.where(absent, 0.0, tl.exp(d))

    second = tl.load(partial + plane + at, mask=here, other=float("-inf")).to(tl.float64)
    second = tl.max(tl.where(wins, second, top), axis=0)
    joins = tl.where(wins, 0.0, 1.0).to(tl.float64)  # a lower maximum becomes a separate term
    count = tl.load(partial + 2 * plane + at, mask=here, other=0.0).to(tl.float64) * INV_SCALE + joins
    first = tl.load(partial + 3 * plane + at, mask=here, other=0.0).to(tl.float64) * INV_SCALE
    squares = tl.load(partial + 4 * plane + at, mask=here, other=0.0).to(tl.float64) * (INV_SCALE * INV_SCALE) + joins
    moment = tl.load(partial + 5 * plane + at, mask=here, other=0.0).to(tl.float64) * INV_SCALE
    target = tl.max(tl.load(partial + 6 * plane + at, mask=here, other=float("-inf")).to(tl.float64), axis=0)
    r = tl.sum(c * count, axis=0)
    s1 = tl.sum(c * (first + d * count), axis=0)
    s2 = tl.sum(c * c * squares, axis=0)
    s11 = tl.sum(c * (moment + 2 * d * first + d * d * count), axis=0)

    nan = float("nan")
    out = state + out_rows
    all_rows = all_rows.to(tl.int64)
    tl.store(out, tl.where(scored, new_top, nan), mask=inside)
    tl.store(out + all_rows, tl.where(scored, second, nan), mask=inside)
    tl.store(out + 2 * all_rows, tl.where(scored, r, nan), mask=inside)
    tl.store(out + 3 * all_rows, tl.where(scored, s1, nan), mask=inside)
    tl.store(out + 4 * all_rows, tl.where(scored, s2, nan), mask=inside)
    tl.store(out + 5 * all_rows, tl.where(scored, s11, nan), mask=inside)
    tl.store(out + 6 * all_rows, tl.where(scored, target, nan), mask=inside)
    best = tl.where(scored & (best >= 0), best + vocab_start, -1)
    tl.store(index + out_rows, best.to(tl.int64), mask=inside)


def merge(
    partial: torch.Tensor,  # [7, splits, n] float32
    partial_index: torch.Tensor,  # [splits, n] int32
    position: torch.Tensor | None,  # [n] int32
    state: torch.Tensor,  # [7, N] float64, columns first_row to first_row + n written
    index: torch.Tensor,  # [N] int64, written in the same range
    first_row: int,
    vocab_start: int,
    destination: torch.Tensor | None = None,  # [n] int32, instead of first_row
) -> None:
    """Launch :func:`merge_splits`."""
    splits, n = partial_index.shape
    padded = triton.next_power_of_2(splits)
    rows = max(MERGE_TILE // padded, 1)
    merge_splits[(triton.cdiv(n, rows),)](
        partial, partial_index, position, destination, state, index, first_row, state.shape[1], n, splits, vocab_start,
        HAS_POSITION=position is not None, HAS_DESTINATION=destination is not None, SPLITS=padded, ROWS=rows,
        enable_fp_fusion=True,
    )  # fmt: skip
