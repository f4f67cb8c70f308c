"""The CUDA C++ backend: a kernel for statistics of logits, and on Hopper one for hidden states, fused with the product.

On other GPUs, and where the fused kernel does not fit, torch multiplies block by block, followed by the logits kernel.
The other operations run in Triton's kernels or, without Triton, in chunked torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from acqcore.backends import extension
from acqcore.backends.base import Gram, HeadRows, LogitRows
from acqcore.backends.chunked import Chunked
from acqcore.backends.extension import constant_when_compiled, core, matrix, pointer
from acqcore.backends.triton import Triton
from acqcore.defaults import float32_products
from acqcore.head import Head
from acqcore.kept import on_device
from acqcore.slots import BLOCK, gaps, pack, slot_table

#: Block of logits that row_stats holds: at most 1024 rows x 8192 columns, 32 MiB in float32.
BLOCK_ROWS = 1024
BLOCK_COLUMNS = 8192
#: Bound in bytes on a float32 copy of a block's hidden states, and on one of a tile of weights.
COPY_BYTES = 16 << 20
#: Blocks of slots come in pairs.
PAIR = 2

_TRITON = Triton()


def _by_triton(operation: str) -> Any:
    """A method that runs in Triton's kernels or, without Triton, in chunked torch."""

    def run(self: Cuda, *arguments: Any) -> Any:
        serving = _TRITON if _TRITON.unavailable() is None else super(Cuda, self)
        return getattr(serving, operation)(*arguments)

    return run


class Cuda(Chunked):
    name = "cuda"
    description = (
        "CUDA C++: logits in one read; hidden states fused with the product on Hopper, else in blocks by torch"
    )
    devices = ("cuda",)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    longest_gram = _by_triton("longest_gram")
    fill_gram = _by_triton("fill_gram")
    gram_norm = _by_triton("gram_norm")
    head_grad_norm = _by_triton("head_grad_norm")
    fill_hidden_grad = _by_triton("fill_hidden_grad")
    fill_fisher_sums = _by_triton("fill_fisher_sums")
    delta_hash = _by_triton("delta_hash")
    dropout_mask = _by_triton("dropout_mask")
    mixture_stats = _by_triton("mixture_stats")

    def unavailable(self) -> str | None:
        return extension.missing() or _no_device()

    def row_stats(self, rows: HeadRows, gram: Gram | None = None) -> None:
        device = rows.hidden.device
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        fits = fits_hopper(rows.hidden, rows.head.weight, capability)
        kept, rest = None, gram
        # Also if no sample is short, so that the split of the rows never depends on the samples.
        if gram is not None and fits and rows.head.softcap is None:
            kept, rest = gram.split(BLOCK)
        with _stating_memory("row_stats"):
            if fits:
                self._fused(rows, kept)
            else:
                self._blocked(rows)
        if rest is not None:
            self.fill_gram(rows, rest)

    def _fused(
        self,
        rows: HeadRows,
        gram: Gram | None,  # samples of at most BLOCK rows
    ) -> None:
        """Queue the Hopper kernel that fuses product and statistics; nothing is read back from the device."""
        head, device = rows.head, rows.hidden.device.index
        bias = None if head.bias is None else head.bias.float().contiguous()
        targets = None if rows.targets is None else rows.targets.contiguous()
        slots = None
        if gram is not None:
            slots = on_device(cuda_slots(gram.bounds, gram.starts, len(rows.hidden)), rows.hidden.device)
        arguments = core.CudaRowStatsArgs(
            matrix(rows.hidden),
            matrix(head.weight),
            pointer(bias),
            pointer(targets),
            head.softcap or 0.0,
            head.scale,
            rows.temperature,
            head.vocab_start,
            rows.state.data_ptr(),
            rows.index.data_ptr(),
            pointer(slots),
            0 if slots is None else len(slots),
            0 if gram is None else gram.products.data_ptr(),
        )
        size = core.cuda_row_stats_sm90_scratch(arguments)
        scratch = torch.empty(size, dtype=torch.uint8, device=rows.hidden.device)
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            core.cuda_row_stats_sm90(arguments, device, stream, scratch.data_ptr(), size)

    def _blocked(self, rows: HeadRows) -> None:
        """For each block of rows and columns: product, bias, cap, then the kernel, which merges along the columns."""
        head, targets = rows.head, rows.targets
        n, v = len(rows.hidden), len(head.weight)
        kept = None if targets is None else (targets != -100).nonzero()[:, 0]
        if kept is not None and len(kept) < n:
            rows.state.fill_(torch.nan)
            rows.index.fill_(-1)
        else:
            kept = None
        mixed = rows.hidden.dtype != head.weight.dtype
        height, width = _block(head.weight.shape[1], mixed)
        with float32_products():
            buffer = rows.hidden.new_empty(min(n, height) * min(v, width), dtype=torch.float32)
            for begin in range(0, n if kept is None else len(kept), height):
                part = slice(begin, begin + height) if kept is None else kept[begin : begin + height]
                hidden = rows.hidden[part].float() if mixed else rows.hidden[part]
                y = None if targets is None else targets[part]
                state = rows.state.new_empty((7, len(hidden)))
                index = rows.index.new_empty(len(hidden))
                for first, last in itertools.pairwise([*range(0, v, width), v]):
                    z = buffer[: len(hidden) * (last - first)].view(len(hidden), last - first)
                    weight = head.weight[first:last]
                    self._product(hidden, weight.float() if mixed else weight, z)
                    _transform(z, head, first, last)
                    start = head.vocab_start + first
                    self._fold(LogitRows(z, y, rows.temperature, state, index), start, first > 0)
                rows.state[:, part] = state
                rows.index[part] = index

    def logit_stats(self, rows: LogitRows) -> None:
        with _stating_memory("logit_stats"):
            self._fold(rows, 0, False)

    def _product(
        self,
        hidden: torch.Tensor,  # [n, D]
        weight: torch.Tensor,  # [v, D], of the same dtype
        out: torch.Tensor,  # [n, v] float32, written
    ) -> None:
        """``hidden weight^T`` accumulated in float32 and never rounded to half precision."""
        if hidden.dtype == torch.float32:
            torch.mm(hidden, weight.T, out=out)
        else:
            torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)

    def _fold(self, rows: LogitRows, vocab_start: int, accumulate: bool) -> None:
        """Queue the kernel on the current stream; the first column is ``vocab_start``. ``accumulate`` merges the rows
        into their state."""
        logits, device = rows.logits, rows.logits.device.index
        targets = None if rows.targets is None else rows.targets.contiguous()
        size = core.cuda_logit_stats_scratch(device, *logits.shape)
        scratch = torch.empty(size, dtype=torch.uint8, device=logits.device)
        arguments = core.CudaLogitStatsArgs(
            matrix(logits),
            pointer(targets),
            rows.temperature,
            vocab_start,
            accumulate,
            rows.state.data_ptr(),
            rows.index.data_ptr(),
        )
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            core.cuda_logit_stats(arguments, device, stream, scratch.data_ptr(), size)


def fits_hopper(
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D]
    capability: tuple[int, int] | None,  # of their device; None for a CPU
) -> bool:
    """Whether the fused kernel supports these: 16-bit products on sm_90, weights that its copy engine can address.

    Hidden states may have any strides; the kernel packs them if needed.
    """
    row, column = weight.stride()
    return (
        capability == (9, 0)
        and hidden.dtype == weight.dtype
        and hidden.dtype in (torch.bfloat16, torch.float16)
        and weight.data_ptr() % 16 == 0
        and column == 1
        and row % 8 == 0
        and row >= weight.shape[1] > 0
    )


def _block(d: int, mixed: bool) -> tuple[int, int]:
    """Rows and columns of a block under a head of ``d`` columns; ``mixed`` means that weights are copied to float32.

    Columns do not depend on the batch, so neither do the places where parts of a row are merged.
    """
    fit = max(128, COPY_BYTES // (4 * max(1, d)) // 128 * 128)
    return min(BLOCK_ROWS, fit), min(BLOCK_COLUMNS, fit) if mixed else BLOCK_COLUMNS


def _transform(
    z: torch.Tensor,  # [n, last - first] float32, in place: hidden weight^T -> cap(scale (it + bias))
    head: Head,
    first: int,
    last: int,
) -> None:
    if head.bias is not None:
        z += head.bias[first:last].float()
    if head.scale != 1:
        z *= head.scale
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)


@constant_when_compiled
def _no_device() -> str | None:
    """Why the extension has no device to run on, or None."""
    if not core.cuda_built:
        return "acqcore was built without CUDA; reinstall it on a machine with nvcc 12.8 or later"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return core.cuda_unavailable() or None


@contextmanager
def _stating_memory(op: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"cuda {op}: not enough device memory for up to 64 MiB of work space: {str(error).split('. ')[0]}"
        ) from error


@lru_cache(maxsize=64)
def cuda_slots(
    bounds: tuple[tuple[int, int], ...],  # [begin, end) rows of each sample, at most BLOCK, none overlapping
    starts: tuple[int, ...],  # first element of each sample's matrix
    n: int,  # rows
) -> torch.Tensor:
    """``[slots, 4]`` int32: a slot's row, -1 if empty; ``first | last << 16``; ``start`` as int64.

    First and last are the slots of the row's sample, counted from the start of its block. Rows outside all samples form
    stretches of their own, with a start of -1.
    """
    stretches = list(bounds)
    for begin, end in gaps(bounds, n):
        stretches += [(first, min(first + BLOCK, end)) for first in range(begin, end, BLOCK)]
    first_slots, blocks = pack([end - begin for begin, end in stretches])
    rows, samples, firsts, lasts = slot_table(first_slots, -(-blocks // PAIR) * PAIR, stretches)
    table = torch.empty((len(rows), 4), dtype=torch.int32)
    table[:, 0] = rows
    table[:, 1] = (firsts | lasts << 16).where(rows >= 0, 0)
    no_matrix = [-1] * (len(stretches) - len(bounds) + 1)  # the last one for empty slots
    table[:, 2:] = torch.tensor([*starts, *no_matrix])[samples].view(torch.int32).view(-1, 2)
    return table
