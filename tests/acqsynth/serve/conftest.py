"""Fixtures: a service with a tiny student, called in process or as a server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch

import acqcore
from acqsynth.serve.app import Service, create_app
from acqsynth.serve.options import ADMIN_TOKEN_VARIABLE, TOKEN_VARIABLE, Limits
from acqsynth.serve.students import Students

TOKENS = {TOKEN_VARIABLE: "secret", ADMIN_TOKEN_VARIABLE: "admin"}

SAMPLES = [
    {"prompt": f"What is {a} + {b}?\n", "completion": "Let me see. " * (a % 4) + f"It is {a + b}."}
    for a in range(6)
    for b in range(4)
]


@pytest.fixture
def student(model, tokenizer):
    return acqcore.Student.from_model(model.eval(), tokenizer=tokenizer)


@pytest.fixture
def tokenizing(student):
    """``tokenizing(check)`` makes the student's tokenizer call ``check(texts)`` first."""
    tokenizer = student.tokenizer

    def wrap(check):
        def wrapped(texts, **options):
            check(texts)
            return tokenizer(texts, **options)

        wrapped.apply_chat_template = tokenizer.apply_chat_template
        wrapped.is_fast = True
        student.tokenizer = wrapped

    return wrap


@pytest.fixture
def forwards(student):
    """Batch sizes of the student's forward passes from now on."""
    sizes = []

    def count(module, arguments, named):
        sizes.append(len(arguments[0] if arguments else named["input_ids"]))

    student.trunk.register_forward_pre_hook(count, with_kwargs=True)
    return sizes


@pytest.fixture
def serve(student):
    """``serve(root=..., limits={...}, **options)`` builds a service for the student."""

    def build(*, root=None, limits=None, **options):
        return Service(Students(student, "first", root=root), limits=Limits(**(limits or {})), **options)

    return build


@contextlib.asynccontextmanager
async def asked(service, **headers):
    """A client of the running service."""
    app = create_app(service)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://scorer", headers=headers) as client,
    ):
        yield client


@pytest.fixture(name="asked")
def _asked():
    return asked


@pytest.fixture
def ask():
    """``ask(service, ("POST", path, {"json": ...}), ..., header=...)`` returns the responses to requests in turn."""

    def run(service, *requests, **headers):
        async def main():
            async with asked(service, **headers) as client:
                return [await client.request(method, path, **options) for method, path, options in requests]

        return asyncio.run(main())

    return run


@pytest.fixture
def post(serve, ask):
    """``post(path, body, **serve_options)`` returns the response of a fresh service; bytes are sent unchanged."""

    def run(path, body, kind="application/json", **options):
        sent = {"content": body, "headers": {"content-type": kind} if kind else {}}
        return ask(serve(**options), ("POST", path, sent if isinstance(body, bytes) else {"json": body}))[0]

    return run


@pytest.fixture
def samples():
    return SAMPLES


@pytest.fixture
def root(model, tokenizer, tmp_path):
    """A folder with the students ``one`` and ``two``."""
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / "root" / name)
        tokenizer.save_pretrained(tmp_path / "root" / name)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
    return tmp_path / "root"


@pytest.fixture
def memory():
    """``memory(process, field)`` returns the current (``VmRSS``) or peak (``VmHWM``) memory of a process in MiB."""

    def read(process, field):
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))

    return read


@pytest.fixture
def start(root):
    """``start("--option", ...)`` starts a server for the student ``one`` and returns the process and its URL."""
    started = []

    def run(*options):
        command = [sys.executable, "-m", "acqsynth.cli", "serve", "--student", str(root / "one"), "--port", "0"]
        environment = {**os.environ, **TOKENS, "OMP_NUM_THREADS": "1"}
        with (root / "stderr").open("w") as errors:
            process = subprocess.Popen(
                [*command, *options], env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"acqsynth: serving (http://127\.0\.0\.1:\d+)\n", line)
        assert found, line + (root / "stderr").read_text()
        return process, found[1]

    yield run
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
