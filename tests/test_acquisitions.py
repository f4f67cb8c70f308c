"""Each acquisition against its own slow reference, and the registry."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch

import acqcore
from acqcore.acquisitions.base import REGISTRY, SampleBatch
from acqcore.testing import Case, random_case

BUILT_IN = (
    "loss", "perplexity", "entropy", "varentropy", "least_confidence", "margin", "gini", "el2n",
    "expected_gradient_length", "token_grad_norm",
)  # fmt: skip
DRAWN = ("mutual_information", "predictive_entropy", "expected_entropy", "variation_ratio", "bald_quadratic")
OF_SAMPLES = ("grad_norm", "badge", "influence", "gradient_diversity", "archive_novelty")


def _reference(name: str, case: Case) -> torch.Tensor:
    exact = case.to(torch.float64)
    module = importlib.import_module(f"acqcore.acquisitions.{name}")
    return module.reference(exact.head.logits(exact.hidden), case.targets, exact.hidden)


def test_the_list() -> None:
    listed = acqcore.acquisitions()
    assert tuple(listed) == (*BUILT_IN, *DRAWN, *OF_SAMPLES)
    assert all(line.endswith(".") for line in listed.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("v", [1, 2, 97])
def test_against_its_reference(name: str, v: int, dtype: torch.dtype, implementation: str) -> None:
    case = random_case(13, 24, v, std=2.0).to(dtype)
    entry = REGISTRY[name]
    value = entry.per_token(case.run(implementation))
    if entry.finish is not None:
        value = entry.finish(value)
    expected = _reference(name, case)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", BUILT_IN)
def test_needs_targets_is_told_truly(name: str) -> None:
    """Without targets, what needs none is unchanged."""
    case = random_case(5, 8, 30)
    entry = REGISTRY[name]
    if not entry.needs_targets:
        free = acqcore.row_stats(case.hidden, case.head)
        assert torch.equal(entry.per_token(free), entry.per_token(case.run("cpu")))
    else:
        other = acqcore.row_stats(case.hidden, case.head, (case.targets + 1) % 30)  # type: ignore[operator]
        assert not torch.equal(entry.per_token(other), entry.per_token(case.run("cpu")))


def test_a_known_uniform_row() -> None:
    """Eight equal logits: every value by hand."""
    case = Case(torch.tensor([[3.0, 4.0]]), acqcore.Head(torch.zeros(8, 2)), torch.tensor([5]))
    stats = case.run("cpu")
    by_hand = {
        "loss": 2.0794415, "perplexity": 2.0794415, "entropy": 2.0794415, "varentropy": 0.0,
        "least_confidence": 7 / 8, "margin": 1.0, "gini": 7 / 8, "el2n": (7 / 8) ** 0.5,
        "expected_gradient_length": 25 * 7 / 8, "token_grad_norm": 5 * (7 / 8) ** 0.5,
    }  # fmt: skip
    for name, value in by_hand.items():
        assert REGISTRY[name].per_token(stats).item() == pytest.approx(value, abs=1e-5), name


def test_grad_norm_against_its_reference(implementation: str) -> None:
    case = random_case(13, 24, 97, std=2.0)
    exact = case.to(torch.float64)
    bounds = ((0, 1), (1, 6), (6, 13))
    batch = SampleBatch(case.hidden, case.head, case.run(implementation), bounds, implementation)
    per_sample = REGISTRY["grad_norm"].per_sample
    assert per_sample is not None
    got = per_sample(batch)
    total = per_sample(batch, loss="sum")
    module = importlib.import_module("acqcore.acquisitions.grad_norm")
    z, y = exact.head.logits(exact.hidden), exact.targets
    assert y is not None
    for i, (a, b) in enumerate(bounds):
        expected = module.reference(z[a:b], y[a:b], exact.hidden[a:b])
        torch.testing.assert_close(got[i].double(), expected, rtol=1e-4, atol=0)
        torch.testing.assert_close(total[i].double(), expected * (b - a), rtol=1e-4, atol=0)


@pytest.fixture
def own_name() -> Iterator[str]:
    yield "confidence_gap"
    REGISTRY.pop("confidence_gap", None)


def test_registering_ones_own(own_name: str) -> None:
    @acqcore.register(own_name)
    def confidence_gap(stats: acqcore.RowStats) -> torch.Tensor:
        """1 - 2 p1."""
        return 1 - 2 * stats.top1_prob

    assert acqcore.acquisitions()[own_name] == "1 - 2 p1."
    with pytest.raises(ValueError, match="'confidence_gap' is registered already"):
        acqcore.register(own_name)(confidence_gap)


def test_registering_without_a_docstring() -> None:
    with pytest.raises(ValueError, match="nameless: an acquisition function needs a docstring"):
        acqcore.register("nameless")(lambda stats: stats.entropy)
    assert "nameless" not in REGISTRY
