"""The common measurement protocol: interleaved peers in one process, medians and ratios, peak memory, JSON and a plot.

Peers take turns (A B C A B C ...), so that a slowdown of the machine affects all of them. Each peer's result is its
median time and the median of its ratio to a named baseline within each turn.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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
        extra_mib: peak resident memory in MiB beyond that before the call, including results; None if not measured.
        share: median over turns of the ceiling's time / its time in the same turn, or None without a ceiling.
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
    ceiling: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Times ``peers`` in turn, after one warm-up call each (which also measures peak memory).

    ``work`` is the work of each call in bytes or floating-point operations. ``ceiling`` names the peer that does the
    same work as fast as the machine can. Times are differences of two readings of ``clock``, in seconds.
    """
    extra = {name: peak_mib(call) if memory else None for name, call in peers.items()}
    times: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(turns):
        for name, call in peers.items():
            times[name].append(cpu_seconds(call, clock))

    def median_ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

    rows = []
    for name in peers:
        seconds = statistics.median(times[name])
        rate = None if work is None else work / seconds / 1e9
        share = None if ceiling is None else median_ratio(ceiling, name)
        rows.append(Row(case, name, seconds, median_ratio(name, baseline), rate, extra[name], share))
    return rows


def cpu_seconds(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    result = call()
    seconds = clock() - start
    del result
    return seconds


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
    before = memory_mib("VmRSS")
    result = call()
    extra = memory_mib("VmHWM") - before
    del result
    return extra


def process_peak_mib(call: Callable[[], object]) -> float:
    """Peak resident memory of the whole process while a call runs, in MiB (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    result = call()
    peak = memory_mib("VmHWM")
    del result
    return peak


def memory_mib(field: str, pid: int | str = "self") -> float:
    """A size in ``/proc/<pid>/status``: ``VmRSS``, the resident memory, or ``VmHWM``, its peak."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


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
        columns = {
            "ms": [f"{row.seconds * 1e3:.{1 if row.seconds > 0.1 else 3}f}" for row in chosen],
            "ratio": [f"{row.ratio:.2f}" for row in chosen],
            unit: ["" if row.rate is None else f"{row.rate:.{0 if row.rate >= 10 else 2}f}" for row in chosen],
            "of ceiling": ["" if row.share is None else f"{row.share:.2f}" for row in chosen],
            "extra MiB": ["" if row.extra_mib is None else f"{row.extra_mib:.0f}" for row in chosen],
        }
        used = {heading: cells for heading, cells in columns.items() if any(cells)}
        cells = zip([row.peer for row in chosen], *used.values(), strict=True)
        lines += ["", f"**{case}**", "", *markdown(["", *used], *cells)]
    return "\n".join(lines)


def markdown(header: Sequence[str], *rows: Sequence[object]) -> list[str]:
    """The lines of a Markdown table."""
    head, *body = [f"| {' | '.join(map(str, row))} |" for row in (header, *rows)]
    return [head, "|---" * len(header) + "|", *body]


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
