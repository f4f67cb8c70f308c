"""Statistics of a language-model head: acqcore compared with other libraries.

``python -m benchmarks.bench_row_stats`` prints and writes ``results/row_stats.json`` and ``.png``; ``make
bench-pytest`` runs the peers under pytest-benchmark on a small shape. Rates count the product alone (2 N D V). Shares
are relative to the peak multiply-add rate measured in the same turns (``peak.py``). ``gpu_mission`` measures the same
functions on a GPU.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

import acqcore
from benchmarks import harness, peak

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # hidden [N, D], weight [V, D], targets [N]


def make_inputs(n: int, d: int, v: int, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(n, d, generator=g, device=device)
    weight = torch.randn(v, d, generator=g, device=device) * (3 / d**0.5)
    return hidden.to(dtype), weight.to(dtype), torch.randint(0, v, (n,), generator=g, device=device)


def eager(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return fields((hidden @ weight.T).float(), targets)


def fields(
    logits: torch.Tensor,  # [N, V] float32
    targets: torch.Tensor,  # [N]
) -> tuple[torch.Tensor, ...]:
    """Every field of RowStats from the logits, without redundant passes over them."""
    lse = logits.logsumexp(dim=-1)
    logp = logits.log_softmax(dim=-1)
    p = logp.exp()
    entropy = -(p * logp).sum(dim=-1)
    varentropy = (p * (logp + entropy[:, None]).square()).sum(dim=-1)
    top = p.topk(2, dim=-1)
    logprob = logp.gather(1, targets[:, None])[:, 0]
    sum_sq = p.square().sum(dim=-1)
    residual = p.scatter_add(1, targets[:, None], -torch.ones_like(logprob)[:, None]).norm(dim=-1)
    return lse, logprob, entropy, varentropy, sum_sq, 1 - sum_sq, top.values, top.indices, residual


def bare_product(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return hidden @ weight.T


def ours_by(backend: str | None) -> Callable[..., acqcore.RowStats]:
    """A call of ``row_stats``; None lets the package choose the backend."""

    def run(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> acqcore.RowStats:
        return acqcore.row_stats(hidden, acqcore.Head(weight), targets, backend=backend)

    return run


def torch_linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    # With options= it works in chunks but also computes gradients, which is even slower.
    return torch.nn.functional.linear_cross_entropy(hidden, weight, targets)


def trl_chunked(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> object:
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, 8192, None, 1.0, ("entropy", "log_sum_sq_probs", "is_top1")
    )


def liger(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> object:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    return LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets, 1.0, -100, 1, True)


def liger_fallback(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> object:
    """Liger's fallback without its Hopper kernel: chunks of 512 tokens in torch."""
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as module

    return module._FusedLinearPPOFallbackFunction.apply(hidden, weight, targets, 1.0, -100, True)


_compiled = torch.compile(eager, dynamic=False)

BASELINE = "hidden @ weight.T (no statistics)"
PEAK = "peak of multiply-adds"

#: name (fields it computes) -> function
PEERS: dict[str, Callable[..., object]] = {
    BASELINE: bare_product,
    "acqcore cpu (all fields)": ours_by(None),
    "eager": eager,
    "acqcore eager (the reference)": ours_by("eager"),
    "torch.compile of eager": lambda *inputs: _compiled(*inputs),
    "TRL chunked (logprob, entropy, sum p^2, top-1)": trl_chunked,
    "Liger fallback (logprob, entropy)": liger,
    "torch linear_cross_entropy (mean loss)": torch_linear_cross_entropy,
}


def missing(peer: str) -> str | None:
    """The reason why a peer cannot run here, or None."""
    if not hasattr(torch.nn.functional, "linear_cross_entropy") and peer.startswith("torch linear"):
        return "this torch has no linear_cross_entropy"
    module = {"TRL": "trl", "Liger": "liger_kernel"}.get(peer.split()[0])
    try:
        if module is not None:
            __import__(module)
        if module == "liger_kernel":
            __import__("triton")
    except ImportError as error:
        return str(error)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument(
        "--instruction-sets", action="store_true", help="only compare the CPU's instruction sets: row_stats_isa.json"
    )
    arguments = parser.parse_args()
    with torch.no_grad():
        (instruction_sets if arguments.instruction_sets else all_peers)(arguments.turns)


def all_peers(turns: int) -> None:
    rows = []
    absent = {peer: reason for peer in PEERS if (reason := missing(peer))}
    for peer, reason in absent.items():
        print(f"not measured: {peer}: {reason}")
    shapes: list[tuple[int, int, int, torch.dtype, bool]] = [
        (4096, 576, 49152, torch.float32, True),
        (4096, 576, 49152, torch.bfloat16, True),
        (512, 2048, 128256, torch.float32, True),
        (4096, 576, 262144, torch.float32, False),  # the logits alone would take 4 GiB
    ]
    for n, d, v, dtype, with_peers in shapes:
        inputs = make_inputs(n, d, v, dtype)
        names = [p for p in PEERS if p not in absent] if with_peers else ["acqcore cpu (all fields)"]
        peers: dict[str, Callable[[], object]] = {name: partial(PEERS[name], *inputs) for name in names}
        case = f"N={n} D={d} V={v} {harness.name(dtype)}"
        baseline = BASELINE if with_peers else names[0]
        work = 2.0 * n * d * v
        peers[PEAK] = peak.multiply_adds(work, str(harness.machine()["instruction_set"]), dtype)
        print(f"measuring {case} ...", flush=True)
        rows += harness.measure(
            case, peers, baseline=baseline, work=work, turns=turns if with_peers else 3, ceiling=PEAK
        )
    notes: dict[str, object] = {
        "ratio_to": BASELINE,
        "not_measured": absent,
        "copy_gb_per_second": peak.copy_bandwidth() / 1e9,
    }
    harness.report("row_stats", rows, unit="GFLOP/s", notes=notes)


def instruction_sets(turns: int) -> None:
    """All statistics under each instruction set of this processor, compared with its peak."""
    n, d, v = 1024, 576, 49152
    work = 2.0 * n * d * v
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(n, d, v, dtype)
        for instruction_set in usable_instruction_sets():
            name = f"acqcore cpu, {instruction_set}"
            peers: dict[str, Callable[[], object]] = {
                name: partial(ours_with, instruction_set, *inputs),
                PEAK: peak.multiply_adds(work, instruction_set, dtype),
            }
            case = f"N={n} D={d} V={v} {harness.name(dtype)}, {instruction_set}"
            print(f"measuring {case} ...", flush=True)
            rows += harness.measure(case, peers, baseline=name, work=work, turns=turns, memory=False, ceiling=PEAK)
    harness.report("row_stats_isa", rows, unit="GFLOP/s", out=harness.RESULTS / "row_stats_isa.json")


def usable_instruction_sets() -> list[str]:
    """The cpu backend's instruction sets that this processor supports and ``peak.py`` has a loop for."""
    from acqcore import _core

    usable = [name for name, reason in dict(_core.isas()).items() if not reason]
    return [name for name in usable if any(name == key[0] for key in peak.LOOPS)]


def ours_with(
    instruction_set: str, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> acqcore.RowStats:
    with mock.patch.dict(os.environ, ACQCORE_ISA=instruction_set):
        return acqcore.row_stats(hidden, acqcore.Head(weight), targets, backend="cpu")


@pytest.mark.parametrize("peer", PEERS)
def bench_row_stats(benchmark: Any, peer: str) -> None:
    if reason := missing(peer):
        pytest.skip(reason)
    inputs = make_inputs(256, 576, 8192, torch.float32)
    with torch.no_grad():
        benchmark(PEERS[peer], *inputs)


if __name__ == "__main__":
    main()
