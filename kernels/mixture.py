"""Statistics of a mixture of K draws (``acqcore/bayes.py``) in two visits of the vocabulary; logits stay in registers.

    number_scored   numbers the scored tokens on the device
    gather_draws    packs the hidden states of all their draws and applies dropout masks
    product_fold    first visit: the state of each packed row (``row_stats.py``)
    finish_draws    each draw's normaliser and vote; expected entropy and the target's likelihood
    mixture_fold    second visit: the terms of the mean distribution
    finish_mixture  merges the splits of the vocabulary in float64

A packed row is one draw of one token. ``PLANE`` tokens are adjacent within each draw: row ``k PLANE + r`` of their
group is draw k of token r. The second visit transposes the product to vocabulary by packed rows. In the matrix units'
layout a thread then holds every draw of its tokens, so sums over draws need neither shuffles nor shared memory. K is
padded to a power of two with rows of zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from acqcore.kernels.fold import LOG2E, merge
from acqcore.kernels.philox import keep_mask, keep_units
from acqcore.kernels.product import (
    GATHER_TILE,
    Product,
    chunk_rows,
    empty_rows,
    place,
    product_tile,
    scored_places,
    tanh,
)
from acqcore.kernels.row_stats import SCRATCH_BYTES, launch_fold

#: Adjacent tokens within a draw: the columns that a matrix unit distributes over the threads of a warp at a time.
PLANE = 8
#: Tokens per tile of the second visit; each has four sums in the registers of every thread that holds it.
TILE_TOKENS = 32
#: Tokens per program of ``number_scored``.
SCAN_ROWS = 1024
#: Packed rows per program of ``gather_draws``.
GATHER_ROWS = 128
#: Tokens per program of ``finish_draws`` and ``finish_mixture``.
FINISH_TOKENS = 64
#: log2 of the smallest probability distinguished from 0; 2^FLOOR is the smallest normal float32.
FLOOR = tl.constexpr(-126.0)
LEAST = tl.constexpr(2.0**-126)
#: Replaces -inf: its exponential is 0, and 0 * LOWEST is 0.
LOWEST = tl.constexpr(-1e30)
LN2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class Masks:
    """Dropout that ``gather_draws`` applies to hidden states ``[N, D]``.

    The product's scale holds the factor of kept columns, as dividing half-precision states by it would round them.
    """

    samples: torch.Tensor  # [N] int64
    positions: torch.Tensor  # [N] int64
    width: int  # columns that drop together
    seed: int
    threshold: int  # floor(p 2^32)

    def of_rows(self, part: slice) -> Masks:
        return replace(self, samples=self.samples[part].contiguous(), positions=self.positions[part].contiguous())


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["targets"])
def number_scored(
    targets,  # [n] int64, -100 ignored
    position,  # [n] int32, written: index among scored tokens, -1 if ignored
    sources,  # [n] int32, written: the token at each index
    count,  # [2] int32, written: packed rows in groups with a scored token; scored tokens
    n,
    PADDED: tl.constexpr,
    PLANE: tl.constexpr,
    ROWS: tl.constexpr,
    SCAN: tl.constexpr,
):
    begin = tl.program_id(0) * ROWS
    rows = begin + tl.arange(0, ROWS)
    _, scored, number, through = scored_places(targets, begin, n, ROWS, SCAN)
    tl.store(position + rows, tl.where(scored, number, -1), mask=rows < n)
    tl.store(sources + number, rows, mask=scored)
    if begin + ROWS >= n:
        tl.store(count, tl.cdiv(through, PLANE) * (PLANE * PADDED))
        tl.store(count + 1, through)


@triton.jit(
    do_not_specialize=["n", "rows", "seed", "threshold"],
    do_not_specialize_on_alignment=["targets", "sources", "count", "samples", "positions"],
)
def gather_draws(
    hidden,  # [n, depth]; without MASKED [draws, n, depth]
    targets,  # [n] int64
    sources,  # [n] int32, from ``number_scored``
    count,  # [2] int32, from ``number_scored``
    samples,  # [n] int64, if MASKED
    positions,  # [n] int64, if MASKED
    packed,  # [rows, depth], written: zero in padding
    packed_targets,  # [rows] int32, written: relative to vocab_start
    n,
    rows,
    depth,
    hidden_draw,
    hidden_row,
    hidden_column,
    packed_row,
    draws,
    vocab_start,
    width,  # columns that drop together
    seed,
    threshold,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,  # width > 1
    HAS_TARGETS: tl.constexpr,  # else every token is scored, without sources and count
    PADDED: tl.constexpr,  # draws per group
    PLANE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    draw = row // PLANE % PADDED
    token = row // (PLANE * PADDED) * PLANE + row % PLANE
    inside = row < rows
    if HAS_TARGETS:
        inside = inside & (token < tl.load(count + 1))
        token = tl.load(sources + token, mask=inside, other=0)
        if tl.program_id(1) == 0:
            target = tl.load(targets + token, mask=inside, other=-100)
            tl.store(packed_targets + row, (target - vocab_start).to(tl.int32), mask=inside)
    else:
        inside = inside & (token < n)
    first = tl.program_id(1) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    within = (columns < depth)[None, :]
    source = token.to(tl.int64)[:, None] * hidden_row + columns.to(tl.int64)[None, :] * hidden_column
    if not MASKED:
        source += draw.to(tl.int64)[:, None] * hidden_draw
    value = tl.load(hidden + source, mask=(inside & (draw < draws))[:, None] & within, other=0.0)
    if MASKED:
        key = (
            tl.load(positions + token, mask=inside, other=0).to(tl.uint32)[:, None],
            tl.load(samples + token, mask=inside, other=0).to(tl.uint32)[:, None],
            draw.to(tl.uint32)[:, None],
            seed.to(tl.uint64),
            threshold.to(tl.uint32),
        )
        if WIDE:
            kept = keep_units((columns // width).to(tl.uint32)[None, :], *key)
        else:
            kept = keep_mask((first // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)[None, :], *key)
        value = tl.where(kept, value, 0.0)
    at = packed + row.to(tl.int64)[:, None] * packed_row + columns[None, :]
    tl.store(at, value.to(packed.dtype.element_ty), mask=inside[:, None] & within)


@triton.jit
def log1p(x):
    """float64 log(1 + x); the quotient corrects the rounding of ``1 + x``."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / (u - 1)))


@triton.jit(
    do_not_specialize=["n", "first", "all_tokens", "rows", "draws"], do_not_specialize_on_alignment=["position"]
)
def finish_draws(
    draw_state,  # [7, rows] float64
    draw_index,  # [rows] int64
    position,  # [n] int32: index among scored tokens, -1 if ignored; None: identity
    references,  # [n] float32, written for scored tokens, by index: the largest logit under draw 0
    norms,  # [rows] float32, written: log2 of each draw's normaliser relative to the reference
    state,  # [6, all tokens] float64: rows 0 and 3 written from ``first`` on
    votes,  # [draws, all tokens] int64, written from ``first`` on
    n,
    first,
    all_tokens,
    rows,
    draws,
    HAS_POSITION: tl.constexpr,
    PADDED: tl.constexpr,
    PLANE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = tokens < n
    token = tokens
    if HAS_POSITION:
        token = tl.load(position + tokens, mask=inside, other=-1)
    scored = inside & (token >= 0)
    at = token // PLANE * (PADDED * PLANE) + token % PLANE
    out = first + tokens
    all_tokens = all_tokens.to(tl.int64)
    low = float("-inf")
    reference = tl.load(draw_state + at, mask=scored, other=0.0)
    tl.store(references + token, reference.to(tl.float32), mask=scored)
    entropy = tl.zeros((TOKENS,), tl.float64)
    best = tl.full((TOKENS,), low, tl.float64)  # the target's largest log-probability
    likelihood = tl.zeros((TOKENS,), tl.float64)  # sum over draws relative to best
    for k in range(draws):
        top = tl.load(draw_state + at, mask=scored, other=0.0)
        r = tl.load(draw_state + 2 * rows + at, mask=scored, other=0.0)
        s1 = tl.load(draw_state + 3 * rows + at, mask=scored, other=0.0)
        target = tl.load(draw_state + 6 * rows + at, mask=scored, other=low)
        log_z = log1p(r)
        entropy += tl.where(top == low, float("nan"), log_z - s1 / (1 + r))
        tl.store(norms + at, ((top - reference + log_z) * LOG2E).to(tl.float32), mask=scored)
        logprob = tl.where(target == low, low, target - top - log_z)
        rises = logprob > best
        new_best = tl.where(rises, logprob, best)
        likelihood *= tl.where(rises & (best > low), tl.exp(best - new_best), 1.0)
        likelihood += tl.where(logprob == low, 0.0, tl.exp(logprob - tl.where(new_best == low, 0.0, new_best)))
        best = new_best
        vote = tl.load(draw_index + at, mask=scored, other=-1)
        tl.store(votes + k * all_tokens + out, vote, mask=inside)
        at += PLANE
    for _ in range(draws, PADDED):
        tl.store(norms + at, -LOWEST, mask=scored)  # padding has no probability
        at += PLANE
    nan = float("nan")
    log_target = tl.where(best == low, low, best + tl.log(likelihood / draws))
    tl.store(state + out, tl.where(scored, entropy / draws, nan), mask=inside)
    tl.store(state + 3 * all_tokens + out, tl.where(scored, log_target, nan), mask=inside)


@triton.jit
def draw_sums(
    y,  # [.., .., draws, ..]: log2 of each draw's probability
    kept,  # same rank: draws that are not padding
    EVEN_DRAWS: tl.constexpr,
    MAY_BE_ABSENT: tl.constexpr,  # some y may be -inf
):
    """top = max_k y, at least FLOOR, and the sums over draws of e = 2^(y - top), y - top, e (y - top), e^2."""
    top = tl.maximum(tl.max(y, axis=2), FLOOR)
    x = y - tl.expand_dims(top, 2)
    near = x
    if MAY_BE_ABSENT:
        near = tl.maximum(x, LOWEST)
    e = tl.exp2(near)
    if not EVEN_DRAWS:
        x = tl.where(kept, x, 0.0)
    return top, tl.sum(e, axis=2), tl.sum(x, axis=2), tl.sum(e * near, axis=2), tl.sum(e * e, axis=2)


@triton.jit
def mixture_terms(top, e, x, ex, ee, share):
    """A column's terms of information, reverse (both in bits), sum_sq and spread, from :func:`draw_sums`.

    m = p mean with p = 2^top. Terms are differences that are exactly 0 if the draws agree.
    """
    mean, mean_x = e * share, x * share
    log_mean = tl.log2(tl.maximum(mean, LEAST))
    absent = top <= FLOOR  # negligible in every draw
    p = tl.where(absent, 0.0, tl.exp2(top))
    m = p * mean
    reverse = tl.where(absent, 0.0, m * (log_mean - mean_x))
    return p * (ex * share - mean * log_mean), reverse, m * m, p * p * (ee * share - mean * mean)


@triton.jit
def in_register_pairs(x, VOCAB: tl.constexpr, GROUPS: tl.constexpr, PLANE: tl.constexpr):
    """``[VOCAB, GROUPS, PLANE]`` -> ``[VOCAB / 16, 8, GROUPS, PLANE]``: sums the pairs in an sm_90 thread."""
    return tl.sum(tl.reshape(x, (VOCAB // 16, 2, 8, GROUPS, PLANE)), axis=1)


@triton.jit(do_not_specialize=["rows", "tokens", "draws"], do_not_specialize_on_alignment=["count"])
def mixture_fold(
    hidden,  # [rows, depth] packed, or its tensor descriptor
    weight,  # [vocab, depth], or its tensor descriptor
    bias,  # [vocab] float32 or None
    references,  # [tokens] float32
    norms,  # [rows, rounded up to whole tiles] float32
    count,  # [1] int32: packed rows in use; None: all
    partial,  # [4, splits, tokens] float32, written: information, reverse (both in bits), sum_sq, spread
    rows,
    tokens,
    vocab,
    depth,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    splits,
    split_tiles,  # tiles per split
    draws,
    scale,  # multiplies product and bias, if HAS_SCALE
    cap,  # multiplies tanh, if HAS_CAP
    BLOCK_M: tl.constexpr,  # packed rows per tile
    BLOCK_N: tl.constexpr,  # vocabulary per tile
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    DRAWS: tl.constexpr,  # per tile
    PLANE: tl.constexpr,
    TURNS: tl.constexpr,  # tiles of DRAWS that cover all draws
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
    block, split = place(tl.program_id(0), tl.cdiv(rows, BLOCK_M * TURNS), splits, GROUP_M)
    first_row = block * (BLOCK_M * TURNS)
    if HAS_COUNT:
        if first_row >= tl.load(count):
            return

    GROUPS: tl.constexpr = BLOCK_M // (DRAWS * PLANE)
    token = block * (GROUPS * PLANE) + tl.reshape(tl.arange(0, GROUPS * PLANE), (GROUPS, PLANE))
    information = tl.zeros((BLOCK_N // 16, 8, GROUPS, PLANE), tl.float32)
    reverse = tl.zeros((BLOCK_N // 16, 8, GROUPS, PLANE), tl.float32)
    sum_sq = tl.zeros((BLOCK_N // 16, 8, GROUPS, PLANE), tl.float32)
    spread = tl.zeros((BLOCK_N // 16, 8, GROUPS, PLANE), tl.float32)
    share = 1.0 / draws
    first_tile = split * split_tiles
    last_tile = min(first_tile + split_tiles, tl.cdiv(vocab, BLOCK_N))
    for tile in range(first_tile, last_tile):
        begin = tile * BLOCK_N
        columns = begin + tl.arange(0, BLOCK_N)
        for turn in tl.static_range(TURNS):
            row = first_row + turn * BLOCK_M
            z = product_tile(
                weight, hidden, begin, row, vocab, rows, depth, weight_row, weight_column, hidden_row, hidden_column,
                BLOCK_N, BLOCK_M, BLOCK_K, EVEN_K, DESCRIPTORS, UPCAST, PRECISION,
            )  # fmt: skip
            if HAS_BIAS:
                z += tl.load(bias + columns, mask=columns < vocab, other=0.0)[:, None]
            if HAS_SCALE:
                z *= scale
            if HAS_CAP:
                z = tanh(z) * cap
            if not EVEN_V:
                z = tl.where((columns < vocab)[:, None], z, LOWEST)
            reference = tl.load(references + token, mask=token < tokens, other=0.0)
            norm = tl.load(norms + row + tl.arange(0, BLOCK_M))
            present = draws - turn * DRAWS
            z = tl.reshape(z, (BLOCK_N, GROUPS, DRAWS, PLANE)) - reference[None, :, None, :]
            y = z * LOG2E - tl.reshape(norm, (GROUPS, DRAWS, PLANE))[None, :, :, :]
            kept = (tl.arange(0, DRAWS) < present)[None, None, :, None]
            new_top, new_e, new_x, new_ex, new_ee = draw_sums(y, kept, EVEN_DRAWS, HAS_BIAS)
            if turn == 0:
                top, e, x, ex, ee = new_top, new_e, new_x, new_ex, new_ee
            else:  # rescale both to the larger top
                higher = tl.maximum(top, new_top)
                d, new_d = top - higher, new_top - higher
                c, new_c = tl.exp2(d), tl.exp2(new_d)
                ex = (ex + d * e) * c + (new_ex + new_d * new_e) * new_c
                x += turn * DRAWS * d + new_x + min(present, DRAWS) * new_d
                e = e * c + new_e * new_c
                ee = ee * c * c + new_ee * new_c * new_c
                top = higher

        of_information, of_reverse, of_sum_sq, of_spread = mixture_terms(top, e, x, ex, ee, share)
        information += in_register_pairs(of_information, BLOCK_N, GROUPS, PLANE)
        reverse += in_register_pairs(of_reverse, BLOCK_N, GROUPS, PLANE)
        sum_sq += in_register_pairs(of_sum_sq, BLOCK_N, GROUPS, PLANE)
        spread += in_register_pairs(of_spread, BLOCK_N, GROUPS, PLANE)

    out = partial + split * tokens + token
    plane = splits * tokens
    inside = token < tokens
    tl.store(out, tl.sum(tl.sum(information, axis=0), axis=0), mask=inside)
    tl.store(out + plane, tl.sum(tl.sum(reverse, axis=0), axis=0), mask=inside)
    tl.store(out + 2 * plane, tl.sum(tl.sum(sum_sq, axis=0), axis=0), mask=inside)
    tl.store(out + 3 * plane, tl.sum(tl.sum(spread, axis=0), axis=0), mask=inside)


@triton.jit(do_not_specialize=["n", "first", "all_tokens"], do_not_specialize_on_alignment=["position"])
def finish_mixture(
    partial,  # [4, splits, n] float32
    position,  # [n] int32, or None
    state,  # [6, all tokens] float64: rows 1, 2, 4, 5 written from ``first`` on
    n,
    first,
    all_tokens,
    splits,
    HAS_POSITION: tl.constexpr,
    TOKENS: tl.constexpr,
):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = tokens < n
    token = tokens
    if HAS_POSITION:
        token = tl.load(position + tokens, mask=inside, other=-1)
    scored = inside & (token >= 0)
    information = tl.zeros((TOKENS,), tl.float64)
    reverse = tl.zeros((TOKENS,), tl.float64)
    sum_sq = tl.zeros((TOKENS,), tl.float64)
    spread = tl.zeros((TOKENS,), tl.float64)
    plane = splits * n
    for split in range(splits):
        at = partial + split * n + token
        information += tl.load(at, mask=scored, other=0.0).to(tl.float64)
        reverse += tl.load(at + plane, mask=scored, other=0.0).to(tl.float64)
        sum_sq += tl.load(at + 2 * plane, mask=scored, other=0.0).to(tl.float64)
        spread += tl.load(at + 3 * plane, mask=scored, other=0.0).to(tl.float64)
    nan = float("nan")
    all_tokens = all_tokens.to(tl.int64)
    out = state + first + tokens
    tl.store(out + all_tokens, tl.where(scored, information * LN2, nan), mask=inside)
    tl.store(out + 2 * all_tokens, tl.where(scored, reverse * LN2, nan), mask=inside)
    tl.store(out + 4 * all_tokens, tl.where(scored, sum_sq, nan), mask=inside)
    tl.store(out + 5 * all_tokens, tl.where(scored, spread, nan), mask=inside)


@dataclass(frozen=True)
class Layout:
    """Arrangement of a token's draws among packed rows."""

    rows: int  # packed rows per tile of the second visit
    draws: int  # per tile
    turns: int  # tiles that cover all draws
    plane: int  # adjacent tokens within each draw

    @property
    def padded(self) -> int:
        """Draws per group of ``plane`` tokens, including padding."""
        return self.draws * self.turns

    @staticmethod
    def of(draws: int, rows: int) -> Layout:
        """The layout of K draws in tiles of at most ``rows`` packed rows."""
        tile = min(triton.next_power_of_2(draws), rows)
        rows = min(rows, TILE_TOKENS * tile)
        return Layout(rows, tile, triton.cdiv(draws, tile), min(PLANE, rows // tile))


def mixture_stats(
    first_visit: Product,
    second_visit: Product,  # the same in its own tiles, whose ``block_m`` counts packed rows
    hidden: torch.Tensor,  # [N, D] with masks, else [K, N, D]
    targets: torch.Tensor | None,  # [N] int64, -100 ignored
    draws: int,
    masks: Masks | None,
    state: torch.Tensor,  # [6, N] float64, written
    votes: torch.Tensor,  # [K, N] int64, written
) -> None:
    """Fill ``state`` and ``votes`` of ``acqcore.bayes.BayesStats``; arguments are trusted, nothing is read back."""
    n, depth = hidden.shape[-2:]
    if n == 0:
        return
    layout = Layout.of(draws, second_visit.tiles.block_m)
    second_visit = replace(second_visit, tiles=replace(second_visit.tiles, block_m=layout.rows))
    splits = max(visit.tiles.split(len(visit.weight))[0] for visit in (first_visit, second_visit))
    row_bytes = (depth + 8) * first_visit.dtype(hidden).itemsize + 32 * splits + 68
    at_once = chunk_rows(n, row_bytes * layout.padded, layout.plane, SCRATCH_BYTES)
    for first in range(0, n, at_once):
        part = slice(first, first + at_once)
        _chunk(
            first_visit, second_visit, layout, hidden[..., part, :],
            None if targets is None else targets[part].contiguous(), draws, masks and masks.of_rows(part), state, votes,
            first,
        )  # fmt: skip


def _chunk(
    first_visit: Product,
    second_visit: Product,
    layout: Layout,
    hidden: torch.Tensor,  # [n, D] with masks, else [K, n, D]
    targets: torch.Tensor | None,  # [n]
    draws: int,
    masks: Masks | None,
    state: torch.Tensor,  # [6, N], columns first to first + n written
    votes: torch.Tensor,  # [K, N]
    first: int,
) -> None:
    n, depth = hidden.shape[-2:]
    weight, vocab_start, tiles = first_visit.weight, first_visit.vocab_start, second_visit.tiles
    rows = triton.cdiv(n, layout.plane) * layout.plane * layout.padded
    packed = empty_rows(rows, depth, first_visit.dtype(hidden), hidden.device)
    packed_targets = position = sources = count = None
    if targets is not None:
        packed_targets = hidden.new_empty(rows, dtype=torch.int32)
        position, sources = hidden.new_empty((2, n), dtype=torch.int32)
        count = hidden.new_empty(2, dtype=torch.int32)
        number_scored[(triton.cdiv(n, SCAN_ROWS),)](
            targets, position, sources, count, n, PADDED=layout.padded, PLANE=layout.plane, ROWS=SCAN_ROWS,
            SCAN=SCAN_ROWS, enable_fp_fusion=True,
        )  # fmt: skip
    columns = GATHER_TILE // GATHER_ROWS
    gather_draws[(triton.cdiv(rows, GATHER_ROWS), max(triton.cdiv(depth, columns), 1))](
        hidden, targets, sources, count, masks and masks.samples, masks and masks.positions, packed, packed_targets,
        n, rows, depth, 0 if masks else hidden.stride(0), *hidden.stride()[-2:], packed.stride(0), draws, vocab_start,
        masks.width if masks else 1, masks.seed if masks else 0, masks.threshold if masks else 0,
        MASKED=masks is not None, WIDE=masks is not None and masks.width > 1, HAS_TARGETS=targets is not None,
        PADDED=layout.padded, PLANE=layout.plane, ROWS=GATHER_ROWS, COLUMNS=columns, enable_fp_fusion=True,
    )  # fmt: skip

    partial, partial_index = launch_fold(packed, first_visit, packed_targets, count)
    draw_state = state.new_empty((7, rows))
    draw_index = votes.new_empty(rows)
    merge(partial, partial_index, None, draw_state, draw_index, 0, vocab_start)
    blocks = triton.cdiv(rows, layout.rows * layout.turns)
    norms = partial.new_empty(blocks * layout.rows * layout.turns)
    references = partial.new_empty(n)
    finish = (triton.cdiv(n, FINISH_TOKENS),)
    finish_draws[finish](
        draw_state, draw_index, position, references, norms, state, votes, n, first, state.shape[1], rows, draws,
        HAS_POSITION=position is not None, PADDED=layout.padded, PLANE=layout.plane, TOKENS=FINISH_TOKENS,
        enable_fp_fusion=True,
    )  # fmt: skip

    splits, split_tiles = tiles.split(len(weight))
    sums = partial.new_empty((4, splits, n))
    mixture_fold[(blocks * splits,)](
        *second_visit.operands(packed), second_visit.bias, references, norms, count, sums, rows, n, len(weight), depth,
        *packed.stride(), *weight.stride(), splits, split_tiles, draws, *second_visit.factors,
        DRAWS=layout.draws, PLANE=layout.plane, TURNS=layout.turns, EVEN_DRAWS=draws == layout.padded,
        HAS_COUNT=count is not None, EVEN_V=len(weight) % tiles.block_n == 0, **second_visit.options(packed),
    )  # fmt: skip
    finish_mixture[finish](
        sums, position, state, n, first, state.shape[1], splits, HAS_POSITION=position is not None,
        TOKENS=FINISH_TOKENS, enable_fp_fusion=True,
    )  # fmt: skip
