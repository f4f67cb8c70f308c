"""Dropout masks from Philox 4x32-10 (Salmon et al. 2011): a counter determines each entry, so masks can be recomputed
where needed, in any order, and are identical on every processor.

Counter: (column // 4, position, sample, draw | site << 16). Key: (low, high) 32 bits of the seed. Of the four output
words, word column % 4 decides: the entry is kept if the word is at least ``floor(p 2^32)``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Counters per program; each covers four columns.
MASK_TILE = 512


@triton.jit
def keep_mask(
    groups,  # [rows or 1, GROUPS] uint32: consecutive values of column // 4
    position,  # [rows, 1] or scalar, uint32
    sample,  # same shape
    draw_site,  # same shape: draw | site << 16
    seed,  # uint64
    threshold,  # uint32: floor(p 2^32)
):
    """Kept entries, ``[rows, 4 GROUPS]`` bool, for the columns of ``groups`` in order."""
    zero = groups * 0 + position * 0 + sample * 0 + draw_site * 0  # [rows, GROUPS]
    a, b, c, d = tl.philox(seed, groups + zero, position + zero, sample + zero, draw_site + zero)
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return words >= threshold


@triton.jit
def keep_units(
    units,  # [rows or 1, UNITS] uint32: any columns or column blocks
    position,  # this and the rest as in keep_mask
    sample,
    draw_site,
    seed,
    threshold,
):
    """Kept units, ``[rows, UNITS]`` bool; evaluates one counter per unit, :func:`keep_mask` one per four."""
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
    flat = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # index over draws and rows
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
    """Units that dropout keeps under each draw (``acqcore.philox.keep_mask``); arguments are trusted.

    Args:
        site: number of the dropout site in the model, < 2^16.
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
