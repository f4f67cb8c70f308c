"""A process that holds one small model and scores with it on demand, so that its memory is measured separately."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import acqcore
from acqcore.costs.shape import Shape, read_config, with_blocks
from acqcore.costs.work import STAND_INS, Objects, Work, with_objects


def serve(
    connection: Connection,
    source: str,
    shape: Shape,
    work: Work,
    device: str,
    threads: int | None,
    started: float,  # when this process was started, in seconds since the epoch
) -> None:
    """Load a model and send the memory and time of that; then receive numbers of rows and send, for each, the seconds
    and peak memory of scoring that many. An error is sent as text."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # what libraries print is not part of the plan
    os.dup2(null, 2)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        score, facts = _load(source, shape, work, device, started)
        connection.send(facts)
        while True:
            connection.send(_measured(score, connection.recv(), device))
    except EOFError:  # the other end is closed
        pass
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "")
        connection.send(f"{type(error).__name__}: {first_line}")


def _load(
    source: str, shape: Shape, work: Work, device: str, started: float
) -> tuple[Callable[[int], object], dict[str, Any]]:
    """A function that scores n rows, and the memory and time of loading."""
    from transformers import AutoModelForCausalLM

    config = with_blocks(read_config(source), shape.blocks)
    dtype = getattr(torch, shape.dtype)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)  # imports what the model needs
    libraries = bytes_of("self/status", "VmRSS") if device == "cpu" else 0
    imported = time.time()
    has_weights = any(Path(source).glob("*.safetensors"))  # a local directory's
    if has_weights:
        model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype)
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to(device).eval()
    load_seconds = time.time() - imported if has_weights else None
    student = acqcore.Student.from_model(model, verify=False)  # the probe would copy a half-precision head

    def samples(rows: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(student.head.weight.shape[0], (rows, work.tokens), generator=generator)
        labels = ids.clone()
        labels[:, : work.tokens - work.scored] = -100
        return {"input_ids": ids, "labels": labels}

    objects: Objects = {
        **STAND_INS,
        "influence": {"reference": lambda: acqcore.influence_reference(student, samples(1))},
        "epig": {"reference": lambda: acqcore.epig_reference(student, samples(1))},
    }
    arguments = with_objects(work.acquisitions, work.arguments, objects)
    options: dict[str, Any] = {"acquisition_args": arguments, "batch_tokens": work.batch_tokens, "progress": False}

    def score(rows: int) -> object:
        return acqcore.score(student, samples(rows), work.acquisitions, **options)

    return score, {"libraries": libraries, "start_seconds": imported - started, "load_seconds": load_seconds}


def _measured(score: Callable[[int], object], rows: int, device: str) -> tuple[float, int]:
    """Seconds of one call and its peak memory: of the process, or allocated by torch on the GPU."""
    gc.collect()
    if device == "cpu":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # else the call reuses pages left by an earlier one
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    else:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    score(rows)
    if device != "cpu":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return seconds, bytes_of("self/status", "VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated(device)


def bytes_of(file: str, field: str) -> int:
    """A field of ``meminfo`` or ``self/status``."""
    for line in Path("/proc", file).read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{file} has no {field}")
