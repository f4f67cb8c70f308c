"""A service around a tiny student, asked without a socket."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import acqcore
from acqsynth.serve.app import Service, create_app
from acqsynth.serve.options import Limits
from acqsynth.serve.students import Students

SAMPLES = [
    {"prompt": f"What is {a} + {b}?\n", "completion": "Let me see. " * (a % 4) + f"It is {a + b}."}
    for a in range(6)
    for b in range(4)
]


@pytest.fixture
def student(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> acqcore.Student:
    return acqcore.Student.from_model(model.eval(), tokenizer=tokenizer)


@pytest.fixture
def forwards(student: acqcore.Student) -> list[int]:
    """The batch size of every forward of the student since."""
    sizes: list[int] = []
    student.trunk.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))  # type: ignore[attr-defined]
    return sizes


@pytest.fixture
def serve(student: acqcore.Student) -> Callable[..., Service]:
    """``serve(access=..., root=..., **limits)``: a service of the student."""

    def build(*, root: Any = None, limits: dict[str, Any] | None = None, **options: Any) -> Service:
        return Service(Students(student, "first", root=root), limits=Limits(**(limits or {})), **options)

    return build


@contextlib.asynccontextmanager
async def asked(service: Service, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the running service."""
    app = create_app(service)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://scorer", headers=headers) as client,
    ):
        yield client


@pytest.fixture(name="asked")
def _asked() -> Callable[..., Any]:
    return asked


@pytest.fixture
def samples() -> list[dict[str, str]]:
    return SAMPLES
