"""Calibration: scores models of a few blocks for a few seconds, each in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from acqcore.costs.shape import Shape, shape_of, with_blocks
from acqcore.costs.work import Work, activation_bytes, passes

#: Seconds of scoring for the whole calibration, unless two rows per turn take longer.
BUDGET_S = 15.0
TURNS = 5
#: Share of the free memory that the small models may fill.
SHARE = 0.75


@dataclass(frozen=True)
class Run:
    """Measurements of a model of a few blocks. Peaks are bytes resident in the process, or allocated on the GPU."""

    blocks: int
    rows: int  # per timed call
    seconds: tuple[float, ...]  # of each call
    peak: int  # while ``rows`` were scored
    fewer_rows: int
    fewer_peak: int  # with ``fewer_rows``, to find the bytes per row
    full_peak: int | None  # with a full batch; None if that would take too long
    weight_bytes: int
    libraries: int  # bytes before the model was built; 0 on a GPU
    start_seconds: float  # from the start of the process until ``libraries`` was read
    load_seconds: float | None  # to build the model and read its weights; None if they are random


def measure(source: str, config: Any, shape: Shape, work: Work, device: str, threads: int | None) -> list[Run]:
    """Measure a small model, and one up to three blocks deeper if the whole model is deeper than the first.

    Raises:
        ValueError: the two do not fit into free memory. RuntimeError: a measurement failed.
    """
    dtype = getattr(torch, shape.dtype)
    low = work.fewest_blocks
    depths = [low] if low == shape.blocks else [low, _deeper(config, shape, work, device)]
    shapes = [shape_of(with_blocks(config, blocks), dtype) for blocks in depths]
    with ExitStack() as stack:
        workers = []
        for small in shapes:
            worker = _Worker(source, small, work, device, threads)
            stack.callback(worker.close)
            worker.loaded()  # one after the other, because loading is timed
            workers.append(worker)
        for worker in workers:
            worker.score(1)  # to warm up
        per_row = sum(worker.score(1)[0] for worker in workers)
        rows = min(work.batch_rows, max(2, int(BUDGET_S / TURNS / per_row)))
        fewer_rows = max(1, rows // 2)
        fewer_peaks = [worker.score(fewer_rows)[1] for worker in workers]
        turns = [[worker.score(rows) for worker in workers] for _ in range(TURNS)]
        # A full batch, if the budget allows; with the smaller model only, unless blocks keep activations.
        full = workers if passes(shape, work).kept_blocks else workers[:1]
        if rows == work.batch_rows or per_row * work.batch_rows > BUDGET_S:
            full = []
        full_peaks = {worker: worker.score(work.batch_rows)[1] for worker in full}
    runs = []
    for i, (small, worker) in enumerate(zip(shapes, workers, strict=True)):
        peak = max(turn[i][1] for turn in turns)
        runs.append(
            Run(
                blocks=small.blocks,
                rows=rows,
                seconds=tuple(turn[i][0] for turn in turns),
                peak=peak,
                fewer_rows=fewer_rows,
                fewer_peak=fewer_peaks[i],
                full_peak=peak if rows == work.batch_rows else full_peaks.get(worker),
                weight_bytes=small.weight_bytes,
                libraries=worker.libraries,
                start_seconds=worker.start_seconds,
                load_seconds=worker.load_seconds,
            )
        )
    return runs


def _deeper(config: Any, shape: Shape, work: Work, device: str) -> int:
    """Blocks of the larger of two models that fit into free memory; more blocks dilute the measurement error."""
    low = work.fewest_blocks
    dtype = getattr(torch, shape.dtype)
    room = int(SHARE * free_bytes(device))

    def needed(blocks: int) -> int:
        both = [shape_of(with_blocks(config, n), dtype) for n in (low, blocks)]
        return sum(small.weight_bytes + activation_bytes(small, work, device == "cpu") for small in both)

    for blocks in range(min(low + 3, shape.blocks), low + 1, -1):
        if needed(blocks) <= room:
            return blocks
    if needed(low + 1) > room:
        raise ValueError(
            f"plan: measuring models of {low} and {low + 1} blocks with a batch needs {needed(low + 1) / 2**30:.2f} "
            f"GiB, but {room / 2**30:.2f} GiB are available; lower --batch-tokens, or give a device's --flops and "
            "--bandwidth"
        )
    return low + 1


def free_bytes(device: str) -> int:
    """Bytes that can still be allocated on a device."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    return bytes_of("meminfo", "MemAvailable")


class _Worker:
    """The process of one small model."""

    def __init__(self, source: str, shape: Shape, work: Work, device: str, threads: int | None) -> None:
        spec = {
            "source": source,
            "weights": any(Path(source).glob("*.safetensors")),  # a local directory's
            "blocks": shape.blocks,
            "dtype": shape.dtype,
            "device": device,
            **{key: value for key, value in asdict(work).items() if key != "rows"},
        }
        environment = dict(os.environ)
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._start = time.time()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "acqcore.costs.worker", json.dumps(spec)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment,
        )  # fmt: skip

    def loaded(self) -> None:
        """Wait for the model."""
        facts = self._reply()
        self.libraries = int(facts["libraries"])
        self.load_seconds: float | None = facts["load_seconds"]
        self.start_seconds = float(facts["imported_at"]) - self._start

    def score(self, rows: int) -> tuple[float, int]:
        """Seconds and peak bytes of scoring ``rows`` rows."""
        assert self._process.stdin is not None
        print(rows, file=self._process.stdin, flush=True)
        facts = self._reply()
        return facts["seconds"], facts["peak"]

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()
            raise RuntimeError(
                f"the measuring process ended with status {self._process.wait()}"
                + (f": {said[-1]}" if said else "; on Linux, -9 usually means out of memory")
            )
        facts: dict[str, Any] = json.loads(line)
        if "error" in facts:
            raise RuntimeError(f"measuring failed: {facts['error']}")
        return facts

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def bytes_of(file: str, field: str) -> int:
    """A field of ``meminfo`` or ``self/status``."""
    try:
        lines = (Path("/proc", file)).read_text().splitlines()
    except OSError as error:
        raise _unmeasured(error) from error
    for line in lines:
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{file} has no {field}")


def reset_peak() -> None:
    """Reset the peak of resident memory to the current value."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise _unmeasured(error) from error


def _unmeasured(error: OSError) -> RuntimeError:
    return RuntimeError(
        f"memory is measured through Linux's /proc, which failed ({error.strerror}); give the device's --flops and "
        "--bandwidth instead"
    )
