"""Expected predictive information gain against brute force over every pair of tokens, and its arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import acqcore
from acqcore.acquisitions import REGISTRY
from acqcore.acquisitions.epig import EpigOptions
from acqcore.gradients.rules import is_linear


def _samples(rows: int, seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 48, (rows, 4), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :2] = -100
    return {"input_ids": ids, "labels": labels}


def _gradients(model: Any, ids: torch.Tensor, layers: int) -> torch.Tensor:
    """``sqrt(p_y) d log p_y / dW`` of both scored tokens and every y, ``[2 V, weights]`` float64."""
    weights = [m.weight for block in model.model.layers[-layers:] for m in block.modules() if is_linear(m)]
    log_p = model(input_ids=ids[None]).logits[0].double().log_softmax(dim=1)[1:3]
    rows = []
    for value in log_p.flatten():
        gradients = torch.autograd.grad(value, weights, retain_graph=True)
        rows.append(torch.cat([g.flatten().double() for g in gradients]) * (value.detach() / 2).exp())
    return torch.stack(rows)


@pytest.mark.parametrize("layers", [1, "all"])
def test_unbiased_over_every_pair_of_tokens(layers, tiny_model):
    model = tiny_model("Llama", vocab_size=48)
    samples, others = _samples(3, 0), _samples(2, 1)
    count = 1 if layers == 1 else 2
    of_samples = [_gradients(model, ids, count) for ids in samples["input_ids"]]
    of_others = [_gradients(model, ids, count) for ids in others["input_ids"]]
    expected = REGISTRY["epig"].reference(torch.stack(of_samples), torch.stack(of_others), (2, 2), 1e-3)
    reference = acqcore.epig_reference(model, others, layers=layers, probes=150, dim=4096)
    got = acqcore.epig(model, samples, reference, variance=1e-3, probes=150)
    torch.testing.assert_close(got.double(), expected, rtol=0.15, atol=0)


def test_the_definition_is_of_pairs_of_tokens():
    """By hand: two samples of one token and two predictions, and a reference sample of one token."""
    of_samples = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [3.0, 0.0]]], dtype=torch.float64)
    of_reference = torch.tensor([[[1.0, 1.0], [2.0, 0.0]]], dtype=torch.float64)
    got = REGISTRY["epig"].reference(of_samples, of_reference, (1, 1), 2.0)
    assert got.tolist() == [2 * (1 + 4 + 4 + 0), 2 * (9 + 36)]


def test_it_is_an_acquisition(tiny_model):
    """``score`` gives the function's values; standard errors match the spread over independent cotangents."""
    model = tiny_model("Llama", vocab_size=48)
    samples = _samples(3, 0)
    reference = acqcore.epig_reference(model, _samples(2, 1), dim=512)
    asked = {"epig": {"reference": reference, "probes": 8}}
    scores = acqcore.score(model, samples, ["entropy", "epig"], acquisition_args=asked)
    torch.testing.assert_close(scores["epig"], acqcore.epig(model, samples, reference, probes=8), rtol=1e-4, atol=0)
    total = acqcore.score(model, samples, "epig", acquisition_args=asked, reduction="sum")
    torch.testing.assert_close(total["epig"], scores["epig"] * 2, rtol=1e-4, atol=0)
    first, second = (torch.randn(3, 400, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    small = acqcore.EpigReference(torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2)), "all", 0, {})
    entry, options = REGISTRY["epig"], EpigOptions(small, probes=20)
    pairs = list(zip(first.split(20, 1), second.split(20, 1), strict=True))
    found, errors = (torch.stack([f(a, b, options) for a, b in pairs]) for f in (entry.value, entry.stderr))
    torch.testing.assert_close(errors.square().mean(0).sqrt(), found.std(0), rtol=0.4, atol=0)
    with pytest.raises(ValueError, match="epig' needs 'reference'"):
        acqcore.score(model, samples, "epig")


def test_a_saved_reference(tiny_model, tmp_path):
    model, samples = tiny_model("Llama", vocab_size=48), _samples(2, 0)
    reference = acqcore.epig_reference(model, samples, dim=64, seed=2**63 - 1)
    reference.save(tmp_path / "epig.pt")
    values = [
        acqcore.score(model, samples, "epig", acquisition_args={"epig": {"reference": given}})["epig"]
        for given in (reference, str(tmp_path / "epig.pt"))
    ]
    assert torch.equal(*values)
    acqcore.influence_reference(model, samples, dim=64).save(tmp_path / "influence.pt")
    (tmp_path / "empty.pt").touch()
    for name in ("influence.pt", "empty.pt"):
        with pytest.raises(ValueError, match=rf"expected a file from EpigReference\.save, got .*{name}"):
            acqcore.score(model, samples, "epig", acquisition_args={"epig": {"reference": tmp_path / name}})


def test_the_reference_is_not_copied(extra_mib):
    """Its sketches take 128 MiB, in float64 256."""
    setup = (
        "reference = acqcore.EpigReference(torch.ones(2, 16384, 1024), 'all', 0, {})\n"
        "one = torch.ones(1, 2, 1024)\n"
        "acqcore.EpigReference(torch.ones(2, 8, 1024), 'all', 0, {}).squares(one, one)"
    )
    assert extra_mib(setup, "assert bool((reference.squares(one, one) == 2**20).all())") <= 48


def test_a_sample_does_not_depend_on_its_batch(tiny_model):
    model = tiny_model("Llama", vocab_size=48)
    samples = _samples(3, 0)
    reference = acqcore.epig_reference(model, _samples(2, 1), dim=256)
    whole = acqcore.epig(model, samples, reference)
    for i in range(3):
        one = {key: value[i : i + 1] for key, value in samples.items()}
        torch.testing.assert_close(acqcore.epig(model, one, reference)[0], whole[i], rtol=1e-3, atol=0)


def test_bad_arguments(tiny_model):
    model = tiny_model("Llama", vocab_size=48)
    samples = _samples(2, 0)
    with pytest.raises(TypeError, match=r"reference: expected a result of acqcore\.epig_reference\(\), got int"):
        acqcore.epig(model, samples, 3)
    with pytest.raises(ValueError, match="layers: expected at most 2 transformer blocks, got 3"):
        acqcore.epig_reference(model, samples, layers=3)
    with pytest.raises(ValueError, match=r"^layers: the noise perturbs weights of blocks"):
        acqcore.epig_reference(model, samples, layers=0)
    with pytest.raises(ValueError, match="probes: expected 1 to"):
        acqcore.epig_reference(model, samples, probes=0)
    with pytest.raises(ValueError, match="dim: expected an int >= 1, got 0"):
        acqcore.epig_reference(model, samples, dim=0)
    with pytest.raises(ValueError, match="expected at least one reference sample, got none"):
        acqcore.epig_reference(model, [])
    reference = acqcore.epig_reference(model, samples, dim=64)
    with pytest.raises(ValueError, match="variance"):
        acqcore.epig(model, samples, reference, variance=0.0)
    other = tiny_model("Llama", vocab_size=48, intermediate_size=64)
    with pytest.raises(ValueError, match=r"reference: made with another student: model.layers.0.mlp.gate_proj.weight"):
        acqcore.epig(other, samples, reference)
