"""The benefit of coalescing requests in the server: 32 concurrent clients, each requesting one sample at a time.

``python -m benchmarks.bench_serve`` starts ``acqsynth serve`` twice per student, with default settings and with batches
of one sample, and writes ``results/serve.json`` and ``.png``. Clients and both servers share the machine's cores. The
students are the arithmetic world's base model, on its own samples, and SmolLM2-135M-Instruct, on the shortest rows of a
GSM8K file. Ratios are to one sample at a time; ``acqcore.score`` on the same samples, without a server, is included for
comparison.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import uvloop

import acqcore
from acqsynth.domains import domain
from acqsynth.models import resolve
from acqsynth.rewards.scoring import training_row
from benchmarks import harness, real_rows

CLIENTS = 32
ONE = "served, one sample at a time"
COALESCED = "served, coalesced"


def world_samples(rows: int) -> list[Any]:
    arithmetic = domain("arithmetic")
    return [training_row(arithmetic, sample, chat=False) for sample in arithmetic.load("world", limit=rows)]


def short_samples(rows: int) -> list[Any]:
    return sorted(real_rows.gsm8k(1000), key=lambda sample: len(sample["prompt"]) + len(sample["completion"]))[:rows]


@contextlib.contextmanager
def server(student: str, *options: str) -> Iterator[str]:
    """Runs a server inside the context and yields its URL."""
    command = [sys.executable, "-m", "acqsynth.cli", "serve", "--student", student, "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            if not first.startswith("acqsynth: serving "):
                raise RuntimeError(f"the server did not start: {first}")
            yield first.split()[-1]
        finally:
            process.terminate()
            process.communicate()


async def ask_all(url: str, samples: Sequence[Any], names: Sequence[str]) -> list[float]:
    """The first acquisition of every sample, each requested separately by one of the clients.

    The clients write raw HTTP: a client library would use more CPU than the server.
    """
    parts = urlsplit(url)
    found = [0.0] * len(samples)
    left = iter(range(len(samples)))

    async def client() -> None:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        for i in left:
            body = json.dumps({"samples": [samples[i]], "acquisitions": list(names)}).encode()
            head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            writer.write(head.encode() + b"\r\n\r\n" + body)
            status, *headers = (await reader.readuntil(b"\r\n\r\n")).decode().lower().splitlines()
            lengths = [line for line in headers if line.startswith("content-length:")]
            answer = json.loads(await reader.readexactly(int(lengths[0].split(":")[1])))
            if " 200 " not in status:
                raise RuntimeError(f"{status}: {answer}")
            found[i] = answer["values"][names[0]][0]
        writer.close()

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return found


def compare(name: str, samples: list[Any], turns: int) -> tuple[list[harness.Row], dict[str, object]]:
    """Result rows of a student, and token counts of its samples."""
    names = ["entropy"]
    student = acqcore.Student.load(resolve(name))
    whole = acqcore.encode(samples, student.tokenizer, vocab_size=student.head.weight.shape[0], limit=None)
    lengths = [len(row.ids) for row in whole]
    with server(name) as coalesced, server(name, "--batch-tokens", "1", "--wait", "0") as one:

        def served(url: str) -> Callable[[], list[float]]:
            return lambda: uvloop.run(ask_all(url, samples, names))

        peers: dict[str, Callable[[], object]] = {
            ONE: served(one),
            COALESCED: served(coalesced),
            "acqcore.score, all samples in one call": lambda: acqcore.score(student, samples, names, progress=False),
        }
        expected = acqcore.score(student, samples, names, progress=False)[names[0]].tolist()
        for url in (one, coalesced):  # warms up and checks the values
            worst = max(abs(a - b) / abs(b) for a, b in zip(served(url)(), expected, strict=True))
            if worst > 1e-4:
                raise RuntimeError(f"{url}: differs from acqcore.score by {worst}")
        case = f"{name}, {CLIENTS} clients, {len(samples)} samples of {sum(lengths) / len(lengths):.0f} tokens"
        rows = harness.measure(case, peers, baseline=ONE, turns=turns, memory=False)
    return rows, {f"{name} tokens": {"least": min(lengths), "most": max(lengths), "sum": sum(lengths)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world-rows", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=96, help="rows of GSM8K")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--students", nargs="+", default=["world:base", "smollm2"])
    arguments = parser.parse_args()
    rows: list[harness.Row] = []
    notes: dict[str, object] = {"ratio_to": ONE, "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "unset")}
    for name in arguments.students:
        samples = short_samples(arguments.rows) if name == "smollm2" else world_samples(arguments.world_rows)
        measured, about = compare(name, samples, arguments.turns)
        rows += measured
        notes |= about
        for row in measured:
            notes[f"{row.case}: {row.peer}: samples a second"] = round(len(samples) / row.seconds, 1)
    harness.report("serve", rows, unit="", notes=notes)


if __name__ == "__main__":
    main()
