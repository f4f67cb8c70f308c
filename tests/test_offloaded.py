"""Students whose weights accelerate keeps elsewhere and brings in for each forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import acqcore

accelerate = pytest.importorskip("accelerate")

IDS = torch.randint(3, 320, (3, 10), generator=torch.Generator().manual_seed(0))
SAMPLES = {"input_ids": IDS, "labels": IDS}


def _score(model: Any, name: str, **options: Any) -> torch.Tensor:
    return acqcore.score(model, SAMPLES, name, acquisition_args={name: options} if options else None)[name]


def _offload(module: Any) -> None:
    accelerate.cpu_offload(module, execution_device=torch.device("cpu"))


GRADIENTS = {
    "norms": lambda model: acqcore.grad_norm(model, SAMPLES, 1),
    "sketches": lambda model: acqcore.grad_sketch(model, SAMPLES, "all"),
    "influence": lambda model: acqcore.influence_reference(model, SAMPLES),
    "badge": lambda model: _score(model, "badge", parameters=1),
    "posterior": lambda model: _score(model, "mutual_information", posterior="isotropic", layers=1),
    "epig": lambda model: acqcore.epig_reference(model, SAMPLES),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_offloaded_weights_are_refused(name, tiny_model):
    model = tiny_model("Llama")
    _offload(model.model.layers[1])
    message = (
        r"parameters: model.layers.1.self_attn.q_proj.weight is offloaded.*; load the student without a device_map"
    )
    with pytest.raises(ValueError, match=message):
        GRADIENTS[name](model)


@pytest.mark.parametrize("part", ["model.embed_tokens", "model.layers.0", "model.layers.1"])
def test_other_scores_have_the_values_of_a_model_in_memory(part, tiny_model):
    model, whole = tiny_model("Llama"), tiny_model("Llama")
    _offload(model.get_submodule(part))
    draws = {"draws": 4, "layers": "all", "dropout": 0.2}
    calls = (
        ("loss", {}),
        ("entropy", {}),
        ("grad_norm", {}),
        ("mutual_information", {}),
        ("mutual_information", draws),
    )
    for name, options in calls:
        torch.testing.assert_close(_score(model, name, **options), _score(whole, name, **options))
    if part == "model.layers.0":
        torch.testing.assert_close(acqcore.grad_norm(model, SAMPLES, 1), acqcore.grad_norm(whole, SAMPLES, 1))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("part", ["", "lm_head"])
def test_an_offloaded_output_embedding_is_refused(part, tiny_model):
    model = tiny_model("Llama")
    _offload(model.get_submodule(part))
    with pytest.raises(
        ValueError, match="model: the output embedding of LlamaForCausalLM is offloaded; load the model"
    ):
        _score(model, "loss")
