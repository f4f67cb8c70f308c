"""Values do not depend on torch's defaults for new tensors and products, which scripts set for the whole process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import acqcore
from acqcore.defaults import standard_defaults
from acqcore.fisher import fisher_grad

KINDS = ["float64", "bfloat16", "float16", "device"]


@pytest.fixture(params=KINDS)
def changed(request: Any) -> Iterator[Callable[[], None]]:
    """Changes a default; tensors on the device "meta" have no values, so the call fails if one is created there."""

    def change() -> None:
        if request.param == "device":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, request.param))

    yield change
    torch.set_default_dtype(torch.float32)
    torch.set_default_device("cpu")


def rows() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(3, 320, (3, 8), generator=generator)}


def assert_same(call: Callable[[], Any], change: Callable[[], None]) -> None:
    expected = call()
    defaults = torch.get_default_dtype(), torch.get_default_device()
    change()
    inside = torch.get_default_dtype(), torch.get_default_device()
    assert inside != defaults
    found = call()
    assert (torch.get_default_dtype(), torch.get_default_device()) == inside
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["entropy", "perplexity", "el2n", "grad_norm", "mutual_information", "bald_quadratic"])
def test_scores(name, changed, tiny_model):
    model, samples = tiny_model("Llama"), rows()
    assert_same(lambda: acqcore.score(model, samples, name, progress=False)[name], changed)


@pytest.mark.parametrize("how", ["texts", "prompts", "badge", "norm", "sketch", "influence", "epig", "laplace"])
def test_functions_of_a_student(how, changed, tiny_model, tokenizer):
    model, samples = tiny_model("Llama"), rows()
    laplace = {"posterior": "laplace", "layers": 1}
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "texts": lambda: acqcore.encode(["a fox"], tokenizer, vocab_size=320, limit=None)[0].ids,
        "prompts": lambda: acqcore.prompt_embedding(model, ["a fox", "the lazy dog"], tokenizer=tokenizer),
        "badge": lambda: acqcore.badge_embedding(model, samples, 1, dim=64),
        "norm": lambda: acqcore.grad_norm(model, samples, "all"),
        "sketch": lambda: acqcore.grad_sketch(model, samples, 1, dim=64),
        "influence": lambda: acqcore.influence(
            model, samples, acqcore.influence_reference(model, samples, parameters=1, dim=64)
        ),
        "epig": lambda: acqcore.epig(model, samples, acqcore.epig_reference(model, samples, layers=1, dim=64)),
        "laplace": lambda: acqcore.score(
            model, samples, "mutual_information", progress=False,
            acquisition_args={
                "mutual_information": laplace | {"reference": acqcore.laplace_posterior(model, samples, layers=1)}
            },
        )["mutual_information"],
    }  # fmt: skip
    assert_same(calls[how], changed)


def calls_with_tensors(backend: str) -> dict[str, Callable[[], torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, vectors = (torch.randn(n, 32, generator=generator) for n in (7, 320, 90))
    targets = torch.tensor([5, 7, -100, 0, 319, 5, 9])
    head, offsets = acqcore.Head(weight), torch.tensor([0, 4, 7])
    arguments: Any = (hidden, head, targets, offsets)
    return {
        "rows": lambda: acqcore.row_stats(hidden, head, targets, backend=backend).entropy,
        "norm": lambda: acqcore.head_grad_norm(*arguments, backend=backend),
        "direct norm": lambda: acqcore.head_grad_norm(*arguments, form="direct", backend=backend),
        "hidden norm": lambda: acqcore.hidden_grad_norm(hidden, head, targets, backend=backend),
        "sketch": lambda: acqcore.grad_sketch(*arguments, dim=64, backend=backend),
        "information": lambda: acqcore.mutual_information(hidden, head, draws=4, backend=backend).mutual_information,
        "cotangents": lambda: fisher_grad(*arguments[:3], offsets=offsets, backend=backend),
        "select": lambda: acqcore.select(vectors, 4, method="log_det"),
        "facilities": lambda: acqcore.select(vectors, 40, method="facility_location"),
        "vendi": lambda: torch.tensor(float(acqcore.vendi_score(vectors)), dtype=torch.float64, device="cpu"),
        "diversity": lambda: acqcore.gradient_diversity(vectors),
    }


HOW = [*calls_with_tensors("cpu")]


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("how", HOW)
def test_functions_of_tensors(how, backend, changed):
    assert_same(calls_with_tensors(backend)[how], changed)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("how", HOW)
def test_precision_of_products(how, backend):
    """Neither autocast nor a lower precision of float32 products, as trainers set them, rounds a product."""
    call = calls_with_tensors(backend)[how]
    expected = call()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(call(), expected, rtol=0, atol=0, equal_nan=True)
        assert torch.is_autocast_enabled("cpu")
    torch.set_float32_matmul_precision("medium")  # bfloat16 on some CPUs
    try:
        torch.testing.assert_close(call(), expected, rtol=0, atol=0, equal_nan=True)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_calls_of_several_threads_may_overlap():
    torch.set_default_dtype(torch.bfloat16)
    try:
        with ThreadPoolExecutor(1) as pool:  # a call that begins later and ends later
            call = standard_defaults()
            with standard_defaults():
                pool.submit(call.__enter__).result()
            assert torch.get_default_dtype() == torch.float32
            pool.submit(call.__exit__, None, None, None).result()
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
