"""Row statistics fused with the head's product: logits exist in registers, one tile at a time, and are never stored.

Three launches per chunk of rows:

    gather_scored   packs the hidden states of scored rows on the device, so ignored rows cost no product
    product_fold    one program per (block of rows, split of the vocabulary): loops over the split's tiles and folds
                    each pipelined product into the rows' state in registers
    merge_splits    merges the splits in float64

Tiles and splits depend on the weight shape and the dtype, never on the number of rows, and every reduction has a fixed
order. Results are therefore bitwise reproducible, and a row's result does not depend on its batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from acqcore.kernels.fold import empty_state, fold, holds_target, merge, store_state
from acqcore.kernels.product import Product, chunk_rows, gathered, has_descriptor, logit_tile, place

#: Scratch memory of a call: split states and packed hidden states of the rows in flight.
SCRATCH_BYTES = 56 << 20


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["count"])
def product_fold(
    hidden,  # [n, depth], or its tensor descriptor
    weight,  # [vocab, depth], or its tensor descriptor
    bias,  # [vocab] float32 or None
    targets,  # [n] int32 relative to this weight, or None
    count,  # [1] int32: rows in use; None: n
    partial,  # [7, splits, n] float32, written
    partial_index,  # [splits, n] int32, written
    n,
    vocab,
    depth,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    splits,
    split_tiles,  # tiles of a split
    scale,  # multiplies product and bias
    cap,  # multiplies tanh, if HAS_CAP
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_V: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FLATTEN: tl.constexpr,
    UPCAST: tl.constexpr,  # multiply in float32 for any weight dtype
    PRECISION: tl.constexpr,
):
    block, split = place(tl.program_id(0), tl.cdiv(n, BLOCK_M), splits, GROUP_M)
    first_row = block * BLOCK_M
    if HAS_COUNT:
        if first_row >= tl.load(count):
            return

    rows = first_row + tl.arange(0, BLOCK_M)
    row_targets = rows
    if HAS_TARGETS:
        row_targets = tl.load(targets + rows, mask=rows < n, other=-1)
    state = empty_state(BLOCK_M)
    first_tile = split * split_tiles
    last_tile = min(first_tile + split_tiles, tl.cdiv(vocab, BLOCK_N))
    for tile in tl.range(first_tile, last_tile, flatten=FLATTEN):
        begin = tile * BLOCK_N
        z = logit_tile(
            hidden, weight, bias, first_row, begin, n, vocab, depth, hidden_row, hidden_column, weight_row,
            weight_column, scale, cap, BLOCK_M, BLOCK_N, BLOCK_K, HAS_BIAS, HAS_SCALE, HAS_CAP, EVEN_K, EVEN_V,
            DESCRIPTORS, UPCAST, PRECISION,
        )  # fmt: skip
        holds = False
        if HAS_TARGETS:
            holds = holds_target(row_targets, begin, BLOCK_N)
        state, _, _ = fold(z, begin, row_targets, holds, state, HAS_TARGETS, HAS_BIAS or not EVEN_V)
    store_state(partial, partial_index, split, splits, n, rows, state)


def row_stats(
    product: Product,
    hidden: torch.Tensor,  # [N, D] float32, bfloat16 or float16
    targets: torch.Tensor | None,  # [N] int64, -100 ignored
    state: torch.Tensor,  # [7, rows] float64, columns first_row to first_row + N written
    index: torch.Tensor,  # [rows] int64, written in the same range
    first_row: int = 0,
) -> None:
    """Fill ``state`` and ``index`` of ``acqcore.row_stats.RowStats``; arguments are trusted.

    Nothing is read back from the device, so calls can be captured in a CUDA graph.
    """
    n, depth = hidden.shape
    row_bytes = (depth + 8) * product.dtype(hidden).itemsize + 32 * product.tiles.split(len(product.weight))[0]
    at_once = chunk_rows(n, row_bytes, product.tiles.block_m, SCRATCH_BYTES)
    for first in range(0, n, at_once):
        part = slice(first, first + at_once)
        of_part = None if targets is None else targets[part].contiguous()
        _chunk(product, hidden[part], of_part, state, index, first_row + first)


def _chunk(
    product: Product,
    hidden: torch.Tensor,  # [n, D]
    targets: torch.Tensor | None,  # [n]
    state: torch.Tensor,  # [7, N], columns first to first + n written
    index: torch.Tensor,  # [N]
    first: int,
) -> None:
    packed, packed_targets, position, count = hidden, None, None, None
    if targets is not None or hidden.dtype != product.dtype(hidden) or not has_descriptor(hidden):
        packed, packed_targets, position, count = gathered(product, hidden, targets)
    partial, partial_index = launch_fold(packed, product, packed_targets, count)
    merge(partial, partial_index, position, state, index, first, product.vocab_start)


def launch_fold(
    packed: torch.Tensor,  # [n, D]
    product: Product,
    targets: torch.Tensor | None,  # [n] int32, relative to this weight
    count: torch.Tensor | None,  # [1] int32: rows in use
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch :func:`product_fold`; returns states ``[7, splits, n]`` float32, indices ``[splits, n]`` int32."""
    weight, tiles = product.weight, product.tiles
    (vocab, depth), n = weight.shape, len(packed)
    splits, split_tiles = tiles.split(vocab)
    partial = packed.new_empty((7, splits, n), dtype=torch.float32)
    partial_index = packed.new_empty((splits, n), dtype=torch.int32)
    product_fold[(triton.cdiv(n, tiles.block_m) * splits,)](
        *product.operands(packed), product.bias, targets, count, partial, partial_index, n, vocab, depth,
        *packed.stride(), *weight.stride(), splits, split_tiles, *product.factors,
        HAS_TARGETS=targets is not None, HAS_COUNT=count is not None, EVEN_V=vocab % tiles.block_n == 0,
        FLATTEN=tiles.flatten, **product.options(packed),
    )  # fmt: skip
    return partial, partial_index
