"""Tables of GPU results, generated from the JSON files of ``make gpu-check`` and ``make gpu-static``.

``python -m benchmarks.gpu_tables`` writes ``docs/gpu.md``. It uses only the standard library, since ``gpu_check`` runs
it on machines where the package is not installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "gpu.md"

Row = dict[str, Any]

INTRODUCTION = """\
# GPU

Accuracy, time and memory of every operation on an H100 and an H200; for a summary, see [Benchmarks](benchmarks.md).

`make gpu-check` builds the package on a machine with a GPU, compares every operation with float64, times it beside the
bare product and other libraries in one process, runs a memory checker, and writes one file per GPU. `make gpu-static`
compiles every kernel for sm_80, sm_90 and sm_100 without a GPU. `python -m benchmarks.gpu_tables` writes this page from
their results.

A product-equivalent is the time of a call divided by that of the bare product `hidden @ weight.T` in bfloat16, in the
same turn of the same process.
"""


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; the first column holds text, the others figures."""
    header = list(header)
    lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    lines += [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def _outcome(stage: Row) -> str:
    if stage["ok"] is None:
        return "not run"
    in_time = any("stopped after" not in part for part in stage["detail"].split("; "))
    return "ok" if stage["ok"] else "failed" if in_time else "stopped"


def _detail(stage: Row) -> str:
    """What ended the stage, once for all its processes: ``stage 0: status 1; stage 1: status 1`` is ``status 1``."""
    return "; ".join(dict.fromkeys(part.rpartition(": ")[2] for part in stage["detail"].split("; ")))


def run_report(content: dict[str, Any]) -> str:
    """One run of ``make gpu-check`` as Markdown."""
    machine = content.get("machine", {})
    parts = [f"## {machine.get('gpu', 'no GPU')}"]
    facts = ", ".join(f"{key} {value}" for key, value in machine.items() if key != "gpu" and value)
    stages = [(stage["name"], _outcome(stage), _detail(stage), stage["seconds"]) for stage in content["stages"]]
    parts += [facts, table(("stage", "", "", "s"), stages)]
    if "note" in content:
        parts.append(str(content["note"]))
    parts += [part for part in (_parity(content), _mission(content), _score(content), _tuning(content)) if part]
    return "\n\n".join(parts) + "\n"


def with_preferences(content: dict[str, Any]) -> str:
    """The report, and what the run says about ``preference.json``."""
    rows = "\n".join(f"    {json.dumps(row)}" for row in preferences(content))
    return run_report(content) + (f"\nRows for `acqcore/backends/preference.json`:\n\n{rows}\n" if rows else "")


def _parity(content: dict[str, Any]) -> str:
    """Counts and worst error by operation and backend over all dtypes, and a list of failed checks."""
    checks = content.get("parity", [])
    if not checks:
        return ""
    backends = sorted({check["backend"] for check in checks})

    def cell(op: str, backend: str) -> str | None:
        chosen = [check for check in checks if (check["op"], check["backend"]) == (op, backend)]
        worst = max((check["worst"] for check in chosen if check["worst"] is not None), default=None)
        error = "" if worst is None else f", {_cell(worst)}"
        return f"{sum(check['ok'] for check in chosen)} of {len(chosen)}{error}" if chosen else None

    rows = [(op, *(cell(op, backend) for backend in backends)) for op in sorted({check["op"] for check in checks})]
    failed = [check for check in checks if not check["ok"]]
    parts = [
        "### Parity with float64",
        "Checks that hold, and the worst error in units of its bound.",
        table(("operation", *backends), rows),
        "\n".join(f"- {c['op']}, {c['case']}, {c['backend']}, {c['dtype']}: {c['message']}" for c in failed),
    ]
    return "\n\n".join(filter(None, parts))


def _by_case(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["case"], []).append(row)
    return found


def _mission(content: dict[str, Any]) -> str:
    parts = []
    for case, chosen in _by_case(content.get("mission", [])).items():
        if case == "device":
            parts += [f"{row['peer']}, read and written: {row['rate']:.0f} GB/s" for row in chosen]
        if measured := [row for row in chosen if "ms" in row]:
            unit, accuracy = measured[0]["unit"], measured[0].get("accuracy", "")
            header = ("", "ms", "spread", "product-equivalents" if unit == "TFLOP/s" else "ratio", unit, "extra MiB")
            cells = [
                (
                    row["peer"], row["ms"], f"{row['spread']:.1%}", f"{row['ratio']:.2f}", row["rate"],
                    row.get("extra_mib"), row.get("error"),
                )
                for row in measured
            ]  # fmt: skip
            error = f"error ({accuracy})" if accuracy else "error"
            parts += [f"**{case}**", table((*header, error), cells), _clocks(measured)]
        parts.append("\n".join(f"- {row['peer']}: {row['not_measured']}" for row in chosen if "not_measured" in row))
    return "\n\n".join(["### Time", *filter(None, parts)]) if parts else ""


def _clocks(rows: list[Row]) -> str:
    row = rows[0]
    if "sm_mhz" not in row:
        return str(row.get("monitor", ""))
    reasons = ", ".join(row["throttle"]) or "no throttling"
    return (
        f"SM clock {row['sm_mhz']:.0f} MHz (lowest {row['sm_mhz_min']:.0f}), at most {row['power_w_max']:.0f} W and "
        f"{row['temperature_c']:.0f} °C, {reasons}."
    )


def _score(content: dict[str, Any]) -> str:
    parts = []
    for case, chosen in _by_case(content.get("score", [])).items():
        cells = [(r["peer"], r.get("ms", r.get("not_measured")), r.get("ratio"), r.get("spread")) for r in chosen]
        parts += [f"**{case}**", table(("", "ms", "of the trunk", "spread"), cells)]
    return "\n\n".join(["### Whole students", *parts]) if parts else ""


def _tuning(content: dict[str, Any]) -> str:
    lines = content.get("tuning", [])
    return "\n".join(["### Tuning", "", *(f"    {line}" for line in lines)]) if lines else ""


def preferences(content: dict[str, Any]) -> list[Row]:
    """Rows for ``acqcore/backends/preference.json``: GPU backends ranked by geometric mean time per class of shapes."""
    logs: dict[tuple[str, str, str, str], dict[str, list[float]]] = {}
    for row in content.get("mission", []):
        peer = re.fullmatch(
            r"(?:statistics and )?(row_stats|logit_stats|head_grad_norm)(?:, T=\d+)?, (\w+)", row["peer"]
        )
        case = re.search(r"N=(\d+) (?:D=\d+ )?V=(\d+) (\w+)", row["case"])
        if peer and peer[2] != "automatic" and case and "ms" in row:
            n, v = int(case[1]), int(case[2])
            key = (peer[1], case[3], "few" if n < 256 else "many", "small" if v < 32768 else "large")
            logs.setdefault(key, {}).setdefault(peer[2], []).append(row["ms"])
    capability = content.get("machine", {}).get("capability")
    rows = []
    for (op, dtype, n_class, v_class), times in logs.items():
        if len(times) > 1:
            shape = {"capability": capability, "op": op, "dtype": dtype, "rows": n_class, "vocab": v_class}
            rows.append(shape | {"order": sorted(times, key=lambda name: geometric_mean(times[name]))})
    return rows


def static_report(content: dict[str, Any]) -> str:
    """The results of ``make gpu-static`` as Markdown."""
    products = {row["op"]: row.get("product_equivalents") for row in content["products"]}
    vocab = max(row["vocab"] for row in content["calls"])
    parts = [
        "## Without a GPU",
        f"Compiled by Triton {content['triton']} for sm_90; N={content['rows']}, D=4096, V={vocab}. Other shapes and "
        "architectures are in `benchmarks/results/gpu_static.json`. Bytes count the arguments of every launch and "
        "torch operation once. Memory excludes the result.",
    ]
    rows = [
        (
            row["op"], row["dtype"], products.get(row["op"]),
            row.get("launches", row.get("fails")), row.get("torch_operations"), row.get("argument_gib"),
            row.get("extra_mib"),
        )
        for row in content["calls"]
        if (row["arch"], row["depth"], row["vocab"]) == (90, 4096, vocab)
    ]  # fmt: skip
    header = ("call", "dtype", "product-equivalents", "launches", "torch operations", "GiB", "extra MiB")
    parts.append(table(header, rows))
    kernels = [
        (
            row["kernel"], row["dtype"], row.get("registers", row.get("fails")),
            row.get("stack_bytes"), row.get("shared_bytes"), row.get("matrix_instructions"), row.get("sass_per_logit"),
        )
        for row in content["kernels"]
        if (row["arch"], row["depth"], row["vocab"]) == (90, 4096, vocab)
    ]  # fmt: skip
    kernels = list(dict.fromkeys(kernels))
    names = ("kernel", "dtype", "registers", "stack, bytes", "shared, bytes", "matrix instructions")
    parts.append(table((*names, "SASS per logit"), kernels))
    return "\n\n".join(parts) + "\n"


def document() -> str:
    """``docs/gpu.md``."""
    parts = [INTRODUCTION]
    runs = sorted(RESULTS.glob("gpu-*.json"))
    if not runs:
        parts.append("No GPU has been measured yet: every time is unmeasured.\n")
    parts += [run_report(json.loads(path.read_text())) for path in runs]
    static = RESULTS / "gpu_static.json"
    if static.exists():
        parts.append(static_report(json.loads(static.read_text())))
    return "\n".join(parts)


def main() -> None:
    DOCUMENT.write_text(document())
    print(f"wrote {DOCUMENT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
