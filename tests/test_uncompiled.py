"""Students compiled with torch.compile are scored eagerly, with the values of a model that was never compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import acqcore
from acqcore.students.student import uncompiled

IDS = torch.randint(3, 320, (3, 10), generator=torch.Generator().manual_seed(0))
SAMPLES = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
DRAWS = {"draws": 4, "layers": "all", "dropout": 0.2}

PARTS = {"block": lambda block: block, "mlp": lambda block: block.mlp, "attention": lambda block: block.self_attn}


@pytest.fixture(autouse=True)
def _forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _values(model: Any) -> list[torch.Tensor]:
    def information(**options: Any) -> torch.Tensor:
        arguments = {"mutual_information": options}
        return acqcore.score(model, SAMPLES, "mutual_information", acquisition_args=arguments)["mutual_information"]

    reference = acqcore.influence_reference(model, SAMPLES, dim=256)
    norms = [acqcore.grad_norm(model, SAMPLES, parameters) for parameters in ("all", 1)]
    return [*norms, acqcore.influence(model, SAMPLES, reference), information(), information(**DRAWS)]


def _run(model: Any) -> None:
    """Compile and keep what is compiled, with and without gradients."""
    with torch.no_grad():
        model(input_ids=IDS)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    model.zero_grad()
    model.eval()


@pytest.fixture(scope="module")
def expected(tiny_model):
    return _values(tiny_model("Llama"))


@pytest.mark.parametrize(("part", "scored_before"), [*((part, False) for part in PARTS), ("block", True)])
def test_compiled_parts_of_blocks(part, scored_before, expected, tiny_model, exact):
    model = tiny_model("Llama")
    exactly = exact(model, SAMPLES, list(model.parameters())).norm(dim=1)
    if scored_before:
        _values(model)
    for block in model.model.layers:
        PARTS[part](block).compile(backend="eager")
    _run(model)
    found = _values(model)
    torch.testing.assert_close(found[0].double(), exactly, rtol=1e-4, atol=0)
    torch.testing.assert_close(found, expected)


def _in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def _regions(model: Any) -> Any:
    return pytest.importorskip("accelerate").utils.compile_regions(model, backend="eager")


@pytest.mark.parametrize("compiled", [_in_place, lambda model: torch.compile(model, backend="eager"), _regions])
def test_whole_models(compiled, expected, tiny_model):
    model = compiled(tiny_model("Llama"))
    _run(model)
    torch.testing.assert_close(_values(model), expected)


def test_the_last_of_overlapping_contexts_restores_the_setting():
    @torch.compile(backend="eager")
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return x + torch.compiler.is_compiling()

    first, second = uncompiled(), uncompiled()
    for change, expected in (
        (first.__enter__, 0),
        (second.__enter__, 0),
        (lambda: first.__exit__(None, None, None), 0),
        (lambda: second.__exit__(None, None, None), 1),
    ):
        change()
        assert compiled(torch.tensor(0)) == expected
