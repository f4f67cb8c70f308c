"""Measures tile shapes on this machine's GPU and writes them to ``configs/``: ``python -m acqcore.kernels.tune``.

Each candidate runs on Gaussian inputs for each weight shape. Candidates that do not compile, or whose statistics differ
from those of the architecture's default tiles, are reported and dropped. Candidates closest to the default come first,
so a search cut short by ``--seconds`` or ``--candidates`` has tried the most promising ones. The file is written after
every entry. Kinds of products not measured keep the file's entries or, in a new file, the architecture's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.testing
from triton.runtime.errors import OutOfResources

from acqcore.kernels.config import ARCHITECTURES, FOLDER, Strips, Tiles, file_name
from acqcore.kernels.logit_stats import logit_stats
from acqcore.kernels.product import Product
from acqcore.kernels.row_stats import row_stats

#: Weights of SmolLM2 135M, Qwen3 0.6B and 4B, Gemma 2 2B, and the usual benchmark shape of fused heads.
SHAPES = ((49152, 576), (151936, 1024), (151936, 2560), (256000, 2304), (131072, 4096))
PRODUCTS = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
ROWS = 4096


@dataclass
class Budget:
    """Limits of a search: a ``time.monotonic`` deadline and a maximum number of candidates."""

    deadline: float = float("inf")
    candidates: int | None = None

    def spent(self, tried: int) -> bool:
        return time.monotonic() > self.deadline or tried == self.candidates


def tile_candidates(product: str, major: int, fallback: Tiles) -> list[Tiles]:
    """Tiles worth trying, closest to ``fallback`` first, with its splits and program order."""
    depths = {"half": (64, 128), "tf32": (32, 64), "ieee": (16,)}[product]
    ways = [(False, False)]  # (descriptors, flatten)
    if major in (9, 10) and product != "ieee":
        ways += [(True, False), (True, True)]
    cuts = ((128, 256, 8), (128, 128, 4), (128, 128, 8), (256, 128, 8), (64, 256, 4), (128, 64, 4), (64, 128, 4))
    candidates = [
        Tiles(m, n, k, warps, stages, fallback.group_m, fallback.splits, descriptors, flatten)
        for (m, n, warps), k, stages, (descriptors, flatten) in itertools.product(cuts, depths, (2, 3, 4), ways)
    ]
    own = asdict(fallback)
    return sorted(candidates, key=lambda tiles: sum(own[name] != value for name, value in asdict(tiles).items()))


def outputs(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``state [7, n]`` and ``index [n]``, uninitialised."""
    device = torch.device("cuda")
    return torch.empty(7, n, dtype=torch.float64, device=device), torch.empty(n, dtype=torch.int64, device=device)


def tune_row_stats(product: str, vocab: int, depth: int, fallback: Tiles, major: int, budget: Budget) -> dict[str, Any]:
    """The entry of the fastest tiles for a weight ``[vocab, depth]``."""
    g = torch.Generator("cuda").manual_seed(0)
    dtype = PRODUCTS[product]
    hidden = torch.randn(ROWS, depth, generator=g, device="cuda").to(dtype)
    weight = (torch.randn(vocab, depth, generator=g, device="cuda") * (3 / depth**0.5)).to(dtype)
    targets = torch.randint(vocab, (ROWS,), generator=g, device="cuda")

    def run(tiles: Tiles) -> torch.Tensor:
        state, index = outputs(ROWS)
        precision = "tf32" if product == "tf32" else "ieee"
        row_stats(Product(weight, None, None, 1.0, 1.0, 0, tiles, precision, False), hidden, targets, state, index)
        return state

    # The number of splits and the program order come last, as they matter least.
    first = fastest(run, tile_candidates(product, major, fallback), fallback, budget)
    around = [replace(first, group_m=group, splits=splits) for group in (4, 8, 16, 32) for splits in (32, 64, 128, 256)]
    best = fastest(run, around, first, budget)
    return {"vocab": vocab, "depth": depth, **asdict(best)}


def tune_logit_stats(vocab: int, fallback: Strips, budget: Budget) -> dict[str, Any]:
    """The entry of the fastest strips for bfloat16 logits ``[ROWS, vocab]``."""
    logits = torch.randn(ROWS, vocab, device="cuda", dtype=torch.bfloat16) * 3

    def run(strips: Strips) -> torch.Tensor:
        state, index = outputs(ROWS)
        logit_stats(logits, None, 1.0, state, index, strips)
        return state

    sizes = itertools.product((1, 2, 4), (512, 1024, 2048, 4096), (8192, 32768), (1, 2, 4))
    return {"vocab": vocab, **asdict(fastest(run, list(itertools.starmap(Strips, sizes)), fallback, budget))}


def fastest(run: Any, candidates: list[Any], fallback: Any, budget: Budget) -> Any:
    """The candidate with the lowest median time whose state matches ``fallback``; ``run(candidate) -> state``."""
    expected = run(fallback)
    best, least = fallback, triton.testing.do_bench(lambda: run(fallback), return_mode="median")
    for tried, candidate in enumerate(dict.fromkeys(candidates)):
        if budget.spent(tried):
            print(f"  the budget ends after {tried} candidates", flush=True)
            break
        try:
            state = run(candidate)
            torch.cuda.synchronize()
        except OutOfResources:
            continue  # exceeds the device's shared memory or registers
        except Exception as error:  # Triton's passes and ptxas raise various errors
            print(f"  dropped, failed with {type(error).__name__}: {candidate}", flush=True)
            continue
        if not torch.allclose(state, expected, rtol=1e-3, atol=1e-4):
            print(f"  dropped, wrong statistics: {candidate}", flush=True)
            continue
        ms = triton.testing.do_bench(lambda c=candidate: run(c), return_mode="median")
        if ms < least:
            best, least = candidate, ms
    print(f"  {least:.3f} ms: {best}", flush=True)
    return best


def why_not() -> str | None:
    """Reason why tuning is impossible on this machine, or None."""
    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set: kernels run in Triton's interpreter, where timings mean nothing"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; tile shapes can only be measured on a GPU"
    if torch.cuda.get_device_capability()[0] < 8:
        return f"{torch.cuda.get_device_name()} has a compute capability below 8.0, which acqcore does not support"
    return None


def write(path: Path, tables: dict[str, Any]) -> None:
    """Write a file of tiles, one entry per line."""
    text = json.dumps(tables, indent=2)
    path.write_text(re.sub(r"{[^{}]*}", lambda entry: json.dumps(json.loads(entry[0])), text) + "\n")


def shape(text: str) -> tuple[int, int]:
    """Parse ``VxD``."""
    vocab, _, depth = text.partition("x")
    return int(vocab), int(depth)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m acqcore.kernels.tune", description=__doc__)
    parser.add_argument("--shapes", nargs="+", type=shape, default=SHAPES, metavar="VxD", help="weight shapes")
    parser.add_argument("--products", nargs="+", choices=PRODUCTS, default=tuple(PRODUCTS), help="default: all")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time limit of the search")
    parser.add_argument("--candidates", type=int, help="maximum candidates per search (two searches per entry)")
    parser.add_argument("--output", type=Path, help="output file (default: this device's, in the package)")
    options = parser.parse_args(arguments)
    if reason := why_not():
        print(f"acqcore.kernels.tune: {reason}", file=sys.stderr)
        return 1
    device, major = torch.cuda.get_device_name(), torch.cuda.get_device_capability()[0]
    base = json.loads((FOLDER / f"{ARCHITECTURES.get(major, 'sm_80')}.json").read_text())
    path = options.output or FOLDER / file_name(device)
    if not os.access(path.parent, os.W_OK):
        print(f"acqcore.kernels.tune: cannot write to {path.parent}; name another file with --output", file=sys.stderr)
        return 1
    budget = Budget(time.monotonic() + options.seconds, options.candidates)
    tables: dict[str, Any] = json.loads(path.read_text()) if path.exists() else base
    for product in options.products:
        known = {key: value for key, value in base["row_stats"][product][0].items() if key not in ("vocab", "depth")}
        entries: list[dict[str, Any]] = []
        for vocab, depth in options.shapes:
            if budget.spent(0):
                break
            print(f"row_stats, {product}, weight [{vocab}, {depth}]", flush=True)
            entries.append(tune_row_stats(product, vocab, depth, Tiles(**known), major, budget))
            tables["row_stats"][product] = entries
            write(path, tables)
    strips = Strips(**{key: value for key, value in base["logit_stats"][0].items() if key != "vocab"})
    entries = []
    for vocab in sorted({vocab for vocab, _ in options.shapes}):
        if budget.spent(0):
            break
        print(f"logit_stats, [{ROWS}, {vocab}]", flush=True)
        entries.append(tune_logit_stats(vocab, strips, budget))
        tables["logit_stats"] = entries
        write(path, tables)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
