"""Second pass over the weights: forms gradients in the logits, one vocabulary stretch at a time, and their products.

Given the statistics, ``write_factors`` forms ``exp(z_s[v] - m_s) cap'`` in tiles and writes them to a ring buffer. From
the ring, the matrix units compute

    add_product      out += factors W     (dL/dh: attention with the vocabulary as keys and values)
    add_grams        products += factors factors^T within each sample, for samples longer than a block of ``gram``

Factors of float32 inputs are float32. For half-precision inputs, Gram matrices split each factor into two numbers with
16 bits in total; ``add_product`` uses one rounded number and adds the rounding errors to the target's column. On an
H100 (N = 4096, D = 4096, V = 131072), dL/dh then costs 3.6 products at an error of 3e-4; two numbers cost 4.5 to 4.7 at
6e-5. torch's product instead of ``add_product`` was equally fast, but its results depend on the batch.

Tiling depends on the weight shape, the dtype and, for ``add_grams``, the sample length. Every sum has a fixed order, so
results are bitwise reproducible and a row's result does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from acqcore.kept import kept, on_device
from acqcore.kernels.config import Tiles
from acqcore.kernels.fold import LOG2E, LOWEST, widen
from acqcore.kernels.product import TABLES, Product, descriptor, has_descriptor, logit_tile, place

#: Size of the ring, and maximum number of rows that share it.
RING_BYTES = 54 << 20
ROWS = 4096
#: Entries of the target weights gathered at a time, 16 MiB in float32.
GATHERED_ELEMENTS = 1 << 22
#: Rows and columns of a tile of ``add_grams``.
GRAM_TILE = 128


@triton.jit(do_not_specialize=["n", "chunk"])
def write_factors(
    hidden,  # [n, depth], or its tensor descriptor
    weight,  # [vocab, depth], or its tensor descriptor
    bias,  # [vocab] float32 or None
    targets,  # [n] int64, -100 ignored
    reference,  # [n] float32: m
    of_target,  # [n] float32: factor in the target's column
    high,  # [n, ring_row], written; zero in ignored rows and outside the vocabulary
    low,  # same shape, written: remainder of each factor; None in float32
    lost,  # [tiles, n] float32, written if ROUNDED: sum of the remainders
    n,
    chunk,  # first column of the stretch
    vocab,
    depth,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    ring_row,
    vocab_start,
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
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
    ROUNDED: tl.constexpr,
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
    target = tl.load(targets + rows, mask=inside, other=-100)
    m = tl.load(reference + rows, mask=inside, other=0.0)
    x = z - m[:, None]
    if HAS_BIAS or not EVEN_V:
        x = tl.maximum(x, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    f = tl.exp2(x * LOG2E)
    if HAS_CAP:
        tanh = tl.maximum(z, -cap, propagate_nan=tl.PropagateNan.ALL) / cap
        f *= 1 - tanh * tanh
    column = tl.arange(0, BLOCK_N)
    local = (target - vocab_start - begin)[:, None]
    f = tl.where(column[None, :] == local, tl.load(of_target + rows, mask=inside, other=0.0)[:, None], f)
    f = tl.where((target != -100)[:, None], f, 0.0)
    part = f.to(high.dtype.element_ty)
    if ROUNDED:
        of_row = tl.sum(f, axis=1) - tl.sum(widen(part), axis=1)
        tl.store(lost + (begin // BLOCK_N).to(tl.int64) * n + rows, of_row, mask=inside)
    at = rows[:, None] * ring_row + (tile * BLOCK_N + column)[None, :]  # the ring is small
    tl.store(high + at, part, mask=inside[:, None])
    if PARTS == 2:
        tl.store(low + at, (f - widen(part)).to(low.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["n", "planes", "chunk", "columns"])
def add_product(
    factor,  # [planes n, ring_row], or its tensor descriptor
    weight,  # [vocab, depth], or its tensor descriptor
    out,  # [planes, n, depth] float32, added to
    final,  # [planes, n] float32, multiplies the rows of ``out`` after the last stretch
    n,
    planes,
    chunk,
    columns,  # columns in use, up to the end of the vocabulary
    vocab,
    depth,
    ring_row,
    weight_row,
    weight_column,
    out_plane,
    out_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(n, BLOCK_M)
    block, tile = place(tl.program_id(0), planes * blocks, tl.cdiv(depth, BLOCK_N), GROUP_M)
    plane = block // blocks
    first_row = block % blocks * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    across = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < n)[:, None] & (across < depth)[None, :]
    out_at = out + plane.to(tl.int64) * out_plane + rows.to(tl.int64)[:, None] * out_row + across[None, :]
    inner = tl.arange(0, BLOCK_K)
    if not DESCRIPTORS:
        ring_at = (plane * n + tl.minimum(rows, n - 1))[:, None] * ring_row + inner[None, :]
        weight_at = weight + (chunk + inner).to(tl.int64)[:, None] * weight_row
        weight_at += tl.minimum(across, depth - 1).to(tl.int64)[None, :] * weight_column
    begun = tl.zeros((BLOCK_M, 1), tl.int32) < chunk
    total = tl.load(out_at, mask=inside & begun, other=0.0)
    for k in range(0, columns, BLOCK_K):
        if DESCRIPTORS:
            a = factor.load([plane * n + first_row, k])
            b = weight.load([chunk + k, tile * BLOCK_N])
        else:
            a = tl.load(factor + ring_at + k)
            b = tl.load(weight_at, mask=(inner < columns - k)[:, None], other=0.0)
            weight_at += BLOCK_K * weight_row
        if UPCAST:
            a = widen(a)
            b = widen(b)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    if chunk + columns == vocab:
        total *= tl.load(final + plane * n + rows, mask=rows < n, other=0.0)[:, None]
    tl.store(out_at, total, mask=inside)


@triton.jit(do_not_specialize=["chunk", "columns", "vocab_start", "number"])
def zero_targets(
    targets,  # [n] int64
    high,  # [n, ring_row]: zeroed in each row at the targets of its sample
    low,
    samples,  # [3, number] int64: first row, length, start of the sample's matrix
    owner,  # [n] int32: each row's sample, -1 for none
    chunk,
    columns,
    ring_row,
    vocab_start,
    number,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program u zeroes the column of row u's target."""
    u = tl.program_id(0)
    sample = tl.load(owner + u)
    column = tl.load(targets + u) - vocab_start - chunk
    if sample >= 0:
        if (column >= 0) & (column < columns):
            begin = tl.load(samples + sample)
            length = tl.load(samples + number + sample)
            for first in range(0, length, ROWS):
                row = first + tl.arange(0, ROWS)
                at = (begin + row).to(tl.int64) * ring_row + column
                tl.store(high + at, tl.zeros((ROWS,), high.dtype.element_ty), mask=row < length)
                if PARTS == 2:
                    tl.store(low + at, tl.zeros((ROWS,), low.dtype.element_ty), mask=row < length)


@triton.jit(do_not_specialize=["chunk", "columns", "number", "programs"])
def add_grams(
    high,  # [n, ring_row]
    low,
    samples,  # [3, number] int64
    tiles,  # [3, programs] int32: sample, tile of rows, tile of columns (not before the rows)
    products,  # [sum T^2] float32, added to
    chunk,
    columns,
    ring_row,
    number,
    programs,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Add a tile of a sample's Gram matrix and its mirror image."""
    program = tl.program_id(0)
    sample = tl.load(tiles + program)
    begin = tl.load(samples + sample).to(tl.int32)
    length = tl.load(samples + number + sample).to(tl.int32)
    products += tl.load(samples + 2 * number + sample)
    s = tl.load(tiles + programs + program) * TILE + tl.arange(0, TILE)
    t = tl.load(tiles + 2 * programs + program) * TILE + tl.arange(0, TILE)
    inner = tl.arange(0, BLOCK_K)
    s_at = (begin + tl.minimum(s, length - 1))[:, None] * ring_row + inner[None, :]
    t_at = (begin + tl.minimum(t, length - 1))[None, :] * ring_row + inner[:, None]
    inside = (s < length)[:, None] & (t < length)[None, :]
    at = products + s[:, None] * length + t[None, :]
    begun = tl.zeros((TILE, 1), tl.int32) < chunk
    total = tl.load(at, mask=inside & begun, other=0.0)
    for k in range(0, columns, BLOCK_K):
        a = tl.load(high + s_at + k)
        b = tl.load(high + t_at + k)
        if UPCAST:
            a = widen(a)
            b = widen(b)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        if PARTS == 2:
            a_low = tl.load(low + s_at + k)
            b_low = tl.load(low + t_at + k)
            if UPCAST:
                a_low = widen(a_low)
                b_low = widen(b_low)
            total = tl.dot(a, b_low, total, input_precision=PRECISION)
            total = tl.dot(a_low, b, total, input_precision=PRECISION)
    tl.store(at, total, mask=inside)
    mirror = products + t[None, :] * length + s[:, None]
    off_diagonal = (s < tl.min(t, axis=0))[:, None]
    tl.store(mirror, total, mask=inside & off_diagonal)


@dataclass(frozen=True, eq=False)
class Factors(Product):
    """Settings for forming factors; tensors are on the device."""

    multiprocessors: int

    def ring(self, n: int, dtype: torch.dtype, parts: int = 2) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``high`` and ``low [n, columns]`` for ``n`` rows, sized within RING_BYTES to fill the multiprocessors."""
        parts = 1 if dtype == torch.float32 else parts
        itemsize = parts * dtype.itemsize
        m, width = self.tiles.block_m, self.tiles.block_n
        most = max(RING_BYTES // (itemsize * max(n, 1) * width), 1)
        most = min(most, triton.cdiv(len(self.weight), width))
        blocks = triton.cdiv(n, m)

        def use(tiles: int) -> float:
            return blocks * tiles / (triton.cdiv(blocks * tiles, self.multiprocessors) * self.multiprocessors)

        columns = width * max(range(max(most // 2, 1), most + 1), key=lambda tiles: (use(tiles), tiles))
        high = self.weight.new_empty((n, columns), dtype=dtype)
        return high, torch.empty_like(high) if parts == 2 else None

    def stretches(
        self,
        hidden: torch.Tensor,  # [n, D]
        targets: torch.Tensor,  # [n] int64
        reference: torch.Tensor,  # [n] float32
        of_target: torch.Tensor,  # [n] float32
        high: torch.Tensor,  # [n, columns], written
        low: torch.Tensor | None,
        lost: torch.Tensor | None = None,  # [tiles of all stretches, n] float32, written
    ) -> Iterator[tuple[int, int]]:
        """Yield (first column, columns) of each vocabulary stretch while the ring holds its factors."""
        (vocab, depth), n, tiles = self.weight.shape, len(hidden), self.tiles
        for chunk in range(0, vocab, high.shape[1]):
            write_factors[(triton.cdiv(n, tiles.block_m) * (high.shape[1] // tiles.block_n),)](
                *self.operands(hidden), self.bias, targets, reference, of_target, high, low, lost, n, chunk, vocab,
                depth, *hidden.stride(), *self.weight.stride(), high.stride(0), self.vocab_start, *self.factors,
                EVEN_V=vocab % high.shape[1] == 0, PARTS=1 if low is None else 2, ROUNDED=lost is not None,
                **self.options(hidden),
            )  # fmt: skip
            yield chunk, min(high.shape[1], vocab - chunk)


def hidden_sums(
    factors: Factors,
    hidden: torch.Tensor,  # [N, D]
    targets: torch.Tensor,  # [N] int64, -100 ignored
    reference: torch.Tensor,  # [N] float32
    final: torch.Tensor,  # [N] float32
    out: torch.Tensor,  # [N, D] float32, written
) -> None:
    """``out_s = final_s sum_v exp(z_s[v] - reference_s) cap' W_v`` over all columns except the row's target."""
    weight, tiles = factors.weight, factors.tiles
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    vocab, n = len(weight), len(hidden)
    if n == 0:
        return
    groups = triton.cdiv(n, ROWS)
    at_once = triton.cdiv(triton.cdiv(n, groups), tiles.block_m) * tiles.block_m
    no_target = torch.zeros_like(reference)
    for first in range(0, n, at_once):
        part = slice(first, first + at_once)
        rows = len(reference[part])
        factor, _ = factors.ring(rows, dtype, parts=1)
        lost = None
        if dtype != torch.float32:
            ring = factor.shape[1]
            lost = reference.new_empty((triton.cdiv(vocab, ring) * (ring // tiles.block_n), rows))
        stretches = factors.stretches(hidden[part], targets[part], reference[part], no_target, factor, None, lost)
        for chunk, columns in stretches:
            multiply(factors, tiles, factor[None], final[None, part], chunk, columns, out[None, part])
        del factor, stretches  # frees memory
        if lost is not None:
            add_lost(factors, targets[part], lost.sum(0) * final[part], out[part])


def multiply(
    factors: Factors,
    tiles: Tiles,
    factor: torch.Tensor,  # [planes, n, ring], contiguous
    final: torch.Tensor,  # [planes, n] float32, contiguous
    chunk: int,
    columns: int,  # columns in use, up to the end of the vocabulary
    out: torch.Tensor,  # [planes, n, D] float32, added to
) -> None:
    """Launch :func:`add_product` for the vocabulary stretch that starts at ``chunk``."""
    weight = factors.weight
    (vocab, depth), (planes, n, ring) = weight.shape, factor.shape
    descriptors = tiles.descriptors and has_descriptor(weight)
    flat = factor.view(planes * n, ring)
    add_product[(planes * triton.cdiv(n, tiles.block_m) * triton.cdiv(depth, tiles.block_n),)](
        descriptor(flat, tiles.block_m, tiles.block_k) if descriptors else flat,
        descriptor(weight, tiles.block_k, tiles.block_n) if descriptors else weight,
        out, final, n, planes, chunk, columns, vocab, depth, ring, *weight.stride(), *out.stride()[:2],
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, GROUP_M=tiles.group_m,
        DESCRIPTORS=descriptors, UPCAST=factors.upcast or weight.dtype != factor.dtype, PRECISION=factors.precision,
        num_warps=tiles.warps, num_stages=max(tiles.stages - 1, 1), enable_fp_fusion=True,
    )  # fmt: skip


def add_lost(
    factors: Factors,
    targets: torch.Tensor,  # [n] int64
    lost: torch.Tensor,  # [n] float32
    out: torch.Tensor,  # [n, D] float32, added to
) -> None:
    """Add the rounding errors of a row's factors to its target's column if that is a row of this weight.

    The gradient is a sum of differences, factor times ``W_v - W_y``. Balancing the rounded factors in the target's
    column preserves this form, so components common to all rows of W still cancel.
    """
    local = targets - factors.vocab_start
    here = (local >= 0) & (local < len(factors.weight))
    at_once = max(GATHERED_ELEMENTS // max(out.shape[1], 1), 1)
    for begin in range(0, len(out), at_once):
        part = slice(begin, begin + at_once)
        columns = factors.weight[local[part].where(here[part], 0)]
        out[part].addcmul_(lost[part].where(here[part], 0)[:, None], columns.to(out.dtype))


def grams(
    factors: Factors,
    hidden: torch.Tensor,  # [n, D]: rows of the samples in order
    targets: torch.Tensor,  # [n] int64, -100 ignored
    reference: torch.Tensor,  # [n] float32
    lengths: tuple[int, ...],
    starts: tuple[int, ...],  # first element of each sample's matrix in ``products``
    products: torch.Tensor,  # [sum T^2] float32, written
) -> None:
    """Gram matrices as in ``gram``, relative to ``reference``, for samples of any length."""
    full = torch.float32 in (hidden.dtype, factors.weight.dtype)
    dtype = torch.float32 if full else torch.bfloat16  # float16 lacks the range for confident rows
    samples, owner, tiles = gram_tables(lengths, starts, GRAM_TILE, hidden.device)
    programs = tiles.shape[1]
    high, low = factors.ring(len(hidden), dtype)
    parts, number = 1 if full else 2, len(lengths)
    for chunk, columns in factors.stretches(hidden, targets, reference, torch.zeros_like(reference), high, low):
        zero_targets[(len(hidden),)](
            targets, high, low, samples, owner, chunk, columns, high.stride(0), factors.vocab_start, number,
            PARTS=parts, ROWS=256, enable_fp_fusion=True,
        )  # fmt: skip
        add_grams[(programs,)](
            high, low, samples, tiles, products, chunk, columns, high.stride(0), number, programs,
            TILE=GRAM_TILE, BLOCK_K=16 if full else 64, UPCAST=factors.upcast, PRECISION="ieee", PARTS=parts,
            num_warps=8, num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip


@kept(TABLES)
def gram_tables(
    lengths: tuple[int, ...],
    starts: tuple[int, ...],
    tile: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``samples [3, B]`` and ``owner [n]`` for :func:`zero_targets`, ``tiles [3, programs]`` for :func:`add_grams`."""
    length = torch.tensor(lengths)
    begin = length.cumsum(0) - length
    samples = torch.stack([begin, length, torch.tensor(starts)])
    owner = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(length)
    sides = [triton.cdiv(rows, tile) for rows in lengths]
    triples = [(i, s, t) for i, side in enumerate(sides) for s in range(side) for t in range(s, side)]
    tiles = torch.tensor(triples, dtype=torch.int32).T.contiguous()
    return on_device(samples, device), on_device(owner, device), on_device(tiles, device)
