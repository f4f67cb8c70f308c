"""Every operation at the shapes that matter, against the bare product and peers: second stage of ``make gpu-check``.

``python -m benchmarks.gpu_mission --device cuda --rows FILE`` interleaves the peers of each group and appends one JSON
object per peer to FILE: median time and spread, product-equivalents (its time over the bare product's in the same
turn), extra memory, error against float64 on a few rows, and the clocks, power and throttle reasons during the turns.
``--warm`` calls everything once without measuring, to fill compiler caches.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar

import torch

import acqcore
from acqcore.fisher import fisher_grad
from benchmarks import bench_row_stats, harness
from benchmarks.gpu_parity import backends

BARE = "bare product"
DRAWS = 8
PROBES = 4
ORACLE_ROWS = 64
#: Minimum time per peer and turn, and the longest call that is still repeated.
TURN_SECONDS, LONGEST_CALL = 20e-3, 2.0

#: (N, D, V): the common shape in publications on fused heads, SmolLM2's head.
SHAPES = {"cuda": [(4096, 4096, 131072), (4096, 576, 49152)], "cpu": [(256, 64, 700), (256, 40, 333)]}
LOGITS = {"cuda": [(4096, 151936), (4096, 50257)], "cpu": [(64, 1000), (64, 501)]}
#: Few rows, bound by reading W; and more than 2^31 logits.
EDGES = {"cuda": [(128, 4096, 131072), (20480, 1024, 131072)], "cpu": [(16, 64, 700)]}


@dataclass
class Peer:
    """``call()`` is timed; ``error(result)`` is its largest error against float64 on a few rows."""

    call: Callable[[], Any]
    error: Callable[[Any], float] | None = None


@dataclass
class Group:
    """Peers that take turns and are compared with the first."""

    case: str
    peers: dict[str, Peer]
    work: float  #: of one bare product (floating-point operations) or one read of the input (bytes)
    unit: str = "TFLOP/s"
    facts: dict[str, Any] = field(default_factory=dict)


class Monitor:
    """Samples ``nvidia-smi`` in the background and summarizes the samples since the last query."""

    FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")
    REASONS: ClassVar[dict[int, str]] = {
        0x2: "application clocks", 0x4: "power cap", 0x8: "hardware slowdown", 0x20: "software thermal slowdown",
        0x40: "hardware thermal slowdown", 0x80: "hardware power brake",
    }  # fmt: skip

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pending = b""
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", f"--query-gpu={','.join(self.FIELDS)}", "--format=csv,noheader,nounits"]
            self._process = subprocess.Popen(
                [*command, "-lms", "100"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
            )
            assert self._process.stdout is not None
            os.set_blocking(self._process.stdout.fileno(), False)

    def seen(self) -> dict[str, Any]:
        """Medians, extremes and throttle reasons since the last call; empty without ``nvidia-smi``."""
        if self._process is None:
            return {}
        samples, odd = [], ""
        for line in self._lines():
            cells = [cell.strip() for cell in line.split(",")]
            try:
                samples.append((*(float(cell) for cell in cells[:4]), int(cells[4], 16)))
            except (ValueError, IndexError):
                odd = line
        if not samples:
            return {"monitor": odd or "no sample"}
        clocks, _, power, temperature, masks = zip(*samples, strict=True)
        reasons = 0
        for mask in masks:
            reasons |= int(mask)
        return {
            "sm_mhz": statistics.median(clocks),
            "sm_mhz_min": min(clocks),
            "power_w_max": max(power),
            "temperature_c": max(temperature),
            "throttle": [name for bit, name in self.REASONS.items() if reasons & bit],
        }

    def _lines(self) -> list[str]:
        """Complete lines received since the last call."""
        assert self._process is not None
        assert self._process.stdout is not None
        while chunk := self._process.stdout.read(1 << 16):  # None if nothing is available
            self._pending += chunk
        *whole, self._pending = self._pending.split(b"\n")
        return [line.decode(errors="replace") for line in whole]

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def gpu_seconds(call: Callable[[], object], repeats: int) -> float:
    """Seconds per call on the device when ``repeats`` calls are queued back to back."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a device-to-device copy of 2 GiB (or a quarter of free memory)."""
    size = min(2 << 30, torch.cuda.mem_get_info()[0] // 4)
    source = torch.empty(size, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    seconds = statistics.median(gpu_seconds(lambda: target.copy_(source), 5) for _ in range(7))
    return 2 * size / seconds


def seconds_of(call: Callable[[], object], repeats: int, device: str) -> float:
    """Mean seconds of ``repeats`` back-to-back calls."""
    if device == "cuda":
        return gpu_seconds(call, repeats)
    return sum(harness.cpu_seconds(call) for _ in range(repeats)) / repeats


def measure(group: Group, turns: int, device: str, rows: Path, monitor: Monitor) -> None:
    """Measures a group and appends one row per peer; the row of a failing peer holds the error instead of figures."""
    baseline = next(iter(group.peers))
    known: dict[str, dict[str, Any]] = {}
    for name, peer in group.peers.items():
        row: dict[str, Any] = {"stage": "mission", "case": group.case, "peer": name, **group.facts}
        try:
            begin = time.perf_counter()
            result = peer.call()
            _settle(device)
            row["first_call_s"] = round(time.perf_counter() - begin, 3)
            if peer.error is not None:
                row["error"] = peer.error(result)
            del result
            _release(device)
            once = _second_call(peer.call, device, row)
        except Exception as error:  # third-party code or a kernel under test: the others are still measured
            harness.append(rows, **row, not_measured=harness.first_line(error))
            print(f"{group.case}: {name}: {harness.first_line(error)}", flush=True)
            _release(device)
            continue
        known[name] = row | {"once": once}
    if baseline not in known:
        return
    monitor.seen()
    repeats = {name: max(1, min(50, math.ceil(TURN_SECONDS / row["once"]))) for name, row in known.items()}
    times: dict[str, list[float]] = {name: [] for name in known}
    for _ in range(turns):
        for name, row in known.items():
            if row["once"] <= LONGEST_CALL:
                times[name].append(seconds_of(group.peers[name].call, repeats[name], device))
            elif not times[name]:
                times[name].append(row["once"])
    clocks = monitor.seen()
    for name, row in known.items():
        seconds = statistics.median(times[name])
        ratio = statistics.median(a / b for a, b in zip(times[name], times[baseline], strict=False))
        row.pop("once")
        row |= {
            "ms": round(seconds * 1e3, 4),
            "spread": round((max(times[name]) - min(times[name])) / seconds, 4),
            "turns": len(times[name]),
            "ratio": round(ratio, 4),
            "rate": round(group.work / seconds / (1e12 if group.unit == "TFLOP/s" else 1e9), 1),
            "unit": group.unit,
            **clocks,
        }
        harness.append(rows, **row)
        print(f"{group.case}: {name}: {row['ms']:.3f} ms, {ratio:.2f}, error {row.get('error')}", flush=True)


def _second_call(call: Callable[[], object], device: str, row: dict[str, Any]) -> float:
    """Seconds of one call; on a GPU, adds its peak allocated memory to ``row``."""
    if device != "cuda":
        return harness.cpu_seconds(call)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = gpu_seconds(call, 1)
    row["extra_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    return seconds


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def _largest(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got[: len(expected)].double() - expected).abs().max())


def _relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error of a row relative to its norm."""
    got = got[: len(expected)].double()
    if expected.ndim == 1:
        return float(((got - expected).abs() / expected.abs()).max())
    return float(((got - expected).norm(dim=1) / expected.norm(dim=1)).max())


def automatic(device: str) -> list[str | None]:
    """The automatic choice (None) and the backends except ``cuda``, which has only statistics and Gram kernels."""
    return [None, *(name for name in backends(device) if name != "cuda")]


def named(op: str, backend: str | None) -> str:
    return f"{op}, {backend or 'automatic'}"


class Shape:
    """Inputs of one bfloat16 head, and float64 copies of a few rows for the errors."""

    def __init__(self, n: int, d: int, v: int, device: str) -> None:
        self.hidden, self.weight, self.targets = bench_row_stats.make_inputs(n, d, v, torch.bfloat16, device)
        self.head, self.few = acqcore.Head(self.weight), min(ORACLE_ROWS, n)
        self.bare = {BARE: Peer(partial(torch.mm, self.hidden, self.weight.T))}
        self.case, self.work = f"N={n} D={d} V={v} bfloat16", 2.0 * n * d * v

    @cached_property
    def exact(self) -> acqcore.Head:
        return acqcore.Head(self.weight.double())

    @cached_property
    def hidden64(self) -> torch.Tensor:
        return self.hidden[: self.few].double()

    def group(self, title: str, peers: dict[str, Peer], accuracy: str) -> Group:
        return Group(f"{title}, {self.case}", self.bare | peers, self.work, facts={"accuracy": accuracy})

    def statistics(self, function: Callable[..., Any], error: Callable[[Any], float] | None = None) -> Peer:
        return Peer(partial(function, self.hidden, self.weight, self.targets), error)


def head_groups(n: int, d: int, v: int, device: str) -> Iterator[Group]:
    """Statistics, gradient norms and gradients for one head."""
    shape = Shape(n, d, v, device)
    hidden, head, targets, few, exact = shape.hidden, shape.head, shape.targets, shape.few, shape.exact
    names = backends(device)
    entropy = acqcore.row_stats(shape.hidden64, exact, targets[:few], backend="eager").entropy.double()

    def peer(function: Callable[..., Any], entropy_of: Callable[[Any], torch.Tensor]) -> Peer:
        return shape.statistics(function, lambda out: _largest(entropy_of(out), entropy))

    def ours(backend: str | None) -> Peer:
        return peer(bench_row_stats.ours_by(backend), lambda stats: stats.entropy)

    peers = {f"row_stats, {name}": ours(name) for name in names}
    peers["eager"] = peer(bench_row_stats.eager, itemgetter(2))
    if device == "cuda":  # compiling for a CPU takes a minute
        peers["torch.compile of eager"] = peer(bench_row_stats.PEERS["torch.compile of eager"], itemgetter(2))
    for title, function in {
        "Liger (logprob, entropy)": bench_row_stats.liger,
        "Liger, its chunked fallback": bench_row_stats.liger_fallback,
        "TRL chunked (logprob, entropy, sum p^2, top-1)": bench_row_stats.trl_chunked,
    }.items():
        peers[title] = peer(function, itemgetter(1))
    yield shape.group("statistics", peers, "entropy, absolute")

    offsets = {t: torch.arange(0, n + 1, t) for t in (32, 128) if t <= n}
    parts = {t: offsets[t][: max(1, few // t) + 1] for t in offsets}  # of the few rows, at least one sample
    peers = {f"row_stats, {names[0]}": ours(names[0]), "row_stats, automatic": ours(None)}
    for tokens, part in parts.items():
        rows = int(part[-1])
        norm = acqcore.head_grad_norm(hidden[:rows].double(), exact, targets[:rows], part, backend="eager")
        error = partial(_relative, expected=norm)
        title = f"statistics and head_grad_norm, T={tokens}"
        for backend in [None, *names]:
            call = partial(acqcore.head_grad_norm, hidden, head, targets, offsets[tokens], backend=backend)
            peers[named(title, backend)] = Peer(call, error)
        on_gpu = partial(acqcore.head_grad_norm, hidden, head, targets, offsets[tokens].to(device))
        peers[f"{title}, offsets on the GPU"] = Peer(on_gpu, error)
    yield shape.group("gradient norms", peers, "norm, relative")

    gradient = acqcore.hidden_grad(shape.hidden64, exact, targets[:few], backend="eager")
    longest = max(parts)
    rows = int(parts[longest][-1])
    sketch = acqcore.grad_sketch(hidden[:rows].double(), exact, targets[:rows], parts[longest], backend="eager")
    peers = {}
    for backend in automatic(device):
        peers[named("hidden_grad", backend)] = Peer(
            partial(acqcore.hidden_grad, hidden, head, targets, backend=backend), partial(_relative, expected=gradient)
        )
        peers[named(f"grad_sketch, T={longest}", backend)] = Peer(
            partial(acqcore.grad_sketch, hidden, head, targets, offsets[longest], backend=backend),
            partial(_relative, expected=sketch),
        )
    yield shape.group("gradients", peers, "vector, relative")


def cotangent_groups(n: int, d: int, v: int, device: str) -> Iterator[Group]:
    """Statistics and random cotangents, which the default mutual information needs from the head."""
    shape = Shape(n, d, v, device)
    expected = fisher_grad(shape.hidden64, shape.exact, probes=PROBES, backend="eager")

    def error(got: torch.Tensor) -> float:
        return max(_relative(of_probe, one) for of_probe, one in zip(got, expected, strict=True))

    title = f"statistics and random cotangents, {PROBES} probes"
    peers = {
        named(title, name): Peer(partial(fisher_grad, shape.hidden, shape.head, probes=PROBES, backend=name), error)
        for name in automatic(device)
    }
    yield shape.group("cotangents", peers, "vector, relative")


def draw_groups(n: int, d: int, v: int, device: str) -> Iterator[Group]:
    """Mutual information of dropout on hidden states, in both forms."""
    shape = Shape(n, d, v, device)
    peers = {}
    for form in ("block", "element"):
        options: dict[str, Any] = {"form": form, "draws": DRAWS}
        drawn = acqcore.mutual_information(shape.hidden64, shape.exact, backend="eager", **options)
        information = drawn.mutual_information.double()

        def error(got: acqcore.BayesStats, expected: torch.Tensor = information) -> float:
            return _largest(got.mutual_information, expected)

        for name in automatic(device):
            call = partial(acqcore.mutual_information, shape.hidden, shape.head, backend=name, **options)
            peers[named(f"mutual_information, {form}, K={DRAWS}", name)] = Peer(call, error)
    yield shape.group("draws", peers, "mutual information, absolute")


def eager_of_logits(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return bench_row_stats.fields(logits.float(), targets)


def trl_fused(logits: torch.Tensor, targets: torch.Tensor) -> Any:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(logits, targets)


def logit_groups(n: int, v: int, device: str) -> Iterator[Group]:
    """Statistics of bfloat16 logits, against a copy of them."""
    g = torch.Generator(device).manual_seed(0)
    logits = torch.empty(n, v, dtype=torch.bfloat16, device=device).normal_(0, 3, generator=g)
    targets = torch.randint(0, v, (n,), generator=g, device=device)
    few = min(ORACLE_ROWS, n)
    entropy = acqcore.logit_stats(logits[:few].double(), targets[:few], backend="eager").entropy.double()
    target = torch.empty_like(logits)

    def peer(function: Callable[..., Any], entropy_of: Callable[[Any], torch.Tensor]) -> Peer:
        return Peer(partial(function, logits, targets), lambda out: _largest(entropy_of(out), entropy))

    peers = {"copy (read and written)": Peer(lambda: target.copy_(logits))}
    for name in backends(device):
        peers[f"logit_stats, {name}"] = peer(partial(acqcore.logit_stats, backend=name), lambda stats: stats.entropy)
    peers["eager"] = peer(eager_of_logits, itemgetter(2))
    if device == "cuda":
        peers["torch.compile of eager"] = peer(torch.compile(eager_of_logits, dynamic=False), itemgetter(2))
    peers["TRL fused (logprob, entropy)"] = peer(trl_fused, itemgetter(1))
    facts = {"accuracy": "entropy, absolute"}
    yield Group(f"logits, N={n} V={v} bfloat16", peers, float(logits.nbytes), "GB/s", facts)


def edge_groups(n: int, d: int, v: int, device: str) -> Iterator[Group]:
    """Only statistics, for each backend."""
    shape = Shape(n, d, v, device)
    peers = {f"row_stats, {name}": shape.statistics(bench_row_stats.ours_by(name)) for name in backends(device)}
    yield Group(f"statistics, {shape.case}", shape.bare | peers, shape.work)


def groups(device: str, wanted: Sequence[str] = ()) -> Iterator[Iterator[Group]]:
    """Sets of groups, most important first; inputs exist only while a set is measured.

    ``wanted``: titles of the groups to measure, up to the first comma; empty for all.
    """
    (first, second), (logits, *other_logits) = SHAPES[device], LOGITS[device]
    heads, statistics = {"statistics", "gradient norms", "gradients"}, {"statistics"}
    sets: list[tuple[set[str], Callable[..., Iterator[Group]], tuple[int, ...]]] = [
        (heads, head_groups, first), ({"cotangents"}, cotangent_groups, first), ({"logits"}, logit_groups, logits),
        ({"draws"}, draw_groups, first),
        (heads, head_groups, second), ({"cotangents"}, cotangent_groups, second), ({"draws"}, draw_groups, second),
        *(({"logits"}, logit_groups, shape) for shape in other_logits),
        *((statistics, edge_groups, shape) for shape in EDGES[device]),
    ]  # fmt: skip
    for titles, make, shape in sets:
        if not wanted or titles & set(wanted):
            yield make(*shape, device)


def warm(device: str) -> None:
    """Calls every peer once, so that later compilations hit the cache on disk."""
    for made in groups(device):
        for group in made:
            for name, peer in group.peers.items():
                begin = time.perf_counter()
                try:
                    peer.call()
                    _settle(device)
                except Exception as error:  # measure() records it
                    print(f"{group.case}: {name}: {harness.first_line(error)}", flush=True)
                    continue
                print(f"{group.case}: {name}: {time.perf_counter() - begin:.1f} s", flush=True)
        _release(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--rows", type=Path, required=True, help="file that results are appended to")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--groups", nargs="+", help="titles up to the first comma; default: all")
    parser.add_argument("--warm", action="store_true", help="call everything once without measuring")
    arguments = parser.parse_args()
    device = arguments.device
    with torch.no_grad():
        if arguments.warm:
            warm(device)
            return
        monitor = Monitor()
        try:
            if device == "cuda":
                rate = copy_bandwidth()
                harness.append(arguments.rows, stage="mission", case="device", peer="copy of 2 GiB", rate=rate / 1e9)
            for made in groups(device, arguments.groups or ()):
                for group in made:
                    if not arguments.groups or group.case.split(",")[0] in arguments.groups:
                        measure(group, arguments.turns, device, arguments.rows, monitor)
                _release(device)
        finally:
            monitor.close()


if __name__ == "__main__":
    main()
