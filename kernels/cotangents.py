"""Second-visit sums from which ``acqcore.fisher`` derives gradients under random cotangents of the logits.

Given the statistics, ``write_cotangents`` forms the factors ``e cap'`` of each row and ``sqrt(e) r cap'`` of each
probe, where ``e = exp(z - reference)`` is set to zero in the column of the largest logit and r are the probe's signs,
recomputed from counters. The factors are written to a ring buffer, one vocabulary stretch at a time, and
``factors.add_product`` multiplies them by the weights. The logits are formed once for all probes.

The reference is the second largest logit, so a confident row's factors do not all vanish. For half-precision inputs,
factors are rounded to the input dtype. The column of the largest logit absorbs the rounding errors of ``e cap'``, and
``signed`` sums the rounded ``sqrt(e) r``. Thus a cotangent's entries still sum to 0, and components common to all rows
of the weight cancel.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from acqcore.kernels.config import Tiles
from acqcore.kernels.factors import ROWS, Factors, add_lost, multiply
from acqcore.kernels.fold import LOG2E, LOWEST, widen
from acqcore.kernels.product import logit_tile, place

#: Counter site of the signs, as in ``acqcore.philox``.
SIGN_SITE = 0xFFFF


#: Maximum tile logits per thread, which also holds root, slope and factor. With 128, as in the sm_90 tiles of
#: ``row_stats``, a thread spills 1064 bytes; with 64, none (Triton 3.9).
THREAD_LOGITS = 64
WIDEST = 128
#: Rows per program of ``add_tiles``.
TOTAL_ROWS = 64


def narrowed(tiles: Tiles) -> Tiles:
    """Tiles for ``write_cotangents``, derived from those of ``row_stats``."""
    width = min(tiles.block_n, WIDEST)
    return replace(tiles, block_n=width, warps=max(tiles.warps, tiles.block_m * width // (32 * THREAD_LOGITS)))


@triton.jit
def sign_words(
    first,  # column, a multiple of 32, or of 128 if WORDS is a multiple of 4
    position,  # [rows] uint32
    sample,  # [rows] uint32
    probe_site,  # uint32: probe | site << 16
    seed,  # uint64
    WORDS: tl.constexpr,
):
    """Sign words ``[rows, WORDS]`` uint32, as in ``acqcore.philox.sign_words``: bit b is column 32 w + b."""
    GROUPS: tl.constexpr = WORDS // 4 if WORDS % 4 == 0 else WORDS  # a counter yields four words
    word = tl.arange(0, GROUPS)[None, :]  # [1, GROUPS]
    if WORDS % 4 == 0:
        word *= 4
    word += first // 32
    zero = (word * 0).to(tl.uint32) + position[:, None] * 0  # [rows, GROUPS]
    group = (word // 4).to(tl.uint32) + zero
    a, b, c, d = tl.philox(seed, group, position[:, None] + zero, sample[:, None] + zero, probe_site + zero)
    if WORDS % 4 == 0:
        return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    else:
        which = word % 4
        return tl.where(which < 2, tl.where(which == 0, a, b), tl.where(which == 2, c, d))


@triton.jit
def flipped(
    x,  # floating point
    negative,  # uint32, 2^31 or 0
):
    """Negate x where ``negative`` is not 0."""
    if x.dtype == tl.float32:
        return (x.to(tl.uint32, bitcast=True) ^ negative).to(tl.float32, bitcast=True)
    else:
        return (x.to(tl.uint16, bitcast=True) ^ (negative >> 16).to(tl.uint16)).to(x.dtype, bitcast=True)


@triton.jit(do_not_specialize=["n", "chunk", "probes", "tiles", "seed"])
def write_cotangents(
    hidden,  # [n, depth], or its tensor descriptor
    weight,  # [vocab, depth], or its tensor descriptor
    bias,  # [vocab] float32 or None
    top,  # [n] int64: column of the largest logit, -1 in rows to ignore
    reference,  # [n] float32
    norms,  # [vocab] float32: squared norms of the weight's rows
    samples,  # [n] int64
    positions,  # [n] int64
    factor,  # [probes + 1, n, ring_row], written; zero in ignored rows and outside the vocabulary
    of_tiles,  # [probes + 2, tiles, n] float32, written: sums over each tile of the stretch of the rounded sqrt(e) r
    # of each probe, of e cap'^2 norms, and of the rounding errors of e cap'
    n,
    chunk,  # first column of the stretch
    vocab,
    depth,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    ring_row,
    probes,
    tiles,  # number of tiles in the stretch
    seed,
    scale,  # multiplies product and bias
    cap,  # multiplies tanh, if HAS_CAP
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    WORDS: tl.constexpr,
    BITS: tl.constexpr,
    SITE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_V: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, tile = place(tl.program_id(0), tl.cdiv(n, BLOCK_M), ring_row // BLOCK_N, GROUP_M)
    first_row = block * BLOCK_M
    begin = chunk + tile * BLOCK_N
    z = logit_tile(
        hidden, weight, bias, first_row, begin, n, vocab, depth, hidden_row, hidden_column, weight_row,
        weight_column, scale, cap, BLOCK_M, BLOCK_N, BLOCK_K, HAS_BIAS, HAS_SCALE, HAS_CAP, EVEN_K, EVEN_V,
        DESCRIPTORS, UPCAST, PRECISION,
    )  # fmt: skip
    rows = first_row + tl.arange(0, BLOCK_M)
    inside = rows < n
    column = begin + tl.arange(0, BLOCK_N)
    largest = tl.load(top + rows, mask=inside, other=-1)
    x = (z - tl.load(reference + rows, mask=inside, other=0.0)[:, None]) * 0.5
    if HAS_BIAS or not EVEN_V:
        x = tl.maximum(x, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    kept = (largest >= 0)[:, None] & (column[None, :] != largest[:, None])
    root = tl.where(kept, tl.exp2(x * LOG2E), 0.0)
    slope = tl.full((BLOCK_M, BLOCK_N), 1.0, tl.float32)
    if HAS_CAP:
        tanh = tl.maximum(z, -cap, propagate_nan=tl.PropagateNan.ALL) / cap
        slope = 1 - tanh * tanh
    of_row = tile * n + rows
    norm = tl.load(norms + column, mask=column < vocab, other=0.0)
    rows_in_ring = tl.zeros((), tl.int64) + n
    plane = rows_in_ring * tiles
    square = tl.sum(root * root * slope * slope * norm[None, :], axis=1)
    tl.store(of_tiles + probes * plane + of_row, square, mask=inside)
    at = rows.to(tl.int64)[:, None] * ring_row + (tile * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mean = root * root * slope
    part = mean.to(factor.dtype.element_ty)
    tl.store(factor + at, part, mask=inside[:, None])
    lost = tl.sum(mean - widen(part), axis=1)
    tl.store(of_tiles + (probes + 1) * plane + of_row, lost, mask=inside)

    size = tl.reshape((root * slope).to(factor.dtype.element_ty), (BLOCK_M, WORDS, BITS))
    slope = tl.reshape(slope, (BLOCK_M, WORDS, BITS))
    bit = (31 - (begin % 32 + tl.arange(0, BITS))).to(tl.uint32)[None, None, :]
    position = tl.load(positions + rows, mask=inside, other=0).to(tl.uint32)
    sample = tl.load(samples + rows, mask=inside, other=0).to(tl.uint32)
    for k in range(probes):  # not unrolled, so variants do not depend on the number of probes
        probe = (tl.zeros((), tl.int32) + k).to(tl.uint32)
        words = sign_words(begin, position, sample, probe | (SITE << 16), seed.to(tl.uint64), WORDS)
        part = flipped(size, (words[:, :, None] ^ 0xFFFFFFFF) << bit & 0x80000000)
        of_part = widen(part)
        if HAS_CAP:
            of_part = tl.where(slope > 0, of_part / slope, 0.0)
        tl.store(of_tiles + k * plane + of_row, tl.sum(tl.sum(of_part, axis=2), axis=1), mask=inside)
        part = tl.reshape(part, (BLOCK_M, BLOCK_N))
        tl.store(factor + (k + 1) * rows_in_ring * ring_row + at, part, mask=inside[:, None])


@triton.jit(do_not_specialize=["n", "tiles"])
def add_tiles(
    of_tiles,  # [planes, tiles, n] float32
    total,  # [planes, n] float64, added to tile by tile, so a row's sum is independent of how tiles are grouped
    n,
    tiles,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    plane = tl.program_id(1).to(tl.int64)
    at = total + plane * n + rows
    found = tl.load(at, mask=inside, other=0.0)
    for tile in range(tiles):
        found += tl.load(of_tiles + (plane * tiles + tile) * n + rows, mask=inside, other=0.0).to(tl.float64)
    tl.store(at, found, mask=inside)


def fisher_sums(
    factors: Factors,
    hidden: torch.Tensor,  # [N, D]
    top: torch.Tensor,  # [N] int64, -1 in rows to ignore
    reference: torch.Tensor,  # [N] float32
    samples: torch.Tensor,  # [N] int64
    positions: torch.Tensor,  # [N] int64
    final: torch.Tensor,  # [N] float64: exp(reference - largest logit)
    seed: int,
    sums: torch.Tensor,  # [P + 1, N, D] float32, written
    signed: torch.Tensor,  # [P, N] float64, written
    squares: torch.Tensor,  # [N] float64, written
) -> None:
    """``Backend.fisher_sums`` for an unsharded head; arguments are trusted."""
    weight, product, cut = factors.weight, factors.tiles, narrowed(factors.tiles)
    factors = replace(factors, tiles=cut)
    dtype = factors.dtype(hidden)
    (vocab, depth), n, probes = weight.shape, len(hidden), len(signed)
    if n == 0:
        return
    norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
    groups = triton.cdiv(n * (probes + 1), ROWS)
    at_once = triton.cdiv(triton.cdiv(n, groups), cut.block_m) * cut.block_m
    for first in range(0, n, at_once):
        part = slice(first, first + at_once)
        rows = len(reference[part])
        ring, _ = factors.ring((probes + 1) * rows, dtype, parts=1)
        width = ring.shape[1]
        factor = ring.view(probes + 1, rows, width)
        tiles = width // cut.block_n
        of_tiles = reference.new_empty((probes + 2, tiles, rows))
        total = squares.new_zeros((probes + 2, rows))
        finals = torch.stack([final[part], *[final[part].sqrt()] * probes]).float()
        for chunk in range(0, vocab, width):
            write_cotangents[(triton.cdiv(rows, cut.block_m) * (width // cut.block_n),)](
                *factors.operands(hidden[part]), factors.bias, top[part], reference[part], norms, samples[part],
                positions[part], factor, of_tiles, rows, chunk, vocab, depth, *hidden.stride(), *weight.stride(), width,
                probes, tiles, seed, *factors.factors, WORDS=max(cut.block_n // 32, 1), BITS=min(cut.block_n, 32),
                SITE=SIGN_SITE, EVEN_V=vocab % width == 0, **factors.options(hidden[part]),
            )  # fmt: skip
            add_tiles[(triton.cdiv(rows, TOTAL_ROWS), probes + 2)](
                of_tiles, total, rows, tiles, ROWS=TOTAL_ROWS, num_warps=2, enable_fp_fusion=True
            )
            multiply(factors, product, factor, finals, chunk, min(width, vocab - chunk), sums[:, part])
        del ring, factor  # frees memory
        signed[:, part] = total[:probes] * final[part].sqrt()
        squares[part] = total[probes] * final[part]
        if dtype != torch.float32:
            add_lost(factors, top[part], total[probes + 1].float() * finals[0], sums[0, part])
