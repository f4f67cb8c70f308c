"""The smallest shapes of every operation, compared with the oracle; ``make gpu-check`` runs a memory checker on it.

The cases cover partial tiles, ignored rows, unaligned views and samples of one token. The oracle runs on the CPU, so
that the checker watches little besides the kernels under test.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch

import acqcore
from acqcore.testing import assert_close_to_oracle, random_case
from benchmarks import harness
from benchmarks.gpu_parity import BOUNDS, backends, gradients as compared


def statistics(backend: str, dtype: torch.dtype, device: str) -> None:
    base = torch.randn(7, 3004, device=device).to(dtype)
    targets = torch.tensor([0, -100, 5, 2999, 2096, 1, 2], device=device)
    for logits in (base[:, :3000], base[:, 1:3001], base.T.contiguous().T[:, :3000], base[:, :3000:3]):
        inside = targets.clamp(max=logits.shape[1] - 1)
        got = acqcore.logit_stats(logits, inside, temperature=0.7, backend=backend)
        oracle = acqcore.logit_stats(logits.double().cpu(), inside.cpu(), temperature=0.7, backend="eager")
        assert_close_to_oracle(got, oracle)
    case = random_case(33, 40, 3001, bias=True, softcap=20.0).to(dtype, device)
    assert case.targets is not None
    case.targets[::5] = -100
    assert_close_to_oracle(case.run(backend), case.to(torch.float64).run("eager"))


def gradients(op: str, backend: str, dtype: torch.dtype, device: str) -> None:
    name = "two tiles, capped" if op == "fisher_grad" else "two tiles"
    got, expected = compared(op, name, backend, dtype, device, oracle="cpu")
    error, bound = float((got - expected).norm() / expected.norm()), BOUNDS[op][dtype != torch.float32]
    assert error <= bound, f"relative error {error:.3g}, expected at most {bound:g}"


def draws(backend: str, dtype: torch.dtype, device: str) -> None:
    case = random_case(37, 72, 1501).to(dtype, device)
    for form in ("element", "block"):
        got = acqcore.mutual_information(case.hidden, case.head, draws=3, form=form, block=16, backend=backend)
        exact = case.to(torch.float64)
        oracle = acqcore.mutual_information(exact.hidden, exact.head, draws=3, form=form, block=16, backend="eager")
        information = got.mutual_information.double().cpu()
        torch.testing.assert_close(information, oracle.mutual_information.double(), rtol=0, atol=2e-5)


PARTS: dict[str, Callable[[str, torch.dtype, str], None]] = {
    "statistics": statistics,
    **{op: partial(gradients, op) for op in BOUNDS},
    "draws": draws,
}
DTYPES = (torch.bfloat16, torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    arguments = parser.parse_args()
    names = backends(arguments.device)
    if not names:
        raise SystemExit("no backend is available: " + "; ".join(str(row.reason) for row in acqcore.backends()))
    todo = [(part, backend, dtype) for dtype in DTYPES for part in PARTS for backend in names]
    for part, backend, dtype in todo[arguments.worker :: arguments.of]:
        PARTS[part](backend, dtype, arguments.device)
        print(f"{part}, {backend}, {harness.name(dtype)}: agrees with the oracle", flush=True)


if __name__ == "__main__":
    main()
