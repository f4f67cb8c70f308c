"""Gram matrices computed with the row states, and their norms, in Triton's interpreter, against float64 eager."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from acqcore import slots
from acqcore.backends import eager
from acqcore.backends.base import Gram, HeadRows, matrix_starts
from acqcore.head import Head
from acqcore.kernels import gram, gram_norm
from acqcore.kernels.config import GramTiles
from acqcore.kernels.product import Product
from acqcore.row_stats import RowStats
from acqcore.testing import CASES, Case, assert_close_to_oracle, case_from_logits, random_case

TILES = GramTiles(128, 32, 16, 4, 1, 2, 3, descriptors=False, flatten=False, resident=False)
RESIDENT = replace(TILES, resident=True)
#: Cases with targets that run in seconds with tiles of 32 columns.
SMALL = (
    "random", "all logits -150", "all logits equal", "-inf columns", "confident 1e-12", "ties", "V = 1", "V = 2",
    "V = 255", "V = 256", "V = 257", "D = 1", "strided", "some rows ignored", "everything",
)  # fmt: skip

Bounds = tuple[tuple[int, int], ...]


def _product(case: Case, tiles: GramTiles) -> Product:
    head, bias = case.head, None if case.head.bias is None else case.head.bias.float()
    return Product(
        head.weight, bias, head.softcap, head.scale, case.temperature, head.vocab_start, tiles, "ieee", True
    )  # fmt: skip


def _run(case: Case, bounds: Bounds, tiles: GramTiles = TILES) -> tuple[RowStats, Gram]:
    n, starts = len(case.hidden), matrix_starts(bounds)
    state = torch.full((7, n), 123.0, dtype=torch.float64)
    index = torch.full((n,), 123)
    products = torch.full((starts[-1],), 123.0)
    gram.row_stats_and_grams(
        _product(case, tiles), case.hidden, case.targets, bounds, starts[:-1], state, index, products
    )
    norm = torch.linalg.vector_norm(case.hidden, dim=1, dtype=torch.float32).where(case.targets != -100, torch.nan)
    return RowStats(state, index, case.targets, norm), Gram(bounds, starts[:-1], products)


def _rows(case: Case, stats: RowStats) -> HeadRows:
    return HeadRows(case.hidden, case.head, case.targets, case.temperature, stats.state, stats.max_index)


def _expected(case: Case, bounds: Bounds) -> torch.Tensor:
    """Products in float64."""
    exact = case.to(torch.float64)
    rows = _rows(exact, exact.run("eager"))
    out = Gram.empty(bounds, torch.float64, torch.device("cpu"))
    eager.gram_products(eager.unnormalised(exact.head.logits(exact.hidden, exact.temperature), rows), rows, out)
    return out.products


def _assert_products(got: Gram, expected: torch.Tensor) -> None:
    """Each entry within 1e-4 of the product of its rows' norms, which bounds it."""
    for (begin, end), start in zip(got.bounds, got.starts, strict=True):
        part, length = slice(start, start + (end - begin) ** 2), end - begin
        mine, exact = (x[part].double().view(length, length) for x in (got.products, expected))
        norms = exact.diagonal().sqrt()
        assert ((mine - exact).abs() <= 1e-4 * norms[:, None] * norms + 1e-38).all()


def _cut(n: int) -> Bounds:
    edges = sorted({0, 1, 3, n // 2, n} & set(range(n + 1)))
    return tuple(itertools.pairwise(edges))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in SMALL),
        *((name, torch.bfloat16) for name in ("random", "strided", "some rows ignored", "everything")),
    ],
)
def test_parity(name, dtype):
    case = CASES[name]().to(dtype)
    bounds = _cut(len(case.hidden))
    stats, got = _run(case, bounds)
    assert_close_to_oracle(stats, case.oracle())
    _assert_products(got, _expected(case, bounds))


@pytest.mark.parametrize("tiles", [TILES, RESIDENT], ids=["waiting", "resident"])
@pytest.mark.parametrize("rise", [True, False])
def test_maxima_that_rise_at_every_tile_and_never(rise, tiles):
    """Logits span 90 nats, so most rescalings leave nothing of the earlier sums."""
    logits = torch.arange(1440.0).expand(3, 1440) / 16 + torch.tensor([[0.0], [0.5], [-3.0]])
    case = case_from_logits(logits if rise else logits.flip(1), torch.tensor([0, 700, 1439]))
    bounds = ((0, 2), (2, 3))
    stats, got = _run(case, bounds, replace(tiles, splits=2))
    assert_close_to_oracle(stats, case.oracle())
    _assert_products(got, _expected(case, bounds))


def test_a_matrix_kept_in_memory_or_registers_has_the_same_bits(in_eighths):
    case, bounds = in_eighths(random_case(40, 32, 300)), ((0, 7), (7, 40))
    waiting, resident = _run(case, bounds, TILES)[1], _run(case, bounds, RESIDENT)[1]
    assert torch.equal(waiting.products, resident.products)


@pytest.mark.parametrize("splits", [1, 2, 7, 1000])
def test_any_number_of_splits(splits):
    case, bounds = random_case(10, 40, 509, std=8.0), ((0, 4), (4, 10))
    stats, got = _run(case, bounds, replace(TILES, splits=splits))
    assert_close_to_oracle(stats, case.oracle())
    _assert_products(got, _expected(case, bounds))


def test_targets_leave_the_matrix_of_their_own_sample_alone():
    """Two samples in a block have each other's largest logits as targets, some repeated or at the edges of tiles."""
    logits = torch.randn(8, 97, generator=torch.Generator().manual_seed(0))
    logits[:4, 31] += 6.0
    logits[4:, 64] += 6.0
    case = case_from_logits(logits, torch.tensor([64, 64, 96, 0, 31, 32, 63, 31]))
    bounds = ((0, 4), (4, 8))
    _, got = _run(case, bounds)
    expected = _expected(case, bounds)
    _assert_products(got, expected)
    p = (logits - logits.amax(dim=1, keepdim=True)).exp()[:4]
    assert got.products[0].item() == pytest.approx(p[0].square().sum().item() - p[0, [64, 96, 0]].square().sum().item())


def test_bits_of_a_sample_do_not_depend_on_its_batch(in_eighths):
    """A sample has the same bits alone, after others in its block, in another block, and in a second run."""
    case = in_eighths(random_case(300, 24, 100))
    case.targets[[3, 90, 200]] = -100
    bounds = ((0, 100), (100, 117), (117, 118), (118, 240), (240, 300))
    stats, whole = _run(case, bounds)
    again, same = _run(case, bounds)
    assert torch.equal(whole.products, same.products)
    assert torch.equal(stats.state.nan_to_num(7.0), again.state.nan_to_num(7.0))
    for (begin, end), start in zip(bounds, whole.starts, strict=True):
        part = replace(case, hidden=case.hidden[begin:end], targets=case.targets[begin:end])
        alone, own = _run(part, ((0, end - begin),))
        assert torch.equal(own.products, whole.products[start : start + (end - begin) ** 2])
        assert torch.equal(alone.state.nan_to_num(7.0), stats.state[:, begin:end].nan_to_num(7.0))


def test_bits_do_not_depend_on_scratch_or_grouping(in_eighths, monkeypatch):
    case = in_eighths(random_case(300, 16, 120))  # three blocks
    bounds = tuple((i, i + 50) for i in range(0, 300, 50))
    _, whole = _run(case, bounds)
    assert torch.equal(_run(case, bounds, replace(TILES, group_m=1))[1].products, whole.products)
    monkeypatch.setattr(gram, "SCRATCH_BYTES", 1)
    assert gram.most_blocks(16, 4, 3) == 1
    assert torch.equal(_run(case, bounds)[1].products, whole.products)


def test_ignored_rows_may_hold_anything(in_eighths):
    case = in_eighths(random_case(30, 16, 100))
    bounds = ((0, 12), (12, 30))
    case.targets[::3] = -100
    expected = _run(case, bounds)
    case.hidden[::3] = torch.nan
    stats, got = _run(case, bounds)
    assert torch.equal(got.products, expected[1].products)
    assert torch.equal(stats.state.nan_to_num(7.0), expected[0].state.nan_to_num(7.0))
    first = got.products[:144].view(12, 12)
    assert (first[::3] == 0).all()
    assert (first[:, ::3] == 0).all()
    assert stats.state[:, ::3].isnan().all()
    assert (stats.max_index[::3] == -1).all()


def test_a_row_without_finite_logits_leaves_other_samples_alone():
    case = random_case(6, 8, 40)
    case.hidden[1] = torch.nan
    _, got = _run(case, ((0, 3), (3, 6)))
    assert got.products[:9].isnan().any()
    assert got.products[9:].isfinite().all()


def test_rows_outside_samples_are_left_alone():
    case = random_case(20, 8, 40)
    stats, _ = _run(case, ((5, 9), (12, 20)))
    assert (stats.state[:, [0, 4, 9, 11]] == 123).all()
    assert (stats.max_index[[0, 4, 9, 11]] == 123).all()


@pytest.mark.parametrize("depth", [33, 64])
def test_descriptors_read_what_pointers_read(depth):
    case = random_case(20, depth, 130)
    bounds = ((0, 20),)
    by_pointer, by_descriptor = (_run(case, bounds, replace(TILES, descriptors=d))[1] for d in (False, True))
    assert torch.equal(by_pointer.products, by_descriptor.products)


def test_packing():
    """Blocks have whole samples and at most 128 rows each, and are no more than first fit would open."""
    lengths = [1, 128, 64, 65, 63, 3, 60, 128, 2]
    first_slots, blocks = slots.pack(lengths)
    taken = [slot for first, length in zip(first_slots, lengths, strict=True) for slot in range(first, first + length)]
    assert len(set(taken)) == sum(lengths)
    assert all(first // 128 == (first + n - 1) // 128 for first, n in zip(first_slots, lengths, strict=True))
    assert blocks == 5
    assert max(taken) < 5 * 128
    assert slots.pack([1] * 300) == ([*range(300)], 3)
    assert slots.pack([0, 128, 0]) == ([0, 0, 0], 1)
    assert slots.pack([]) == ([], 0)


@pytest.mark.parametrize(
    ("blocks", "depth", "splits"), [(32, 4096, 32), (782, 4096, 32), (1, 16384, 32), (40, 576, 16)]
)
def test_scratch_is_bounded(blocks, depth, splits):
    bounds = tuple((128 * i, 128 * i + 128) for i in range(blocks))
    starts = tuple(128**2 * i for i in range(blocks))
    parts = gram.parts(bounds, starts, gram.most_blocks(depth, 2, splits), torch.device("cpu"))
    lengths = [part.slots.shape[1] for part in parts]
    assert sum(lengths) == 128 * blocks
    assert lengths[0] * ((depth + 8) * 2 + 4 * 128 * splits + 32 * splits + 40) <= 64 << 20
    assert lengths[0] - lengths[-1] < 128 * len(parts)


def test_tables_of_a_batch_are_made_once():
    """Batches of the same shape share their device tables; other samples get other tables."""
    bounds, starts = ((0, 3), (3, 10)), (0, 9)
    device = torch.device("cpu")
    assert gram.parts(bounds, starts, 4, device) is gram.parts(bounds, starts, 4, device)
    assert gram_norm.cuts(bounds, starts, device) is gram_norm.cuts(bounds, starts, device)
    (other,) = gram.parts(((0, 5), (5, 10)), (0, 25), 4, device)
    assert other.samples[1].tolist() == [5, 5]


def _norms(case: Case, bounds: Bounds) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared norms by the kernel and by eager in float64, from the same float64 statistics and products."""
    exact = case.to(torch.float64)
    stats, products = exact.run("eager"), _expected(case, bounds)
    starts = matrix_starts(bounds)[:-1]
    weights = torch.linspace(-1, 2, len(case.hidden), dtype=torch.float64).where(case.targets != -100, 0)
    expected, got = torch.empty((2, len(bounds)), dtype=torch.float64)
    local_max = stats.state[0] - 0.25  # a shard's may be lower than the vocabulary's
    factor = torch.full_like(products, 0.5).exp()
    scaled = Gram(bounds, starts, products * factor)
    eager.Eager().gram_norm(_rows(exact, stats), scaled, local_max, weights, expected)
    gram_norm.gram_norm(
        _product(case, TILES), case.hidden, case.targets, bounds, starts, stats.state, stats.max_index,
        (products * factor).float(), local_max, weights, got,
    )  # fmt: skip
    return got, expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["plain", "everything", "repeated", "confident", "shard", "odd depth"])
def test_norm(name, dtype, monkeypatch):
    """Samples of one 16-row tile, one 64-row tile and four 64-row tiles; ``sum_tiles`` adds two parts at a time."""
    monkeypatch.setattr(gram_norm, "PARTS_AT_ONCE", 2)
    options = {"bias": True, "softcap": 15.0, "scale": 0.5, "temperature": 1.3} if name == "everything" else {}
    case = random_case(120, 70 if name == "odd depth" else 64, 90, **options)
    if name == "repeated":
        case.targets[:] = case.targets[::10].repeat_interleave(10)
        case.targets[::4] = case.run("eager").max_index[::4]
    if name == "confident":  # the target's own entry is -R / Z, with R far below an ulp of 1
        case = replace(case, hidden=case.hidden * 8)
        case.targets[:] = case.run("eager").max_index
    if name == "shard":
        head = Head(case.head.weight, vocab_start=40, vocab_size=200)
        case = replace(case, head=head, targets=case.targets + 60)  # some belong to another rank
    case.targets[[2, 30, 110]] = -100
    got, expected = _norms(case.to(dtype), ((0, 1), (1, 17), (17, 40), (40, 120)))
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=0)


def test_tiles_of_samples():
    short, long, firsts = gram_norm.tile_tables(torch.tensor([1, 70, 17, 16]))
    assert short.tolist() == [[0, 3], [0, 0], [0, 0]]
    assert long.tolist() == [[1, 1, 1, 1, 2], [0, 0, 1, 1, 0], [0, 1, 0, 1, 0]]
    assert firsts.tolist() == [[0, 2, 6, 1], [1, 6, 7, 2]]
