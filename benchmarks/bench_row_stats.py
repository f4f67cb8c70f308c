"""Statistics of a language-model head: acqcore against what people use, on the CPU.

``python -m benchmarks.bench_row_stats`` measures, prints and writes ``results/row_stats.json`` and ``.png``;
``make bench-pytest`` drives the same peers through pytest-benchmark on a small shape.
Rates count the product alone (2 N D V); the bare ``hidden @ weight.T`` beside them is what torch's BLAS reaches here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pytest
import torch

import acqcore
from benchmarks import harness

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # hidden [N, D], weight [V, D], targets [N]


def make_inputs(n: int, d: int, v: int, dtype: torch.dtype) -> Inputs:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=g)
    weight = torch.randn(v, d, generator=g) * (3 / d**0.5)
    return hidden.to(dtype), weight.to(dtype), torch.randint(0, v, (n,), generator=g)


def eager(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Every field of RowStats from the logits, written with care: each pass over them is needed."""
    logits = (hidden @ weight.T).float()
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


def ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> acqcore.RowStats:
    return acqcore.row_stats(hidden, acqcore.Head(weight), targets)


def reference(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> acqcore.RowStats:
    return acqcore.row_stats(hidden, acqcore.Head(weight), targets, backend="eager")


def torch_linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    # With options= it goes by chunks, but computes the gradients too: slower still.
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


_compiled = torch.compile(eager)

#: name -> (function, what it gives)
PEERS: dict[str, Callable[..., object]] = {
    "hidden @ weight.T (no statistics)": bare_product,
    "acqcore cpu (all fields)": ours,
    "eager": eager,
    "acqcore eager (the reference)": reference,
    "torch.compile of eager": lambda *inputs: _compiled(*inputs),
    "TRL chunked (logprob, entropy, sum p^2, top-1)": trl_chunked,
    "Liger fallback (logprob, entropy)": liger,
    "torch linear_cross_entropy (mean loss)": torch_linear_cross_entropy,
}
BASELINE = "hidden @ weight.T (no statistics)"


def missing(peer: str) -> str | None:
    """Why a peer can not run here, or None."""
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
    arguments = parser.parse_args()
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
    with torch.no_grad():
        for n, d, v, dtype, with_peers in shapes:
            inputs = make_inputs(n, d, v, dtype)
            names = [p for p in PEERS if p not in absent] if with_peers else ["acqcore cpu (all fields)"]
            peers = {name: _bind(PEERS[name], inputs) for name in names}
            case = f"N={n} D={d} V={v} {str(dtype).removeprefix('torch.')}"
            baseline = BASELINE if with_peers else names[0]
            print(f"measuring {case} ...", flush=True)
            rows += harness.measure(
                case,
                peers,
                baseline=baseline,
                work=2.0 * n * d * v,
                turns=arguments.turns if with_peers else 3,
            )
    harness.report("row_stats", rows, unit="GFLOP/s", notes={"ratio_to": BASELINE, "not_measured": absent})


def _bind(function: Callable[..., object], inputs: Inputs) -> Callable[[], object]:
    return lambda: function(*inputs)


@pytest.mark.parametrize("peer", PEERS)
def bench_row_stats(benchmark: Any, peer: str) -> None:
    if reason := missing(peer):
        pytest.skip(reason)
    inputs = make_inputs(256, 576, 8192, torch.float32)
    with torch.no_grad():
        benchmark(PEERS[peer], *inputs)


if __name__ == "__main__":
    main()
