"""A small case for every GPU backend present, held to the oracle: ``make gpu-check`` runs a memory checker over it."""

from __future__ import annotations

import torch

import acqcore
from acqcore.testing import assert_close_to_oracle, assert_logits_match, random_case


def main() -> None:
    backends = [row.name for row in acqcore.backends() if row.available and row.name not in ("cpu", "eager")]
    for backend in backends:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            base = torch.randn(7, 9004, device="cuda").to(dtype)
            targets = torch.tensor([0, -100, 5, 8999, 4096, 1, 2], device="cuda")
            for logits in (base[:, :9000], base[:, 1:9001], base.T.contiguous().T[:, :9000], base[:, :9000:3]):
                assert_logits_match(logits, targets.clamp(max=logits.shape[1] - 1), 0.7, backend)
            case = random_case(33, 40, 9001, bias=True, softcap=20.0).to(dtype, "cuda")
            assert_close_to_oracle(case.run(backend), case.oracle())
        print(f"{backend}: agrees with the oracle")
    if not backends:
        raise SystemExit("no GPU backend is available: " + "; ".join(str(row.reason) for row in acqcore.backends()))


if __name__ == "__main__":
    main()
