"""A process that holds one small model and scores with it on demand, so that its memory is measured separately.

``python -m acqcore.costs.worker SPEC``: SPEC is JSON; each line of stdin is a number of rows to score, and each line of
stdout gives the seconds and peak memory. Started by ``acqcore.costs.measure``.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import acqcore
from acqcore.costs.measure import bytes_of, reset_peak
from acqcore.costs.shape import read_config, with_blocks
from acqcore.costs.work import STAND_INS, Objects, with_objects


def main() -> int:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps the output of libraries out of the replies

    def reply(**values: Any) -> None:
        print(json.dumps(values), file=replies, flush=True)

    try:
        spec = json.loads(sys.argv[1])
        score, facts = _load(spec)
        reply(**facts)
        for line in sys.stdin:
            reply(**_measured(score, int(line), spec["device"]))
    except Exception as error:  # reported to the user by the parent process
        first_line = next(iter(str(error).strip().splitlines()), "")
        reply(error=f"{type(error).__name__}: {first_line}")
        return 1
    return 0


def _load(spec: dict[str, Any]) -> tuple[Callable[[int], object], dict[str, Any]]:
    """A function that scores n rows, and the time and memory of loading."""
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    on_gpu = spec["device"] != "cpu"
    if not on_gpu:
        reset_peak()  # raises if memory cannot be measured
    config = with_blocks(read_config(spec["source"]), spec["blocks"])
    dtype = getattr(torch, spec["dtype"])
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)  # imports what the model needs
    libraries = 0 if on_gpu else bytes_of("self/status", "VmRSS")
    imported_at = time.time()
    start = time.perf_counter()
    if spec["weights"]:
        model = AutoModelForCausalLM.from_pretrained(spec["source"], config=config, dtype=dtype)
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to(spec["device"]).eval()
    load_seconds = time.perf_counter() - start if spec["weights"] else None
    student = acqcore.Student.from_model(model, verify=False)  # the probe would copy a half-precision head

    def samples(rows: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(student.head.weight.shape[0], (rows, spec["tokens"]), generator=generator)
        labels = ids.clone()
        labels[:, : spec["tokens"] - spec["scored"]] = -100
        return {"input_ids": ids, "labels": labels}

    objects: Objects = {
        **STAND_INS,
        "influence": {"reference": lambda: acqcore.influence_reference(student, samples(1))},
        "epig": {"reference": lambda: acqcore.epig_reference(student, samples(1))},
    }
    arguments = with_objects(spec["acquisitions"], spec["arguments"], objects)
    options: dict[str, Any] = {"acquisition_args": arguments, "batch_tokens": spec["batch_tokens"]}

    def score(rows: int) -> object:
        return acqcore.score(student, samples(rows), spec["acquisitions"], **options, progress=False)

    return score, {"libraries": libraries, "imported_at": imported_at, "load_seconds": load_seconds}


def _measured(score: Callable[[int], object], rows: int, device: str) -> dict[str, float]:
    """Seconds of one call and its peak memory: of the process, or allocated by torch on the GPU."""
    gc.collect()
    if device == "cpu":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # else the call reuses pages left by an earlier one
        reset_peak()
    else:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    score(rows)
    if device != "cpu":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "peak": bytes_of("self/status", "VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated(device),
    }


if __name__ == "__main__":
    raise SystemExit(main())
