"""Hash collisions in sketches, and their effect on inner products."""

from __future__ import annotations

import torch

from acqcore.backends import cpu
from acqcore.head import Head
from acqcore.head_grad import grad_sketch
from acqcore.signs import ColumnHash, hashed_places, random_signs, rotated_places


def test_signs_and_places_are_fixed_for_ever():
    """Others would make stored sketches meaningless."""
    signs = random_signs(5, 100, 0, 0)
    assert signs[0, :8].tolist() == [1, 1, 1, 1, -1, 1, 1, -1]
    assert torch.equal(random_signs(2, 8, 0, 0), signs[:2, :8])
    assert hashed_places(6, 48, 7, 1).tolist() == [-27, 32, 38, -11, -11, -23]
    assert rotated_places(6, 48, 7, 1).tolist() == [-39, 39, 40, -42, -43, -44]


def test_signs_are_fair_and_their_columns_uncorrelated():
    many = random_signs(4096, 64, 7, 1)
    assert abs(many.mean().item()) < 0.01
    assert (many.T @ many / 4096 - torch.eye(64)).abs().max() < 0.09  # 5.6 standard deviations


def test_rotated_places_do_not_depend_on_the_shard():
    whole = rotated_places(500, 48, 7, 0)
    assert torch.equal(rotated_places(123, 48, 7, 0, 77), whole[77:200])
    assert not torch.equal(rotated_places(500, 48, 8, 0), whole)
    assert not torch.equal(rotated_places(500, 48, 7, 1), whole)


def test_a_group_fills_every_place_once_in_order():
    places = rotated_places(480, 48, 7, 0)
    places = torch.where(places < 0, ~places, places).view(10, 48)
    assert torch.equal(places.sort(dim=1).values, torch.arange(48, dtype=torch.int32).expand(10, 48))
    assert torch.equal(places.diff(dim=1) % 48, torch.ones(10, 47, dtype=torch.int32))
    assert len(places[:, 0].unique()) > 5


def test_collisions_are_those_of_independent_places():
    """Rows of different groups share a place for 1 in 32 seeds; signs are fair and independent."""
    seeds = 4000
    drawn = torch.stack([rotated_places(70, 32, seed, 0) for seed in range(seeds)])
    places = torch.where(drawn < 0, ~drawn, drawn)
    for a, b in ((0, 32), (3, 40), (31, 69)):
        share = (places[:, a] == places[:, b]).double().mean()
        assert abs(float(share) - 1 / 32) < 5 * (1 / 32 / seeds) ** 0.5
    signs = torch.where(drawn < 0, -1.0, 1.0).double()
    correlation = signs.T @ signs / seeds - torch.eye(70)
    assert float(correlation.abs().max()) < 5.5 / seeds**0.5


def test_inner_products_keep_mean_and_variance():
    """Over seeds, they are unbiased and have the variance that independent places give."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 300, generator=g, dtype=torch.float64)
    y += 0.5 * x
    exact, dim, seeds = float(x @ y), 64, 3000
    products = []
    for places in (rotated_places, hashed_places):
        hashed = [ColumnHash.of(places(300, dim, seed, 0), dim)(torch.stack([x, y]), x.dtype) for seed in range(seeds)]
        products.append(torch.stack([h[0] @ h[1] for h in hashed]))
    size = float((x.square().sum() * y.square().sum() + exact**2) / dim) ** 0.5  # bound on the standard deviation
    for product in products:
        assert abs(float(product.mean()) - exact) < 5 * size / seeds**0.5
    assert float(products[0].std()) < 1.05 * float(products[1].std())


def test_sums_of_columns():
    """The kernel, plain torch (float64) and the GPU form, which sorts columns by place; some places are empty."""
    values = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    for dim in (7, 64, 1000):
        places = hashed_places(300, dim, 1, 0)
        expected = torch.zeros(5, dim, dtype=torch.float64)
        for column, place in enumerate(places.tolist()):
            expected[:, place if place >= 0 else ~place] += values[:, column].double() * (1 if place >= 0 else -1)
        for ordered in (False, True):
            hashed = ColumnHash.of(places, dim, ordered)
            torch.testing.assert_close(hashed(values, torch.float64), expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(hashed(values, torch.float32).double(), expected, rtol=0, atol=1e-5)
            of_half = hashed(values.bfloat16(), torch.float32)
            torch.testing.assert_close(of_half, hashed(values.bfloat16().float(), torch.float32), rtol=0, atol=1e-5)


def test_a_cpu_hashes_float32_in_the_kernel(monkeypatch):
    calls = []
    monkeypatch.setattr(cpu, "hash_columns", lambda values, places, out: calls.append((values.shape, out.shape)))
    ColumnHash.of(hashed_places(300, 64, 1, 0), 64)(torch.ones(5, 300), torch.float32)
    assert calls == [((5, 300), (5, 64))]


def test_sketches_of_gradients_keep_inner_products():
    """``E <S_i, S_j> = <G_i, G_j>`` for whole head gradients, with at most the tensor sketch's deviation."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(6, 12, generator=g, dtype=torch.float64)
    weight = torch.randn(90, 12, generator=g, dtype=torch.float64)
    targets, offsets = torch.tensor([3, 50, 7, 89, 50, 1]), torch.tensor([0, 3, 6])
    head = Head(weight)
    delta = (hidden @ weight.T).softmax(dim=1) - torch.nn.functional.one_hot(targets, 90)
    first, second = (torch.einsum("tv,td->vd", delta[p], hidden[p]) / 3 for p in (slice(0, 3), slice(3, 6)))
    exact, dim, seeds = float((first * second).sum()), 32, 400
    got = []
    for seed in range(seeds):
        a, b = grad_sketch(hidden, head, targets, offsets, dim=dim, seed=seed, backend="eager")
        got.append(float(a @ b))
    product = torch.tensor(got)
    size = float(first.norm() * second.norm()) * (2 / dim) ** 0.5
    assert abs(float(product.mean()) - exact) < 5 * size / seeds**0.5
    assert float(product.std()) < 1.2 * size
