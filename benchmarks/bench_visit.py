"""One visit of a head's weights on the CPU: statistics, and the added cost of gradient norms, dL/dh, sketches, draws.

``python -m benchmarks.bench_visit`` measures SmolLM2's head (D = 576, V = 49152) in float32 and bfloat16 on samples of
several lengths, next to the bare product, Opacus if installed, and one backward per sample. It writes
``results/visit.json`` and a plot after every case, and keeps cases measured earlier on the same machine, so it can be
run in parts. ``ACQCORE_ISA`` selects another instruction set. ``--clock cpu`` counts the process's CPU time, for shared
machines; use it with one thread.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import acqcore
from acqcore.fisher import fisher_grad
from benchmarks import harness, peak
from benchmarks.bench_gradients import D, V, loop, opacus

STATISTICS = "statistics"
PEAK = "peak of multiply-adds"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DRAWS = 8
PROBES = 4


def inputs(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states ``[rows, D]``, weight ``[V, D]`` and targets ``[rows]``; logits of standard deviation 3."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=g) * (3 / D**0.5)
    hidden = torch.randn(rows, D, generator=g)
    return hidden.to(dtype), weight.to(dtype), torch.randint(0, V, (rows,), generator=g)


def norm_peers(
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D]
    targets: torch.Tensor,  # [N]
    length: int,
) -> dict[str, Callable[[], object]]:
    """Gradient norms of samples of ``length`` rows; raises unless every peer agrees with ours to 5e-3.

    At 2,048 tokens the float32 backward deviates from float64 by 1.6e-3, ours by 4e-8.
    """
    head, offsets = acqcore.Head(weight), torch.arange(0, len(hidden) + 1, length)
    peers: dict[str, Callable[[], object]] = {
        STATISTICS: lambda: acqcore.row_stats(hidden, head, targets),
        "statistics and norm": lambda: acqcore.head_grad_norm(hidden, head, targets, offsets),
        "statistics and norm, two visits": lambda: acqcore.head_grad_norm(
            hidden, head, targets, offsets, form="direct"
        ),
        "bare product (torch)": lambda: hidden @ weight.T,
    }
    if hidden.dtype == torch.float32:
        layer = torch.nn.Linear(D, V, bias=False)
        layer.weight = torch.nn.Parameter(weight)
        batch, of_batch = hidden.view(-1, length, D), targets.view(-1, length)
        expected = acqcore.head_grad_norm(hidden, head, targets, offsets)
        found: dict[str, Callable[..., torch.Tensor]] = {"one backward per sample": loop}
        if importlib.util.find_spec("opacus") is not None:
            found["Opacus ghost norm"] = opacus
        for name, function in found.items():
            torch.testing.assert_close(function(batch, layer, of_batch), expected, rtol=5e-3, atol=0)
            peers[name] = partial(function, batch, layer, of_batch)
    return peers


def row_peers(
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D]
    targets: torch.Tensor,  # [N]
) -> dict[str, Callable[[], object]]:
    """Operations on rows or on samples of 128, and the peak; the cotangents serve the linear form's draws."""
    head, offsets = acqcore.Head(weight), torch.arange(0, len(hidden) + 1, 128)
    isa = str(harness.machine()["instruction_set"])
    return {
        PEAK: peak.multiply_adds(2.0 * len(hidden) * D * V, isa, hidden.dtype),
        STATISTICS: lambda: acqcore.row_stats(hidden, head, targets),
        "hidden_grad": lambda: acqcore.hidden_grad(hidden, head, targets),
        "grad_sketch, 4096 numbers": lambda: acqcore.grad_sketch(hidden, head, targets, offsets),
        f"random cotangents, {PROBES} probes": lambda: fisher_grad(hidden, head, targets, probes=PROBES),
    }


def draw_peers(
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D]
    targets: torch.Tensor,  # [N]
) -> dict[str, Callable[[], object]]:
    """Mutual information alone, and in ``score`` with entropy and gradient norm, for samples of 128.

    The student's trunk only looks up hidden states, so that the head accounts for the whole cost.
    """
    head = acqcore.Head(weight)
    student = acqcore.Student(lambda ids: hidden[ids % len(hidden)], head)  # other ids: its test rows
    samples = {"input_ids": torch.arange(len(hidden)).view(-1, 128)}
    draws = {"mutual_information": {"form": "block", "draws": DRAWS}}

    def scored(names: list[str]) -> Callable[[], object]:
        return lambda: acqcore.score(student, samples, names, acquisition_args=draws)

    return {
        STATISTICS: lambda: acqcore.row_stats(hidden, head, targets),
        f"mutual information, block, K={DRAWS}": lambda: acqcore.mutual_information(
            hidden, head, form="block", draws=DRAWS
        ),
        "score(mutual_information)": scored(["mutual_information"]),
        "score(entropy, grad_norm, mutual_information)": scored(["entropy", "grad_norm", "mutual_information"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--parts", nargs="+", choices=("norms", "rows", "draws"), default=["norms", "rows", "draws"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 512, 2048])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write this JSON instead, without a plot; for a second machine")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    arguments = parser.parse_args()
    for dtype in arguments.dtypes:
        hidden, weight, targets = inputs(arguments.rows, DTYPES[dtype])
        cases: dict[str, Callable[[], dict[str, Callable[[], object]]]] = {}
        if "norms" in arguments.parts:
            for t in arguments.lengths:
                cases[f"samples of {t}"] = partial(norm_peers, hidden, weight, targets, t)
        if "rows" in arguments.parts:
            cases["rows"] = partial(row_peers, hidden, weight, targets)
        if "draws" in arguments.parts:
            cases["draws"] = partial(draw_peers, hidden, weight, targets)
        for what, peers in cases.items():
            isa = harness.machine()["instruction_set"]
            case = f"{dtype}, {isa}, N={arguments.rows} D={D} V={V}, {what}"
            print(f"measuring {case} ...", flush=True)
            rows = harness.measure(
                case,
                peers(),
                baseline=STATISTICS,
                work=2.0 * len(hidden) * D * V,
                turns=arguments.turns,
                ceiling=PEAK if what == "rows" else None,
                clock=CLOCKS[arguments.clock],
            )
            notes: dict[str, object] = {"ratio_to": STATISTICS, "clock": arguments.clock}
            harness.report("visit", rows, unit="GFLOP/s", notes=notes, out=arguments.out, keep=True)


if __name__ == "__main__":
    main()
