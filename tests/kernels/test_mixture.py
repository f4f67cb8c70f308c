"""Kernels of the mixture of draws in Triton's interpreter, with cuts that the committed tiles do not reach here.

``test_cuts`` catches wrong tail tiles of vocabulary or tokens (no tile divides V or N) and, with 19 and 5 draws, draws
merged without a common maximum and padding that counts. ``test_packed_rows`` catches the mask of another row, draw or
column. ``test_kernels_run`` catches the reference running instead of a kernel.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from acqcore.backends import DrawRows, Dropout, get as get_backend
from acqcore.backends.triton import Triton
from acqcore.head import Head
from acqcore.kernels import block_mixture, mixture
from acqcore.kernels.block_mixture import block_mixture_stats
from acqcore.kernels.config import Tiles
from acqcore.kernels.mixture import Layout, Masks, mixture_stats
from acqcore.kernels.product import Product
from acqcore.philox import keep_mask, threshold
from acqcore.testing import Case, random_case


def _tiles(block_m: int, block_n: int, block_k: int = 16, splits: int = 3, descriptors: bool = False) -> Tiles:
    return Tiles(block_m, block_n, block_k, 4, 1, 2, splits, descriptors, flatten=False)


def _run(case: Case, draws: int, width: int, tiles: Tiles, p: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """State ``[6, N]`` and votes ``[K, N]`` from the kernels, in the block form unless ``width`` is 1."""
    n = len(case.hidden)
    positions = torch.arange(n)
    samples = torch.full_like(positions, 4)
    masks = Masks(samples, positions, width, 11, threshold(p))
    state, votes = torch.empty(6, n, dtype=torch.float64), torch.empty(draws, n, dtype=torch.int64)
    head = Dropout(p, "block", width, 11, samples, positions).of_head(case.head)
    how = Product(head.weight, head.bias.float(), head.softcap, head.scale, 1.0, 0, tiles, "ieee", True)
    inputs = case.hidden, case.targets, draws, masks, state, votes
    if width == 1:
        mixture_stats(how, how, *inputs)
    else:
        block_mixture_stats(how, *inputs)
    return state, votes


def _oracle(case: Case, draws: int, width: int, p: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    exact = case.to(torch.float64)
    n = len(case.hidden)
    positions = torch.arange(n)
    dropout = Dropout(p, "element" if width == 1 else "block", width, 11, torch.full_like(positions, 4), positions)
    state, votes = torch.empty(6, n, dtype=torch.float64), torch.empty(draws, n, dtype=torch.int64)
    rows = DrawRows(exact.hidden, (exact.head,), case.targets, draws, dropout, state, votes)
    get_backend("eager").mixture_stats(rows)
    return state, votes


def _case(n: int, d: int, v: int, **options: Any) -> Case:
    """A third of the rows ignored, column 7 impossible."""
    case = random_case(n, d, v, bias=True, seed=5, **options)
    case.targets[case.targets == 7] = 8
    case.targets[1::3] = -100
    case.head.bias[7] = -torch.inf
    return case


@pytest.mark.parametrize(
    ("draws", "width", "tiles", "dtype"),
    [
        (8, 1, _tiles(64, 16), torch.float32),
        (2, 1, _tiles(64, 32), torch.float32),
        (5, 1, _tiles(64, 16, descriptors=True), torch.float32),  # padded to 8
        (5, 1, _tiles(64, 16, descriptors=True), torch.bfloat16),
        (19, 1, _tiles(16, 128), torch.float32),  # in two rounds, the second padded
        (8, 16, _tiles(16, 32), torch.float32),
        (8, 32, _tiles(16, 32), torch.float32),  # two product steps per block, and a short last block
        (8, 32, _tiles(16, 32), torch.bfloat16),
        (5, 16, _tiles(32, 16, descriptors=True), torch.float32),
        (3, 1000, _tiles(16, 32), torch.float32),  # one block for all columns
    ],
)
def test_cuts(draws, width, tiles, dtype):
    case = _case(11, 56 if tiles.descriptors else 43, 107, softcap=9.0, scale=0.7).to(dtype)
    state, votes = _run(case, draws, width, tiles)
    expected, expected_votes = _oracle(case, draws, width)
    torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(votes, expected_votes)


@pytest.mark.parametrize("depth", [100, 128])
def test_masks_of_more_blocks_than_a_word_holds(depth):
    """Seven blocks, with a short last block and a partly filled word, and eight blocks."""
    case = _case(11, depth, 107)
    state, votes = _run(case, 8, 16, _tiles(16, 32))
    expected, expected_votes = _oracle(case, 8, 16)
    torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(votes, expected_votes)


@pytest.mark.parametrize("width", [1, 16])
def test_a_row_does_not_depend_on_its_batch(width, in_eighths, monkeypatch):
    """A row's bits depend neither on the rows beside it nor on how many are processed at a time."""
    case = in_eighths(_case(20, 32, 60))
    tiles = _tiles(16, 32)
    state, votes = _run(case, 4, width, tiles)
    short, short_votes = _run(Case(case.hidden[:6], case.head, case.targets[:6]), 4, width, tiles)
    assert torch.equal(short.nan_to_num(9), state[:, :6].nan_to_num(9))
    assert torch.equal(short_votes, votes[:, :6])
    for module in (mixture, block_mixture):
        monkeypatch.setattr(module, "SCRATCH_BYTES", 1 << 16)
    chunked, _ = _run(case, 4, width, tiles)
    assert torch.equal(chunked.nan_to_num(9), state.nan_to_num(9))


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("draws", [4, 6])
def test_packed_rows(draws, width, monkeypatch):
    """Every packed row is its token's hidden state under its draw's mask, bit for bit; padding is zero."""
    case = _case(21, 45, 40).to(torch.bfloat16)
    seen: list[torch.Tensor] = []

    class EnoughError(Exception):
        pass

    def stop(packed: torch.Tensor, *_: Any) -> None:
        seen.append(packed)
        raise EnoughError

    monkeypatch.setattr(mixture, "launch_fold", stop)
    positions = torch.arange(21) * 3
    samples = torch.arange(21) // 4
    masks = Masks(samples, positions, width, 2**62 + 5, threshold(0.4))
    how = Product(case.head.weight, None, None, 1.0, 1.0, 0, _tiles(64, 16), "ieee", False)
    state, votes = torch.empty(6, 21, dtype=torch.float64), torch.empty(draws, 21).long()
    with pytest.raises(EnoughError):
        mixture_stats(how, how, case.hidden, case.targets, draws, masks, state, votes)
    layout = Layout.of(draws, 64)
    scored = (case.targets != -100).nonzero()[:, 0]
    packed = seen[0].view(-1, layout.padded, layout.plane, 45)
    for k in range(layout.padded):
        keep = torch.zeros(21, 45, dtype=torch.bool)
        if k < draws:
            keep = keep_mask(samples, positions, -(-45 // width), 0.4, 2**62 + 5, k)
            keep = keep.repeat_interleave(width, dim=1)[:, :45]
        expected = case.hidden.where(keep, 0)[scored]
        assert torch.equal(packed[:, k].reshape(-1, 45)[: len(scored)], expected)


def test_kernels_run(monkeypatch):
    """Each form reaches its kernel and fails without it."""
    n = 3
    state, votes = torch.empty(6, n, dtype=torch.float64), torch.empty(2, n, dtype=torch.int64)
    case = random_case(n, 32, 20)
    rows = torch.arange(n)

    def draw(form: str, block: int) -> None:
        dropout = Dropout(0.1, form, block, 0, rows, rows)
        Triton().mixture_stats(DrawRows(case.hidden, (case.head,), None, 2, dropout, state, votes))

    monkeypatch.setattr(mixture, "mixture_fold", None)
    draw("block", 16)
    for form, block in (("element", 1), ("block", 7)):  # no product step divides 7: runs as elements
        with pytest.raises(TypeError):
            draw(form, block)
    monkeypatch.setattr(block_mixture, "block_mixture", None)
    with pytest.raises(TypeError):
        draw("block", 16)


def test_an_ensemble_of_one_head():
    """Given hidden states with one head use the kernels; several heads use chunked torch."""
    case = random_case(9, 40, 90)
    drawn = torch.stack([random_case(9, 40, 90, seed=k).hidden for k in range(3)])
    state, votes = torch.empty(6, 9, dtype=torch.float64), torch.empty(3, 9, dtype=torch.int64)
    Triton().mixture_stats(DrawRows(drawn, (case.head,), case.targets, 3, None, state, votes))
    exact = Head(case.head.weight.double())
    expected, expected_votes = torch.empty_like(state), torch.empty_like(votes)
    get_backend("eager").mixture_stats(
        DrawRows(drawn.double(), (exact,), case.targets, 3, None, expected, expected_votes)
    )
    torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(votes, expected_votes)
