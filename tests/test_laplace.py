"""Mutual information under a Laplace posterior: variances and values against brute force, and bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import acqcore
from acqcore.acquisitions import LinearOptions
from acqcore.gradients.laplace import LaplacePosterior
from acqcore.gradients.probe import Probe
from acqcore.gradients.rules import is_linear


def _samples(rows: int, seed: int, length: int = 5) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 24, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :2] = -100
    labels[0, -1] = -100  # one scored token fewer in the first sample
    return {"input_ids": ids, "labels": labels}


def _squares(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """``sum_t sum_y p_y (d log p_y / dW)^2 / T`` for each linear weight ``[P, Q]``, one backward per token and y."""
    transposed = {
        f"{n}.weight" for n, m in model.named_modules() if is_linear(m) and not isinstance(m, torch.nn.Linear)
    }
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    within = {module for block in blocks for module in block.modules() if is_linear(module)}
    weights = {f"{name}.weight": m.weight for name, m in model.named_modules() if m in within}
    log_p = model(input_ids=ids[None]).logits[0].double().log_softmax(dim=1)
    scored = (labels != -100).nonzero()[:, 0].tolist()
    found = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    for t in scored:
        for value in log_p[t - 1]:
            gradients = torch.autograd.grad(value, list(weights.values()), retain_graph=True)
            for name, g in zip(weights, gradients, strict=True):
                found[name] += value.detach().exp() * g.double().square() / len(scored)
    return {name: squares.T if name in transposed else squares for name, squares in found.items()}


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_against_brute_force(kind, tiny_model):
    model = tiny_model(kind, vocab_size=24)
    samples, others = _samples(2, 0, length=10), _samples(2, 1, length=10)
    squares = [_squares(model, *row) for row in zip(others["input_ids"], others["labels"], strict=True)]
    marginals = {}
    for name in squares[0]:
        diagonal = (squares[0][name] + squares[1][name]) / 2
        marginals[name] = diagonal.sum(dim=1), diagonal.sum(dim=0)
    expected = LaplacePosterior.of(marginals, "all", 1e4, 0.1)
    posterior = acqcore.laplace_posterior(model, others, probes=300, observations=1e4)
    assert set(posterior.factors) == set(expected.factors)
    for name, factors in expected.factors.items():
        for got, factor in zip(posterior.factors[name], factors, strict=True):
            torch.testing.assert_close(got, factor, rtol=0.3, atol=0)
    options = {"mutual_information": {"form": "linear", "posterior": "laplace", "reference": posterior, "probes": 800}}
    scores = acqcore.score(model, samples, "mutual_information", acquisition_args=options)
    value, error = scores["mutual_information"], scores.stderr["mutual_information"]
    for i, row in enumerate(zip(samples["input_ids"], samples["labels"], strict=True)):
        total = sum(
            float((torch.outer(*posterior.factors[name]).double() * of_weight).sum())
            for name, of_weight in _squares(model, *row).items()
        )
        assert float(error[i]) < 0.02 * total / 2
        assert abs(float(value[i]) - total / 2) < 3 * float(error[i])


def test_a_sample_of_the_reference_set_has_other_cotangents_when_scored(tiny_model):
    model, samples = tiny_model("Llama", vocab_size=48), _samples(1, 0)
    squares, ratios = _squares(model, samples["input_ids"][0], samples["labels"][0]), []
    for seed in range(24):
        posterior = acqcore.laplace_posterior(model, samples, seed=seed)
        options = {"mutual_information": LinearOptions("laplace", reference=posterior, seed=seed)}
        value = acqcore.score(model, samples, "mutual_information", acquisition_args=options)["mutual_information"]
        factors = posterior.factors.items()
        expected = sum(float((torch.outer(*of).double() * squares[name]).sum()) for name, of in factors) / 2
        ratios.append(float(value) / expected)
    assert 0.9 < sum(ratios) / len(ratios) < 1.1  # 0.81 with the same cotangents


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_weights_left_to_autograd_have_the_same_values(kind, dtype, tiny_model, monkeypatch):
    """Posteriors, squared norms under them, and sketches; sketches also project their columns (144 > 8)."""
    monkeypatch.setattr("acqcore.gradients.measures.WIDTH", 8)
    samples = {"input_ids": torch.randint(3, 320, (2, 7), generator=torch.Generator().manual_seed(0))}
    compare, found = Probe._compare, []
    for by_autograd in (False, True):
        if by_autograd:
            monkeypatch.setattr(
                Probe, "_compare", lambda self, ids: compare(self, ids) | {*self._capture.names.values()}
            )
        model = tiny_model(kind).to(dtype)
        posterior = acqcore.laplace_posterior(model, samples)
        options = {"mutual_information": {"posterior": "laplace", "reference": posterior}}
        scores = acqcore.score(model, samples, "mutual_information", acquisition_args=options)
        sketches = acqcore.epig_reference(model, samples, dim=64).sketches
        found.append((posterior.factors, scores["mutual_information"], sketches))
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 2e-2}
    torch.testing.assert_close(found[1], found[0], **tolerance)


class Direct(torch.nn.Module):
    """Its weight is used directly and by a call, so no rule covers it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(16, 24, bias=False)
        self.back = torch.nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.back(torch.nn.functional.linear(x, self.layer.weight).tanh() + self.layer(x))


def test_a_weight_that_no_rule_covers():
    torch.manual_seed(0)
    trunk = torch.nn.Sequential(torch.nn.Embedding(48, 16), torch.nn.ModuleList([Direct(), Direct()]))
    trunk.forward = lambda ids: trunk[1][1](trunk[1][0](trunk[0](ids)))
    student = acqcore.Student(trunk, acqcore.Head(torch.randn(48, 16)))
    posterior = acqcore.laplace_posterior(student, _samples(3, 0))
    rows, columns = posterior.factors["1.0.layer.weight"]
    assert (len(rows), len(columns)) == (24, 16)
    options = {"mutual_information": {"posterior": "laplace", "reference": posterior}}
    values = acqcore.score(student, _samples(3, 1), "mutual_information", acquisition_args=options)
    assert bool((values["mutual_information"] > 0).all())


class Picks(torch.nn.Module):
    """``index`` only picks an expert, so it has no gradient; the second expert sees no token."""

    def __init__(self) -> None:
        super().__init__()
        self.index = torch.nn.Linear(16, 2)
        self.index.bias = torch.nn.Parameter(torch.tensor([1e3, 0.0]))
        self.experts = torch.nn.ModuleList([torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        picked = self.index(x).argmax(-1, keepdim=True)
        for i, expert in enumerate(self.experts):
            if (picked == i).any():
                x = x + expert(x).where(picked == i, 0)
        return x


def test_weights_that_the_reference_set_does_not_reach_add_nothing():
    torch.manual_seed(0)
    trunk = torch.nn.Sequential(torch.nn.Embedding(48, 16), torch.nn.ModuleList([Picks(), Picks()]))
    trunk.forward = lambda ids: trunk[1][1](trunk[1][0](trunk[0](ids)))
    student = acqcore.Student(trunk, acqcore.Head(torch.randn(48, 16)))
    posterior = acqcore.laplace_posterior(student, _samples(3, 0))
    reached = {name for name, (rows, _) in posterior.factors.items() if rows.any()}
    assert reached == {"1.0.experts.0.weight", "1.1.experts.0.weight"}
    options = {"mutual_information": {"posterior": "laplace", "reference": posterior}}
    expected = acqcore.score(student, _samples(3, 1), "mutual_information", acquisition_args=options)
    with torch.no_grad():
        trunk[1][1].index.bias.zero_()  # now both experts see tokens
    both = acqcore.laplace_posterior(student, _samples(3, 0))
    assert {name for name, (rows, _) in both.factors.items() if rows.any()} == reached | {"1.1.experts.1.weight"}
    values = acqcore.score(student, _samples(3, 1), "mutual_information", acquisition_args=options)
    assert bool((values["mutual_information"] != expected["mutual_information"]).any())
    assert bool((values["mutual_information"] > 0).all())


def test_isotropic_is_the_same_with_equal_variances(tiny_model):
    model, samples = tiny_model("Llama"), _samples(2, 0)
    posterior = acqcore.laplace_posterior(model, samples)
    equal = {n: (torch.full_like(r, 1e-3), torch.full_like(c, 1e-3)) for n, (r, c) in posterior.factors.items()}
    options = LinearOptions("laplace", reference=LaplacePosterior(equal, "all"))
    got = acqcore.score(model, samples, "mutual_information", acquisition_args={"mutual_information": options})
    options = LinearOptions("isotropic", variance=1e-6)
    expected = acqcore.score(model, samples, "mutual_information", acquisition_args={"mutual_information": options})
    torch.testing.assert_close(got["mutual_information"], expected["mutual_information"], rtol=1e-4, atol=0)


def test_an_adapter_that_does_nothing_yet_adds_nothing(tiny_model):
    """Its B is 0, and so are the gradients of its A and their Fisher information."""
    peft = pytest.importorskip("peft")
    model, samples, found = tiny_model("Llama"), _samples(2, 0), []
    for adapted in (model, peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["o_proj"]))):
        posterior = acqcore.laplace_posterior(adapted, samples)
        factors = {n: (r, 0 * c) if "lora_B" in n else (r, c) for n, (r, c) in posterior.factors.items()}
        options = LinearOptions("laplace", reference=LaplacePosterior(factors, "all"))
        scores = acqcore.score(adapted, samples, "mutual_information", acquisition_args={"mutual_information": options})
        found.append(scores["mutual_information"])
    torch.testing.assert_close(found[1], found[0])


def test_bad_arguments(tiny_model):
    model, samples = tiny_model("Llama"), _samples(2, 0)
    with pytest.raises(TypeError, match=r"reference: expected the result of acqcore\.laplace_posterior, got NoneType"):
        LinearOptions("laplace")
    posterior = acqcore.laplace_posterior(model, samples, layers=1)
    with pytest.raises(ValueError, match="layers: the reference was made with 1, got 'all'"):
        LinearOptions("laplace", reference=posterior)
    with pytest.raises(ValueError, match="reference: requires posterior='laplace', got posterior='dropout'"):
        LinearOptions(reference=posterior)
    with pytest.raises(ValueError, match="observations"):
        acqcore.laplace_posterior(model, samples, observations=0.0)
    with pytest.raises(ValueError, match="damping"):
        acqcore.laplace_posterior(model, samples, damping=-1.0)
    with pytest.raises(ValueError, match="expected at least one reference sample, got none"):
        acqcore.laplace_posterior(model, [])
    options = {"mutual_information": LinearOptions("laplace", layers=1, reference=posterior)}
    other = tiny_model("Llama", intermediate_size=64)
    with pytest.raises(ValueError, match=r"reference: made with another student: model\.layers\.1\.mlp\.down_proj"):
        acqcore.score(other, samples, "mutual_information", acquisition_args=options)
