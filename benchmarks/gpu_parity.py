"""Parity of every operation on a device, on small shapes: the first stage of ``make gpu-check``.

``python -m benchmarks.gpu_parity --device cuda --rows FILE`` compares each backend with float64 on the same inputs,
checks that results repeat bit for bit, do not depend on the batch and can be captured in a CUDA graph, and appends one
JSON object per check to FILE. ``--worker I --of N`` runs every Nth check, so that processes can compile in parallel.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import acqcore
from acqcore.bayes import FIELDS as BAYES_FIELDS
from acqcore.fisher import fisher_grad
from acqcore.testing import CASES, Case, assert_logits_match, random_case, worst_errors
from benchmarks import gpu_student, harness

HALF = (torch.bfloat16, torch.float16)
MAIN = (torch.bfloat16, torch.float32)
ALL = (torch.bfloat16, torch.float32, torch.float16)

#: Bounds on relative errors in float32 and in half precision: of a sample's norm, or of a vector by its norm. Random
#: cotangents are rounded to the dtype of a half-precision head.
BOUNDS = {
    "head_grad_norm": (1e-4, 1e-3), "hidden_grad": (1e-4, 5e-3), "grad_sketch": (1e-4, 5e-3),
    "fisher_grad": (1e-4, 8e-3),
}  # fmt: skip
BAYES = {torch.float32: 1e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}  # absolute, relative above 1


@dataclass(frozen=True)
class Check:
    """One check: ``run(backend, dtype, device)`` returns the worst error relative to its bound."""

    op: str
    case: str
    dtypes: tuple[torch.dtype, ...]
    run: Callable[[str, torch.dtype, str], float]


def backends(device: str) -> list[str]:
    """The backends under test: those of the GPU, or of the CPU for a trial without one."""
    names = [row.name for row in acqcore.backends() if row.available and row.name != "eager"]
    if device == "cuda":
        return [name for name in names if name != "cpu"]
    return [name for name in names if name in ("cpu", "triton")]


def _row_stats(make: Callable[[], Case], backend: str, dtype: torch.dtype, device: str) -> float:
    case = make().to(dtype, device)
    return max(worst_errors(case.run(backend), case.oracle()).values(), default=0.0)


def _mixed(backend: str, dtype: torch.dtype, device: str) -> float:
    """Hidden states of one dtype with a float32 weight."""
    case = random_case(37, 123, 507).to(dtype, device)
    mixed = Case(case.hidden, acqcore.Head(case.head.weight.float()), case.targets)
    return max(worst_errors(mixed.run(backend), case.oracle()).values())


def _logit_stats(view: str, backend: str, dtype: torch.dtype, device: str) -> float:
    g = torch.Generator().manual_seed(0)
    base = (3 * torch.randn(7, 9004, generator=g)).to(device, dtype)
    targets = torch.tensor([0, -100, 5, 2999, 2096, 1, 2], device=device)
    views = {
        "rows": base[:, :9000],
        "rows, unaligned": base[:, 1:9001],
        "columns": base.T.contiguous().T[:, :9000],
        "every third": base[:, :9000:3],
        "V = 50257": torch.cat([base] * 6, dim=1)[:, :50257],
    }
    assert_logits_match(views[view], targets, 0.7, backend)
    return 0.0


def _gradient_case(name: str, dtype: torch.dtype, device: str) -> tuple[Case, torch.Tensor]:
    """A case and the offsets of its samples."""
    case, lengths = {
        "odd": lambda: (random_case(60, 41, 700), [1, 2, 17, 40]),
        "everything": lambda: (
            random_case(60, 41, 600, bias=True, softcap=15.0, scale=0.5, temperature=1.3),
            [1, 2, 17, 40],
        ),
        "128 tokens": lambda: (random_case(384, 256, 5000), [128, 128, 128]),
        "32 tokens": lambda: (random_case(256, 256, 4096), [32] * 8),
        "300 tokens": lambda: (random_case(400, 256, 4096), [300, 100]),
        "longer than deep": lambda: (random_case(500, 64, 2048), [400, 100]),
        "two tiles": lambda: (random_case(150, 40, 1501), [1, 19, 130]),
        "two tiles, capped": lambda: (random_case(150, 40, 1501, bias=True, softcap=20.0), [1, 19, 130]),
    }[name]()
    assert case.targets is not None
    case.targets[[5, 9, 59]] = -100
    case.targets[[10, 11, 12, 13]] = 7  # a target repeated inside a sample
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(device)
    return case.to(dtype, device), offsets


GRADIENT_CASES = ("128 tokens", "32 tokens", "odd", "everything", "300 tokens", "longer than deep")


def gradients(
    op: str, name: str, backend: str, dtype: torch.dtype, device: str, oracle: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms ``[B, 1]``, gradients or sketches of a backend and of float64 on the device ``oracle``, in scored rows."""
    case, offsets = _gradient_case(name, dtype, device)
    exact, exact_offsets = case.to(torch.float64, oracle or device), offsets.to(oracle or device)
    got = _calls(case, offsets, backend)[op]().to(exact_offsets.device, torch.float64)
    expected = _calls(exact, exact_offsets, "eager")[op]()
    if op == "head_grad_norm":
        return got[:, None], expected[:, None]
    if op in ("hidden_grad", "fisher_grad"):
        assert exact.targets is not None
        ignored = exact.targets == -100
        if got[..., ignored, :].any():
            raise AssertionError("ignored rows have a gradient")
        return got[..., ~ignored, :], expected[..., ~ignored, :]
    return got, expected


def gradient(op: str, name: str, backend: str, dtype: torch.dtype, device: str) -> float:
    """Largest error of a norm, gradient or sketch relative to its bound."""
    got, expected = gradients(op, name, backend, dtype, device)
    error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(error.max()) / BOUNDS[op][dtype != torch.float32]


def _mutual_information(form: str, name: str, backend: str, dtype: torch.dtype, device: str) -> float:
    cases = {
        "wide": lambda: random_case(256, 256, 4096),
        "deep": lambda: random_case(96, 4096, 1000),  # a pipeline in its steady state
        "depth no multiple of a block": lambda: random_case(11, 1411, 700, bias=True, softcap=9.0, scale=0.7),
    }
    case = (cases[name] if name in cases else CASES[name])().to(dtype, device)
    exact = case.to(torch.float64, device)
    large = name in ("wide", "deep")
    options = {"draws": 8 if large else 5, "form": form, "block": 64 if large else 16, "seed": 3}
    got = acqcore.mutual_information(case.hidden, case.head, targets=case.targets, backend=backend, **options)  # type: ignore[arg-type]
    oracle = acqcore.mutual_information(exact.hidden, exact.head, targets=exact.targets, backend="eager", **options)  # type: ignore[arg-type]
    return _bayes_error(got, oracle) / BAYES[dtype]


def _ensemble(backend: str, dtype: torch.dtype, device: str) -> float:
    cases = [random_case(21, 700, 911, bias=True, seed=seed).to(dtype, device) for seed in range(3)]
    exact = [case.to(torch.float64, device) for case in cases]
    hidden, targets = torch.stack([case.hidden for case in cases]), cases[0].targets
    got = acqcore.ensemble_stats(hidden, [case.head for case in cases], targets, backend=backend)
    oracle = acqcore.ensemble_stats(hidden.double(), [case.head for case in exact], targets, backend="eager")
    return _bayes_error(got, oracle) / BAYES[dtype]


def _bayes_error(got: acqcore.BayesStats, oracle: acqcore.BayesStats) -> float:
    """Largest error of any field, relative to ``max(1, |value|)``; infinite if validity differs."""
    worst = 0.0
    for field in BAYES_FIELDS:
        value, expected = getattr(got, field), getattr(oracle, field)
        if expected is None or not len(expected):
            continue
        same = (value.double() == expected) | (value.isnan() & expected.isnan())
        error = (value.double() - expected).abs() / expected.abs().clamp_min(1)
        worst = max(worst, float(error.masked_fill(same, 0).nan_to_num(torch.inf).max()))
    return worst


def _equal(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    if not torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)):
        different = int((a.nan_to_num(7.0) != b.nan_to_num(7.0)).sum())
        raise AssertionError(f"{what}: {different} of {a.numel()} values differ")


def _calls(
    case: Case,
    offsets: torch.Tensor,  # [B + 1]
    backend: str,
    logits: torch.Tensor | None = None,  # [N, V]; None: the case's own
) -> dict[str, Callable[[], torch.Tensor]]:
    """Every operation on one case, each returning a tensor."""
    assert case.targets is not None
    hidden, head, targets = case.hidden, case.head, case.targets
    options: Any = {"temperature": case.temperature, "backend": backend}
    if logits is None:
        logits = head.logits(hidden).to(hidden.dtype)
    information = partial(acqcore.mutual_information, hidden, head, offsets=offsets, targets=targets, backend=backend)
    return {
        "row_stats": lambda: acqcore.row_stats(hidden, head, targets, backend=backend).state,
        "logit_stats": lambda: acqcore.logit_stats(logits, targets, backend=backend).state,
        "head_grad_norm": lambda: acqcore.head_grad_norm(hidden, head, targets, offsets, **options),
        "hidden_grad": lambda: acqcore.hidden_grad(hidden, head, targets, **options),
        "grad_sketch": lambda: acqcore.grad_sketch(hidden, head, targets, offsets, **options),
        "fisher_grad": lambda: fisher_grad(hidden, head, targets, probes=3, seed=5, offsets=offsets, **options),
        "mutual_information, element": lambda: information(form="element").state,
        "mutual_information, block": lambda: information(form="block").state,
    }


OPERATIONS = (
    "row_stats", "logit_stats", "head_grad_norm", "hidden_grad", "grad_sketch", "fisher_grad",
    "mutual_information, element", "mutual_information, block",
)  # fmt: skip


def _repeats(op: str, backend: str, dtype: torch.dtype, device: str) -> float:
    """Repeated runs give the same bits."""
    call = _calls(*_gradient_case("128 tokens", dtype, device), backend)[op]
    first = call()
    for _ in range(3):
        _equal(call(), first, "a second run")
    return 0.0


def _batch_invariance(op: str, backend: str, dtype: torch.dtype, device: str) -> float:
    """The first one and two samples alone give the same bits as within the whole batch."""
    case, offsets = _gradient_case("128 tokens", dtype, device)
    # torch's own product depends on the batch, so logits are computed once and sliced.
    logits = case.head.logits(case.hidden).to(dtype)
    whole = _calls(case, offsets, backend, logits)[op]()
    for samples in (1, 2):
        rows = int(offsets[samples])
        assert case.targets is not None
        part = Case(case.hidden[:rows], case.head, case.targets[:rows])
        got = _calls(part, offsets[: samples + 1], backend, logits[:rows])[op]()
        # States are [fields, N], cotangents [probes, N, D]; norms, gradients and sketches have rows or samples first.
        of_state = op in ("row_stats", "logit_stats", "fisher_grad") or op.startswith("mutual")
        expected = whole[:, :rows] if of_state else whole[: len(got)]
        _equal(got, expected, f"{rows} of {len(case.hidden)} rows")
    return 0.0


def _host_never_waits(op: str, backend: str, dtype: torch.dtype, device: str) -> float:
    """Everything is queued without synchronizing with the device; syncs that torch detects raise."""
    case, offsets = _gradient_case("128 tokens", dtype, device)
    call = _calls(case, offsets.cpu(), backend)[op]
    call()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return 0.0


def _graph(op: str, backend: str, dtype: torch.dtype, device: str) -> float:
    """Replaying a captured graph on new inputs gives the same result as a call."""
    case, offsets = _gradient_case("128 tokens", dtype, device)
    call = _calls(case, offsets, backend)[op]
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    case.hidden.copy_(case.hidden.flip(0))
    graph.replay()
    _equal(captured, call(), "a replay")
    return 0.0


def promised(check: Check, backend: str, dtype: torch.dtype) -> bool:
    """Whether the backend promises this: all except ``cuda`` give a row the same bits in any batch.

    Operations without a ``cuda`` kernel use torch, whose products depend on the number of rows.
    """
    if backend != "cuda" or check.op != "batch invariance":
        return True
    return check.case == "logit_stats" or (check.case == "row_stats" and dtype != torch.float32)


def checks(device: str) -> Iterator[Check]:
    """Every check, the most important first."""
    for name in GRADIENT_CASES[:3]:
        for op in BOUNDS:
            yield Check(op, name, ALL, partial(gradient, op, name))
    for title in gpu_student.titles():
        yield Check("a student", title, (torch.float32,), partial(gpu_student.error, title))
    for form in ("element", "block"):
        for name in ("wide", "deep", "depth no multiple of a block"):
            yield Check("mutual_information", f"{form}, {name}", ALL, partial(_mutual_information, form, name))
    yield Check("row_stats", "full tiles", ALL, partial(_row_stats, partial(random_case, 384, 512, 8192)))
    for op in OPERATIONS:
        yield Check("repeats", op, MAIN, partial(_repeats, op))
        yield Check("batch invariance", op, MAIN, partial(_batch_invariance, op))
        if device == "cuda" and op in ("row_stats", "logit_stats", "hidden_grad"):
            yield Check("graph capture", op, (torch.bfloat16,), partial(_graph, op))
        if device == "cuda" and op != "grad_sketch":
            yield Check("the host never waits", op, (torch.bfloat16,), partial(_host_never_waits, op))
    for view in ("rows", "rows, unaligned", "columns", "every third", "V = 50257"):
        yield Check("logit_stats", view, ALL, partial(_logit_stats, view))
    for name in CASES:
        dtypes = ALL if name in ("random", "everything") else MAIN
        yield Check("row_stats", name, dtypes, partial(_row_stats, CASES[name]))
    yield Check("row_stats", "mixed dtypes", HALF, _mixed)
    yield Check("ensemble_stats", "three heads", ALL, _ensemble)
    for name in GRADIENT_CASES[3:]:
        for op in BOUNDS:
            yield Check(op, name, MAIN, partial(gradient, op, name))
    for form in ("element", "block"):
        for name in ("random", "confident 1e-12", "ties", "-inf columns", "some rows ignored", "no targets"):
            yield Check("mutual_information", f"{form}, {name}", MAIN, partial(_mutual_information, form, name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--backends", nargs="+", help="default: all of the device")
    parser.add_argument("--rows", type=Path, required=True, help="file that results are appended to")
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    arguments = parser.parse_args()
    names = arguments.backends or backends(arguments.device)
    todo = [
        (check, backend, dtype)
        for check in checks(arguments.device)
        for backend in names
        for dtype in check.dtypes
        if promised(check, backend, dtype)
    ]
    failed = 0
    for check, backend, dtype in todo[arguments.worker :: arguments.of]:
        begin = time.perf_counter()
        worst, message = None, ""
        try:
            with torch.no_grad():
                worst = check.run(backend, dtype, arguments.device)
            if not worst <= 1:
                message = f"error {worst:.3g} times its bound"
        except Exception as error:  # the next check is still worth running
            message = harness.first_line(error)
        harness.append(
            arguments.rows,
            stage="parity", op=check.op, case=check.case, backend=backend, dtype=harness.name(dtype), ok=not message,
            worst=worst, message=message, seconds=round(time.perf_counter() - begin, 2),
        )  # fmt: skip
        failed += bool(message)
        if message:
            print(f"{check.op}, {check.case}, {backend}, {harness.name(dtype)}: {message}", flush=True)
        if "CUDA error" in message or "illegal memory" in message:
            raise SystemExit("the CUDA context is lost; stopping this worker")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
