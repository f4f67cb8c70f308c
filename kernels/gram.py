"""Row statistics and Gram matrices from one pass over the weights, for exact norms of samples' head gradients.

This is ``product_fold`` with a second accumulator. Whole samples are packed into blocks of 128 rows. After its fold,
each tile adds the product of its exponentials with themselves to the block's Gram matrix, as flash attention updates
its output: rows and columns are rescaled when a maximum rises. Target columns of a sample's rows are excluded from its
matrix and added exactly in ``gram_norm``. All entries of the matrix are positive, so nothing cancels. Launches:

    gather_slots    packs hidden states and targets; sorts each block's targets
    gram_fold       one program per (block of rows, split of the vocabulary)
    merge_splits    merges the row states in float64
    merge_grams     merges the Gram matrices per sample, independently of its place in the block

Tiling depends only on the weight shape and the dtype, and every sum has a fixed order, so results are bitwise
reproducible and do not depend on the batch.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from acqcore.kept import kept, on_device
from acqcore.kernels.config import GramTiles
from acqcore.kernels.fold import INV_SCALE, LOG2E, LOWEST, empty_state, fold, merge, store_state
from acqcore.kernels.product import GATHER_TILE, TABLES, Product, empty_rows, logit_tile, place
from acqcore.slots import BLOCK, pack, slot_table

#: Scratch memory of a call: Gram matrices, split states and packed hidden states of the blocks in flight.
SCRATCH_BYTES = 60 << 20
#: Rows of the Gram matrix per program of ``merge_grams``.
MERGE_ROWS = 16
#: Sorts after every target of this weight.
NO_TARGET = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize_on_alignment=["targets", "slots"])
def gather_slots(
    hidden,  # [N, depth]
    targets,  # [N] int64, -100 ignored
    slots,  # [3, n] int32: the slot's row, -1 for none; first and last slot of its sample within the block
    packed,  # [n, depth], written; zero in slots with no scored row
    packed_targets,  # [n] int32, written: relative to vocab_start
    marks,  # [3, n] int32, written: sorted targets of each block; first and last slot of the sample
    position,  # [n] int32, written: the slot, -1 with no scored row
    n,
    depth,
    hidden_row,
    hidden_column,
    packed_row,
    vocab_start,
    vocab,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    within = tl.arange(0, ROWS)
    slot = tl.program_id(0) * ROWS + within
    row = tl.load(slots + slot)
    target = tl.load(targets + row, mask=row >= 0, other=-100)
    scored = target != -100
    if tl.program_id(1) == 0:
        local = target - vocab_start
        here = scored & (local >= 0) & (local < vocab)
        local = tl.where(here, local, NO_TARGET).to(tl.int32)
        tl.store(packed_targets + slot, local)
        tl.store(position + slot, tl.where(scored, slot, -1))
        tie = (local[None, :] == local[:, None]) & (within[None, :] < within[:, None])
        rank = tl.sum(((local[None, :] < local[:, None]) | tie).to(tl.int32), axis=1)
        place = tl.program_id(0) * ROWS + rank
        tl.store(marks + place, local)
        tl.store(marks + n + place, tl.load(slots + n + slot))
        tl.store(marks + 2 * n + place, tl.load(slots + 2 * n + slot))
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    source = row.to(tl.int64)[:, None] * hidden_row + columns.to(tl.int64)[None, :] * hidden_column
    inside = (columns < depth)[None, :]
    value = tl.load(hidden + source, mask=scored[:, None] & inside, other=0.0)
    destination = slot.to(tl.int64)[:, None] * packed_row + columns[None, :]
    tl.store(packed + destination, value.to(packed.dtype.element_ty), mask=inside)


@triton.jit
def halves(
    e,  # [BLOCK, COLUMNS] float32, not negative
    INTERPRETED: tl.constexpr,
):
    """``high`` and ``2 low`` in bfloat16, with ``e = high + low`` to 15 bits; ``high`` is truncated, not rounded.

    The symmetric part of ``high (high + 2 low)^T`` is ``e e^T - low low^T``, which takes two products instead of three.
    Triton's interpreter lacks bfloat16 products, so there both are float32 with the same values.
    """
    bits = e.to(tl.uint32, bitcast=True)
    cut = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    low = 2 * (e - cut)
    if INTERPRETED:
        bits = low.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return cut, bits.to(tl.float32, bitcast=True)
    else:
        high = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        return high, low.to(tl.bfloat16)


@triton.jit(do_not_specialize=["n"])
def gram_fold(
    hidden,  # [n, depth], or its tensor descriptor
    weight,  # [vocab, depth], or its tensor descriptor
    bias,  # [vocab] float32 or None
    targets,  # [n] int32 relative to this weight
    marks,  # [3, n] int32, from ``gather_slots``
    partial,  # [7, splits, n] float32, written
    partial_index,  # [splits, n] int32, written
    grams,  # [n / BLOCK_M, splits, BLOCK_M, BLOCK_M] float32, written
    n,  # slots, a multiple of BLOCK_M
    vocab,
    depth,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    splits,
    split_tiles,  # tiles per split
    longer_splits,  # number of leading splits with one more tile
    scale,  # multiplies product and bias
    cap,  # multiplies tanh, if HAS_CAP
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_V: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,  # multiply in float32 for any weight dtype
    PRECISION: tl.constexpr,
    RESIDENT: tl.constexpr,  # keep the Gram matrix in registers between tiles, not in ``grams``
    INTERPRETED: tl.constexpr,
):
    block, split = place(tl.program_id(0), n // BLOCK_M, splits, GROUP_M)
    first_row = block * BLOCK_M
    slots = tl.arange(0, BLOCK_M)
    rows = first_row + slots
    row_targets = tl.load(targets + rows)
    state = empty_state(BLOCK_M)
    g = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    gram_at = grams + (block * splits + split).to(tl.int64) * (BLOCK_M * BLOCK_M)
    gram_at += slots[:, None] * BLOCK_M + slots[None, :]
    first_tile = split * split_tiles + min(split, longer_splits)
    last_tile = first_tile + split_tiles + (split < longer_splits).to(tl.int32)
    mark = tl.sum((tl.load(marks + rows) < first_tile * BLOCK_N).to(tl.int32), axis=0)
    for tile in range(first_tile, last_tile):
        begin = tile * BLOCK_N
        z = logit_tile(
            hidden, weight, bias, first_row, begin, n, vocab, depth, hidden_row, hidden_column, weight_row,
            weight_column, scale, cap, BLOCK_M, BLOCK_N, BLOCK_K, HAS_BIAS, HAS_SCALE, HAS_CAP, EVEN_K, EVEN_V,
            DESCRIPTORS, UPCAST, PRECISION,
        )  # fmt: skip
        special = tl.load(marks + first_row + mark, mask=mark < BLOCK_M, other=NO_TARGET) - begin
        state, e, c = fold(z, begin, row_targets, special < BLOCK_N, state, True, HAS_BIAS or not EVEN_V)
        if HAS_CAP:
            tanh = tl.maximum(z, -cap) / cap
            e *= 1 - tanh * tanh
        # Zero each of the tile's targets, in order, in the rows of its sample.
        while special < BLOCK_N:
            at = marks + first_row + mark
            own = (slots >= tl.load(at + n)) & (slots <= tl.load(at + 2 * n))
            e = tl.where(own[:, None] & (tl.arange(0, BLOCK_N) == special)[None, :], 0.0, e)
            mark += 1
            special = tl.load(at + 1, mask=mark < BLOCK_M, other=NO_TARGET) - begin
        high, low = halves(e, INTERPRETED)
        if not RESIDENT:
            begun = slots < (tile - first_tile) * BLOCK_M  # not in the first tile
            g = tl.load(gram_at, mask=begun[:, None], other=0.0)
        g *= c[:, None] * c[None, :]
        g = tl.dot(high, tl.trans(low), g)
        g = tl.dot(high, tl.trans(high), g)
        if not RESIDENT:
            tl.store(gram_at, g)
            tl.debug_barrier()  # other threads may load these values
    if RESIDENT:
        tl.store(gram_at, g)
    store_state(partial, partial_index, split, splits, n, rows, state)


@triton.jit(do_not_specialize=["first_slot", "number"], do_not_specialize_on_alignment=["tops"])
def merge_grams(
    grams,  # [n / BLOCK, splits, BLOCK, BLOCK] float32
    tops,  # [splits, n] float32: each split's maxima
    position,  # [n] int32: -1 with no scored row
    samples,  # [3, samples] int64: first slot of the sample, its length, start of its matrix in ``products``
    products,  # [sum T^2] float32, written
    first_slot,  # of this chunk
    n,
    splits,
    number,  # of samples
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rescale the matrices of all splits to each row's final maximum and add their symmetric parts in order."""
    first = (tl.load(samples + tl.program_id(0)) - first_slot).to(tl.int32)
    length = tl.load(samples + number + tl.program_id(0)).to(tl.int32)
    start = tl.load(samples + 2 * number + tl.program_id(0))
    s = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    t = tl.arange(0, BLOCK)
    if tl.program_id(1) * ROWS >= length:
        return
    inside_s, inside_t = s < length, t < length
    top_s, top_t = tl.full((ROWS,), float("-inf"), tl.float32), tl.full((BLOCK,), float("-inf"), tl.float32)
    for split in range(splits):
        top_s = tl.maximum(top_s, tl.load(tops + split * n + first + s, mask=inside_s, other=0.0))
        top_t = tl.maximum(top_t, tl.load(tops + split * n + first + t, mask=inside_t, other=0.0))
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    within = first % BLOCK
    inside = inside_s[:, None] & inside_t[None, :]
    own = (first // BLOCK * splits).to(tl.int64) * (BLOCK * BLOCK)
    at = own + (within + s)[:, None] * BLOCK + (within + t)[None, :]
    mirrored = own + (within + t)[None, :] * BLOCK + (within + s)[:, None]
    for split in range(splits):
        c_s = relative(tl.load(tops + split * n + first + s, mask=inside_s, other=0.0), top_s)
        c_t = relative(tl.load(tops + split * n + first + t, mask=inside_t, other=0.0), top_t)
        g = tl.load(grams + at + split * (BLOCK * BLOCK), mask=inside, other=0.0)
        g += tl.load(grams + mirrored + split * (BLOCK * BLOCK), mask=inside, other=0.0)
        total += g * (c_s[:, None] * c_t[None, :])
    scored_s = tl.load(position + first + s, mask=inside_s, other=-1) >= 0
    scored_t = tl.load(position + first + t, mask=inside_t, other=-1) >= 0
    total = tl.where(scored_s[:, None] & scored_t[None, :], total * (0.5 * INV_SCALE) * INV_SCALE, 0.0)
    tl.store(products + start + s[:, None] * length + t[None, :], total, mask=inside)


@triton.jit
def relative(top, new_top):
    """``exp(top - new_top)``; 0 if the split has no finite logit."""
    d = tl.where(top == float("-inf"), LOWEST, tl.maximum(top - new_top, LOWEST))
    return tl.exp2(d * LOG2E)


def row_stats_and_grams(
    product: Product,  # in GramTiles
    hidden: torch.Tensor,  # [N, D] float32, bfloat16 or float16
    targets: torch.Tensor,  # [N] int64, -100 ignored
    bounds: tuple[tuple[int, int], ...],  # [begin, end) rows of each sample, at most BLOCK
    starts: tuple[int, ...],  # first element of each sample's matrix in ``products``
    state: torch.Tensor,  # [7, N] float64, written in the samples' rows
    index: torch.Tensor,  # [N] int64, written in the samples' rows
    products: torch.Tensor,  # [sum T^2] float32, written
) -> None:
    """Fill the states of the samples' rows and ``products`` of ``acqcore.backends.base.Gram``; arguments are
    trusted."""
    tiles = product.tiles
    assert isinstance(tiles, GramTiles)
    most = most_blocks(hidden.shape[1], product.dtype(hidden).itemsize, tiles.even_split(len(product.weight))[0])
    for part in parts(bounds, starts, most, hidden.device):
        _chunk(product, tiles, hidden, targets, part, state, index, products)


def most_blocks(depth: int, itemsize: int, splits: int) -> int:
    """Number of blocks that fit in SCRATCH_BYTES."""
    block_bytes = BLOCK * ((depth + 8) * itemsize + 32 * splits + 40) + 4 * splits * BLOCK * BLOCK
    return max(SCRATCH_BYTES // block_bytes, 1)


@dataclass(frozen=True, eq=False)
class Part:
    """Blocks processed together, and their samples; tensors are on the device."""

    slots: torch.Tensor  # [3, n] int32, for ``gather_slots``
    samples: torch.Tensor  # [3, samples] int64, for ``merge_grams``
    first_slot: int  # among the slots of all parts


@kept(TABLES)
def parts(
    bounds: tuple[tuple[int, int], ...],
    starts: tuple[int, ...],
    most: int,  # blocks per part
    device: torch.device,
) -> tuple[Part, ...]:
    """Pack the samples into blocks, and the blocks into parts of nearly equal length."""
    first_slots, blocks = pack([end - begin for begin, end in bounds])
    if not blocks:
        return ()
    rows, _, firsts, lasts = slot_table(first_slots, blocks, bounds)
    slots = on_device(torch.stack([rows, firsts, lasts]).int(), device)
    in_order = sorted(zip(first_slots, (end - begin for begin, end in bounds), starts, strict=True))
    samples = on_device(torch.tensor(in_order).T, device)
    at_once = triton.cdiv(blocks, triton.cdiv(blocks, most))
    found, done = [], 0
    for first in range(0, blocks * BLOCK, at_once * BLOCK):
        last = min(first + at_once * BLOCK, blocks * BLOCK)
        end = bisect_left(in_order, (last,))
        found.append(Part(slots[:, first:last].contiguous(), samples[:, done:end].contiguous(), first))
        done = end
    return tuple(found)


def _chunk(
    product: Product,
    tiles: GramTiles,  # those of the product
    hidden: torch.Tensor,  # [N, D]
    targets: torch.Tensor,  # [N]
    part: Part,
    state: torch.Tensor,  # [7, N]
    index: torch.Tensor,  # [N]
    products: torch.Tensor,
) -> None:
    weight, slots, samples = product.weight, part.slots, part.samples
    (vocab, depth), n = weight.shape, slots.shape[1]
    packed = empty_rows(n, depth, product.dtype(hidden), hidden.device)
    packed_targets, position = hidden.new_empty((2, n), dtype=torch.int32)
    marks = hidden.new_empty((3, n), dtype=torch.int32)
    columns = GATHER_TILE // BLOCK
    gather_slots[(n // BLOCK, max(triton.cdiv(depth, columns), 1))](
        hidden, targets.contiguous(), slots, packed, packed_targets, marks, position, n, depth, *hidden.stride(),
        packed.stride(0), product.vocab_start, vocab, ROWS=BLOCK, COLUMNS=columns, enable_fp_fusion=True,
    )  # fmt: skip
    splits, split_tiles, longer_splits = tiles.even_split(vocab)
    partial = hidden.new_empty((7, splits, n), dtype=torch.float32)
    partial_index = hidden.new_empty((splits, n), dtype=torch.int32)
    grams = hidden.new_empty((n // BLOCK, splits, BLOCK, BLOCK), dtype=torch.float32)
    gram_fold[(n // BLOCK * splits,)](
        *product.operands(packed), product.bias, packed_targets, marks, partial, partial_index, grams, n, vocab, depth,
        *packed.stride(), *weight.stride(), splits, split_tiles, longer_splits, *product.factors,
        EVEN_V=vocab % tiles.block_n == 0, RESIDENT=tiles.resident, INTERPRETED=triton.knobs.runtime.interpret,
        **product.options(packed),
    )  # fmt: skip
    merge(partial, partial_index, position, state, index, 0, product.vocab_start, slots[0])
    merge_grams[(samples.shape[1], BLOCK // MERGE_ROWS)](
        grams, partial[0], position, samples, products, part.first_slot, n, splits, samples.shape[1],
        BLOCK=BLOCK, ROWS=MERGE_ROWS, enable_fp_fusion=True,
    )  # fmt: skip
