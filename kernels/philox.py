"""Dropout masks from Philox 4x32-10 (Salmon et al. 2011): a counter decides each entry, so that a mask is recomputed
wherever it is needed, in any order, and is the same on every processor.

Counter: (column // 4, position, sample, draw | site << 16). Key: (low, high) 32 bits of the seed. Of the four words
that come out, number column % 4 decides: the entry is kept if it is at least ``floor(p 2^32)``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def keep_mask(
    groups,  # [rows or 1, GROUPS] int32: consecutive values of column // 4
    position,  # [rows, 1] or scalar, int32
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


@triton.jit(do_not_specialize=["rows", "seed", "threshold"])
def write_keep_mask(
    positions,  # [rows] int32
    samples,  # [rows] int32
    draw_sites,  # [rows] int32
    mask,  # [rows, columns] bool, written
    rows,
    columns,
    seed,
    threshold,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    first = tl.program_id(1) * GROUPS
    keep = keep_mask(
        (first + tl.arange(0, GROUPS))[None, :],
        tl.load(positions + row, mask=inside, other=0)[:, None],
        tl.load(samples + row, mask=inside, other=0)[:, None],
        tl.load(draw_sites + row, mask=inside, other=0)[:, None],
        seed.to(tl.uint64),
        threshold.to(tl.uint32),
    )
    column = 4 * first + tl.arange(0, 4 * GROUPS)
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(mask + at, keep, mask=inside[:, None] & (column < columns)[None, :])


def dropout_keep_mask(
    positions: torch.Tensor,  # [R] int32
    samples: torch.Tensor,  # [R] int32
    draws: torch.Tensor,  # [R] int32, < 2^16
    site: int,
    columns: int,
    seed: int,
    p: float,
) -> torch.Tensor:
    """``[R, columns]`` bool: the entries that dropout with probability ``p`` keeps; arguments are trusted.

    Args:
        positions, samples, draws: of each row.
        site: which of the model's dropouts, < 2^16.
        seed: 0 <= seed < 2^64.
    """
    rows = len(positions)
    mask = torch.empty((rows, columns), dtype=torch.bool, device=positions.device)
    draw_sites = draws | (site << 16)
    write_keep_mask[(triton.cdiv(rows, 16), triton.cdiv(columns, 256))](
        positions, samples, draw_sites, mask, rows, columns, seed, int(p * 2**32), ROWS=16, GROUPS=64,
        enable_fp_fusion=True,
    )  # fmt: skip
    return mask
