"""Gradients in the logits and their products, in Triton's interpreter, against float64 eager."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from acqcore.backends import eager
from acqcore.backends.base import Gram, HeadRows
from acqcore.head import Head
from acqcore.kernels import factors
from acqcore.kernels.config import Tiles
from acqcore.testing import CASES, Case, random_case

TILES = Tiles(32, 64, 16, 4, 1, 2, 3, descriptors=False, flatten=False)
SMALL = (
    "random", "all logits -150", "rising logits", "-inf columns", "ties", "V = 1", "V = 2", "V = 256", "V = 257",
    "D = 1", "strided", "some rows ignored", "all rows ignored", "everything",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _many_stretches(monkeypatch):
    """Sets stretches of 64 columns for 50 rows, and three groups of rows for 100."""
    monkeypatch.setattr(factors, "RING_BYTES", 4 * 50 * 64)
    monkeypatch.setattr(factors, "ROWS", 48)


def _factors(case: Case, tiles: Tiles) -> factors.Factors:
    head = case.head
    return factors.Factors(
        head.weight, head.bias, head.softcap, head.scale, case.temperature, head.vocab_start, tiles, "ieee", True, 4
    )


def _sums(case: Case, tiles: Tiles = TILES) -> torch.Tensor:
    """Sums relative to the largest logit, with rows scaled by 2 at the end."""
    state = case.to(torch.float64).run("eager").state
    out = torch.full(case.hidden.shape, 123.0)
    final = torch.full((len(case.hidden),), 2.0)
    factors.hidden_sums(_factors(case, tiles), case.hidden, case.targets, state[0].float(), final, out)
    return out


def _expected(case: Case) -> torch.Tensor:
    exact = case.to(torch.float64)
    state, index = torch.empty(7, len(exact.hidden), dtype=torch.float64), torch.empty(len(exact.hidden)).long()
    out = torch.empty_like(exact.hidden)
    eager.Eager().delta_sums(HeadRows(exact.hidden, exact.head, exact.targets, exact.temperature, state, index), out)
    return 2 * out


@pytest.mark.parametrize("name", SMALL)
def test_sums(name):
    case = CASES[name]()
    got, expected = _sums(case), _expected(case)
    error = (got - expected).norm(dim=1)
    of_all = replace(case, targets=torch.full_like(case.targets, case.head.vocab_size))  # includes the target's share
    assert (error <= 3e-5 * _expected(of_all).norm(dim=1) + 1e-30).all()


@pytest.mark.parametrize("name", [*SMALL, "rows alike"])
def test_sums_of_rounded_factors(name):
    """One bfloat16 per factor, off by at most 2^-8 (the interpreter truncates, a GPU rounds), which the target absorbs.

    The error is therefore one of row differences: a part common to all rows of W cancels, however large.
    """
    case = random_case(20, 24, 300) if name == "rows alike" else CASES[name]()
    if name == "rows alike":
        case = replace(case, head=replace(case.head, weight=case.head.weight + 30 * torch.randn(24)))
    case = case.to(torch.bfloat16)
    exact = case.to(torch.float64)
    state = exact.run("eager").state
    got, expected = _sums(case), _expected(case)
    rows = HeadRows(exact.hidden, exact.head, exact.targets, exact.temperature, state, case.targets)
    f = eager.unnormalised(exact.head.logits(exact.hidden, exact.temperature), rows)
    scored = (case.targets != -100)[:, None]
    f = f.masked_fill((torch.arange(f.shape[1]) + case.head.vocab_start == case.targets[:, None]) | ~scored, 0)
    of_targets = exact.head.weight[case.targets.clamp(min=0) - case.head.vocab_start]
    bound = 2 * (f * torch.cdist(of_targets, exact.head.weight)).sum(dim=1) * 2**-8
    bound += 3e-5 * f.sum(dim=1) * exact.head.weight.norm(dim=1).max()
    assert ((got - expected).norm(dim=1) <= bound + 1e-30).all()


def test_sums_of_a_row_do_not_depend_on_its_batch_or_the_ring(in_eighths, monkeypatch):
    case = in_eighths(random_case(100, 24, 150))
    whole = _sums(case)
    assert torch.equal(_sums(case), whole)
    monkeypatch.setattr(factors, "ROWS", 4096)
    monkeypatch.setattr(factors, "RING_BYTES", 1 << 20)
    wide = _sums(case)
    torch.testing.assert_close(wide, whole, rtol=2e-6, atol=1e-6)  # numpy's summation order depends on the shape
    for begin, end in [(0, 1), (40, 60), (99, 100)]:
        part = replace(case, hidden=case.hidden[begin:end], targets=case.targets[begin:end])
        torch.testing.assert_close(_sums(part), wide[begin:end], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("depth", [33, 64])
def test_descriptors_read_what_pointers_read(depth):
    case = random_case(20, depth, 130)
    by_pointer, by_descriptor = (_sums(case, replace(TILES, descriptors=d)) for d in (False, True))
    torch.testing.assert_close(by_descriptor, by_pointer, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["plain", "everything", "shard"])
def test_grams_of_long_samples(name, dtype, monkeypatch):
    """Samples of one tile and of three, with targets shared within a sample and between samples."""
    monkeypatch.setattr(factors, "GRAM_TILE", 16)
    options = {"bias": True, "softcap": 15.0, "scale": 0.5, "temperature": 1.3} if name == "everything" else {}
    case = random_case(50, 24, 150, **options)
    case.targets[5:30:3] = case.targets[5]
    if name == "shard":
        case = replace(case, head=Head(case.head.weight, vocab_start=40, vocab_size=300), targets=case.targets + 80)
    case.targets[[2, 30]] = -100
    case = case.to(dtype)
    exact = case.to(torch.float64)
    stats = exact.run("eager")
    rows = HeadRows(exact.hidden, exact.head, exact.targets, exact.temperature, stats.state, stats.max_index)
    bounds = ((0, 10), (10, 50))
    expected = Gram(bounds, (0, 100), torch.zeros(1700, dtype=torch.float64))
    eager.gram_products(eager.unnormalised(exact.head.logits(exact.hidden, exact.temperature), rows), rows, expected)
    products = torch.full((1700,), 123.0)
    factors.grams(
        _factors(case, TILES), case.hidden, case.targets, stats.state[0].float(), (10, 40), (0, 100), products
    )
    for (begin, end), start in zip(bounds, expected.starts, strict=True):
        length = end - begin
        mine, wanted = (
            x[start : start + length**2].double().view(length, length) for x in (products, expected.products)
        )
        norms = wanted.diagonal().sqrt()
        assert ((mine - wanted).abs() <= 1e-4 * norms[:, None] * norms).all()
        torch.testing.assert_close(mine, mine.T, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("n", "vocab", "itemsize"), [(4096, 131072, 2), (1, 131072, 2), (4096, 50257, 4), (130, 7, 2)])
def test_ring_is_bounded(n, vocab, itemsize, monkeypatch):
    monkeypatch.undo()
    weight = torch.empty(vocab, 1, device="meta")
    tiles = Tiles(128, 256, 64, 8, 3, 16, 128, descriptors=True, flatten=False)
    dtype = torch.float32 if itemsize == 4 else torch.bfloat16
    ring = factors.Factors(weight, None, None, 1.0, 1.0, 0, tiles, "ieee", False, 132).ring(n, dtype)
    assert sum(part.numel() * part.element_size() for part in ring if part is not None) <= 64 << 20
    assert ring[0].shape[1] % 256 == 0
    assert ring[0].shape[1] < vocab + 256


def test_groups_of_samples(monkeypatch):
    monkeypatch.undo()
    from acqcore.backends import triton

    bounds = [(0, 3000), (3000, 4000), (4000, 4100), (4100, 9000), (9000, 9200)]
    assert triton._groups(bounds) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    edges = list(itertools.pairwise(range(0, 3072, 256)))
    assert triton._groups([(a, b) for a, b in edges]) == [(0, 11)]
