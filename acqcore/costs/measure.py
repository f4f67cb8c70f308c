"""Calibration: scores models of a few blocks for a few seconds, each in its own process."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from acqcore.costs import worker
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
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        raise RuntimeError(
            "memory is measured through Linux's /proc, which is not here; give the device's --flops and --bandwidth"
        )
    dtype = getattr(torch, shape.dtype)
    low = work.fewest_blocks
    depths = [low] if low == shape.blocks else [low, _deeper(config, shape, work, device)]
    shapes = [shape_of(with_blocks(config, blocks), dtype) for blocks in depths]
    work = replace(work)  # without its plan, which may not pickle
    spawn = get_context("spawn")
    with ExitStack() as stack:
        models, loaded = [], []
        for small in shapes:
            model, other = spawn.Pipe()
            models.append(stack.enter_context(model))  # closing it ends the process
            arguments = other, source, small, work, device, threads, time.time()
            spawn.Process(target=worker.serve, args=arguments, daemon=True).start()
            other.close()
            loaded.append(_reply(model))  # one after the other, because loading is timed
        for model in models:
            _score(model, 1)  # to warm up
        per_row = sum(_score(model, 1)[0] for model in models)
        rows = min(work.batch_rows, max(2, int(BUDGET_S / TURNS / per_row)))
        fewer_rows = max(1, rows // 2)
        fewer_peaks = [_score(model, fewer_rows)[1] for model in models]
        turns = [[_score(model, rows) for model in models] for _ in range(TURNS)]
        # A full batch, if the budget allows; with the smaller model only, unless blocks keep activations.
        full = len(models) if passes(shape, work).kept_blocks else 1
        if rows == work.batch_rows or per_row * work.batch_rows > BUDGET_S:
            full = 0
        full_peaks = [_score(model, work.batch_rows)[1] for model in models[:full]]
    runs = []
    for i, small in enumerate(shapes):
        peak = max(turn[i][1] for turn in turns)
        full_peak = full_peaks[i] if i < full else None
        runs.append(
            Run(
                blocks=small.blocks,
                rows=rows,
                seconds=tuple(turn[i][0] for turn in turns),
                peak=peak,
                fewer_rows=fewer_rows,
                fewer_peak=fewer_peaks[i],
                full_peak=peak if rows == work.batch_rows else full_peak,
                weight_bytes=small.weight_bytes,
                **loaded[i],
            )
        )
    return runs


def _score(model: Connection, rows: int) -> tuple[float, int]:
    """Seconds and peak bytes of scoring ``rows`` rows."""
    model.send(rows)
    seconds, peak = _reply(model)
    return seconds, peak


def _reply(model: Connection) -> Any:
    try:
        reply = model.recv()
    except EOFError:
        raise RuntimeError("measuring failed: a process died, usually for lack of memory") from None
    if isinstance(reply, str):
        raise RuntimeError(f"measuring failed: {reply}")
    return reply


def _deeper(config: Any, shape: Shape, work: Work, device: str) -> int:
    """Blocks of the larger of two models that fit into free memory; more blocks dilute the measurement error."""
    low = work.fewest_blocks
    dtype = getattr(torch, shape.dtype)
    room = int(SHARE * free_bytes(device))

    def needed(blocks: int) -> int:
        both = [shape_of(with_blocks(config, n), dtype) for n in (low, blocks)]
        return sum(small.weight_bytes + activation_bytes(small, work, device == "cpu") for small in both)

    for blocks in range(min(low + 3, shape.blocks), low, -1):
        if needed(blocks) <= room:
            return blocks
    raise ValueError(
        f"plan: measuring models of {low} and {low + 1} blocks with a batch needs {needed(low + 1) / 2**30:.2f} GiB, "
        f"but {room / 2**30:.2f} GiB are available; lower --batch-tokens, or give a device's --flops and --bandwidth"
    )


def free_bytes(device: str) -> int:
    """Bytes that can still be allocated on a device."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    return worker.bytes_of("meminfo", "MemAvailable")
