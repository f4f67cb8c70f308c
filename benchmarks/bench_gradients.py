"""Per-sample gradients of a language-model head and of a whole student, compared with other libraries, on the CPU.

``python -m benchmarks.bench_gradients`` measures, prints and writes ``results/gradients_head.json``,
``gradients_student.json`` and their plots.
Head: B samples of T tokens each, D = 576, V = 49152 (SmolLM2). Student: SmolLM2-135M on GSM8K rows.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

import acqcore
from acqsynth.models import smollm2_path
from benchmarks import harness, real_rows
from benchmarks.real_rows import TRUNK

LONGEST_PEER_ROWS = 8192
D, V = 576, 49152
OURS = "acqcore.head_grad_norm"
LARGEST = 1 << 29  # elements; peers that store more logits or per-sample gradients are skipped


def loop(hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """One backward per sample: ``hidden [B, T, D]``, ``targets [B, T]``."""
    norms = []
    for h, y in zip(hidden, targets, strict=True):
        loss = torch.nn.functional.cross_entropy(head(h), y)
        (grad,) = torch.autograd.grad(loss, [head.weight])
        norms.append(grad.norm())
    return torch.stack(norms)


def functional(hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """torch.func: vmap of grad; stores B gradients the size of the head."""

    def loss(weight: torch.Tensor, h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(h @ weight.T, y)

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), chunk_size=1)(head.weight, hidden, targets)
    return grads.flatten(1).norm(dim=1)


def opacus(hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """Opacus's ghost norm of a linear layer, from logits and their gradients."""
    from opacus.grad_sample.linear import compute_linear_norm_sample

    logits = head(hidden).detach().requires_grad_()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    (backprops,) = torch.autograd.grad(loss / targets.shape[1], [logits])
    return compute_linear_norm_sample(head, [hidden], backprops)[head.weight]


def backpack_l2(hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """BackPACK's BatchL2Grad, squared norms; the loss is a sum so that samples are not scaled."""
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    layer = extend(torch.nn.Linear(D, V, bias=False))
    layer.weight = head.weight
    logits = layer(hidden)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    with backpack(BatchL2Grad()):
        (loss / targets.shape[1]).backward()
    result = layer.weight.batch_l2.sqrt()
    layer.weight.grad = None
    return result


def ours(hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    b, t = targets.shape
    offsets = torch.arange(b + 1) * t
    return acqcore.head_grad_norm(hidden.flatten(0, 1), acqcore.Head(head.weight), targets.flatten(), offsets)


#: name -> (function, module it needs)
PEERS: dict[str, tuple[Callable[..., torch.Tensor], str | None]] = {
    OURS: (ours, None),
    "one backward per sample": (loop, None),
    "torch.func vmap(grad), one at a time": (functional, None),
    "Opacus ghost norm": (opacus, "opacus"),
    "BackPACK BatchL2Grad": (backpack_l2, "backpack"),
}


def head_rows(turns: int, absent: dict[str, str]) -> list[harness.Row]:
    """Measures every peer on each shape; raises unless its norms agree with ours to 1e-3."""
    g = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(D, V, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, D, generator=g) * (3 / D**0.5))
    rows = []
    for b, t in ((8, 32), (64, 32), (8, 128), (64, 128), (8, 512), (8, 2048)):
        hidden, targets = torch.randn(b, t, D, generator=g), torch.randint(0, V, (b, t), generator=g)
        expected = ours(hidden, head, targets)
        peers: dict[str, Callable[[], object]] = {}
        held = {"Opacus ghost norm": b * t * V, "BackPACK BatchL2Grad": max(b * t * V, b * V * D)}
        for name, (function, _) in PEERS.items():
            if name in absent or held.get(name, 0) > LARGEST or (name != OURS and b * t > LONGEST_PEER_ROWS):
                continue
            torch.testing.assert_close(function(hidden, head, targets), expected, rtol=1e-3, atol=0)
            peers[name] = partial(function, hidden, head, targets)
        case = f"head D={D} V={V}, B={b} T={t}"
        print(f"measuring {case} ...", flush=True)
        work = 2.0 * b * t * D * V
        rows += harness.measure(case, peers, baseline=OURS, work=work, turns=turns)
    return rows


def student_rows(turns: int, count: int) -> list[harness.Row]:
    """Times ``score`` with the head's gradient norm, and gradients of all layers, against forwards and backwards."""
    student = acqcore.Student.load(smollm2_path(), dtype=torch.float32)
    samples = real_rows.gsm8k(count)
    rows = real_rows.token_rows(student, samples)
    model = student.trunk
    assert isinstance(model, torch.nn.Module)
    parameters = list(model.parameters())
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]

    def gradient(part: Sequence[tuple[torch.Tensor, int]]) -> list[torch.Tensor]:
        """Gradients of all parameters of the mean loss of the completions' tokens in one batch."""
        ids = torch.nn.utils.rnn.pad_sequence([row for row, _ in part], batch_first=True)
        states = student.hidden(ids)
        hidden = torch.cat([h[prompt - 1 : len(row) - 1] for h, (row, prompt) in zip(states, part, strict=True)])
        targets = torch.cat([row[prompt:] for row, prompt in part])
        loss = torch.nn.functional.cross_entropy(hidden @ embedding.T, targets)
        return list(torch.autograd.grad(loss, parameters))

    def backward_per_sample() -> list[torch.Tensor]:
        model.requires_grad_(True)
        return [torch.stack([g.norm() for g in gradient([row])]).norm() for row in rows]

    longest_first = sorted(rows, key=lambda row: -len(row[0]))

    def batched() -> None:
        """Forward and backward of an ordinary training step over all rows, eight of similar length at a time."""
        model.requires_grad_(True)
        for i in range(0, len(rows), 8):
            gradient(longest_first[i : i + 8])

    reference = acqcore.influence_reference(student, samples[:2])
    arguments: dict[str, dict[str, Any]] = {
        "grad_norm": {"parameters": "all"},
        "influence": {"reference": reference},
        "gradient_diversity": {"parameters": "all"},
    }

    def score(*names: str) -> Callable[[], object]:
        given = {name: arguments[name] for name in names}
        return lambda: acqcore.score(student, samples, names, acquisition_args=given, progress=False)

    peers: dict[str, Callable[[], object]] = {
        TRUNK: partial(real_rows.run_trunk, student, rows),
        "score(grad_norm, entropy, margin)": lambda: acqcore.score(
            student, samples, ("grad_norm", "entropy", "margin"), progress=False
        ),
        "acqcore.grad_norm(parameters='all')": lambda: acqcore.grad_norm(student, samples, "all"),
        "acqcore.grad_sketch(parameters='all')": lambda: acqcore.grad_sketch(student, samples, "all"),
        **{f"score({name}), all layers": score(name) for name in arguments},
        f"score({', '.join(arguments)}), all layers": score(*arguments),
        "ordinary batched forward and backward": batched,
        "one backward per sample, all parameters": backward_per_sample,
    }
    exact = torch.stack(backward_per_sample())
    torch.testing.assert_close(acqcore.grad_norm(student, samples, "all"), exact, rtol=1e-3, atol=0)
    case = f"SmolLM2-135M float32, {len(rows)} GSM8K rows, {sum(len(ids) for ids, _ in rows)} tokens"
    print(f"measuring {case} ...", flush=True)
    return harness.measure(case, peers, baseline=TRUNK, turns=turns, memory=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--part", choices=["all", "head", "student"], default="all")
    arguments = parser.parse_args()
    absent = {
        name: f"package {module} is not installed"
        for name, (_, module) in PEERS.items()
        if module is not None and importlib.util.find_spec(module) is None
    }
    for name, reason in absent.items():
        print(f"not measured: {name}: {reason}")
    if arguments.part != "student":
        rows = head_rows(arguments.turns, absent)
        harness.report("gradients_head", rows, unit="GFLOP/s", notes={"ratio_to": OURS, "not_measured": absent})
    if arguments.part != "head":
        rows = student_rows(arguments.turns, arguments.rows)
        harness.report("gradients_student", rows, unit="GFLOP/s", notes={"ratio_to": TRUNK})


if __name__ == "__main__":
    main()
