"""``make gpu-static``: static analysis of the GPU kernels without a GPU; writes ``results/gpu_static.json``.

Every public operation runs on tensors that are allocated but never touched, for every dtype, with an even and an odd
vocabulary and with SmolLM2's head. The kernels that it would launch are compiled for sm_80, sm_90 and sm_100 to report
registers, stack (spills), shared memory, matrix instructions and instructions of the fold per logit. For each call it
also counts launches, torch operations, bytes of their arguments (each read or written once) and memory beyond the
result. Products are counted with Triton's interpreter in a separate process (``--part products``): multiply-adds
relative to one head product, as the slope between two vocabularies. To add an operation, add a row to ``OPERATIONS``;
its kernels are discovered from its launches. Users with torch 2.11 have Triton 3.6; the file names the version used.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import acqcore
from acqcore.backends import triton as backend
from acqcore.fisher import fisher_grad
from benchmarks import ahead_of_time, harness

RESULT = harness.RESULTS / "gpu_static.json"
ROWS = 4096
DRAWS = 8
PROBES = 4
#: Operations on tensors with more elements are counted but not run.
TOUCHED = 1 << 18


@dataclass(frozen=True)
class Inputs:
    """Inputs of an operation."""

    hidden: torch.Tensor  # [N, D]
    weight: torch.Tensor  # [V, D]
    targets: torch.Tensor  # [N]
    logits: torch.Tensor  # [N, V]

    def offsets(self, tokens: int) -> torch.Tensor:
        return torch.arange(0, len(self.hidden) + 1, tokens)

    @property
    def head(self) -> acqcore.Head:
        return acqcore.Head(self.weight)


def _norm(tokens: int) -> Callable[[Inputs], object]:
    return lambda x: acqcore.head_grad_norm(x.hidden, x.head, x.targets, x.offsets(tokens), backend="triton")


def _information(form: str) -> Callable[[Inputs], object]:
    return lambda x: acqcore.mutual_information(x.hidden, x.head, form=form, draws=DRAWS, backend="triton")


OPERATIONS: dict[str, Callable[[Inputs], object]] = {
    "row_stats": lambda x: acqcore.row_stats(x.hidden, x.head, x.targets, backend="triton"),
    "row_stats, no targets": lambda x: acqcore.row_stats(x.hidden, x.head, backend="triton"),
    "logit_stats": lambda x: acqcore.logit_stats(x.logits, x.targets, backend="triton"),
    "statistics and head_grad_norm, T=128": _norm(128),
    "statistics and head_grad_norm, T=32": _norm(32),
    "hidden_grad": lambda x: acqcore.hidden_grad(x.hidden, x.head, x.targets, backend="triton"),
    "grad_sketch, T=128": lambda x: acqcore.grad_sketch(x.hidden, x.head, x.targets, x.offsets(128), backend="triton"),
    f"statistics and random cotangents, {PROBES} probes": lambda x: fisher_grad(
        x.hidden, x.head, x.targets, probes=PROBES, backend="triton"
    ),
    f"mutual_information, element, K={DRAWS}": _information("element"),
    f"mutual_information, block, K={DRAWS}": _information("block"),
}

#: (V, D, dtypes): a head whose V is a multiple of every tile, one with odd V, SmolLM2's.
HEADS = (
    (131072, 4096, (torch.bfloat16, torch.float32)),
    (50257, 4096, (torch.bfloat16, torch.float32)),
    (49152, 576, (torch.bfloat16,)),
)


#: (V, D, dtype, architecture)
Case: TypeAlias = tuple[int, int, torch.dtype, int]


class Counter(TorchDispatchMode):
    """Counts torch operations, bytes and memory; operations on large tensors return untouched memory of their shape."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.operations = 0
        self.argument_bytes = 0
        self._own = {t.untyped_storage()._cdata for t in (inputs.hidden, inputs.weight, inputs.targets, inputs.logits)}
        self._live: dict[int, list[int]] = {}  # storage -> [bytes, tensors that hold it]
        self.held = 0  #: bytes held by live tensors other than the inputs
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if func.is_view or func.namespace != "aten" or "empty" in func.__name__:
            out = func(*args, **kwargs)
        else:
            self.operations += 1
            out = self._run(func, args, kwargs, tensors)
            outputs = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.argument_bytes += sum(t.numel() * t.element_size() for t in [*tensors, *outputs])
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
        if func._schema.is_mutable:
            if all(t.numel() <= TOUCHED for t in tensors):
                return func(*args, **kwargs)
            written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
            names = [a.name for a in func._schema.arguments]
            found = [kwargs[name] if name in kwargs else args[names.index(name)] for name in written]
            return found[0] if len(found) == 1 else tuple(found)
        on_meta = torch.utils._pytree.tree_map(
            lambda t: (
                torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
                if isinstance(t, torch.Tensor)
                else t
            ),
            (args, {key: value for key, value in kwargs.items() if key != "device"}),
        )
        if all(t.numel() <= TOUCHED for t in tensors):
            try:
                shaped = func(*on_meta[0], **on_meta[1], **({"device": "meta"} if "device" in kwargs else {}))
            except (NotImplementedError, RuntimeError):  # its shape depends on values
                return func(*args, **kwargs)
            sizes = [t.numel() for t in torch.utils._pytree.tree_leaves(shaped) if isinstance(t, torch.Tensor)]
            if all(size <= TOUCHED for size in sizes):
                return func(*args, **kwargs)
        else:
            shaped = func(*on_meta[0], **on_meta[1])
        return torch.utils._pytree.tree_map(
            lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) if isinstance(t, torch.Tensor) else t,
            shaped,
        )

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._own:
            return
        if key not in self._live:
            self._live[key] = [storage.nbytes(), 0]
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
        self._live[key][1] += 1
        weakref.finalize(tensor, self._release, key)

    def _release(self, key: int) -> None:
        entry = self._live[key]
        entry[1] -= 1
        if not entry[1]:
            self.held -= entry[0]
            del self._live[key]


@contextlib.contextmanager
def serving_the_cpu(major: int) -> Iterator[None]:
    """Makes the Triton backend accept CPU tensors with an architecture's tiles, and inlines custom operations."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        patch = mock.patch.multiple(backend.Triton, devices=("cpu",), unavailable=lambda self: None)
        stack.enter_context(patch)
        stack.enter_context(mock.patch.object(backend, "_device", return_value=("no device", major)))
        of_device = SimpleNamespace(multi_processor_count=132, major=major, minor=0, name="no device")
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_properties", return_value=of_device))
        if not backend.INTERPRETED:
            stack.enter_context(mock.patch.object(backend, "_launching", return_value=contextlib.nullcontext()))
        for name, module in list(sys.modules.items()):
            if name.startswith("acqcore"):
                for attribute, value in list(vars(module).items()):
                    if isinstance(value, torch._library.custom_ops.CustomOpDef):
                        stack.enter_context(mock.patch.object(module, attribute, value._init_fn))
        yield


def make_inputs(vocab: int, depth: int, dtype: torch.dtype, rows: int = ROWS) -> Inputs:
    return Inputs(
        torch.empty(rows, depth, dtype=dtype), torch.empty(vocab, depth, dtype=dtype),
        torch.arange(rows) % vocab, torch.empty(rows, vocab, dtype=dtype),
    )  # fmt: skip


def call(op: str, inputs: Inputs, arch: int) -> tuple[object, Counter, list[ahead_of_time.Launch], int]:
    """An operation's result, counts, launches, and peak bytes beyond inputs and result.

    They describe a second call, since the first one leaves tables for the batch's shape on the device.
    """
    launches: list[ahead_of_time.Launch] = []
    with serving_the_cpu(ahead_of_time.MAJORS[arch]), ahead_of_time.recorded(launches), torch.no_grad():
        with Counter(inputs):
            OPERATIONS[op](inputs)
        launches.clear()
        counter = Counter(inputs)
        with counter:
            result = OPERATIONS[op](inputs)
        return result, counter, launches, counter.peak - counter.held


def calls_and_kernels(cases: list[Case], ops: list[str], path: Path) -> None:
    """Counts and compiles every operation in every case, and updates the file after each."""
    for vocab, depth, dtype, arch in cases:
        inputs = make_inputs(vocab, depth, dtype)
        for op in ops:
            case = {"op": op, "dtype": harness.name(dtype), "vocab": vocab, "depth": depth, "arch": arch}
            print(", ".join(map(str, case.values())), flush=True)
            try:
                _, counter, launches, extra = call(op, inputs, arch)
            except Exception as error:  # a failing operation is a finding; the others still run
                found: dict[str, list[dict[str, Any]]] = {"calls": [case | {"fails": harness.first_line(error)}]}
            else:
                moved = counter.argument_bytes + sum(launch.bytes for launch in launches)
                counts = {
                    "launches": len(launches),
                    "torch_operations": counter.operations,
                    "argument_gib": round(moved / 2**30, 3),
                    "extra_mib": round(extra / 2**20, 2),
                }
                variants = {launch.name: launch for launch in launches}.values()
                kernels = [{"kernel": launch.name, **case, **_measured(launch, arch)} for launch in variants]
                found = {"calls": [case | counts], "kernels": kernels}
            content = read(path)
            for key, rows in found.items():
                others = [row for row in content.get(key, []) if any(row[name] != case[name] for name in case)]
                content[key] = sorted([*others, *rows], key=_place)
            write(path, content)


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    op = list(OPERATIONS).index(row["op"])
    return -row["arch"] if row["arch"] == 90 else row["arch"], row["dtype"], -row["vocab"], op, row.get("kernel", "")


def _measured(launch: ahead_of_time.Launch, arch: int) -> dict[str, Any]:
    try:
        return ahead_of_time.measured(launch, arch)
    except Exception as error:  # a kernel that does not compile for an architecture is a finding
        return {"fails": harness.first_line(error)}


#: Vocabularies for the sketch, whose tiles hold whole buckets: small buckets would be mostly padding.
WIDE = (16384, 32768)


def _addmm_flops(out: Any, left: Any, right: Any, **_: Any) -> int:
    """Operations of ``out += left @ right``, from the shapes."""
    return 2 * int(left[0]) * int(left[1]) * int(right[1])


def products(depth: int = 4096, rows: int = 128) -> list[dict[str, Any]]:
    """Product-equivalents of every operation, counting the products in Triton's interpreter and in torch."""
    from torch.utils import flop_counter
    from triton.runtime import interpreter

    found = []
    multiplied = 0
    create_dot = interpreter.InterpreterBuilder.create_dot

    def counting(self: Any, a: Any, b: Any, *others: Any) -> Any:
        nonlocal multiplied
        multiplied += 2 * a.data.size * b.data.shape[-1]
        return create_dot(self, a, b, *others)

    def flops(run: Callable[[Inputs], object], vocab: int) -> tuple[int, int]:
        """Floating-point operations of all products, and of those in torch."""
        nonlocal multiplied
        g = torch.Generator().manual_seed(0)
        hidden = torch.randn(rows, depth, generator=g).bfloat16()
        weight = (torch.randn(vocab, depth, generator=g) / depth**0.5).bfloat16()
        multiplied = 0
        # torch counts addmm but not its in-place form.
        counter = flop_counter.FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops})
        with counter, torch.no_grad():
            run(Inputs(hidden, weight, torch.arange(rows) % vocab, torch.empty(1, vocab)))
        return multiplied + counter.get_total_flops(), counter.get_total_flops()

    with mock.patch.object(interpreter.InterpreterBuilder, "create_dot", counting), serving_the_cpu(9):
        for op, run in OPERATIONS.items():
            if op == "logit_stats":
                continue
            small, large = WIDE if "sketch" in op else (1024, 2048)
            row: dict[str, Any] = {"op": op, "depth": depth}
            try:
                pairs = zip(flops(run, large), flops(run, small), strict=True)
                slopes = [round((a - b) / (2 * rows * depth * (large - small)), 3) for a, b in pairs]
                row |= {"product_equivalents": slopes[0], "of_them_in_torch": slopes[1]}
            except Exception as error:  # the others still run
                row["fails"] = harness.first_line(error)
            found.append(row)
            print(row, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", "kernels", "products"), default="all")
    parser.add_argument("--ops", nargs="+", choices=tuple(OPERATIONS), help="operations to rerun; default: all")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.part in ("all", "products"):
        if not backend.INTERPRETED:  # Triton decides this once per process
            command = [sys.executable, "-m", "benchmarks.gpu_static", "--part", "products", "--out", arguments.out]
            subprocess.run(command, check=True, env=os.environ | {"TRITON_INTERPRET": "1"})
        else:
            write(arguments.out, read(arguments.out) | {"products": products()})
    if arguments.part in ("all", "kernels"):
        import triton

        write(arguments.out, {"triton": triton.__version__, "rows": ROWS} | read(arguments.out))
        cases = [
            (vocab, depth, dtype, arch) for arch in (90, 80, 100) for vocab, depth, dtypes in HEADS for dtype in dtypes
        ]
        calls_and_kernels(cases, arguments.ops or list(OPERATIONS), arguments.out)
    print(f"wrote {arguments.out.name}")


def read(path: Path) -> dict[str, Any]:
    """The file's content, or an empty dictionary."""
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON with one line per row, so that diffs show the changed rows."""
    parts = []
    for key, value in content.items():
        if isinstance(value, list):
            rows = ",\n".join("  " + json.dumps(row) for row in value)
            parts.append(f" {json.dumps(key)}: [\n{rows}\n ]" if value else f" {json.dumps(key)}: []")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main()
