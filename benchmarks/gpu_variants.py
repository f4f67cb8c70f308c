"""Ways of forming the same numbers that only a device can tell apart: each is held to float64 before it is timed.

A variant is a set of module constants. ``applied`` sets them for a block of code. ``python -m benchmarks.gpu_variants
--worker I --of N`` calls every Nth operation once at the shapes of the mission, so that processes compile side by side.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import acqcore
from acqcore.kernels import block_mixture, factors
from benchmarks import bench_row_stats, harness

#: operation -> variant -> module, constant, value
VARIANTS: dict[str, dict[str, tuple[tuple[Any, str, Any], ...]]] = {
    "hidden_grad": {
        "two parts": ((factors, "PARTS", 2),),
        "one part": ((factors, "PARTS", 1),),
        "one part, ring of 30 MiB": ((factors, "PARTS", 1), (factors, "RING_BYTES", 30 << 20)),
        "one part, torch's product": ((factors, "PARTS", 1), (factors, "LIBRARY", True)),
        "two parts, torch's product": ((factors, "PARTS", 2), (factors, "LIBRARY", True)),
    },
    "mutual_information, block": {
        "masks loaded": ((block_mixture, "BITS", False), (block_mixture, "CARRY", False)),
        "masks carried": ((block_mixture, "BITS", False), (block_mixture, "CARRY", True)),
        "bits": ((block_mixture, "BITS", True), (block_mixture, "CARRY", False)),
        "bits carried": ((block_mixture, "BITS", True), (block_mixture, "CARRY", True)),
    },
}  # fmt: skip


@contextlib.contextmanager
def applied(op: str, name: str) -> Iterator[None]:
    before = [(module, constant, getattr(module, constant)) for module, constant, _ in VARIANTS[op][name]]
    try:
        for module, constant, value in VARIANTS[op][name]:
            setattr(module, constant, value)
        yield
    finally:
        for module, constant, value in before:
            setattr(module, constant, value)


def under(op: str, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` with a variant's constants."""

    def run(*arguments: Any) -> Any:
        with applied(op, name):
            return call(*arguments)

    return run


def calls(n: int, d: int, v: int, device: str) -> dict[str, Callable[[], Any]]:
    """What the mission will call and Triton has to compile."""
    hidden, weight, targets = bench_row_stats.make_inputs(n, d, v, torch.bfloat16, device)
    head = acqcore.Head(weight)
    found: dict[str, Callable[[], Any]] = {}
    call: Callable[..., Any]
    for name in VARIANTS["mutual_information, block"]:
        call = partial(acqcore.mutual_information, hidden, head, form="block", draws=8, backend="triton")
        found[f"block, {name}"] = under("mutual_information, block", name, call)
    for name in VARIANTS["hidden_grad"]:
        call = partial(acqcore.hidden_grad, hidden, head, targets, backend="triton")
        found[f"hidden_grad, {name}"] = under("hidden_grad", name, call)
    found["element"] = partial(acqcore.mutual_information, hidden, head, form="element", draws=8, backend="triton")
    for tokens in (32, 128):
        offsets = torch.arange(0, n + 1, tokens)
        found[f"norm, T={tokens}"] = partial(
            acqcore.head_grad_norm, hidden, head, targets, offsets, backend="triton"
        )  # fmt: skip
    found["sketch"] = partial(
        acqcore.grad_sketch, hidden, head, targets, torch.arange(0, n + 1, 128), backend="triton"
    )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    arguments = parser.parse_args()
    from benchmarks.gpu_mission import SHAPES

    for shape in SHAPES[arguments.device]:
        for name, call in list(calls(*shape, arguments.device).items())[arguments.worker :: arguments.of]:
            begin = time.perf_counter()
            try:
                with torch.no_grad():
                    call()
                if arguments.device == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:  # the mission will say so too
                print(f"{shape}: {name}: {harness.first_line(error)}", flush=True)
            print(f"{shape}: {name}: {time.perf_counter() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    main()
