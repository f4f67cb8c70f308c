"""This machine's peak multiply-adds and copied bytes per second, measured alongside the peers.

A rate in GFLOP/s says little about another processor; the share of the measured peak is portable. ``peak.cpp`` is
compiled on first use with the C++ compiler (``$CXX``, else ``c++``).
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.harness import cpu_seconds

#: (instruction set of the cpu backend, dtype) -> (loop in peak.cpp, its floating-point operations per round)
LOOPS = {
    ("x86-64-v4-amx", torch.bfloat16): ("amx_bf16", 4 * 16 * 16 * 32 * 2),
    ("x86-64-v4-amx", torch.float32): ("avx512_fp32", 16 * 16 * 2),
    ("x86-64-v4-bf16", torch.bfloat16): ("avx512_bf16", 16 * 32 * 2),
    ("x86-64-v4-bf16", torch.float32): ("avx512_fp32", 16 * 16 * 2),
    ("x86-64-v4", torch.float32): ("avx512_fp32", 16 * 16 * 2),
    ("x86-64-v3", torch.float32): ("avx2_fp32", 12 * 8 * 2),
    ("neon", torch.float32): ("neon_fp32", 24 * 4 * 2),
}


def multiply_adds(work: float, instruction_set: str, dtype: torch.dtype) -> Callable[[], object]:
    """A call that runs ``work`` floating-point operations, two per multiply-add, spread over torch's threads.

    Without a bfloat16 dot product, the backend widens bfloat16 inputs, so the float32 peak applies.

    Raises:
        LookupError: there is no loop for the instruction set.
        RuntimeError: there is no compiler.
    """
    key = (instruction_set, dtype)
    loop = LOOPS.get(key) or LOOPS.get((instruction_set, torch.float32))
    if loop is None:
        raise LookupError(f"no multiply-add loop for {instruction_set}; available: {sorted({k[0] for k in LOOPS})}")
    name, operations = loop
    function = getattr(_library(), name)
    function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_float
    threads = torch.get_num_threads()
    rounds = int(work / operations / threads)
    pool = ThreadPoolExecutor(threads)  # ctypes releases the GIL
    return lambda: list(pool.map(function, [rounds] * threads))


def copy_bandwidth(turns: int = 5) -> float:
    """Bytes per second, read plus written, of torch's copy of 256 MiB: the best of ``turns``."""
    source = torch.zeros(1 << 26)
    target = torch.ones_like(source)
    return 2 * source.nbytes / min(cpu_seconds(lambda: target.copy_(source)) for _ in range(turns))


@functools.cache
def _library() -> ctypes.CDLL:
    source = Path(__file__).with_name("peak.cpp")
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "peak.so"
        command = [compiler, "-O2", "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(target)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise RuntimeError(f"measuring the peak needs a C++ compiler; not found: {compiler!r}") from None
        return ctypes.CDLL(str(target))
