"""Sums of random cotangents in Triton's interpreter, with various tiles, rings and batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from acqcore.backends import FisherSums, HeadRows, Probes, eager
from acqcore.kernels import cotangents
from acqcore.kernels.config import Tiles
from acqcore.kernels.factors import Factors
from acqcore.testing import Case, random_case

#: Small tiles, which cut a vocabulary into several stretches with a ragged end.
TILES = Tiles(
    block_m=16, block_n=64, block_k=16, warps=4, stages=1, group_m=2, splits=1, descriptors=False, flatten=False
)


def _probes(n: int) -> Probes:
    return Probes(3, 1 << 40 | 9, torch.arange(n) * 2654435761, torch.arange(n) % 7)


def _sums(case: Case, probes: Probes, tiles: Tiles = TILES) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    head, n = case.head, len(case.hidden)
    stats = case.run("eager")
    how = Factors(
        head.weight, head.bias, head.softcap, head.scale, case.temperature, 0, tiles, "ieee", True, 1
    )  # fmt: skip
    reference = stats.state[1]
    sums = torch.empty(probes.count + 1, n, head.weight.shape[1])
    signed, squares = torch.empty(probes.count, n, dtype=torch.float64), torch.empty(n, dtype=torch.float64)
    cotangents.fisher_sums(
        how, case.hidden, stats.max_index, reference.float(), probes.samples, probes.positions,
        (reference - stats.state[0]).exp(), probes.seed, sums, signed, squares,
    )  # fmt: skip
    return sums, signed, squares


def _expected(case: Case, probes: Probes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    exact = case.to(torch.float64)
    stats = exact.run("eager")
    found = [
        torch.empty(shape, dtype=torch.float64)
        for shape in ((probes.count + 1, *exact.hidden.shape), (probes.count, len(exact.hidden)), (len(exact.hidden),))
    ]
    rows = HeadRows(exact.hidden, exact.head, exact.targets, exact.temperature, stats.state, stats.max_index)
    eager.Eager().fisher_sums(rows, probes, FisherSums(*found))
    return found[0], found[1], found[2]


@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
def test_signs_of_tiles_of_any_width(width):
    """Tiles with fewer columns than a word of signs has bits, as many as a counter has, and more."""
    case = random_case(20, 24, 300)
    for got, expected in zip(
        _sums(case, _probes(20), replace(TILES, block_n=width)), _expected(case, _probes(20)), strict=True
    ):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_row_does_not_depend_on_its_batch_or_the_ring(rounded_once, monkeypatch):
    case, probes = random_case(70, 24, 300, bias=True), _probes(70)
    whole = _sums(case, probes)
    monkeypatch.setattr(cotangents, "ROWS", 64)
    monkeypatch.setattr("acqcore.kernels.factors.RING_BYTES", 1 << 14)
    for cut, all_at_once in zip(_sums(case, probes), whole, strict=True):
        assert torch.equal(cut, all_at_once)
    part = slice(33, 40)
    some = replace(case, hidden=case.hidden[part], targets=None if case.targets is None else case.targets[part])
    of_part = Probes(3, probes.seed, probes.samples[part], probes.positions[part])
    for alone, all_at_once in zip(_sums(some, of_part), whole, strict=True):
        assert torch.equal(alone, all_at_once[..., part, :] if all_at_once.dim() == 3 else all_at_once[..., part])


def test_a_part_shared_by_all_rows_cancels_in_bfloat16():
    """After rounding, a cotangent's entries still sum to 0 and the mean's weights to 1."""
    case = random_case(20, 24, 300)
    shared = 30 * torch.randn(24, generator=torch.Generator().manual_seed(0))
    case = replace(case, head=replace(case.head, weight=case.head.weight + shared)).to(torch.bfloat16)
    totals = _totals(case, _probes(20))  # [P + 1, N]
    weight, top = case.head.weight.double(), case.run("eager").max_index

    def centred(sums: torch.Tensor, signed: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        """The mean minus the most likely token's row, and each probe's sum minus its share of the mean."""
        mean = sums[0].double() / totals[0, :, None]
        return torch.stack([totals[0, :, None] * (mean - weight[top]), *(sums[1:] - signed[:, :, None] * mean)])

    got, expected = centred(*_sums(case, _probes(20))), centred(*_expected(case, _probes(20)))
    error = (got - expected).norm(dim=2)
    farthest = torch.cdist(weight[top], weight).amax(dim=1)  # [N]
    assert bool((error <= 2**-8 * totals * farthest).all())
    assert float((2**-8 * totals * shared.norm()).mean()) > 10 * float(error.mean())


def _totals(case: Case, probes: Probes) -> torch.Tensor:
    """Sums of the factors' absolute values, ``[P + 1, N]``."""
    exact = case.to(torch.float64)
    z = exact.head.logits(exact.hidden, exact.temperature)
    root = ((z - z.max(dim=1, keepdim=True).values) / 2).exp().scatter(1, z.argmax(dim=1, keepdim=True), 0)
    return torch.stack([root.square().sum(dim=1), *[root.sum(dim=1)] * probes.count])


@pytest.mark.parametrize("depth", [33, 64])
def test_descriptors_read_what_pointers_read(depth):
    case, probes = random_case(20, depth, 130), _probes(20)
    by_pointer, by_descriptor = (_sums(case, probes, replace(TILES, descriptors=d))[0] for d in (False, True))
    torch.testing.assert_close(by_descriptor, by_pointer, rtol=1e-6, atol=1e-6)
