"""Dropout masks from Philox 4x32-10 (Salmon et al. 2011): a counter decides each entry, so that a mask is recomputed
wherever it is needed, in any order, and is the same on every processor.

Counter: (column // 4, position, sample, draw | site << 16). Key: (low, high) 32 bits of the seed. Of the four words
that come out, number column % 4 decides: the entry is kept if it is at least ``floor(p 2^32)``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Counters of a program, each of four columns.
MASK_TILE = 512


@triton.jit
def keep_mask(
    groups,  # [rows or 1, GROUPS] uint32: consecutive values of column // 4
    position,  # [rows, 1] or scalar, uint32
    sample,  # the same
    draw_site,  # the same: draw | site << 16
    seed,  # uint64
    threshold,  # uint32: floor(p 2^32)
):
    """Which entries stay, ``[rows, 4 GROUPS]`` bool, for the columns of ``groups`` from first to last."""
    zero = groups * 0 + position * 0 + sample * 0 + draw_site * 0  # [rows, GROUPS]
    a, b, c, d = tl.philox(seed, groups + zero, position + zero, sample + zero, draw_site + zero)
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return words >= threshold


@triton.jit
def keep_units(
    units,  # [rows or 1, UNITS] uint32: any columns, or blocks of them
    position,  # as in keep_mask, and so on
    sample,
    draw_site,
    seed,
    threshold,
):
    """Which of these units stay, ``[rows, UNITS]`` bool: a counter each, where :func:`keep_mask` has one for four."""
    zero = units * 0 + position * 0 + sample * 0 + draw_site * 0
    a, b, c, d = tl.philox(seed, units // 4 + zero, position + zero, sample + zero, draw_site + zero)
    word = units % 4
    return tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d)) >= threshold


@triton.jit(do_not_specialize=["draws", "n", "site", "seed", "threshold"])
def write_keep_mask(
    samples,  # [n] int64
    positions,  # [n] int64
    keep,  # [draws, n, columns] bool, written
    draws,
    n,
    columns,
    site,
    seed,
    threshold,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    flat = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # of draw and row
    inside = flat < draws * n
    draw = flat // n
    row = flat % n
    first = tl.program_id(1) * GROUPS
    kept = keep_mask(
        (first + tl.arange(0, GROUPS)).to(tl.uint32)[None, :],
        tl.load(positions + row, mask=inside, other=0).to(tl.uint32)[:, None],
        tl.load(samples + row, mask=inside, other=0).to(tl.uint32)[:, None],
        (draw.to(tl.uint32) | (site.to(tl.uint32) << 16))[:, None],
        seed.to(tl.uint64),
        threshold.to(tl.uint32),
    )
    column = 4 * first + tl.arange(0, 4 * GROUPS)
    at = flat.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(keep + at, kept, mask=inside[:, None] & (column < columns)[None, :])


def dropout_mask(
    samples: torch.Tensor,  # [N] int64
    positions: torch.Tensor,  # [N] int64
    site: int,
    seed: int,
    threshold: int,
    keep: torch.Tensor,  # [K, N, units] bool, contiguous, written
) -> None:
    """Which units dropout keeps under each draw, ``acqcore.philox.keep_mask``; arguments are trusted.

    Args:
        site: which of the model's dropouts, < 2^16.
        seed: 0 <= seed < 2^64.
        threshold: ``floor(p 2^32)``.
    """
    draws, n, units = keep.shape
    if keep.numel() == 0:
        return
    groups = min(triton.next_power_of_2(triton.cdiv(units, 4)), MASK_TILE)
    rows = MASK_TILE // groups
    write_keep_mask[(triton.cdiv(draws * n, rows), triton.cdiv(units, 4 * groups))](
        samples.contiguous(), positions.contiguous(), keep, draws, n, units, site, seed, threshold,
        ROWS=rows, GROUPS=groups, enable_fp_fusion=True,
    )  # fmt: skip
