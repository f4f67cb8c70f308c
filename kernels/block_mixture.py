"""The mixture of ``mixture.py`` for dropout of column blocks: one product of partial logits per visit.

The partial logits ``u_b`` of block b are formed once on the matrix units, and every draw sums the blocks it keeps,
``z_k = sum_b keep_kb u_b``, in registers. Cost on an sm_90 multiprocessor per column, token and block of a head of
depth D, with K = 8 draws and blocks of 64:

    u_b on the matrix units       64 multiply-adds at 2048 per cycle            0.031 cycles, one product
    sums over draws               8 multiply-adds at 128 per cycle              0.063 cycles, two products
    all instructions of the step  239 per warp, 128 of them for the sums        0.117 cycles, 3.7 products
    operands from L2              12 KiB per block and 64 x 32 tile, 39 B/cycle 0.154 cycles, 5.0 products

z_k of 64 tokens x 32 columns x 8 draws takes a quarter of the register file, so two programs share a multiprocessor and
one multiplies while the other sums. A tile of 64 x 64 loads a third less but runs alone: on an H100 (N = 4096,
D = 4096, V = 131072) both visits took 73 ms with it, against 59 ms, and at D = 576, V = 49152 11 ms against 7.7.
Over two visits the sums alone cost four products for any tiles. Masks in float32 instead of bits took a third longer.

Rejected alternatives: subtracting only the dropped blocks costs a tenth of the sums, but they differ between tokens and
a warp holds eight or four tokens. On the matrix units, with the draws as columns of an ``m16n8k16``, the sums cost an
eighth of a product per bfloat16 of u_b. But a token's blocks would have to span the lanes of a quad, and a product
leaves them in one lane: shuffles cost as much as a product, and a block-diagonal operand wastes three quarters.

The layout is tokens by vocabulary, so a thread holds few tokens and thus few masks, for many columns and all draws.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from acqcore.kernels.fold import LOG2E, SCALE, merge, widen
from acqcore.kernels.mixture import FINISH_TOKENS, LOWEST, Masks, draw_sums, finish_draws, finish_mixture, mixture_terms
from acqcore.kernels.philox import keep_mask
from acqcore.kernels.product import Product, chunk_rows, gathered, place, tanh
from acqcore.kernels.row_stats import SCRATCH_BYTES

#: Maximum draws per program.
MAX_DRAWS = 8
#: Counters per program of ``write_block_masks``; each covers four blocks.
MASK_TILE = 256
#: Stages of the loop over words; each loads operands for four blocks.
STAGES = 3


def serves(width: int, depth: int, draws: int) -> bool:
    """Whether these kernels support blocks of ``width`` columns (whole product steps) and that many draws."""
    return draws <= MAX_DRAWS and (width % 16 == 0 or width >= depth)


@triton.jit(do_not_specialize=["n", "seed", "threshold"], do_not_specialize_on_alignment=["samples", "position"])
def write_block_masks(
    samples,  # [n] int64
    positions,  # [n] int64
    position,  # [n] int32: index among scored tokens, -1 if ignored; None: identity
    keep,  # [n, words] int32, written by index: bit 8 j + k of word w is draw k's mask of block 4 w + j
    n,
    words,
    seed,
    threshold,
    HAS_POSITION: tl.constexpr,
    DRAWS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    to = rows
    if HAS_POSITION:
        to = tl.load(position + rows, mask=inside, other=-1)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    at_position = tl.load(positions + rows, mask=inside, other=0).to(tl.uint32)[:, None]
    of_sample = tl.load(samples + rows, mask=inside, other=0).to(tl.uint32)[:, None]
    word = tl.zeros((ROWS, GROUPS), tl.int32)
    for draw in tl.static_range(DRAWS):
        kept = keep_mask(
            group.to(tl.uint32)[None, :], at_position, of_sample, tl.full((), draw, tl.uint32), seed.to(tl.uint64),
            threshold.to(tl.uint32),
        )  # fmt: skip
        bits = tl.reshape(kept.to(tl.int32), (ROWS, GROUPS, 4)) << (8 * tl.arange(0, 4) + draw)[None, None, :]
        word += tl.sum(bits, axis=2)
    at = to.to(tl.int64)[:, None] * words + group[None, :]
    tl.store(keep + at, word, mask=(inside & (to >= 0))[:, None] & (group < words)[None, :])


@triton.jit
def unpacked(
    word,  # [ROWS] int32
    first,  # bit of draw 0
    DRAWS: tl.constexpr,
):
    """Unpacked masks ``[ROWS, DRAWS]`` in float32."""
    bits = word[:, None] >> (first + tl.arange(0, DRAWS))[None, :]
    return tl.where((bits & 1) != 0, 1.0, 0.0)


@triton.jit
def block_logits(
    hidden,  # [n, depth], or its tensor descriptor
    weight,  # [vocab, depth], or its tensor descriptor
    keep,  # [n, words] int32, from ``write_block_masks``
    bias,  # [vocab] float32 or None
    first_row,
    begin,  # the tile's first column
    n,
    vocab,
    depth,
    blocks,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    scale,  # multiplies product and bias, if HAS_SCALE
    cap,  # multiplies tanh, if HAS_CAP
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,  # steps of BLOCK_K columns per block
    DRAWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_V: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits ``[BLOCK_M, BLOCK_N, DRAWS]`` in float32; LOWEST outside the vocabulary, undefined beyond row ``n``."""
    rows = tl.minimum(first_row + tl.arange(0, BLOCK_M), n - 1)
    columns = begin + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    words = (blocks + 3) // 4
    word_at = keep + rows.to(tl.int64) * words
    if not DESCRIPTORS:
        hidden_at = hidden + rows.to(tl.int64)[:, None] * hidden_row + inner.to(tl.int64)[None, :] * hidden_column
        of_weight = tl.minimum(columns, vocab - 1).to(tl.int64)[None, :] * weight_row
        weight_at = weight + of_weight + inner.to(tl.int64)[:, None] * weight_column
    z = tl.zeros((BLOCK_M, BLOCK_N, DRAWS), tl.float32)
    if STEPS == 1:
        # A word holds the masks of four blocks.
        for first in range(0, depth, 4 * BLOCK_K):
            word = tl.load(word_at + first // (4 * BLOCK_K))
            for j in tl.static_range(4):
                k = first + j * BLOCK_K
                if DESCRIPTORS:
                    a = hidden.load([first_row, k])
                    b = weight.load([begin, k]).T
                else:
                    if EVEN_K:
                        a = tl.load(hidden_at)
                        b = tl.load(weight_at)
                    else:
                        a = tl.load(hidden_at, mask=(inner < depth - k)[None, :], other=0.0)
                        b = tl.load(weight_at, mask=(inner < depth - k)[:, None], other=0.0)
                    hidden_at += BLOCK_K * hidden_column
                    weight_at += BLOCK_K * weight_column
                if UPCAST:
                    a = widen(a)
                    b = widen(b)
                u = tl.dot(a, b, input_precision=PRECISION)
                z += tl.reshape(u, (BLOCK_M, BLOCK_N, 1)) * unpacked(word, 8 * j, DRAWS)[:, None, :]
    else:
        u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, depth, BLOCK_K):
            if DESCRIPTORS:
                a = hidden.load([first_row, k])
                b = weight.load([begin, k]).T
            else:
                if EVEN_K:
                    a = tl.load(hidden_at)
                    b = tl.load(weight_at)
                else:
                    a = tl.load(hidden_at, mask=(inner < depth - k)[None, :], other=0.0)
                    b = tl.load(weight_at, mask=(inner < depth - k)[:, None], other=0.0)
                hidden_at += BLOCK_K * hidden_column
                weight_at += BLOCK_K * weight_column
            if UPCAST:
                a = widen(a)
                b = widen(b)
            u = tl.dot(a, b, u, input_precision=PRECISION)
            step = k // BLOCK_K
            if (step + 1) % STEPS == 0 or k + BLOCK_K >= depth:
                block = step // STEPS
                kept = unpacked(tl.load(word_at + block // 4), 8 * (block % 4), DRAWS)
                z += tl.reshape(u, (BLOCK_M, BLOCK_N, 1)) * kept[:, None, :]
                u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=columns < vocab, other=0.0)[None, :, None]
    if HAS_SCALE:
        z *= scale
    if HAS_CAP:
        z = tanh(z) * cap
    if not EVEN_V:
        z = tl.where((columns < vocab)[None, :, None], z, LOWEST)
    return z


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["count"])
def block_fold(
    hidden,  # [n, depth], or its tensor descriptor
    weight,  # [vocab, depth], or its tensor descriptor
    keep,  # [n, words] int32, from ``write_block_masks``
    bias,  # [vocab] float32 or None
    targets,  # [n] int32 relative to this weight, or None
    count,  # [1] int32: rows in use; None: n
    partial,  # [7, splits, n DRAWS] float32, written as in ``row_stats.product_fold``; second, s2 and s11 are unused
    partial_index,  # [splits, n DRAWS] int32, written
    n,
    vocab,
    depth,
    blocks,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    splits,
    split_tiles,
    scale,
    cap,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP_M: tl.constexpr,
    DRAWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_V: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """First visit: the state of every draw."""
    block, split = place(tl.program_id(0), tl.cdiv(n, BLOCK_M), splits, GROUP_M)
    first_row = block * BLOCK_M
    if HAS_COUNT:
        if first_row >= tl.load(count):
            return

    rows = first_row + tl.arange(0, BLOCK_M)
    if HAS_TARGETS:
        row_targets = tl.load(targets + rows, mask=rows < n, other=-1)
    flat = rows[:, None] * DRAWS + tl.arange(0, DRAWS)[None, :]
    inside = flat < n * DRAWS
    out = split * (n * DRAWS) + flat
    plane = splits * (n * DRAWS)
    low = tl.full((BLOCK_M, DRAWS), float("-inf"), tl.float32)
    # Index and target change rarely, so they stay in memory and leave registers to the draws' logits.
    tl.store(partial_index + out, tl.full((BLOCK_M, DRAWS), -1, tl.int32), mask=inside)
    tl.store(partial + 6 * plane + out, low, mask=inside)
    tl.debug_barrier()
    top = low
    total = tl.zeros((BLOCK_M, DRAWS), tl.float32)  # sum of e = exp(z - top)
    moment = tl.zeros((BLOCK_M, DRAWS), tl.float32)  # sum of e (z - top)
    column = tl.arange(0, BLOCK_N)[None, :, None]
    first_tile = split * split_tiles
    last_tile = min(first_tile + split_tiles, tl.cdiv(vocab, BLOCK_N))
    for tile in range(first_tile, last_tile):
        begin = tile * BLOCK_N
        z = block_logits(
            hidden, weight, keep, bias, first_row, begin, n, vocab, depth, blocks, hidden_row, hidden_column,
            weight_row, weight_column, scale, cap, BLOCK_M, BLOCK_N, BLOCK_K, STEPS, DRAWS, HAS_BIAS,
            HAS_SCALE, HAS_CAP, EVEN_K, EVEN_V, DESCRIPTORS, UPCAST, PRECISION,
        )  # fmt: skip
        if HAS_TARGETS:
            local = row_targets - begin
            holds = (local >= 0) & (local < BLOCK_N)
            if tl.max(holds.to(tl.int32), axis=0) > 0:
                hit = tl.where(column == local[:, None, None], z, float("-inf"))
                tl.store(partial + 6 * plane + out, tl.max(hit, axis=1), mask=inside & holds[:, None])
        tile_top = tl.max(z, axis=1)
        rises = tile_top > top  # false for NaN, which shows in the sums
        first = tl.min(tl.where(z == tile_top[:, None, :], column, BLOCK_N), axis=1)
        tl.store(partial_index + out, begin + first, mask=inside & rises)
        new_top = tl.where(rises, tile_top, top)
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        d = tl.maximum(top - reference, LOWEST)
        c = tl.exp2(d * LOG2E)
        x = z - reference[:, None, :]
        if HAS_BIAS:  # a bias may be -inf
            x = tl.maximum(x, LOWEST, propagate_nan=tl.PropagateNan.ALL)
        e = tl.exp2(x * LOG2E)
        moment = (moment + d * total) * c + tl.sum(e * x, axis=1)
        total = total * c + tl.sum(e, axis=1)
        top = new_top
    tl.store(partial + out, top, mask=inside)
    tl.store(partial + plane + out, top, mask=inside)
    tl.store(partial + 2 * plane + out, (total - 1) * SCALE, mask=inside)
    tl.store(partial + 3 * plane + out, moment * SCALE, mask=inside)
    tl.store(partial + 4 * plane + out, tl.zeros((BLOCK_M, DRAWS), tl.float32), mask=inside)
    tl.store(partial + 5 * plane + out, tl.zeros((BLOCK_M, DRAWS), tl.float32), mask=inside)


@triton.jit(do_not_specialize=["n", "draws"], do_not_specialize_on_alignment=["count"])
def block_mixture(
    hidden,  # [n, depth], or its tensor descriptor
    weight,  # [vocab, depth], or its tensor descriptor
    keep,  # [n, words] int32, from ``write_block_masks``
    bias,  # [vocab] float32 or None
    references,  # [n] float32
    norms,  # [n, DRAWS] float32
    count,  # [1] int32: rows in use; None: n
    partial,  # [4, splits, n] float32, written: information, reverse (both in bits), sum_sq, spread
    n,
    vocab,
    depth,
    blocks,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    splits,
    split_tiles,
    draws,
    scale,
    cap,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP_M: tl.constexpr,
    DRAWS: tl.constexpr,
    EVEN_DRAWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_V: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Second visit: the terms of the mean distribution."""
    block, split = place(tl.program_id(0), tl.cdiv(n, BLOCK_M), splits, GROUP_M)
    first_row = block * BLOCK_M
    if HAS_COUNT:
        if first_row >= tl.load(count):
            return

    rows = first_row + tl.arange(0, BLOCK_M)
    inside = rows < n
    information = tl.zeros((BLOCK_M,), tl.float32)
    reverse = tl.zeros((BLOCK_M,), tl.float32)
    sum_sq = tl.zeros((BLOCK_M,), tl.float32)
    spread = tl.zeros((BLOCK_M,), tl.float32)
    share = 1.0 / draws
    kept = (tl.arange(0, DRAWS) < draws)[None, None, :]
    first_tile = split * split_tiles
    last_tile = min(first_tile + split_tiles, tl.cdiv(vocab, BLOCK_N))
    for tile in range(first_tile, last_tile):
        z = block_logits(
            hidden, weight, keep, bias, first_row, tile * BLOCK_N, n, vocab, depth, blocks, hidden_row, hidden_column,
            weight_row, weight_column, scale, cap, BLOCK_M, BLOCK_N, BLOCK_K, STEPS, DRAWS, HAS_BIAS,
            HAS_SCALE, HAS_CAP, EVEN_K, EVEN_V, DESCRIPTORS, UPCAST, PRECISION,
        )  # fmt: skip
        reference = tl.load(references + rows, mask=inside, other=0.0)
        norm = tl.load(norms + rows[:, None] * DRAWS + tl.arange(0, DRAWS)[None, :], mask=inside[:, None], other=0.0)
        y = (z - reference[:, None, None]) * LOG2E - norm[:, None, :]
        top, e, x, ex, ee = draw_sums(y, kept, EVEN_DRAWS, HAS_BIAS)
        of_information, of_reverse, of_sum_sq, of_spread = mixture_terms(top, e, x, ex, ee, share)
        information += tl.sum(of_information, axis=1)
        reverse += tl.sum(of_reverse, axis=1)
        sum_sq += tl.sum(of_sum_sq, axis=1)
        spread += tl.sum(of_spread, axis=1)
    out = partial + split * n + rows
    plane = splits * n
    tl.store(out, information, mask=inside)
    tl.store(out + plane, reverse, mask=inside)
    tl.store(out + 2 * plane, sum_sq, mask=inside)
    tl.store(out + 3 * plane, spread, mask=inside)


def block_mixture_stats(
    product: Product,
    hidden: torch.Tensor,  # [N, D]
    targets: torch.Tensor | None,  # [N] int64, -100 ignored
    draws: int,
    masks: Masks,
    state: torch.Tensor,  # [6, N] float64, written
    votes: torch.Tensor,  # [K, N] int64, written
) -> None:
    """:func:`acqcore.kernels.mixture.mixture_stats` for column blocks that :func:`serves` accepts."""
    n, depth = hidden.shape
    if n == 0:
        return
    padded = triton.next_power_of_2(draws)
    blocks = max(triton.cdiv(depth, masks.width), 1)
    of_draws = padded * (32 * product.tiles.split(len(product.weight))[0] + 68)
    row_bytes = (depth + 8) * product.dtype(hidden).itemsize + of_draws + blocks + 4
    at_once = chunk_rows(n, row_bytes, product.tiles.block_m, SCRATCH_BYTES)
    for first in range(0, n, at_once):
        part = slice(first, first + at_once)
        of_part = None if targets is None else targets[part].contiguous()
        _chunk(product, hidden[part], of_part, draws, masks.of_rows(part), state, votes, first, padded, blocks)


def _chunk(
    product: Product,
    hidden: torch.Tensor,  # [n, D]
    targets: torch.Tensor | None,  # [n]
    draws: int,
    masks: Masks,
    state: torch.Tensor,  # [6, N], columns first to first + n written
    votes: torch.Tensor,  # [K, N]
    first: int,
    padded: int,
    blocks: int,
) -> None:
    weight, tiles = product.weight, product.tiles
    (vocab, depth), n = weight.shape, len(hidden)
    packed, packed_targets, position, count = gathered(product, hidden, targets)
    words = triton.cdiv(blocks, 4)
    groups = min(triton.next_power_of_2(words), MASK_TILE)
    rows = MASK_TILE // groups
    keep = hidden.new_empty((n, words), dtype=torch.int32)
    write_block_masks[(triton.cdiv(n, rows), triton.cdiv(words, groups))](
        masks.samples, masks.positions, position, keep, n, words, masks.seed, masks.threshold,
        HAS_POSITION=position is not None, DRAWS=padded, ROWS=rows, GROUPS=groups, enable_fp_fusion=True,
    )  # fmt: skip

    splits, split_tiles = tiles.split(vocab)
    block_k = tiles.block_k if masks.width >= depth else min(tiles.block_k, masks.width & -masks.width)
    steps = triton.cdiv(min(masks.width, depth), block_k) or 1
    stages = min(tiles.stages, STAGES) if steps == 1 else tiles.stages
    product = replace(product, tiles=replace(tiles, block_k=block_k, stages=stages))
    operands = *product.operands(packed), keep, product.bias
    strides = *packed.stride(), *weight.stride(), splits, split_tiles
    options = product.options(packed) | {
        "STEPS": steps, "DRAWS": padded, "HAS_COUNT": count is not None, "EVEN_K": depth % (4 * block_k) == 0,
        "EVEN_V": vocab % tiles.block_n == 0,
    }  # fmt: skip
    grid = (triton.cdiv(n, tiles.block_m) * splits,)
    partial = hidden.new_empty((7, splits, n * padded), dtype=torch.float32)
    partial_index = hidden.new_empty((splits, n * padded), dtype=torch.int32)
    block_fold[grid](
        *operands, packed_targets, count, partial, partial_index, n, vocab, depth, blocks, *strides, *product.factors,
        HAS_TARGETS=targets is not None, **options,
    )  # fmt: skip
    draw_state = state.new_empty((7, n * padded))
    draw_index = votes.new_empty(n * padded)
    merge(partial, partial_index, None, draw_state, draw_index, 0, product.vocab_start)
    norms = partial.new_empty((n, padded))
    references = partial.new_empty(n)
    finish = (triton.cdiv(n, FINISH_TOKENS),)
    finish_draws[finish](
        draw_state, draw_index, position, references, norms, state, votes, n, first, state.shape[1], n * padded, draws,
        HAS_POSITION=position is not None, PADDED=padded, PLANE=1, TOKENS=FINISH_TOKENS, enable_fp_fusion=True,
    )  # fmt: skip
    sums = partial.new_empty((4, splits, n))
    block_mixture[grid](
        *operands, references, norms, count, sums, n, vocab, depth, blocks, *strides, draws,
        *product.factors, EVEN_DRAWS=draws == padded, **options,
    )  # fmt: skip
    finish_mixture[finish](
        sums, position, state, n, first, state.shape[1], splits, HAS_POSITION=position is not None,
        TOKENS=FINISH_TOKENS, enable_fp_fusion=True,
    )  # fmt: skip
