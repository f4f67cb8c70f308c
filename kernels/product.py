"""The product shared by all kernels of the head: packs hidden states and forms one tile of logits in registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from acqcore.kernels.config import Tiles
from acqcore.kernels.fold import LOG2E, widen

#: Elements of a tile of ``gather_scored``.
GATHER_TILE = 1 << 14
#: Number of batch shapes whose tables stay on the device.
TABLES = 64


@triton.jit
def scored_places(
    targets,  # [n] int64, -100 ignored
    begin,  # first requested row
    n,
    ROWS: tl.constexpr,
    SCAN: tl.constexpr,
):
    """For ``ROWS`` rows: target, whether scored, index among scored rows; and the number of scored rows to the end."""
    rows = begin + tl.arange(0, ROWS)
    target = tl.load(targets + rows, mask=rows < n, other=-100)
    scored = target != -100
    before = 0
    for i in range(0, begin, SCAN):  # every program recounts, as n is at most a few thousand
        earlier = i + tl.arange(0, SCAN)
        other = tl.load(targets + earlier, mask=earlier < begin, other=-100)
        before += tl.sum((other != -100).to(tl.int32), axis=0)
    ones = scored.to(tl.int32)
    through = before + tl.cumsum(ones, axis=0)
    return target, scored, through - ones, tl.max(through, axis=0)


# Row counts are not specialised, so a new N neither compiles a new variant nor changes the rounding.
@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["targets", "position", "count"])
def gather_scored(
    hidden,  # [n, depth]
    targets,  # [n] int64, -100 ignored; None: every row is scored
    packed,  # [n, depth] written: the scored rows in order
    packed_targets,  # [n] int32, written: relative to vocab_start
    position,  # [n] int32, written: a row's index in ``packed``, -1 if ignored
    count,  # [1] int32, written: number of scored rows
    n,
    depth,
    hidden_row,
    hidden_column,
    packed_row,
    vocab_start,
    HAS_TARGETS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCAN: tl.constexpr,
):
    begin = tl.program_id(0) * ROWS
    rows = begin + tl.arange(0, ROWS)
    inside = rows < n
    place = rows
    scored = inside
    if HAS_TARGETS:
        target, scored, place, through = scored_places(targets, begin, n, ROWS, SCAN)
        if tl.program_id(1) == 0:
            tl.store(position + rows, tl.where(scored, place, -1), mask=inside)
            tl.store(packed_targets + place, (target - vocab_start).to(tl.int32), mask=scored)
            if begin + ROWS >= n:
                tl.store(count, through)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = scored[:, None] & (columns < depth)[None, :]
    source = rows.to(tl.int64)[:, None] * hidden_row + columns.to(tl.int64)[None, :] * hidden_column
    value = tl.load(hidden + source, mask=mask, other=0.0)
    destination = place.to(tl.int64)[:, None] * packed_row + columns[None, :]
    tl.store(packed + destination, value.to(packed.dtype.element_ty), mask=mask)


@triton.jit
def tanh(y):
    """Within 2 ulp: an odd polynomial near 0 (Cephes tanhf), else (1 - t) / (1 + t) with t = exp(-2 |y|)."""
    a = tl.abs(y)
    t = tl.exp2(a * (-2 * LOG2E))
    far = (1 - t) / (1 + t)
    s = y * y
    p = s * -5.70498872745e-3 + 2.06390887954e-2
    p = p * s + -5.37397155531e-2
    p = p * s + 1.33314422036e-1
    p = p * s + -3.33332819422e-1
    return tl.where(a < 0.625, p * s * y + y, tl.where(y < 0, -far, far))


@triton.jit
def product_tile(
    a,  # [rows_a, depth], or its tensor descriptor
    b,  # [rows_b, depth], or its tensor descriptor
    first_a,  # the tile's first row in a
    first_b,  # and in b
    rows_a,
    rows_b,
    depth,
    a_row,
    a_column,
    b_row,
    b_column,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,  # multiply in float32 for all dtypes
    PRECISION: tl.constexpr,
):
    """A tile of ``a b^T``, ``[BLOCK_A, BLOCK_B]`` float32; undefined beyond ``rows_a`` and ``rows_b``."""
    z = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    if not DESCRIPTORS:
        inner = tl.arange(0, BLOCK_K)
        of_a = tl.minimum(first_a + tl.arange(0, BLOCK_A), rows_a - 1).to(tl.int64)[:, None] * a_row
        a_at = a + of_a + inner.to(tl.int64)[None, :] * a_column
        of_b = tl.maximum(tl.minimum(first_b + tl.arange(0, BLOCK_B), rows_b - 1), 0).to(tl.int64)[None, :] * b_row
        b_at = b + of_b + inner.to(tl.int64)[:, None] * b_column
    for k in range(0, depth, BLOCK_K):
        if DESCRIPTORS:
            x = a.load([first_a, k])
            y = b.load([first_b, k]).T
        else:
            if EVEN_K:
                x = tl.load(a_at)
                y = tl.load(b_at)
            else:
                x = tl.load(a_at, mask=(inner < depth - k)[None, :], other=0.0)
                y = tl.load(b_at, mask=(inner < depth - k)[:, None], other=0.0)
            a_at += BLOCK_K * a_column
            b_at += BLOCK_K * b_column
        if UPCAST:
            x = widen(x)
            y = widen(y)
        if x.dtype == tl.float32 and PRECISION == "ieee":
            # Sum each step first: added one by one, 576 products lose 1.2e-4 of a logit near 100, twice the error
            # allowed for a runner-up's probability (H100, H200). tl.fma keeps Triton from fusing the sum into the dot.
            z = tl.fma(tl.dot(x, y, input_precision=PRECISION), tl.full((BLOCK_A, BLOCK_B), 1.0, tl.float32), z)
        else:
            z = tl.dot(x, y, z, input_precision=PRECISION)
    return z


@triton.jit
def logit_tile(
    hidden,  # [n, depth], or its tensor descriptor
    weight,  # [vocab, depth], or its tensor descriptor
    bias,  # [vocab] float32 or None
    first_row,  # of the tile
    begin,  # the tile's first column
    n,
    vocab,
    depth,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    scale,  # multiplies product and bias, if HAS_SCALE
    cap,  # multiplies tanh, if HAS_CAP
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_V: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits ``[BLOCK_M, BLOCK_N]`` in float32; -inf outside the vocabulary, undefined beyond row ``n``."""
    z = product_tile(
        hidden, weight, first_row, begin, n, vocab, depth, hidden_row, hidden_column, weight_row, weight_column,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS, UPCAST, PRECISION,
    )  # fmt: skip
    columns = begin + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=columns < vocab, other=0.0)[None, :]
    if HAS_SCALE:
        z *= scale
    if HAS_CAP:
        z = tanh(z) * cap
    if not EVEN_V:
        z = tl.where((columns < vocab)[None, :], z, float("-inf"))
    return z


@triton.jit
def place(
    program,
    row_blocks,
    splits,
    GROUP_M: tl.constexpr,
):
    """(row block, split) of a program: neighbours share a split's weights and GROUP_M row blocks stay in L2."""
    group_programs = GROUP_M * splits
    group = program // group_programs
    group_blocks = min(row_blocks - group * GROUP_M, GROUP_M)
    within = program % group_programs
    return group * GROUP_M + within % group_blocks, within // group_blocks


def has_descriptor(matrix: torch.Tensor) -> bool:
    """Whether the sm_90 copy engine can load ``matrix [rows, columns]``: contiguous rows, aligned to 16 bytes."""
    row, column = matrix.stride()
    aligned = matrix.data_ptr() % 16 == 0 and row * matrix.element_size() % 16 == 0
    return aligned and column == 1 and row >= matrix.shape[1] > 0


def descriptor(matrix: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


@dataclass(frozen=True, eq=False)
class Product:
    """A head and the tiles (:func:`acqcore.kernels.config.tiles_for`) in which its product with rows is formed."""

    weight: torch.Tensor  # [V, D]
    bias: torch.Tensor | None  # [V] float32, contiguous
    softcap: float | None
    scale: float
    temperature: float
    vocab_start: int
    tiles: Tiles
    precision: str  # of float32 products, as in ``triton.language.dot``: ieee, tf32 or tf32x3
    upcast: bool  # multiply in float32 for any dtypes, as is always done if they differ

    @property
    def factors(self) -> tuple[float, float]:
        """``scale`` and ``cap`` of the kernels, which multiply the product and its tanh."""
        return self.scale / self._over, (self.softcap or 1.0) / self.temperature

    @property
    def _over(self) -> float:
        return self.softcap or self.temperature

    def dtype(self, hidden: torch.Tensor) -> torch.dtype:
        """The dtype in which hidden states are packed."""
        own = self.weight.dtype  # promote_types is dispatched like an operation, so it is called only if needed
        return own if hidden.dtype == own else torch.promote_types(hidden.dtype, own)

    def operands(self, hidden: torch.Tensor) -> tuple[Any, Any]:
        """``hidden [n, D]`` and the weight, as tensor descriptors if the copy engine can load both."""
        if not self._has_descriptors(hidden):
            return hidden, self.weight
        tiles = self.tiles
        of_hidden = descriptor(hidden, tiles.block_m, tiles.block_k)
        return of_hidden, descriptor(self.weight, tiles.block_n, tiles.block_k)

    def options(self, hidden: torch.Tensor) -> dict[str, Any]:
        """Compile-time arguments of the kernels that take :meth:`operands`."""
        tiles = self.tiles
        return {
            "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k, "GROUP_M": tiles.group_m,
            "HAS_BIAS": self.bias is not None, "HAS_SCALE": self.scale != self._over,
            "HAS_CAP": self.softcap is not None, "EVEN_K": self.weight.shape[1] % tiles.block_k == 0,
            "DESCRIPTORS": self._has_descriptors(hidden),
            "UPCAST": self.upcast or hidden.dtype != self.weight.dtype, "PRECISION": self.precision,
            "num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True,
        }  # fmt: skip

    def _has_descriptors(self, hidden: torch.Tensor) -> bool:
        return self.tiles.descriptors and has_descriptor(hidden) and has_descriptor(self.weight)


def empty_rows(n: int, depth: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised ``[n, depth]``, whose rows are aligned to 16 bytes for descriptors."""
    return torch.empty((n, triton.cdiv(depth, 8) * 8), dtype=dtype, device=device)[:, :depth]


def gathered(
    product: Product,
    hidden: torch.Tensor,  # [n, D]
    targets: torch.Tensor | None,  # [n] int64, contiguous
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """``packed``, ``packed_targets``, ``position`` and ``count`` of :func:`gather_scored`; without targets all rows
    are packed, and the others are None."""
    n, depth = hidden.shape
    packed = empty_rows(n, depth, product.dtype(hidden), hidden.device)
    packed_targets = position = count = None
    if targets is not None:
        packed_targets, position = hidden.new_empty((2, n), dtype=torch.int32)
        count = hidden.new_empty(1, dtype=torch.int32)
    rows = product.tiles.block_m
    columns = GATHER_TILE // rows
    gather_scored[(triton.cdiv(n, rows), max(triton.cdiv(depth, columns), 1))](
        hidden, targets, packed, packed_targets, position, count, n, depth, *hidden.stride(), packed.stride(0),
        product.vocab_start, HAS_TARGETS=targets is not None, ROWS=rows, COLUMNS=columns, SCAN=1024,
        enable_fp_fusion=True,
    )  # fmt: skip
    return packed, packed_targets, position, count


def chunk_rows(n: int, row_bytes: int, multiple: int, scratch_bytes: int) -> int:
    """Rows per chunk, a multiple of ``multiple``, that fit in the scratch memory.

    Chunks have nearly equal lengths, as a short last one would leave multiprocessors idle.
    """
    blocks, most = triton.cdiv(n, multiple), max(scratch_bytes // row_bytes // multiple, 1)
    chunks = max(triton.cdiv(blocks, most), 1)
    return max(triton.cdiv(blocks, chunks), 1) * multiple
