"""The norm of each sample's head gradient from its Gram matrix and its exactly computed target columns.

If ``w``, ``h`` and ``delta`` are a row's weight, hidden state and gradient in the logits, and u runs over the sample's
distinct targets, the squared norm is

    sum_st <h_s, h_t> (c_s c_t products_st + w_s w_t sum_u delta_s[u] delta_t[u])

Launches, the first two on tiles of T x T and separately for short and long samples:

    target_delta   w delta from the logits of a sample's rows for the weight rows of its targets, and <h_s, h_t>
    contract       a tile's part of the sum, in float64
    sum_tiles      sums a sample's parts in order

A sample is tiled from its first row by its own length, so its norm does not depend on the batch.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from acqcore.kept import kept, on_device
from acqcore.kernels.fold import LOG2E, widen
from acqcore.kernels.product import TABLES, Product, tanh as exact_tanh

#: Tile size for samples of at most SHORT rows, and for longer ones.
SHORT, LONG = 16, 64
#: Parts of a sample that ``sum_tiles`` adds at a time.
PARTS_AT_ONCE = 64


@triton.jit(do_not_specialize=["all_rows", "number", "programs"])
def target_delta(
    hidden,  # [N, depth]
    weight,  # [vocab, depth]
    bias,  # [vocab] float32 or None
    targets,  # [N] int64
    state,  # [7, N] float64, of the whole vocabulary
    index,  # [N] int64
    weights,  # [N] float64
    tiles,  # [3, programs] int32: sample, tile of rows, tile of columns
    samples,  # [3, number] int64: first row, length, start of the sample's matrix
    keys,  # [sum T^2] float32, written: <h_s, h_t>, + 1 with a bias; 0 in ignored rows
    delta,  # [sum T^2] float32, written: w_s delta_s at the target of row u, 0 if an earlier row has that target
    all_rows,
    number,
    programs,
    vocab,
    depth,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    vocab_start,
    scale,  # multiplies product and bias
    cap,  # multiplies tanh, if HAS_CAP
    slope,  # scale / temperature
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    sample = tl.load(tiles + program)
    begin = tl.load(samples + sample)
    length = tl.load(samples + number + sample)
    start = tl.load(samples + 2 * number + sample)
    within = tl.arange(0, TILE)
    s = tl.load(tiles + programs + program) * TILE + within
    u = tl.load(tiles + 2 * programs + program) * TILE + within
    row_s = begin + tl.minimum(s, length - 1)
    row_u = begin + tl.minimum(u, length - 1)
    y_s = tl.load(targets + row_s)
    y_u = tl.load(targets + row_u)
    column = y_u - vocab_start
    here = (y_u != -100) & (column >= 0) & (column < vocab)
    column = tl.where(here, column, 0)

    inner = tl.arange(0, BLOCK_K)
    s_at = hidden + row_s[:, None] * hidden_row + inner.to(tl.int64)[None, :] * hidden_column
    u_at = hidden + row_u[None, :] * hidden_row + inner.to(tl.int64)[:, None] * hidden_column
    w_at = weight + column[None, :] * weight_row + inner.to(tl.int64)[:, None] * weight_column
    k = tl.zeros((TILE, TILE), tl.float32)
    z = tl.zeros((TILE, TILE), tl.float32)
    for first in range(0, depth, BLOCK_K):
        if EVEN_K:
            a = tl.load(s_at)
            b = tl.load(u_at)
            w = tl.load(w_at)
        else:
            left = inner < depth - first
            a = tl.load(s_at, mask=left[None, :], other=0.0)
            b = tl.load(u_at, mask=left[:, None], other=0.0)
            w = tl.load(w_at, mask=left[:, None], other=0.0)
        if UPCAST:
            a = widen(a)
            b = widen(b)
            w = widen(w)
        k = tl.dot(a, b, k, input_precision="ieee")
        z = tl.dot(a, w, z, input_precision="ieee")
        s_at += BLOCK_K * hidden_column
        u_at += BLOCK_K * hidden_column
        w_at += BLOCK_K * weight_column
    if HAS_BIAS:
        k += 1
        z += tl.load(bias + column)[None, :]
    z *= scale
    factor = tl.load(weights + row_s) * slope
    largest = tl.load(state + row_s)
    r = tl.load(state + 2 * all_rows + row_s)
    factor = (factor / (1 + r)).to(tl.float32)
    cap_slope = tl.full((TILE, TILE), 1.0, tl.float32)
    if HAS_CAP:
        z = exact_tanh(z)
        cap_slope = 1 - z * z
        z *= cap
    largest = largest.to(tl.float32)
    r = r.to(tl.float32)
    e = tl.exp2((z - largest[:, None]) * LOG2E)
    same = y_s[:, None] == y_u[None, :]
    top = (tl.load(index + row_s) == y_s)[:, None]
    d = tl.where(same, tl.where(top, -r[:, None], e - (1 + r[:, None])), e) * cap_slope * factor[:, None]

    repeated = tl.zeros((TILE,), tl.int32)
    for first in range(0, tl.max(u, axis=0), TILE):
        other = first + within
        y = tl.load(targets + begin + other, mask=other < length, other=-100)
        equal = (y[:, None] == y_u[None, :]) & (other[:, None] < u[None, :])
        repeated = tl.maximum(repeated, tl.max(equal.to(tl.int32), axis=0))
    scored = y_s != -100
    d = tl.where(scored[:, None] & (here & (repeated == 0))[None, :], d, 0.0)
    k = tl.where(scored[:, None] & (y_u != -100)[None, :], k, 0.0)
    inside = (s < length)[:, None] & (u < length)[None, :]
    at = start + s[:, None] * length + u[None, :]
    tl.store(keys + at, k, mask=inside)
    tl.store(delta + at, d, mask=inside)


@triton.jit(do_not_specialize=["all_rows", "number", "programs"], do_not_specialize_on_alignment=["parts"])
def contract(
    products,  # [sum T^2] float32
    keys,  # [sum T^2] float32
    delta,  # [sum T^2] float32
    targets,  # [N] int64
    state,  # [7, N] float64, of the whole vocabulary
    local_max,  # [N] float64
    weights,  # [N] float64
    tiles,  # [3, programs] int32
    samples,  # [3, number] int64
    parts,  # [programs] float64, written
    all_rows,
    number,
    programs,
    slope,
    TILE: tl.constexpr,
):
    program = tl.program_id(0)
    sample = tl.load(tiles + program)
    begin = tl.load(samples + sample)
    length = tl.load(samples + number + sample)
    start = tl.load(samples + 2 * number + sample)
    within = tl.arange(0, TILE)
    s = tl.load(tiles + programs + program) * TILE + within
    t = tl.load(tiles + 2 * programs + program) * TILE + within
    at_s = start + s * length
    at_t = start + t * length
    total = tl.zeros((TILE, TILE), tl.float32)
    for first in range(0, length, 16):
        u = first + tl.arange(0, 16)
        left = tl.load(
            delta + at_s[:, None] + u[None, :], mask=(s < length)[:, None] & (u < length)[None, :], other=0.0
        )
        right = tl.load(
            delta + at_t[None, :] + u[:, None], mask=(t < length)[None, :] & (u < length)[:, None], other=0.0
        )
        total = tl.dot(left, right, total, input_precision="ieee")
    c_s = shift(targets, state, local_max, weights, begin + s, s < length, all_rows, slope)
    c_t = shift(targets, state, local_max, weights, begin + t, t < length, all_rows, slope)
    inside = (s < length)[:, None] & (t < length)[None, :]
    at = at_s[:, None] + t[None, :]
    g = tl.load(products + at, mask=inside, other=0.0).to(tl.float64)
    g = c_s[:, None] * g * c_t[None, :] + total.to(tl.float64)
    k = tl.load(keys + at, mask=inside, other=0.0).to(tl.float64)
    g = tl.where(k == 0, 0.0, g * k)  # products of ignored rows may be NaN
    tl.store(parts + program, tl.sum(tl.sum(g, axis=1), axis=0))


@triton.jit
def shift(targets, state, local_max, weights, row, inside, all_rows, slope):
    """Factor from unnormalised exponentials to weighted probabilities, times the slope; 0 in ignored rows."""
    scored = inside & (tl.load(targets + row, mask=inside, other=-100) != -100)
    d = tl.load(local_max + row, mask=scored, other=0.0) - tl.load(state + row, mask=scored, other=0.0)
    r = tl.load(state + 2 * all_rows + row, mask=scored, other=0.0)
    return tl.load(weights + row, mask=scored, other=0.0) * slope * tl.exp(d) / (1 + r)


@triton.jit(do_not_specialize=["number"])
def sum_tiles(
    parts,  # [programs] float64, contiguous per sample
    firsts,  # [2, number] int32: where a sample's parts begin and end
    squared,  # [number] float64, written
    number,
    AT_ONCE: tl.constexpr,
):
    sample = tl.program_id(0)
    first = tl.load(firsts + sample)
    end = tl.load(firsts + number + sample)
    total = tl.zeros((AT_ONCE,), tl.float64)
    for i in range(first, end, AT_ONCE):
        at = i + tl.arange(0, AT_ONCE)
        total += tl.load(parts + at, mask=at < end, other=0.0)
    tl.store(squared + sample, tl.sum(total, axis=0))


def gram_norm(
    product: Product,
    hidden: torch.Tensor,  # [N, D]
    targets: torch.Tensor,  # [N] int64, -100 ignored
    bounds: tuple[tuple[int, int], ...],  # [begin, end) rows of each sample
    starts: tuple[int, ...],  # first element of each sample's matrix in ``products``
    state: torch.Tensor,  # [7, N] float64, of the whole vocabulary
    index: torch.Tensor,  # [N] int64, of the whole vocabulary
    products: torch.Tensor,  # [sum T^2] float32
    local_max: torch.Tensor,  # [N] float64: reference of ``products``
    weights: torch.Tensor,  # [N] float64
    squared: torch.Tensor,  # [samples] float64, written
) -> None:
    """``Backend.gram_norm``; arguments are trusted."""
    weight, bias, (n, depth) = product.weight, product.bias, hidden.shape
    targets = targets.contiguous()
    cut = cuts(bounds, starts, hidden.device)
    keys, delta = products.new_empty((2, len(products)))
    programs_of_short = cut.short.shape[1]
    parts = products.new_empty(programs_of_short + cut.long.shape[1], dtype=torch.float64)
    slope = product.scale / product.temperature
    upcast = product.upcast or hidden.dtype != weight.dtype
    block_k = 16 if torch.float32 in (hidden.dtype, weight.dtype) else 64
    halves = (cut.short, SHORT, parts[:programs_of_short]), (cut.long, LONG, parts[programs_of_short:])
    for tiles, tile, part in halves:
        programs = tiles.shape[1]
        if not programs:
            continue
        target_delta[(programs,)](
            hidden, weight, bias, targets, state, index, weights, tiles, cut.samples, keys, delta, n, len(bounds),
            programs, len(weight), depth, *hidden.stride(), *weight.stride(), product.vocab_start, *product.factors,
            slope, HAS_BIAS=bias is not None, HAS_CAP=product.softcap is not None, EVEN_K=depth % block_k == 0,
            UPCAST=upcast, TILE=tile, BLOCK_K=block_k, num_warps=4, num_stages=3, enable_fp_fusion=True,
        )  # fmt: skip
        contract[(programs,)](
            products, keys, delta, targets, state, local_max, weights, tiles, cut.samples, part, n, len(bounds),
            programs, slope, TILE=tile, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    sum_tiles[(len(bounds),)](parts, cut.firsts, squared, len(bounds), AT_ONCE=PARTS_AT_ONCE)


@dataclass(frozen=True, eq=False)
class Cut:
    """Samples and their tiles; tensors are on the device."""

    samples: torch.Tensor  # [3, samples] int64: first row, length, start of the sample's matrix
    short: torch.Tensor  # [3, programs] int32: sample, tile of rows, tile of columns
    long: torch.Tensor  # same layout
    firsts: torch.Tensor  # [2, samples] int32: where a sample's parts begin and end


@kept(TABLES)
def cuts(bounds: tuple[tuple[int, int], ...], starts: tuple[int, ...], device: torch.device) -> Cut:
    begins, ends = torch.tensor(list(itertools.chain.from_iterable(bounds))).view(-1, 2).T
    lengths = ends - begins
    tables = torch.stack([begins, lengths, torch.tensor(starts)]), *tile_tables(lengths)
    return Cut(*(on_device(table, device) for table in tables))


def tile_tables(
    lengths: torch.Tensor,  # [samples] int64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``tiles [3, programs]`` of short and of long samples, and ``firsts [2, samples]``; int32, on the host."""
    is_long = lengths > SHORT
    side = torch.where(is_long, (lengths + LONG - 1) // LONG, (lengths + SHORT - 1) // SHORT)  # [samples]
    order = is_long.to(torch.uint8).argsort(stable=True)
    ends = side[order].square().cumsum(0)
    firsts = torch.empty((2, len(lengths)), dtype=torch.int64)
    firsts[1, order] = ends
    firsts[0, order] = ends - side[order].square()
    sample = order.repeat_interleave(side[order].square())
    within = torch.arange(len(sample)) - firsts[0, sample]
    tiles = torch.stack([sample, within // side[sample], within % side[sample]]).int()
    split = int(side[~is_long].square().sum())
    return tiles[:, :split].contiguous(), tiles[:, split:].contiguous(), firsts.int()
