"""Selection: each greedy step against a naive one, and results against the best subsets of tiny sets."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable

import pytest
import torch

import acqcore

VECTOR_METHODS = ["k_center", "facility_location", "badge", "log_det"]


def vectors(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Vectors in clusters of different sizes and norms, ``[n, d]``."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(2, n // 5), d, generator=g) * 2
    which = torch.randint(len(centres), (n,), generator=g)
    return centres[which] + 0.5 * torch.randn(n, d, generator=g)


def coverage(x: torch.Tensor, chosen: list[int]) -> float:
    """Facility location by its definition."""
    unit = x / x.norm(dim=1, keepdim=True)
    return float((unit @ unit[chosen].T).clamp_min(0).amax(dim=1).sum())


def log_det(x: torch.Tensor, chosen: list[int], ridge: float) -> float:
    kernel = x @ x.T / x.square().sum(dim=1).mean()
    part = kernel[chosen][:, chosen] / ridge
    return float(torch.logdet(torch.eye(len(chosen), dtype=x.dtype) + part))


def naive_greedy(value: Callable[[list[int]], float], n: int, k: int) -> list[int]:
    chosen: list[int] = []
    for _ in range(k):
        left = [i for i in range(n) if i not in chosen]
        chosen.append(max(left, key=lambda i: value([*chosen, i])))
    return chosen


def brute_force(value: Callable[[list[int]], float], n: int, k: int) -> float:
    return max(value(list(subset)) for subset in itertools.combinations(range(n), k))


class TestTopK:
    def test_order_ties_and_nan(self):
        scores = torch.tensor([1.0, torch.nan, 3.0, 1.0, -torch.inf, 3.0, torch.inf])
        assert acqcore.select(scores, 6).tolist() == [6, 2, 5, 0, 3, 4]
        assert acqcore.select(scores, 2).dtype == torch.int64

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtypes(self, dtype):
        assert acqcore.select(torch.tensor([0.0, 2.0, 1.0], dtype=dtype), 2).tolist() == [1, 2]

    def test_many_ties_come_in_order(self):
        assert acqcore.select(torch.zeros(1000), 1000).tolist() == list(range(1000))

    def test_of_scores(self):
        one = acqcore.Scores({"loss": torch.tensor([1.0, 2.0])}, torch.ones(2).long(), torch.ones(2).bool())
        two = acqcore.Scores({**one, "margin": torch.tensor([2.0, 1.0])}, one.n_tokens, one.valid)
        assert acqcore.select(one, 1).tolist() == [1]
        assert acqcore.select(two, 1, acquisition="margin").tolist() == [0]
        with pytest.raises(ValueError, match="candidates: expected scores of one acquisition, got loss, margin"):
            acqcore.select(two, 1)
        with pytest.raises(ValueError, match=r"acquisition: unknown 'los', .*did you mean 'loss'"):
            acqcore.select(one, 1, acquisition="los")


class TestLabelsAndTrust:
    SCORES = torch.tensor([5.0, 4.0, 3.0, torch.nan, 2.0, 1.0, 0.0])
    LABELS = torch.tensor([7, 7, 7, 1, 0, 0, -3])

    def test_labels_take_turns(self):
        assert acqcore.select(self.SCORES, 5, labels=self.LABELS).tolist() == [0, 4, 6, 1, 5]
        assert acqcore.select(self.SCORES, 6, labels=self.LABELS).tolist() == [0, 4, 6, 1, 5, 2]
        assert acqcore.select(self.SCORES, 3, labels=torch.zeros(7).long()).tolist() == [0, 1, 2]

    def test_only_what_is_trusted_is_chosen(self):
        trust = torch.tensor([-1.0, 0.5, 0.1, 9.0, 0.0, 0.2, -0.5])
        assert acqcore.select(self.SCORES, 3, trust=trust).tolist() == [1, 2, 5]
        assert acqcore.select(self.SCORES, 3, trust=trust, labels=self.LABELS).tolist() == [1, 5, 2]

    def test_the_most_trusted_of_the_others_fill_up(self):
        trust = torch.tensor([-3.0, 0.5, -1.0, 9.0, -2.0, -0.2, -0.5])
        assert acqcore.select(self.SCORES, 3, trust=trust).tolist() == [1, 5, 6]
        assert sorted(acqcore.select(self.SCORES, 6, trust=trust).tolist()) == [0, 1, 2, 4, 5, 6]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"labels": LABELS[:3]}, r"labels: expected int64 \[7\], got"),
            ({"labels": LABELS.float()}, r"labels: expected int64 \[7\], got"),
            ({"trust": SCORES}, r"trust: expected \[7\] without NaN"),
            ({"trust": SCORES[:2]}, r"trust: expected \[7\] without NaN"),
            ({"labels": LABELS, "method": "badge"}, "labels: only valid with method='top_k', got method='badge'"),
            ({"trust": SCORES, "method": "k_center"}, "trust: only valid with method='top_k'"),
        ],
    )
    def test_wrong_ones_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            acqcore.select(self.SCORES, 2, **arguments)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"labels": [0, 1, 1]}, r"labels: expected int64 \[7\], got list"),
            ({"trust": [0.5] * 7}, r"trust: expected a tensor \[n\], got list"),
            ({"trust": LABELS}, r"trust: expected float32, bfloat16, float16 or float64 \[n\], got"),
        ],
    )
    def test_other_types_are_refused(self, arguments, message):
        with pytest.raises(TypeError, match=message):
            acqcore.select(self.SCORES, 2, **arguments)


@pytest.mark.parametrize("method", VECTOR_METHODS)
class TestEveryVectorMethod:
    def test_all_of_them_is_a_permutation(self, method):
        x = torch.cat([vectors(12, 3), vectors(12, 3), torch.zeros(2, 3)])  # copies, zeros, n > d
        chosen = acqcore.select(x, 26, method)
        assert chosen.dtype == torch.int64
        assert sorted(chosen.tolist()) == list(range(26))

    def test_fewer_are_a_prefix_of_more(self, method):
        x = vectors(40, 6)
        assert acqcore.select(x, 20, method)[:7].tolist() == acqcore.select(x, 7, method).tolist()

    def test_copies_come_last(self, method):
        x = torch.randn(6, 17, generator=torch.Generator().manual_seed(0)).repeat(5, 1)
        chosen = acqcore.select(x, 6, method).tolist()
        assert sorted(i % 6 for i in chosen) == list(range(6))
        assert method == "badge" or max(chosen) < 6  # badge draws among copies, the others choose the first

    @pytest.mark.parametrize("length", [0, 4])
    def test_one_candidate(self, length, method):
        assert acqcore.select(torch.ones(1, length), 1, method).tolist() == [0]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_dtypes(self, method, dtype):
        x = torch.diag(torch.arange(1.0, 7.0))
        assert acqcore.select(x.to(dtype), 4, method).tolist() == acqcore.select(x, 4, method).tolist()

    @pytest.mark.parametrize(
        ("x", "error", "message"),
        [
            (torch.zeros(3), ValueError, r"candidates: expected shape \[n, d\], got float32 .*\[3\]"),
            (torch.zeros(3, 2, dtype=torch.int64), TypeError, r"candidates: expected float32, .* got int64"),
            ([[1.0]], TypeError, r"candidates: expected a tensor \[n, d\], got list"),
            (torch.tensor([[0.0], [torch.nan]]), ValueError, "candidates: expected finite .*row 1 has NaN"),
            (torch.zeros(1, 2), ValueError, r"k: expected at most 1 \(the number of candidates\), got 2"),
            (torch.zeros(0, 2), ValueError, r"k: expected at most 0 \(the number of candidates\), got 2"),
        ],
    )  # fmt: skip
    def test_bad_vectors(self, method, x, error, message):
        with pytest.raises(error, match=message):
            acqcore.select(x, 2, method)


@pytest.mark.parametrize("seed", range(3))
def test_k_center_step_by_step(seed):
    x = vectors(30, 4, seed).double()
    chosen = acqcore.select(x, 10, "k_center").tolist()
    assert chosen[0] == int((x - x.mean(dim=0)).norm(dim=1).argmin())
    between = torch.linalg.norm(x[:, None] - x[None], dim=2)
    for j in range(1, 10):
        assert chosen[j] == int(between[chosen[:j]].amin(dim=0).argmax())


def test_k_center_is_within_twice_the_best():
    x = vectors(12, 2).double()
    between = torch.linalg.norm(x[:, None] - x[None], dim=2)

    def radius(chosen):
        return float(between[chosen].amin(dim=0).amax())

    best = -brute_force(lambda chosen: -radius(chosen), 12, 4)
    assert radius(acqcore.select(x, 4, "k_center").tolist()) <= 2 * best


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("blocks", [False, True])
def test_facility_location_step_by_step(blocks, seed, monkeypatch):
    if blocks:
        module = importlib.import_module("acqcore.selection.subsets")
        monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 3 * 40)
        monkeypatch.setattr(module, "_KEPT_ELEMENTS", 0)
    x = vectors(40, 6, seed).double()
    chosen = acqcore.select(x, 15, "facility_location").tolist()
    for j in range(15):  # two vectors that cover each other gain equally, so values are compared
        values = [coverage(x, [*chosen[:j], i]) for i in range(40)]
        assert values[chosen[j]] == pytest.approx(max(values), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ridge", [1.0, 0.01, 1e-7])
def test_log_det_is_the_naive_greedy(seed, ridge):
    x = vectors(25, 8, seed)
    chosen = acqcore.select(x, 12, "log_det", ridge=ridge).tolist()
    assert chosen == naive_greedy(lambda picked: log_det(x.double(), picked, ridge), 25, 12)


@pytest.mark.parametrize("seed", range(3))
def test_submodular_methods_are_within_their_bound(seed):
    x = vectors(11, 4, seed).double()
    values: dict[str, Callable[[list[int]], float]] = {
        "facility_location": lambda chosen: coverage(x, chosen),
        "log_det": lambda chosen: log_det(x, chosen, 0.01),
    }
    for method, value in values.items():
        best = brute_force(value, 11, 4)
        assert value(acqcore.select(x, 4, method).tolist()) >= (1 - 1 / math.e) * best


def test_log_det_does_not_depend_on_the_scale():
    x = vectors(30, 8)
    expected = acqcore.select(x, 10, "log_det").tolist()
    assert acqcore.select(x * 2.0**-20, 10, "log_det").tolist() == expected
    assert acqcore.select(x * 2.0**20, 10, "log_det").tolist() == expected


@pytest.mark.parametrize("method", VECTOR_METHODS)
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-43, 2.0**66, 2.0**124])
def test_lengths_far_from_one(method, scale):
    x = vectors(30, 6) / 8
    assert acqcore.select(x * scale, 8, method).tolist() == acqcore.select(x, 8, method).tolist()


@pytest.mark.parametrize("scale", [1e-13, 1e-25])
def test_facility_location_compares_directions_alone(scale):
    x = vectors(30, 6)
    lengths = torch.where(torch.arange(30) < 15, 1.0, scale)
    assert acqcore.select(x * lengths[:, None], 8, "facility_location").tolist() == naive_greedy(
        lambda chosen: coverage(x.double(), chosen), 30, 8
    )


def test_badge_is_seeded():
    x = vectors(50, 4)
    assert acqcore.select(x, 8, "badge", seed=3).tolist() == acqcore.select(x, 8, "badge", seed=3).tolist()
    assert len({tuple(acqcore.select(x, 8, "badge", seed=s).tolist()) for s in range(5)}) > 1


@pytest.mark.parametrize("seed", [-1, 2**70])
def test_bad_seeds(seed):
    with pytest.raises(ValueError, match="seed: expected "):
        acqcore.select(vectors(9, 4), 2, "badge", seed=seed)


def test_badge_draws_by_squared_distance():
    x = torch.tensor([[0.0], [1.0], [3.0]])
    squared = (x - x.T).square()
    counts = torch.zeros(3, 3)
    draws = 3000
    for seed in range(draws):
        first, second = acqcore.select(x, 2, "badge", seed=seed).tolist()
        counts[first, second] += 1
    expected = squared / squared.sum(dim=1, keepdim=True) / 3
    # Within five standard deviations of a binomial share.
    assert ((counts / draws - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt()).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3), 4), ValueError, r"k: expected at most 3 \(the number of scores .*\), got 4"),
        ((torch.tensor([1.0, torch.nan]), 2), ValueError, "k: expected at most 1 .*not NaN"),
        ((torch.zeros(3), 0), ValueError, "k: expected an int >= 1, got 0"),
        ((torch.zeros(3), 1.0), TypeError, "k: expected an int, got float"),
        ((torch.zeros(3), 1, "kcenter"), ValueError, "method: unknown 'kcenter', .*did you mean 'k_center'"),
        ((torch.zeros(3, 2), 1), ValueError, r"candidates: expected shape \[n\], got .*\[3, 2\]"),
        (([1.0, 2.0], 1), TypeError, r"candidates: expected a tensor \[n\], got list"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        acqcore.select(*arguments)


@pytest.mark.parametrize(("ridge", "message"), [(0.0, ">= 1e-9, got 0.0"), (torch.nan, "finite number, got nan")])
def test_bad_ridge(ridge, message):
    with pytest.raises(ValueError, match=f"ridge: expected a .*{message}"):
        acqcore.select(torch.zeros(3, 2), 1, "log_det", ridge=ridge)
