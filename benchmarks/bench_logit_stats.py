"""Statistics of materialized logits: acqcore compared with other libraries, in GB/s for one read of the logits.

``python -m benchmarks.bench_logit_stats`` measures on the CPU, prints and writes ``results/logit_stats.json`` and
``.png``; ``--device cuda --out FILE`` measures on a GPU and writes that file. GPU shares are relative to the bandwidth
of a device-to-device copy (bytes read plus written), measured first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

import acqcore
from benchmarks import harness
from benchmarks.bench_row_stats import fields


def make_inputs(n: int, v: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian logits ``[n, v]`` with standard deviation 3, and targets ``[n]``."""
    g = torch.Generator(device).manual_seed(0)
    logits = torch.empty(n, v, dtype=dtype, device=device).normal_(0, 3, generator=g)
    return logits, torch.randint(0, v, (n,), generator=g, device=device)


def ours_by(backend: str, with_targets: bool) -> Callable[..., acqcore.RowStats]:
    def run(logits: torch.Tensor, targets: torch.Tensor) -> acqcore.RowStats:
        return acqcore.logit_stats(logits, targets if with_targets else None, backend=backend)

    return run


def eager(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return fields(logits.float(), targets)


def trl_fused(logits: torch.Tensor, targets: torch.Tensor) -> object:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(logits, targets)


def quack_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> object:
    from quack.cross_entropy import cross_entropy_fwd

    return cross_entropy_fwd(logits, targets, return_lse=True)


_compiled = torch.compile(eager, dynamic=False)
BASELINE = "eager"

#: device -> peer -> function
PEERS: dict[str, dict[str, Callable[..., object]]] = {
    "cpu": {
        "acqcore cpu (all fields)": ours_by("cpu", True),
        "eager": eager,
        "acqcore eager (the reference)": ours_by("eager", True),
        "torch.compile of eager": lambda *inputs: _compiled(*inputs),
    },
    "cuda": {
        "acqcore cuda (all fields)": ours_by("cuda", True),
        "acqcore cuda (no targets: no check of their range)": ours_by("cuda", False),
        "acqcore triton (all fields)": ours_by("triton", True),
        "acqcore triton (no targets: no check of their range)": ours_by("triton", False),
        "eager": eager,
        "torch.compile of eager": lambda *inputs: _compiled(*inputs),
        "TRL fused (logprob, entropy)": trl_fused,
        "QuACK cross_entropy (loss, logsumexp)": quack_cross_entropy,
    },
}

#: device -> (N, V, dtype); on the GPU several vocabularies at full load, then a few rows
SHAPES: dict[str, list[tuple[int, int, torch.dtype]]] = {
    "cpu": [(1024, 151936, torch.float32), (1024, 151936, torch.bfloat16)],
    "cuda": [
        (8192, 151936, torch.bfloat16),
        (8192, 131072, torch.bfloat16),
        (4096, 151936, torch.float32),
        (4096, 131072, torch.float32),
        (8192, 50257, torch.bfloat16),
        (16, 151936, torch.bfloat16),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, help="N of every shape")
    parser.add_argument("--vocab", type=int, help="V of every shape")
    parser.add_argument("--out", type=Path, help="JSON to write, instead of results/logit_stats.json and .png")
    arguments = parser.parse_args()
    device = arguments.device
    ceiling = harness.copy_bandwidth() if device == "cuda" else None
    rows: list[harness.Row] = []
    not_measured = {}
    for n, v, dtype in SHAPES[device]:
        n, v = arguments.rows or n, arguments.vocab or v
        case = f"N={n} V={v} {harness.name(dtype)}"
        print(f"measuring {case} ...", flush=True)
        inputs = make_inputs(n, v, dtype, device)
        with torch.no_grad():
            peers, absent = harness.running(PEERS[device], inputs)
            for peer, reason in absent.items():
                print(f"not measured: {peer}: {reason}")
                not_measured[f"{case}: {peer}"] = reason
            work = float(inputs[0].numel() * inputs[0].element_size())
            rows += harness.measure(
                case, peers, baseline=BASELINE, work=work, turns=arguments.turns, device=device, ceiling=ceiling
            )
        del inputs, peers
        if device == "cuda":
            torch.cuda.empty_cache()
    notes: dict[str, object] = {"ratio_to": BASELINE, "not_measured": not_measured, "copy_bytes_per_second": ceiling}
    harness.report("logit_stats", rows, unit="GB/s", notes=notes, out=arguments.out)


if __name__ == "__main__":
    main()
