"""``make gpu-check``: everything that needs a GPU, on this machine's, in under ten minutes and without network.

Builds the package with what the interpreter has (nothing else is installed; it goes to ``build/gpu-check``), runs
every parity test on the device, a memory checker over a small case, and the benchmarks; writes ``gpu-<name>.json`` and
``gpu-<name>.md`` to ``--out``. Settings of the card are left as they are. It ends with a non-zero status where anything
failed. Run as a script, as the package is not there yet.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu-check"
SITE = WORK / "site"
TOTAL_SECONDS = 590


@dataclass
class Stage:
    """What became of one part: ``ok`` None where it could not run, ``detail`` says why or how it went."""

    name: str
    ok: bool | None
    seconds: float
    detail: str


def missing() -> str | None:
    """Why this machine or interpreter cannot run the check, in one sentence, or None."""
    if sys.version_info < (3, 11):  # noqa: UP036 - the interpreter is the user's, this package is not installed in it
        return f"expected Python 3.11 or newer, got {sys.version.split()[0]}"
    try:
        import torch
    except ImportError as error:
        return f"expected an interpreter with torch >= 2.11 for CUDA ({error}); GPU_PYTHON names another"
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < (2, 11):
        return f"expected torch >= 2.11, got {torch.__version__}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; GPU_PYTHON names another interpreter"
    if not torch.cuda.is_available():
        return "torch finds no GPU with a working driver on this machine"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"expected a GPU of compute capability 8.0 or later, got {torch.cuda.get_device_name()}"
    for module in ("triton", "scikit_build_core", "pybind11"):
        if importlib.util.find_spec(module) is None:
            return f"expected an interpreter with {module}; nothing is installed here beside this package"
    return None


class Check:
    """Runs stages one after another within the time there is."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.started = time.monotonic()

    def run(self, name: str, command: list[str], limit: float, log: Path, **environment: str) -> bool:
        """Runs ``command`` in the checkout with the built package importable; its output goes to ``log``."""
        print(f"[gpu-check] {name} ...", flush=True)
        begin = time.monotonic()
        limit = max(1.0, min(limit, TOTAL_SECONDS - (begin - self.started)))
        paths = {"PYTHONPATH": f"{SITE}{os.pathsep}{ROOT}", "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
        with log.open("w") as output:
            try:
                result = subprocess.run(
                    command,
                    cwd=ROOT,
                    env=os.environ | paths | environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=limit,
                )
                ok, detail = result.returncode == 0, f"status {result.returncode}"
            except subprocess.TimeoutExpired:
                ok, detail = False, f"stopped after {limit:.0f} s"
        if not ok:
            print("\n".join(log.read_text(errors="replace").splitlines()[-40:]))
        self.add(name, ok, detail, time.monotonic() - begin)
        return ok

    def add(self, name: str, ok: bool | None, detail: str, seconds: float = 0.0) -> None:
        self.stages.append(Stage(name, ok, round(seconds, 1), detail))
        word = {True: "ok", False: "FAILED", None: "not run"}[ok]
        print(f"[gpu-check] {name}: {word}, {detail} ({seconds:.0f} s)", flush=True)

    @property
    def failed(self) -> list[str]:
        return [stage.name for stage in self.stages if stage.ok is False]


def build(check: Check) -> bool:
    shutil.rmtree(SITE, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    command += ["--target", str(SITE), str(ROOT)]
    return check.run("build", command, 180, WORK / "build.log")


def list_backends(check: Check) -> None:
    """That both GPU backends are there: one that is missing must not pass as one that was tested."""
    code = (
        "import acqcore\n"
        "rows = [row for row in acqcore.backends() if row.name in ('cuda', 'triton')]\n"
        "for row in rows: print(row.name, 'available' if row.available else f'missing: {row.reason}')\n"
        "raise SystemExit(len(rows) != 2 or not all(row.available for row in rows))\n"
    )
    check.run("backends", [sys.executable, "-c", code], 60, WORK / "backends.log")


def parity(check: Check) -> dict[str, int]:
    """Every test that goes through the backends, for those of the device alone; counts of their outcomes."""
    if importlib.util.find_spec("pytest") is None:
        check.add("parity tests", False, "pytest is not installed for this interpreter, so no test ran")
        return {}
    tests = sorted(ROOT.glob("tests/test_*.py"))
    files = [
        path for path in tests if "implementation" in path.read_text() or path.stem in ("test_cuda", "test_triton")
    ]
    report = WORK / "parity.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", "-rs"]
    command += [f"--junitxml={report}", "-k", "(cuda or triton) and not emulated", *map(str, files)]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", "4"]
    check.run("parity tests", command, 260, WORK / "parity.log")
    if not report.exists():
        return {}
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
    check.stages[-1].detail += ", " + ", ".join(f"{value} {key}" for key, value in counts.items())
    return counts


def memory_checker(check: Check) -> None:
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        check.add("memory checker", None, "compute-sanitizer is not installed")
        return
    log = WORK / "sanitizer.log"
    command = [
        checker,
        "--tool",
        "memcheck",
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "benchmarks.gpu_small_case",
    ]
    check.run("memory checker", command, 120, log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if check.stages[-1].ok is False and "Device not supported" in log.read_text(errors="replace"):
        check.stages[-1].ok, check.stages[-1].detail = None, "compute-sanitizer does not support this machine"


def benchmark(check: Check, name: str, limit: float) -> dict[str, Any]:
    out = WORK / f"{name}.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", f"benchmarks.bench_{name}", "--device", "cuda", "--turns", "5", "--out", str(out)]
    check.run(f"benchmark {name}", command, limit, WORK / f"{name}.log")
    content: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    return content


def preferences(op: str, measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows for ``acqcore/backends/preference.json``: per class of shapes, GPU backends by their geometric mean time."""
    sys.path.insert(0, str(SITE))
    from acqcore.backends.preference import shape_class

    products: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in measured.get("rows", []):
        peer = re.fullmatch(r"acqcore (cuda|triton) \(all fields\)", row["peer"])
        case = re.fullmatch(r"N=(\d+) (?:D=\d+ )?V=(\d+) (\w+)", row["case"])
        if peer and case:
            key = (case[3], *shape_class(int(case[1]), int(case[2])))
            products.setdefault(key, {}).setdefault(peer[1], []).append(row["seconds"])
    rows = []
    for (dtype, n, v), times in products.items():
        means = {name: _geometric_mean(seconds) for name, seconds in times.items()}
        if len(means) == 2:
            shape = {"capability": measured["machine"]["capability"], "op": op, "dtype": dtype, "rows": n, "vocab": v}
            rows.append(shape | {"order": sorted(means, key=lambda name: means[name])})
    return rows


def _geometric_mean(values: list[float]) -> float:
    product = 1.0
    for value in values:
        product *= value ** (1 / len(values))
    return product


def summary(name: str, check: Check, results: dict[str, Any]) -> str:
    lines = [f"# GPU check: {name}", "", "| stage | | | s |", "|---|---|---|---|"]
    words = {True: "ok", False: "FAILED", None: "not run"}
    lines += [f"| {stage.name} | {words[stage.ok]} | {stage.detail} | {stage.seconds:.0f} |" for stage in check.stages]
    bandwidth = results["logit_stats"].get("copy_bytes_per_second")
    if bandwidth:
        lines += ["", f"Device-to-device copy, read and written: {bandwidth / 1e9:.0f} GB/s."]
    for case, rate in results["row_stats"].get("product_flops", {}).items():
        lines += ["", f"Bare product, {case}: {rate / 1e12:.0f} TFLOP/s."]
    for op in ("logit_stats", "row_stats"):
        log = WORK / f"{op}.log"
        if results[op]:
            tables = log.read_text()
            lines += ["", f"## {op}", tables[tables.index("\n**") :].rstrip()]
    lines += ["", "## Rows for acqcore/backends/preference.json", ""]
    lines += [f"    {json.dumps(row)}" for row in results["preference"]] or ["None: both backends are needed."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for gpu-<name>.*")
    arguments = parser.parse_args()
    if reason := missing():
        raise SystemExit(f"gpu-check: {reason}")
    import torch

    name = torch.cuda.get_device_name()
    WORK.mkdir(parents=True, exist_ok=True)
    check = Check()
    counts: dict[str, int] = {}
    results: dict[str, Any] = {"logit_stats": {}, "row_stats": {}, "preference": []}
    if build(check):
        list_backends(check)
        counts = parity(check)
        memory_checker(check)
        for op, limit in (("logit_stats", 120), ("row_stats", 200)):
            results[op] = benchmark(check, op, limit)
            results["preference"] += preferences(op, results[op])
    content = {"gpu": name, "stages": [asdict(stage) for stage in check.stages], "parity": counts, **results}
    stem = "gpu-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n")
    text = summary(name, check, results)
    (arguments.out / f"{stem}.md").write_text(text)
    print(
        f"\n{text}\n[gpu-check] wrote {arguments.out / stem}.json and .md in {time.monotonic() - check.started:.0f} s"
    )
    if check.failed:
        raise SystemExit(f"gpu-check: failed: {', '.join(check.failed)}")


if __name__ == "__main__":
    main()
