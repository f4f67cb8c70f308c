"""The fused kernel in Triton's interpreter: statistics do not depend on the tiles, nor bits on the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from acqcore.kernels import product, row_stats as kernels
from acqcore.kernels.config import Tiles
from acqcore.kernels.product import Product
from acqcore.row_stats import RowStats
from acqcore.testing import CASES, Case, assert_close_to_oracle, random_case

TILES = Tiles(16, 32, 16, 4, 1, 2, 3, descriptors=False, flatten=False)
#: Cases that are cheap in tiles of 16 x 32; they reach boundaries, -inf tiles and rising maxima many times.
SMALL = (
    "random", "all logits -150", "all logits equal", "rising logits", "falling logits", "-inf columns",
    "-inf first tiles", "-inf last tiles", "confident 1e-20", "ties", "V = 1", "V = 2", "V = 255", "V = 256",
    "V = 257", "D = 1", "strided", "some rows ignored", "all rows ignored", "no targets", "everything",
)  # fmt: skip


def _run(case: Case, tiles: Tiles, rows: slice = slice(None)) -> RowStats:
    hidden = case.hidden[rows]
    targets = None if case.targets is None else case.targets[rows]
    state = torch.full((7, len(hidden)), 123.0, dtype=torch.float64)
    index = torch.full((len(hidden),), 123)
    head, bias = case.head, None if case.head.bias is None else case.head.bias.float()
    how = Product(
        head.weight, bias, head.softcap, head.scale, case.temperature, head.vocab_start, tiles, "ieee", True
    )  # fmt: skip
    kernels.row_stats(how, hidden, targets, state, index)
    norm = torch.linalg.vector_norm(hidden, dim=1, dtype=torch.float32)
    if targets is not None:
        norm = norm.where(targets != -100, torch.nan)
    return RowStats(state, index, targets, norm)


@pytest.mark.parametrize("name", SMALL)
def test_small_tiles(name):
    case = CASES[name]()
    assert_close_to_oracle(_run(case, TILES), case.oracle())


@pytest.mark.parametrize("splits", [1, 2, 5, 16, 1000])
def test_any_number_of_splits(splits):
    case = random_case(10, 40, 509, std=8.0, bias=True)
    assert_close_to_oracle(_run(case, replace(TILES, splits=splits)), case.oracle())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("descriptors", [False, True])
def test_bits_of_a_row_do_not_depend_on_its_batch(descriptors, dtype, in_eighths):
    """A row has the same bits alone, beside others, in another block of rows, and after ignored rows."""
    case = in_eighths(random_case(67, 48, 100, bias=True)).to(dtype)
    case.targets[[3, 30, 31, 32, 60]] = -100
    tiles = replace(TILES, descriptors=descriptors)
    whole = _run(case, tiles)
    for begin, end in [(0, 1), (40, 41), (66, 67), (29, 46), (2, 67)]:
        part = _run(case, tiles, slice(begin, end))
        assert torch.equal(part.state.nan_to_num(7.0), whole.state[:, begin:end].nan_to_num(7.0))
        assert torch.equal(part.max_index, whole.max_index[begin:end])


def test_bits_do_not_depend_on_how_rows_are_grouped(in_eighths, monkeypatch):
    case = in_eighths(random_case(70, 48, 200, bias=True))
    whole = _run(case, TILES)
    assert torch.equal(_run(case, replace(TILES, group_m=1)).state, whole.state)
    assert torch.equal(_run(case, replace(TILES, group_m=100)).state, whole.state)
    row_bytes = 4 * (48 + 8) + 32 * 3
    monkeypatch.setattr(kernels, "SCRATCH_BYTES", 40 * row_bytes)
    rows = [product.chunk_rows(n, row_bytes, 16, 40 * row_bytes) for n in (0, 1, 32, 33, 70, 97)]
    assert rows == [16, 16, 32, 32, 32, 32]
    assert torch.equal(_run(case, TILES).state, whole.state)


def test_descriptors_read_what_pointers_read():
    case = random_case(37, 72, 333)  # no tile divides 72 and 333
    by_pointer, by_descriptor = (_run(case, replace(TILES, descriptors=d)) for d in (False, True))
    assert torch.equal(by_pointer.state, by_descriptor.state)


def test_descriptors_where_strides_do_not_allow_them():
    tiles = replace(TILES, descriptors=True)
    for case in (random_case(5, 33, 70), CASES["strided"]()):
        assert_close_to_oracle(_run(case, tiles), case.oracle())


def test_ignored_rows_take_no_part(in_eighths):
    """Their hidden states may be anything, and a block without scored rows does nothing."""
    case = in_eighths(random_case(80, 32, 100, bias=True))
    expected = _run(case, TILES)
    ignored = torch.arange(80) % 3 > 0
    case.targets[ignored] = -100
    case.hidden[ignored] = torch.nan
    got = _run(case, TILES)
    assert got.state[:, ignored].isnan().all()
    assert (got.max_index[ignored] == -1).all()
    assert torch.equal(got.state[:, ~ignored], expected.state[:, ~ignored])


@pytest.mark.parametrize(
    ("depth", "vocab", "itemsize"),
    [(4096, 131072, 2), (4096, 131072, 4), (576, 49152, 2), (16384, 262144, 4), (1, 1, 2), (2304, 256000, 2)],
)
def test_scratch_is_bounded(depth, vocab, itemsize):
    tiles = Tiles(128, 256, 64, 8, 3, 16, 128, descriptors=True, flatten=False)
    row_bytes = itemsize * (depth + 8) + 32 * tiles.split(vocab)[0]
    rows = product.chunk_rows(100_000, row_bytes, 128, kernels.SCRATCH_BYTES)
    assert rows % 128 == 0
    assert rows * row_bytes <= 64 << 20


def test_chunks_are_of_nearly_equal_length():
    row_bytes = 2 * (4096 + 8) + 32 * 128
    rows = [product.chunk_rows(n, row_bytes, 128, kernels.SCRATCH_BYTES) for n in (4096, 4200, 8192, 16384)]
    assert rows == [4096, 4224, 4096, 4096]


def test_no_scratch_for_hidden_states_that_need_no_packing(monkeypatch):
    packed = []
    gather = product.gather_scored

    class Recording:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            packed.append(grid)
            return gather[grid]

    monkeypatch.setattr(product, "gather_scored", Recording())
    _run(random_case(20, 32, 50, targets=False), TILES)
    assert not packed
    _run(random_case(20, 33, 50, targets=False), TILES)
    assert len(packed) == 1
