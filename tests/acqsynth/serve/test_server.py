"""The whole server in its own process, with clients of every kind at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import sys
from collections import Counter
from urllib.parse import urlsplit

import httpx
import pytest
import torch

import acqcore
from acqsynth.cli import main
from acqsynth.serve.options import ADMIN_TOKEN_VARIABLE, TOKEN_VARIABLE

BEARER = {"Authorization": "Bearer secret"}
NAMES = ["entropy", "loss"]


async def raw(url, head, pieces, *, every=0.0):
    """Sends raw bytes, the first piece together with the head, and returns the response status."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        # One write: a server that answers the head alone must not reset the connection before its answer is read.
        for piece in (request_head(head) + pieces[0], *pieces[1:]):
            with contextlib.suppress(ConnectionError):
                writer.write(piece)
                await writer.drain()
            if every:
                with contextlib.suppress(TimeoutError):
                    return status_of(await asyncio.wait_for(reader.readline(), every))
        return status_of(await asyncio.wait_for(reader.readline(), 60))
    finally:
        writer.close()


def cut_off(url, head, body):
    """Sends raw bytes and closes the connection at once, before the server can answer."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        connection.sendall(request_head(head) + body)


def request_head(line):
    lines = ["POST /score HTTP/1.1", "Host: scorer", "Content-Type: application/json", line]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def status_of(line):
    return int(line.split()[1])


def body_of(texts):
    return json.dumps({"samples": texts, "acquisitions": NAMES}).encode()


def metrics_of(text):
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def test_64_clients_of_every_kind_and_a_reload(start, root):
    """Half of the clients behave, and each gets its own values, once, from one student. The others abort the request or
    the body, drip-feed, send too much with or without declaring it, send invalid JSON, or lack a valid token."""
    # The body timeout also closes idle connections: on a busy machine an honest client may pause for seconds.
    _, url = start(
        "--student-root", str(root), "--max-body", "4096", "--body-timeout", "5", "--batch-tokens", "512"
    )  # fmt: skip
    statuses = Counter()
    answers = {}
    token = "Authorization: Bearer secret"

    async def good(client, i):
        for j in range(6):
            texts = [f"client {i} asks for the {j}th time, sample {k}" for k in range(1 + (i + j) % 3)]
            response = await client.post("/score", content=body_of(texts), headers={"content-type": "application/json"})
            statuses["good", response.status_code] += 1
            assert tuple(texts) not in answers
            answers[tuple(texts)] = response.json()
            await asyncio.sleep(0.02)

    async def bad(kind, i):
        body = body_of([f"bad client {i}", "is it scored?"])
        length = f"{token}\r\nContent-Length: {len(body)}"
        if kind == "cut off":
            found = cut_off(url, length, body)
        elif kind == "cut off in the body":
            found = cut_off(url, length, body[:20])
        elif kind == "drip":
            found = await raw(url, length, [body[k : k + 1] for k in range(len(body))], every=0.2)
        elif kind == "declared too large":
            found = await raw(url, f"{token}\r\nContent-Length: 4097", [b"{"])
        elif kind == "chunked too large":
            chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
            found = await raw(url, f"{token}\r\nTransfer-Encoding: chunked", [chunk] * 5)
        elif kind == "no JSON":
            found = await raw(url, f"{token}\r\nContent-Length: 8", [b'{"a": \xff}'])
        elif kind == "wrong token":
            found = await raw(url, f"Authorization: Bearer Secret\r\nContent-Length: {len(body)}", [body])
        else:
            found = await raw(url, f"Content-Length: {len(body)}", [body])
        statuses[kind, found] += 1

    kinds = ["cut off", "cut off in the body", "drip", "declared too large", "chunked too large", "no JSON"]
    kinds += ["wrong token", "no token"]

    async def reload():
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            while not answers:  # the first student has answered
                await asyncio.sleep(0.01)
            refused = await client.post("/student", json={"path": "two"}, headers=BEARER)
            done = await client.post("/student", json={"path": "two"}, headers={"Authorization": "Bearer admin"})
            return refused.status_code, done.status_code

    async def everybody():
        async with httpx.AsyncClient(base_url=url, headers=BEARER, timeout=60) as client:
            reloaded, *_ = await asyncio.gather(
                reload(), *(good(client, i) for i in range(32)), *(bad(kinds[i % 8], i) for i in range(32))
            )
            await good(client, 99)  # the server still works
            assert (await client.get("/health")).json() == {"status": "ok"}
            return reloaded, metrics_of((await client.get("/metrics")).text)

    reloaded, metrics = asyncio.run(everybody())
    assert reloaded == (401, 200)
    assert statuses == {
        ("good", 200): 33 * 6,
        ("cut off", None): 4,
        ("cut off in the body", None): 4,
        ("drip", 408): 4,
        ("declared too large", 413): 4,
        ("chunked too large", 413): 4,
        ("no JSON", 400): 4,
        ("wrong token", 401): 4,
        ("no token", 401): 4,
    }
    students = {1: acqcore.Student.load(root / "one"), 2: acqcore.Student.load(root / "two")}
    assert {answer["student"]["version"] for answer in answers.values()} == {1, 2}
    found, expected = [], []
    for version, student in students.items():
        of_it = [(texts, answer) for texts, answer in answers.items() if answer["student"]["version"] == version]
        scores = acqcore.score(student, [text for texts, _ in of_it for text in texts], NAMES, progress=False)
        expected.append(torch.stack([scores[name] for name in NAMES], dim=1))
        found.append(torch.cat([torch.tensor([answer["values"][name] for name in NAMES]).T for _, answer in of_it]))
        assert all(answer["valid"] == [True] * len(texts) for texts, answer in of_it)
    own, right = torch.cat(found), torch.cat(expected)  # [samples, names]
    assert torch.allclose(own, right, rtol=2e-6, atol=0)
    distances = torch.cdist(right.double(), right.double(), p=torch.inf)
    distances.fill_diagonal_(1)
    assert distances.min() > 2e-6 * right.max()  # so a value of another client would show
    good_samples = sum(len(texts) for texts in answers)
    assert good_samples <= metrics['acqsynth_samples_total{outcome="scored"}'] <= good_samples + 2 * 4
    assert metrics['acqsynth_requests_total{route="/score",status="200"}'] == 33 * 6
    assert metrics['acqsynth_requests_total{route="/score",status="499"}'] >= 4  # aborted
    assert metrics["acqsynth_queue_tokens"] == 0
    assert metrics["acqsynth_active_requests"] == 1
    assert metrics['acqsynth_reloads_total{outcome="done"}'] == 1
    assert not [name for name in metrics if re.search(r'requests_total.*status="5', name)]
    assert "Traceback" not in (root / "stderr").read_text()


def test_a_signal_lets_it_finish_what_it_took(start, root):
    process, url = start("--batch-tokens", "500")
    texts = [f"sample {i} " + "of many words " * 12 for i in range(18)]
    question = {"acquisitions": ["mutual_information"], "acquisition_args": {"mutual_information": {"draws": 16}}}

    async def ask():
        async with httpx.AsyncClient(base_url=url, headers=BEARER, timeout=60) as client:
            tasks = [
                asyncio.create_task(client.post("/score", json={"samples": texts[i::3], **question})) for i in range(3)
            ]
            while metrics_of((await client.get("/metrics")).text)["acqsynth_batch_samples_count"] == 0:
                await asyncio.sleep(0.01)
            waiting = metrics_of((await client.get("/metrics")).text)["acqsynth_queue_tokens"]
            assert waiting > 0
            process.send_signal(signal.SIGTERM)
            answers = await asyncio.gather(*tasks)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        return answers

    answers = asyncio.run(ask())
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert output.splitlines()[-1] == "acqsynth: stopped; all accepted requests were answered"
    student = acqcore.Student.load(root / "one")
    options = {"acquisition_args": question["acquisition_args"], "progress": False}
    for i, response in enumerate(answers):
        assert response.status_code == 200
        expected = acqcore.score(student, texts[i::3], "mutual_information", **options)["mutual_information"]
        assert response.json()["values"]["mutual_information"] == pytest.approx(expected.tolist(), rel=1e-4)
    assert "Traceback" not in (root / "stderr").read_text()


def test_a_second_interrupt_ends_it_at_once(start, root):
    process, url = start("--body-timeout", "60")
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port)) as client:
        client.sendall(request_head("Authorization: Bearer secret\r\nContent-Length: 9"))
        while metrics_of(httpx.get(f"{url}/metrics", headers=BEARER).text)["acqsynth_active_requests"] < 2:
            pass
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(httpx.TransportError):
            while True:
                httpx.get(f"{url}/health")
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "answered" not in output
    assert (root / "stderr").read_text() == "acqsynth: interrupted; requests in progress were not answered\n"


class TestUsage:
    """Usage errors are reported in one sentence with exit code 2."""

    @pytest.fixture(autouse=True)
    def _no_tokens(self, monkeypatch):
        for name in (TOKEN_VARIABLE, ADMIN_TOKEN_VARIABLE):
            monkeypatch.delenv(name, raising=False)

    def fails(self, capsys, *options):
        capsys.readouterr()
        assert main(["serve", *options]) == 2
        error = capsys.readouterr().err
        (sentence,) = error.splitlines()
        assert sentence.startswith("acqsynth: error: ")
        return sentence

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            *(
                (f"--host {host}", f"--host {host} is not loopback and needs a token: set ACQSYNTH_TOKEN or pass")
                for host in ("0.0.0.0", "::", "192.0.2.1", "scorer.example.com")
            ),
            ("--student-root {root}", "--student-root needs an admin token: set ACQSYNTH_ADMIN_TOKEN"),
            ("--student-root {root}/missing", "--student-root: no such folder"),
            ("--token-file {root}/missing", "No such file"),
            ("--student {root}/missing", "holds no model"),
            ("--port 99999", "--port: expected 0 to 65535, got 99999"),
            ("--max-samples 0", "max_samples: expected a finite number >= 1, got 0"),
            ("--acquisition influence", "acquisition: unknown 'influence', expected one of"),
            ("--backend nope", "backend: unknown 'nope'"),
            ("--backend cuda", "'cuda'"),
        ],
    )
    def test_wrong_options(self, capsys, root, options, sentence):
        given = options.format(root=root).split()
        assert sentence in self.fails(capsys, "--student", str(root / "one"), "--port", "0", *given)

    def test_a_broken_student(self, capsys, root):
        (root / "one" / "model.safetensors").write_bytes(b"")
        error = self.fails(capsys, "--student", str(root / "one"), "--port", "0")
        assert f"--student {root / 'one'} cannot be loaded: Error while deserializing header" in error

    def test_an_empty_token_is_none(self, capsys, monkeypatch):
        monkeypatch.setenv(TOKEN_VARIABLE, "")
        error = self.fails(capsys, "--student", "nowhere", "--host", "0.0.0.0")
        assert "ACQSYNTH_TOKEN: expected a token of visible ASCII characters" in error

    def test_an_address_that_is_taken(self, capsys):
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = str(other.getsockname()[1])
            assert f"127.0.0.1:{port} cannot be bound" in self.fails(capsys, "--student", "nowhere", "--port", port)

    def test_overrides_are_those_of_recipes(self):
        with pytest.raises(SystemExit) as caught:
            main(["serve", "--student", "nowhere", "seed=1"])
        assert caught.value.code == 2

    def test_without_fastapi_it_says_what_to_install(self, capsys, monkeypatch):
        for name in [name for name in sys.modules if name.startswith("acqsynth.serve.")]:
            if name != "acqsynth.serve.options":
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(sys.modules["acqsynth.serve"], "server", raising=False)
        monkeypatch.setitem(sys.modules, "fastapi", None)
        error = self.fails(capsys, "--student", "nowhere")
        assert 'serving needs fastapi, which is not installed: run pip install "acqcore[serve]"' in error
