"""Hashed gradients of the logits along with the row states, from one pass over the weights, without atomics.

The hash rotates each group of n consecutive vocabulary columns as a whole: column g n + u has the place
``(u + s_g) mod n`` (``acqcore.signs.rotated_places``). A class of ``BLOCK_N`` consecutive places thus receives
consecutive columns from every group, which wrap around in one of ``n / BLOCK_N`` groups. A program of ``sketch_fold``
processes one class of places for a block of rows, so its share of the vocabulary is its share of the places. It folds
each tile of logits into the rows' states and adds the signed exponentials to one bucket per column, in registers, as
flash attention updates its output.

    gather_scored   packs the hidden states of scored rows
    sketch_fold     states and bucket sums of each class
    merge_splits    merges the states in float64
    finish_hash     normalises the sums and adds the target's column exactly
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from acqcore.kernels.fold import INV_SCALE, LOWEST, empty_state, fold, holds_target, merge, store_state
from acqcore.kernels.product import Product, chunk_rows, gathered, place, product_tile, tanh

#: Scratch memory of a call: bucket sums, states and packed hidden states of the rows in flight.
SCRATCH_BYTES = 56 << 20
#: Elements of a tile of ``finish_hash``.
FINISH_ROWS, FINISH_COLUMNS = 8, 256


@triton.jit
def take_tile(
    z,  # [ROWS, COLUMNS] product
    bias,  # [vocab] float32 or None
    places,  # [vocab] int32
    targets,  # [ROWS] int32
    holds,  # whether the tile holds a target
    begin,  # the tile's first column
    low,  # the first of its columns that counts
    high,  # one past the last
    scale,
    cap,
    state,  # of the rows, as from ``empty_state``
    buckets,  # [ROWS, COLUMNS] float32
    WHOLE: tl.constexpr,  # all columns count
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """State and buckets after adding the tile."""
    COLUMNS: tl.constexpr = z.shape[1]
    column = tl.arange(0, COLUMNS)
    columns = begin + column
    inside = (columns >= low) & (columns < high)
    if HAS_BIAS:
        if WHOLE:
            z += tl.load(bias + columns)[None, :]
        else:
            z += tl.load(bias + columns, mask=inside, other=0.0)[None, :]
    if HAS_SCALE:
        z *= scale
    if HAS_CAP:
        z = tanh(z) * cap
    if not WHOLE:
        z = tl.where(inside[None, :], z, float("-inf"))
    state, e, c = fold(z, begin, targets, holds, state, True, HAS_BIAS or not WHOLE)
    if HAS_CAP:
        slope = tl.maximum(z, -cap) / cap
        e *= 1 - slope * slope
    if holds:
        e = tl.where(column[None, :] == (targets - begin)[:, None], 0.0, e)
    if WHOLE:
        of_column = tl.load((places + begin) + column)
        sign = tl.where(of_column < 0, -1.0, 1.0)
    else:
        of_column = tl.load(places + columns, mask=inside, other=0)
        sign = tl.where(inside, tl.where(of_column < 0, -1.0, 1.0), 0.0)
    buckets = buckets * c[:, None] + e * sign[None, :]
    return state, buckets


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["count"])
def sketch_fold(
    hidden,  # [n, depth], or its tensor descriptor
    weight,  # [vocab, depth], or its tensor descriptor
    bias,  # [vocab] float32 or None
    targets,  # [n] int32 relative to this weight
    places,  # [vocab] int32: a place in [0, dim), complemented for a minus sign
    count,  # [1] int32: rows in use
    partial,  # [7, splits, n] float32, written; splits = shares * classes, classes fastest
    partial_index,  # [splits, n] int32, written
    sums,  # [shares, n, dim] float32, written: 2^40 sum of +-exp(z - top) without the target's column
    n,
    vocab,
    depth,
    dim,
    vocab_start,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    classes,
    shares,  # of the groups
    share_groups,  # groups per share
    first_group,  # first group with a column of this weight
    last_group,  # one past the last such group
    scale,
    cap,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    splits = classes * shares
    block, split = place(tl.program_id(0), tl.cdiv(n, BLOCK_M), splits, GROUP_M)
    first_row = block * BLOCK_M
    if first_row >= tl.load(count):
        return

    rows = first_row + tl.arange(0, BLOCK_M)
    row_targets = tl.load(targets + rows, mask=rows < n, other=-1)
    state = empty_state(BLOCK_M)
    buckets = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    column = tl.arange(0, BLOCK_N)
    first_place = split % classes * BLOCK_N
    width = min(BLOCK_N, dim - first_place)  # places of the class
    share = split // classes
    begin_group = first_group + share * share_groups
    end_group = min(begin_group + share_groups, last_group)
    for group in range(begin_group, end_group):
        origin = group * dim - vocab_start  # the group's first column in this weight
        low, high = max(origin, 0), min(origin + dim, vocab)
        known = tl.load(places + low)
        known = tl.where(known < 0, -1 - known, known)
        turn = (known - (low - origin) + dim) % dim
        start = (first_place - turn + dim) % dim  # start of the class in the group
        wraps = (start + width > dim).to(tl.int32)
        for turned in range(1 - wraps, 2):  # wrapped columns are at the group's beginning
            begin = origin + start - (1 - turned) * dim
            holds = holds_target(row_targets, begin, BLOCK_N)
            z = product_tile(
                hidden, weight, first_row, begin, n, vocab, depth, hidden_row, hidden_column, weight_row, weight_column,
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS, UPCAST, PRECISION,
            )  # fmt: skip
            if (begin >= low) & (begin + BLOCK_N <= high) & (width == BLOCK_N):
                state, buckets = take_tile(
                    z, bias, places, row_targets, holds, begin, begin, high, scale, cap, state, buckets, True, HAS_BIAS,
                    HAS_SCALE, HAS_CAP,
                )  # fmt: skip
            else:
                last = min(high, begin + width)
                state, buckets = take_tile(
                    z, bias, places, row_targets, holds, begin, low, last, scale, cap, state, buckets, False, HAS_BIAS,
                    HAS_SCALE, HAS_CAP,
                )  # fmt: skip
    at = sums + (share.to(tl.int64) * n + rows)[:, None] * dim + first_place + column[None, :]
    tl.store(at, buckets, mask=(rows < n)[:, None] & (column < width)[None, :])
    store_state(partial, partial_index, split, splits, n, rows, state)


@triton.jit(
    do_not_specialize=["n", "first_row", "all_rows"],
    do_not_specialize_on_alignment=["targets", "position", "state", "index", "out"],
)
def finish_hash(
    sums,  # [shares, n, dim] float32
    tops,  # [shares * classes, n] float32
    targets,  # [n] int64, -100 ignored
    places,  # [vocab] int32
    position,  # [n] int32: a row's index among scored rows, -1 if ignored
    state,  # [7, all rows] float64
    index,  # [all rows] int64
    out,  # [all rows, dim] float32, written from ``first_row`` on
    n,
    vocab,
    dim,
    vocab_start,
    first_row,
    all_rows,
    out_row,
    classes,
    shares,
    slope,  # scale / temperature
    cap,  # softcap / temperature, if HAS_CAP
    CLASS: tl.constexpr,  # places per class
    HAS_CAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = rows < n
    at = tl.load(position + rows, mask=inside, other=-1)
    scored = inside & (at >= 0)
    all_rows = all_rows.to(tl.int64)
    of_row = first_row + rows
    largest = tl.load(state + of_row, mask=scored, other=0.0)
    r = tl.load(state + 2 * all_rows + of_row, mask=scored, other=0.0)
    logit = tl.load(state + 6 * all_rows + of_row, mask=scored, other=0.0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    mask = scored[:, None] & (columns < dim)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for share in range(shares):
        split = share * classes + columns // CLASS
        top = tl.load(tops + split[None, :] * n + at[:, None], mask=mask, other=float("-inf"))
        d = tl.where(top == float("-inf"), LOWEST, tl.maximum((top - shift[:, None]).to(tl.float32), LOWEST))
        part = tl.load(sums + (share * n + at).to(tl.int64)[:, None] * dim + columns[None, :], mask=mask, other=0.0)
        total += part * tl.exp(d)
    factor = slope / (1 + r)
    target = tl.load(targets + rows, mask=inside, other=-100)
    local = target - vocab_start
    here = scored & (local >= 0) & (local < vocab)
    to = tl.load(places + local, mask=here, other=0)
    of_target = tl.where(target == tl.load(index + of_row, mask=scored, other=-1), -r, tl.exp(logit - shift) - (1 + r))
    of_target = tl.where(to < 0, -of_target, of_target) * factor
    if HAS_CAP:
        of_target *= 1 - (logit / cap) * (logit / cap)
    of_target = tl.where(here, of_target, 0.0)
    to = tl.where(to < 0, -1 - to, to)
    value = total * (factor * INV_SCALE).to(tl.float32)[:, None]
    value += tl.where(columns[None, :] == to[:, None], of_target.to(tl.float32)[:, None], 0.0)
    out_at = out + of_row.to(tl.int64)[:, None] * out_row + columns[None, :]
    tl.store(out_at, tl.where(scored[:, None], value, 0.0), mask=inside[:, None] & (columns < dim)[None, :])


def hashed_delta(
    product: Product,  # whose ``tiles.splits`` is the minimum number of programs that share the vocabulary
    hidden: torch.Tensor,  # [N, D] float32, bfloat16 or float16
    targets: torch.Tensor,  # [N] int64, -100 ignored
    places: torch.Tensor,  # [V] int32, from ``acqcore.signs.rotated_places``, columns from vocab_start on
    state: torch.Tensor,  # [7, N] float64, read; written if ``fill``
    index: torch.Tensor,  # [N] int64, read; written if ``fill``
    fill: bool,
    out: torch.Tensor,  # [N, dim] float32, written
) -> None:
    """``Backend.delta_hash``; ``fill`` also writes the state and index of ``row_stats`` from the same pass."""
    n, depth = hidden.shape
    if n == 0:
        return
    tiles, dim = product.tiles, out.shape[1]
    classes = triton.cdiv(dim, tiles.block_n)
    first_group = product.vocab_start // dim
    last_group = triton.cdiv(product.vocab_start + len(product.weight), dim)
    groups = last_group - first_group
    share_groups = triton.cdiv(groups, min(triton.cdiv(tiles.splits, classes), groups))
    shares = triton.cdiv(groups, share_groups)
    row_bytes = (depth + 8) * product.dtype(hidden).itemsize + 32 * classes * shares + 4 * dim * shares
    at_once = chunk_rows(n, row_bytes, tiles.block_m, SCRATCH_BYTES)
    for first in range(0, n, at_once):
        part = slice(first, first + at_once)
        _chunk(
            product, hidden[part], targets[part].contiguous(), places, state, index, fill, out, first,
            (classes, shares, share_groups, first_group, last_group),
        )  # fmt: skip


def _chunk(
    product: Product,
    hidden: torch.Tensor,  # [n, D]
    targets: torch.Tensor,  # [n]
    places: torch.Tensor,  # [V] int32
    state: torch.Tensor,  # [7, N], columns first to first + n
    index: torch.Tensor,  # [N]
    fill: bool,
    out: torch.Tensor,  # [N, dim], rows first to first + n written
    first: int,
    cut: tuple[int, int, int, int, int],  # ``classes`` to ``last_group`` of :func:`sketch_fold`
) -> None:
    weight, tiles = product.weight, product.tiles
    (vocab, depth), n, dim = weight.shape, len(hidden), out.shape[1]
    classes, shares, *_ = cut
    packed, packed_targets, position, count = gathered(product, hidden, targets)
    splits = classes * shares
    partial = hidden.new_empty((7, splits, n), dtype=torch.float32)
    partial_index = hidden.new_empty((splits, n), dtype=torch.int32)
    sums = hidden.new_empty((shares, n, dim), dtype=torch.float32)
    sketch_fold[(triton.cdiv(n, tiles.block_m) * splits,)](
        *product.operands(packed), product.bias, packed_targets, places, count, partial, partial_index, sums, n, vocab,
        depth, dim, product.vocab_start, *packed.stride(), *weight.stride(), *cut, *product.factors,
        **product.options(packed),
    )  # fmt: skip
    if fill:
        merge(partial, partial_index, position, state, index, first, product.vocab_start)
    finish_hash[(triton.cdiv(n, FINISH_ROWS), triton.cdiv(dim, FINISH_COLUMNS))](
        sums, partial, targets, places, position, state, index, out, n, vocab, dim, product.vocab_start, first,
        state.shape[1], out.stride(0), classes, shares, product.scale / product.temperature, product.factors[1],
        CLASS=tiles.block_n, HAS_CAP=product.softcap is not None, ROWS=FINISH_ROWS, COLUMNS=FINISH_COLUMNS,
        enable_fp_fusion=True,
    )  # fmt: skip
