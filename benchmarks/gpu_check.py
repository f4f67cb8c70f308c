"""``make gpu-check``: every check that needs a GPU, on this machine, in eight minutes and without network access.

Stages, each with a cap in seconds; a stage that fails or times out does not stop the others:

    parity     every operation on small shapes against float64, in parallel processes; at the same time the extension
               is compiled, and compiler caches are filled for the next stage
    mission    every operation at the shapes that matter, against the bare product, eager torch and peers
    sanitizer  compute-sanitizer on the smallest shapes
    score      whole students
    tune       a bounded search for tiles of one shape, in the remaining time

``gpu-<name>.json`` and ``.md`` in ``--out`` are rewritten whenever a stage has new measurements, so that a killed run
keeps its results. Peers come from ``build/gpu-peers`` (``make gpu-peers``) or the interpreter. The settings of the card
are not changed. The exit status is non-zero if anything failed. ``--dry-run`` runs the same steps on tiny shapes on the
CPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a script, whose folder is not its package's
    sys.path.insert(0, str(ROOT))

from benchmarks import gpu_tables  # noqa: E402

WORK = ROOT / "build" / "gpu-check"
SITE = WORK / "site"
PEERS = ROOT / "build" / "gpu-peers"

#: The interpreter's own CMake and Ninja come first; the CUDA toolkit is found even if it is not on the caller's path.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"])

#: stage -> cap in seconds
CAPS = {"parity": 140.0, "mission": 130.0, "sanitizer": 60.0, "score": 100.0, "tune": 60.0}
BUILD_SECONDS = 150.0
#: Processes that compile and check kernels in parallel; the build and the warm-up use the other cores.
WORKERS = max(2, (os.cpu_count() or 2) - 4)


@dataclass
class Stage:
    """The outcome of a stage: ``ok`` is None if it could not run; ``detail`` gives the reason or the result."""

    name: str
    ok: bool | None
    seconds: float
    detail: str


def missing() -> str | None:
    """The reason why this machine or interpreter cannot run the check, in one sentence, or None."""
    if sys.version_info < (3, 11):  # noqa: UP036 - the user's interpreter, without this package installed
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
    for module in ("triton", "pybind11"):
        if importlib.util.find_spec(module) is None:
            return f"expected an interpreter with {module}; this check installs no packages"
    return None


def machine(dry_run: bool) -> dict[str, Any]:
    """The environment of the measurements."""
    import torch

    found: dict[str, Any] = {}
    if not dry_run:
        properties = torch.cuda.get_device_properties(0)
        found = {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30),
            "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20),
            "cuda": torch.version.cuda,
            **_driver(),
        }
    found |= {"python": sys.version.split()[0], "torch": torch.__version__, "cores": os.cpu_count()}
    paths = [*sys.path, *map(str, _peer_paths())]
    for name in ("triton", "transformers", "liger-kernel", "trl", "nvidia-cutlass-dsl"):
        versions = [dist.version for dist in importlib.metadata.distributions(name=name, path=paths)]
        found[name] = versions[0] if versions else None
    return found


def _driver() -> dict[str, Any]:
    query = [
        "nvidia-smi",
        "--query-gpu=driver_version,power.limit,clocks.max.sm,clocks.max.mem",
        "--format=csv,noheader",
    ]
    try:
        line = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.TimeoutExpired, IndexError):
        return {}
    return dict(zip(("driver", "power_limit", "sm_max", "memory_max"), line.split(", "), strict=False))


def _peer_paths() -> list[Path]:
    """Folders of bundled peers; CuTe DSL, which Liger's Hopper kernels need, keeps its packages in a subfolder."""
    return [path for path in (PEERS, PEERS / "nvidia_cutlass_dsl" / "dsl_packages") if path.exists()]


class Run:
    """Starts processes within the time limit, and keeps the report up to date with the rows that they append."""

    def __init__(self, out: Path, seconds: float, dry_run: bool) -> None:
        self.started = time.monotonic()
        self.seconds = seconds
        self.dry_run = dry_run
        self.out = out
        self.rows = WORK / "rows.jsonl"
        self.log = out / "gpu-log.txt"
        self.stages: list[Stage] = []
        self.tuning: list[str] = []
        self.groups: list[str] = []
        self.machine = machine(dry_run)
        name = "dry-run" if dry_run else str(self.machine["gpu"])
        self.stem = "gpu-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        self._written = -1
        self.rows.unlink(missing_ok=True)
        self.log.unlink(missing_ok=True)

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def start(self, name: str, command: list[str], **environment: str) -> subprocess.Popen[bytes]:
        """Starts a process that imports from the site, then the caller's PYTHONPATH, then the bundled peers."""
        inherited = os.environ.get("PYTHONPATH", "")
        parts = [str(SITE), *inherited.split(os.pathsep), *map(str, _peer_paths())]
        ours = {
            "PYTHONPATH": os.pathsep.join(part for part in parts if part),
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
            "PATH": PATH,
        }
        if self.dry_run:
            ours |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        with self._log_of(name).open("wb") as output:
            return subprocess.Popen(
                command, cwd=ROOT, env=os.environ | ours | environment, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def wait(self, name: str, processes: dict[str, subprocess.Popen[bytes]], limit: float) -> bool:
        """Waits for all processes, kills those still running at the limit, and records the stage."""
        begin = time.monotonic()
        stopped = self.finish(processes, begin + max(1.0, min(limit, self.left)))
        seconds = time.monotonic() - begin
        failed = [part for part, process in processes.items() if process.returncode != 0 and part not in stopped]
        details = [f"{part}: status {processes[part].returncode}" for part in failed]
        details += [f"{part}: stopped after {seconds:.0f} s" for part in stopped]
        for part in failed + stopped:
            print("\n".join(self._log_of(part).read_text(errors="replace").splitlines()[-15:]), flush=True)
        self.add(name, not details, "; ".join(details) or "status 0", seconds)
        return not details

    def finish(self, processes: dict[str, subprocess.Popen[bytes]], deadline: float) -> list[str]:
        """Waits for processes, kills those still running at the deadline and names them; keeps the end of their logs,
        more of one that failed."""
        while any(process.poll() is None for process in processes.values()) and time.monotonic() < deadline:
            time.sleep(0.25)
            self.report()
        stopped = [part for part, process in processes.items() if process.poll() is None]
        for part in stopped:
            os.killpg(processes[part].pid, signal.SIGKILL)
        with self.log.open("a") as file:
            for part, process in processes.items():
                lines = self._log_of(part).read_text(errors="replace").splitlines()
                file.write("\n".join([f"===== {part}", *lines[-400 if process.wait() else -60 :]]) + "\n")
        return stopped

    def add(self, name: str, ok: bool | None, detail: str, seconds: float = 0.0) -> None:
        self.stages.append(Stage(name, ok, round(seconds, 1), detail))
        word = {True: "ok", False: "FAILED", None: "not run"}[ok]
        print(f"[gpu-check] {name}: {word}, {detail} ({seconds:.0f} s; {self.left:.0f} s left)", flush=True)
        self.report(force=True)

    def content(self) -> dict[str, Any]:
        parts: dict[str, list[dict[str, Any]]] = {"parity": [], "mission": [], "score": []}
        for line in self.rows.read_text().splitlines() if self.rows.exists() else ():
            row = json.loads(line)
            parts[row.pop("stage")].append(row)
        stages = [asdict(stage) for stage in self.stages]
        return {"machine": self.machine, "stages": stages, **parts, "tuning": self.tuning}

    def report(self, force: bool = False) -> None:
        """Rewrites both files if there are new rows."""
        size = self.rows.stat().st_size if self.rows.exists() else 0
        if not force and size == self._written:
            return
        try:
            content = self.content()
        except json.JSONDecodeError:
            return  # a line is only half written
        self._written = size
        texts = {"json": json.dumps(content, indent=1) + "\n", "md": gpu_tables.with_preferences(content)}
        for name, text in texts.items():
            path = self.out / f"{self.stem}.{name}"
            path.with_suffix(".part").write_text(text)
            path.with_suffix(".part").replace(path)

    def _log_of(self, name: str) -> Path:
        return WORK / f"{re.sub(r'[^a-z0-9]+', '-', name)}.log"


def module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def make_site() -> None:
    """Creates a folder to import from: links to the checkout's packages, and the extension once it is compiled."""
    shutil.rmtree(SITE, ignore_errors=True)
    package = SITE / "acqcore"
    package.mkdir(parents=True)
    for path in (ROOT / "acqcore").iterdir():
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    (package / "kernels").symlink_to(ROOT / "kernels")
    (SITE / "acqsynth").symlink_to(ROOT / "python" / "acqsynth")
    (SITE / "benchmarks").symlink_to(ROOT / "benchmarks")


def start_build(run: Run) -> subprocess.Popen[bytes]:
    """Starts compiling the extension for this interpreter, with CMake and Ninja, in the background."""
    jobs = max(2, (os.cpu_count() or 2) // 2)
    folder = WORK / "build"
    cuda = "OFF" if run.dry_run else "ON"
    script = (
        f"cmake -S '{ROOT}' -B '{folder}' -G Ninja -DCMAKE_BUILD_TYPE=Release -DACQCORE_CUDA={cuda} "
        f"-DPython_EXECUTABLE='{sys.executable}' -Dpybind11_DIR=\"$('{sys.executable}' -m pybind11 --cmakedir)\" && "
        f"cmake --build '{folder}' -j {jobs} && ln -sf '{folder}'/_core*.so '{SITE}/acqcore/'"
    )
    return run.start("build", ["bash", "-c", script])


def parity(run: Run, cap: float) -> None:
    """Checks Triton's kernels while the extension compiles, then the extension's."""
    deadline = time.monotonic() + cap
    building = start_build(run)
    common = ["--device", run.device, "--rows", str(run.rows)]

    def workers(what: str, backends: list[str], count: int) -> dict[str, subprocess.Popen[bytes]]:
        checks = module("benchmarks.gpu_parity", *common, "--backends", *backends, "--of", str(count))
        return {
            f"{what} {i}": run.start(f"{what} {i}", [*checks, "--worker", str(i)], OMP_NUM_THREADS="2")
            for i in range(count)
        }

    warming = None if run.dry_run else run.start("warm-up", module("benchmarks.gpu_mission", "--warm", *common))
    run.wait("parity of triton", workers("parity of triton", ["triton"], WORKERS), cap * 0.75)
    if run.wait("build", {"build": building}, BUILD_SECONDS):
        others = [name for name in backends(run) if name != "triton"]
        if others:
            processes = workers("parity of the extension", others, min(4, WORKERS))
            run.wait("parity of the extension", processes, max(20.0, deadline - time.monotonic()))
    if warming is not None and run.finish({"warm-up": warming}, deadline):
        run.add("warm-up", None, "ended before all was compiled")


def backends(run: Run) -> list[str]:
    """The backends of the device; a missing one is recorded as a failure, so that it cannot pass as tested."""
    code = (
        "import acqcore\n"
        "from benchmarks.gpu_parity import backends\n"
        "for row in acqcore.backends(): print('#', row.name, row.reason or 'available')\n"
        f"print(*backends('{run.device}'))\n"
    )
    run.wait("backends", {"backends": run.start("backends", [sys.executable, "-c", code])}, 60)
    lines = (WORK / "backends.log").read_text().splitlines()
    names = lines[-1].split() if lines and not lines[-1].startswith("#") else []
    expected = ["cpu", "triton"] if run.dry_run else ["cuda", "triton"]
    absent = [name for name in expected if name not in names]
    if absent:
        reasons = "; ".join(line[2:] for line in lines if line.startswith("#") and line.split()[1] in absent)
        run.add("backends present", False, reasons)
    return names


def mission(run: Run, cap: float) -> None:
    turns = "2" if run.dry_run else "7"
    command = module("benchmarks.gpu_mission", "--device", run.device, "--rows", str(run.rows), "--turns", turns)
    if run.groups:
        command += ["--groups", *run.groups]
    run.wait("mission", {"mission": run.start("mission", command)}, cap)


def sanitizer(run: Run, cap: float) -> None:
    command = module("benchmarks.gpu_small_case", "--device", run.device)
    checker = shutil.which("compute-sanitizer", path=PATH)
    if run.dry_run:
        run.wait("smallest shapes", {"smallest shapes": run.start("smallest shapes", command)}, cap)
        return
    if checker is None:
        run.add("sanitizer", None, "compute-sanitizer is not installed")
        return
    command = [checker, "--tool", "memcheck", "--error-exitcode", "9", *command, "--of", str(WORKERS), "--worker"]
    processes = {
        f"sanitizer {i}": run.start(
            f"sanitizer {i}", [*command, str(i)], PYTORCH_NO_CUDA_MEMORY_CACHING="1", OMP_NUM_THREADS="1"
        )
        for i in range(WORKERS)
    }
    run.wait("sanitizer", processes, cap)
    first = (WORK / "sanitizer-0.log").read_text(errors="replace")
    if run.stages[-1].ok is False and "Device not supported" in first:
        run.stages[-1].ok, run.stages[-1].detail = None, "compute-sanitizer does not support this machine"


def score(run: Run, cap: float) -> None:
    command = module("benchmarks.gpu_score", "--device", run.device, "--rows", str(run.rows))
    run.wait("score", {"score": run.start("score", command)}, cap)


def tune(run: Run, cap: float) -> None:
    if run.dry_run:
        run.add("tune", None, "an interpreter has no speed to measure")
        return
    seconds = max(0.0, min(cap, run.left) - 25)
    path = run.out / f"{run.stem}-tiles.json"
    command = module("acqcore.kernels.tune", "--shapes", "131072x4096", "--products", "half", "--candidates", "12")
    command += ["--seconds", str(round(seconds)), "--output", str(path)]
    run.wait("tune", {"tune": run.start("tune", command)}, cap)
    run.tuning = (WORK / "tune.log").read_text(errors="replace").splitlines()[-60:]
    run.report(force=True)


STAGES = {"parity": parity, "mission": mission, "sanitizer": sanitizer, "score": score, "tune": tune}


def caps(text: str) -> dict[str, float]:
    """``mission=200,score=30``."""
    found = dict(CAPS)
    for entry in filter(None, text.split(",")):
        name, _, seconds = entry.partition("=")
        if name not in CAPS:
            raise argparse.ArgumentTypeError(f"unknown stage {name!r}, expected one of {', '.join(CAPS)}")
        found[name] = float(seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=gpu_tables.RESULTS, help="folder for gpu-<name>.json and .md")
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated stages to run; default: all")
    parser.add_argument("--groups", default="", help="comma-separated groups of the mission; default: all")
    parser.add_argument("--caps", type=caps, default=dict(CAPS), metavar="STAGE=SECONDS,...", help=f"default: {CAPS}")
    parser.add_argument("--seconds", type=float, default=480.0, help="time limit of the whole run")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, Triton's kernels interpreted")
    arguments = parser.parse_args()
    chosen = arguments.stages.split(",")
    if unknown := sorted(set(chosen) - set(STAGES)):
        raise SystemExit(f"gpu-check: unknown stages {', '.join(unknown)}, expected {', '.join(STAGES)}")
    if not arguments.dry_run and (reason := missing()):
        raise SystemExit(f"gpu-check: {reason}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    run = Run(arguments.out, arguments.seconds, arguments.dry_run)
    run.groups = list(filter(None, arguments.groups.split(",")))
    make_site()
    if "parity" not in chosen:
        run.wait("build", {"build": start_build(run)}, BUILD_SECONDS)
    for name in chosen:
        if run.left < 10:
            run.add(name, None, "no time is left")
            continue
        try:
            STAGES[name](run, arguments.caps[name])
        except Exception as error:  # the next stage is still worth running
            run.add(name, False, f"{type(error).__name__}: {error}")
    run.report(force=True)
    print((arguments.out / f"{run.stem}.md").read_text())
    failed = [stage.name for stage in run.stages if stage.ok is False]
    print(f"[gpu-check] {time.monotonic() - run.started:.0f} s; failed: {', '.join(failed) or 'nothing'}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
