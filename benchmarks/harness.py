"""The common measurement protocol: interleaved peers in one process, medians and ratios, peak memory, JSON and a plot.

On a GPU, times come from device events around as many calls as fill five milliseconds, and memory is the allocator's;
rates are compared with ceilings measured in the same process.

Peers take turns (A B C A B C ...), so that a slowdown of the machine affects all of them. Each peer's result is its
median time and the median of its ratio to a named baseline within each turn.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import acqcore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"

#: Name prefixes of our own fast paths, coloured in plots.
OURS = ("acqcore cpu", "acqcore cuda", "acqcore triton", "acqcore.", "score(")


@dataclass
class Row:
    """One peer on one input.

    Attributes:
        seconds: median over turns.
        ratio: median over turns of its time / the baseline's time in the same turn.
        rate: ``work / seconds`` in the benchmark's unit (GFLOP/s, GB/s), or None.
        extra_mib: peak resident memory (on a GPU, allocated memory) in MiB beyond that before the call, including
            results; None if not measured.
        share: ``rate`` over its measured ceiling, or None; the median over turns if the ceiling took turns with the
            peers.
    """

    case: str
    peer: str
    seconds: float
    ratio: float
    rate: float | None
    extra_mib: float | None
    share: float | None = None


def measure(
    case: str,
    peers: dict[str, Callable[[], object]],
    *,
    baseline: str,
    work: float | None = None,
    turns: int = 7,
    memory: bool = True,
    device: str = "cpu",
    ceiling: float | str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Times ``peers`` in turn, after one warm-up call each (which also measures peak memory).

    ``work`` is the work of each call in bytes or floating-point operations. ``ceiling`` is in units of work per second,
    or names the peer that does the same work as fast as the machine can.
    On the CPU, the time of a call is the difference of two readings of ``clock``, in seconds.
    """
    on_gpu = device == "cuda"
    peak = peak_gpu_mib if on_gpu else peak_mib
    extra = {name: peak(call) if memory else None for name, call in peers.items()}
    repeats = {name: math.ceil(min(20, 5e-3 / gpu_seconds(call, 1))) if on_gpu else 1 for name, call in peers.items()}
    times: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(turns):
        for name, call in peers.items():
            times[name].append(gpu_seconds(call, repeats[name]) if on_gpu else cpu_seconds(call, clock))
    rows = []
    share: float | None
    for name in peers:
        seconds = statistics.median(times[name])
        ratio = statistics.median(a / b for a, b in zip(times[name], times[baseline], strict=True))
        rate = None if work is None else work / seconds / 1e9
        if isinstance(ceiling, str):
            share = statistics.median(a / b for a, b in zip(times[ceiling], times[name], strict=True))
        else:
            share = None if rate is None or ceiling is None else rate * 1e9 / ceiling
        rows.append(Row(case, name, seconds, ratio, rate, extra[name], share))
    return rows


def cpu_seconds(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    result = call()
    seconds = clock() - start
    del result
    return seconds


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


def running(
    peers: dict[str, Callable[..., object]], inputs: Sequence[torch.Tensor]
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Peers whose first call succeeds, bound to ``inputs``, and the other peers' errors."""
    good: dict[str, Callable[[], object]] = {}
    absent = {}
    for name, function in peers.items():
        call = partial(function, *inputs)
        try:
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except Exception as error:  # third-party code may raise anything; the error is the result
            absent[name] = first_line(error)
        else:
            good[name] = call
    return good, absent


def first_line(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def append(path: Path, **row: object) -> None:
    """Appends ``row`` to a JSON-lines file in one write, so that a killed process loses no earlier row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file, and its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def save(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Writes a plot, and its folder if needed, without the frame's upper and right lines."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a device-to-device copy of 2 GiB (or a quarter of free memory)."""
    size = min(2 << 30, torch.cuda.mem_get_info()[0] // 4)
    source = torch.empty(size, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    seconds = statistics.median(gpu_seconds(lambda: target.copy_(source), 5) for _ in range(7))
    return 2 * size / seconds


def peak_gpu_mib(call: Callable[[], object]) -> float:
    """Peak allocated device memory of a second call beyond the memory allocated before it, in MiB."""
    call()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    extra = (torch.cuda.max_memory_allocated() - before) / 2**20
    del result
    return extra


def peak_mib(call: Callable[[], object]) -> float | None:
    """Peak resident memory of a second call beyond the memory resident before it, in MiB (Linux)."""
    call()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # else the call reuses pages that an earlier call left behind
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current resident size
    except OSError:
        return None
    before = _status("VmRSS")
    result = call()
    extra = (_status("VmHWM") - before) / 1024
    del result
    return extra


def process_peak_mib(call: Callable[[], object]) -> float:
    """Peak resident memory of the whole process while a call runs, in MiB (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    result = call()
    peak = _status("VmHWM") / 1024
    del result
    return peak


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def machine() -> dict[str, str | int]:
    """The environment of a measurement: processor, threads, versions, instruction set of the cpu backend."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    cpu = next(row for row in acqcore.backends() if row.name == "cpu")
    gpu: dict[str, str | int] = {}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory_gib": round(properties.total_memory / 2**30),
            "cuda": torch.version.cuda or "",
        }
    return {
        "cpu": model,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "instruction_set": cpu.instruction_set or "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "acqcore": acqcore.__version__,
        **gpu,
    }


def report(
    name: str,
    rows: list[Row],
    *,
    unit: str,
    notes: dict[str, object] | None = None,
    out: Path | None = None,
    keep: bool = False,
) -> None:
    """Prints the table and writes ``results/<name>.json`` and ``results/<name>.png``; with ``out``, only that JSON.

    With ``keep``, the file keeps other cases that the same machine measured, with any instruction set.
    """
    print(table(rows, unit))
    path = out or RESULTS / f"{name}.json"
    if keep and path.exists():
        before = json.loads(path.read_text())
        here = machine() | {"instruction_set": before["machine"]["instruction_set"]}
        if before["machine"] == here:
            taken = {row.case for row in rows}
            rows = [row for row in (Row(**found) for found in before["rows"]) if row.case not in taken] + rows
    write(path, {"machine": machine(), "unit": unit, "rows": [asdict(row) for row in rows], **(notes or {})})
    if out is None:
        plot(name, rows)


def table(rows: list[Row], unit: str) -> str:
    """The rows as Markdown, one table per case; empty columns are omitted."""
    lines: list[str] = []
    for case in dict.fromkeys(row.case for row in rows):
        chosen = [row for row in rows if row.case == case]
        columns = ["ms", "ratio"]
        columns += [unit] if any(row.rate is not None for row in chosen) else []
        columns += ["of ceiling"] if any(row.share is not None for row in chosen) else []
        columns += ["extra MiB"] if any(row.extra_mib is not None for row in chosen) else []
        lines += ["", f"**{case}**", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for row in chosen:
            cells = [f"{row.seconds * 1e3:.{1 if row.seconds > 0.1 else 3}f}", f"{row.ratio:.2f}"]
            cells += [] if row.rate is None else [f"{row.rate:.{0 if row.rate >= 10 else 2}f}"]
            cells += [] if row.share is None else [f"{row.share:.2f}"]
            cells += [] if row.extra_mib is None else [f"{row.extra_mib:.0f}"]
            lines.append(f"| {row.peer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(name: str, rows: list[Row]) -> None:
    """Plots the median times as horizontal bars, one panel per case with several peers."""
    from matplotlib.figure import Figure

    counts = Counter(row.case for row in rows)
    cases = [case for case, count in counts.items() if count > 1]
    longest = max(len([r for r in rows if r.case == case]) for case in cases)
    figure = Figure(figsize=(8, (0.45 * longest + 0.9) * len(cases)))
    axes = figure.subplots(len(cases), 1, squeeze=False)
    for axis, case in zip(axes[:, 0], cases, strict=True):
        chosen = [row for row in rows if row.case == case][::-1]
        colours = ["#c44e52" if row.peer.startswith(OURS) else "#8c9bb0" for row in chosen]
        bars = axis.barh([row.peer for row in chosen], [row.seconds for row in chosen], color=colours)
        axis.bar_label(bars, [f"{row.seconds:.3g} s" for row in chosen], padding=3, fontsize=8)
        axis.annotate(case, (0.01, 1.03), xycoords=("figure fraction", "axes fraction"), fontsize=10)
        axis.set_xlabel("seconds (median)")
        axis.margins(x=0.12)
    figure.tight_layout()
    save(figure, RESULTS / f"{name}.png", dpi=110)
