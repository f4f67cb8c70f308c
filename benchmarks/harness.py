"""One way of measuring: peers in one process, interleaved, medians and ratios; peak memory; JSON and a plot.

Peers take turns (A B C A B C ...), so that a machine that slows down slows all of them; the median of each and the
median of its turn-by-turn ratio to a named baseline are kept.
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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import acqcore

RESULTS = Path(__file__).parent / "results"

#: How the names of our own fast paths begin; plots colour them.
OURS = ("acqcore cpu", "acqcore.", "score(")


@dataclass
class Row:
    """One peer on one input.

    Attributes:
        seconds: median over turns.
        ratio: median over turns of its time / the baseline's time in the same turn.
        rate: ``work / seconds`` in the benchmark's unit (GFLOP/s, GB/s), or None.
        extra_mib: peak of resident memory beyond what was resident before the call, MiB; None where not measured.
    """

    case: str
    peer: str
    seconds: float
    ratio: float
    rate: float | None
    extra_mib: float | None


def measure(
    case: str,
    peers: dict[str, Callable[[], object]],
    *,
    baseline: str,
    work: float | None = None,
    turns: int = 7,
    memory: bool = True,
) -> list[Row]:
    """Times ``peers`` in turn, after one call each to warm up (and to take its peak memory)."""
    extra = {name: peak_mib(call) if memory else None for name, call in peers.items()}
    times: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(turns):
        for name, call in peers.items():
            start = time.perf_counter()
            result = call()
            times[name].append(time.perf_counter() - start)
            del result
    rows = []
    for name in peers:
        seconds = statistics.median(times[name])
        ratio = statistics.median(a / b for a, b in zip(times[name], times[baseline], strict=True))
        rate = None if work is None else work / seconds / 1e9
        rows.append(Row(case, name, seconds, ratio, rate, extra[name]))
    return rows


def peak_mib(call: Callable[[], object]) -> float | None:
    """Peak resident memory of a second call beyond what is resident before it, in MiB (Linux)."""
    call()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # else the call is served from pages that an earlier one left
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    except OSError:
        return None
    before = _status("VmRSS")
    result = call()
    extra = (_status("VmHWM") - before) / 1024
    del result
    return extra


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def machine() -> dict[str, str | int]:
    """What the figures depend on: processor, threads, versions, the instruction set of the cpu backend."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    cpu = next(row for row in acqcore.backends() if row.name == "cpu")
    return {
        "cpu": model,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "instruction_set": cpu.instruction_set or "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "acqcore": acqcore.__version__,
    }


def report(name: str, rows: list[Row], *, unit: str, notes: dict[str, object] | None = None) -> None:
    """Prints the table, writes ``results/<name>.json`` and ``results/<name>.png``."""
    print(table(rows, unit))
    RESULTS.mkdir(exist_ok=True)
    content = {"machine": machine(), "unit": unit, "rows": [asdict(row) for row in rows], **(notes or {})}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    plot(name, rows)


def table(rows: list[Row], unit: str) -> str:
    """The rows as Markdown, one table a case; columns without a figure are left out."""
    lines: list[str] = []
    for case in dict.fromkeys(row.case for row in rows):
        chosen = [row for row in rows if row.case == case]
        columns = ["ms", "ratio"]
        columns += [unit] if any(row.rate is not None for row in chosen) else []
        columns += ["extra MiB"] if any(row.extra_mib is not None for row in chosen) else []
        lines += ["", f"**{case}**", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for row in chosen:
            cells = [f"{row.seconds * 1e3:.1f}", f"{row.ratio:.2f}"]
            cells += [f"{value:.0f}" for value in (row.rate, row.extra_mib) if value is not None]
            lines.append(f"| {row.peer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(name: str, rows: list[Row]) -> None:
    """Horizontal bars of the median times, one panel a case that compares several."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = Counter(row.case for row in rows)
    cases = [case for case, count in counts.items() if count > 1]
    longest = max(len([r for r in rows if r.case == case]) for case in cases)
    figure, axes = pyplot.subplots(len(cases), 1, figsize=(8, (0.45 * longest + 0.9) * len(cases)), squeeze=False)
    for axis, case in zip(axes[:, 0], cases, strict=True):
        chosen = [row for row in rows if row.case == case][::-1]
        colours = ["#c44e52" if row.peer.startswith(OURS) else "#8c9bb0" for row in chosen]
        bars = axis.barh([row.peer for row in chosen], [row.seconds for row in chosen], color=colours)
        axis.bar_label(bars, [f"{row.seconds:.3g} s" for row in chosen], padding=3, fontsize=8)
        axis.set_title(case, fontsize=10, loc="left")
        axis.set_xlabel("seconds (median)")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=110)
    pyplot.close(figure)
