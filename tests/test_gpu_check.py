"""``make gpu-check`` apart from its measurements, without a GPU."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

import pytest
import torch

import acqcore
from benchmarks import gpu_check, gpu_parity, gpu_student, gpu_tables


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A dry run that keeps its files in the test's own folder."""
    monkeypatch.setattr(gpu_check, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu_check, "SITE", tmp_path / "work" / "site")
    (tmp_path / "work").mkdir()
    (tmp_path / "out").mkdir()
    return gpu_check.Run(tmp_path / "out", seconds=60, dry_run=True)


def _content(run: gpu_check.Run) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run.out / "gpu-dry-run.json").read_text())
    return content


def test_rows_of_a_stage_that_is_stopped_are_kept(run):
    row = json.dumps({"stage": "mission", "case": "a", "peer": "b", "not_measured": "c"}) + "\n"
    script = f"import time; open({str(run.rows)!r}, 'a').write({row!r}); print('begun', flush=True); time.sleep(60)"
    began = time.monotonic()
    assert not run.wait("mission", {"mission": run.start("mission", [sys.executable, "-c", script])}, limit=3)
    assert time.monotonic() - began < 20
    assert _content(run)["mission"] == [{"case": "a", "peer": "b", "not_measured": "c"}]
    assert _content(run)["stages"][0]["detail"].startswith("mission: stopped after 3 s")
    assert "begun" in (run.out / "gpu-log.txt").read_text()
    assert "- b: c" in (run.out / "gpu-dry-run.md").read_text()


def test_a_process_that_fails_is_named(run):
    good = run.start("good", [sys.executable, "-c", ""])
    bad = run.start("bad", [sys.executable, "-c", "raise SystemExit(4)"])
    assert not run.wait("two", {"good": good, "bad": bad}, limit=30)
    assert run.stages[-1] == gpu_check.Stage("two", False, run.stages[-1].seconds, "bad: status 4")


def test_peers_of_the_caller_are_found(run, tmp_path, monkeypatch):
    """The caller's PYTHONPATH entries are kept, after the package under test."""
    (tmp_path / "carried").mkdir()
    (tmp_path / "carried" / "peer_of_the_caller.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "carried"))
    script = "import sys, peer_of_the_caller; print(sys.path)"
    assert run.wait("path", {"path": run.start("path", [sys.executable, "-c", script])}, limit=30)
    path = (gpu_check.WORK / "path.log").read_text()
    assert path.index(str(gpu_check.SITE)) < path.index("carried")


def test_the_site_has_every_package(run):
    gpu_check.make_site()
    for part in ("acqcore/__init__.py", "acqcore/kernels/configs/sm_90.json", "acqsynth", "benchmarks/gpu_check.py"):
        assert (gpu_check.SITE / part).exists()


@pytest.mark.parametrize("title", list(gpu_student.titles()))
def test_a_student_agrees_with_eager(title):
    """Runs the GPU's check on the CPU's kernels."""
    assert gpu_student.error(title, "cpu", torch.float32, "cpu") <= 1


def test_a_student_that_does_not_agree_is_noticed(monkeypatch):
    expected = gpu_student.score("entropy", "eager", "cpu")
    found = {"eager": expected, "cpu": expected * 1.002, "nan": expected.where(expected != expected[0], torch.nan)}
    monkeypatch.setattr(gpu_student, "score", lambda title, backend, device: found[backend])
    assert gpu_student.error("entropy", "cpu", torch.float32, "cpu") > 1
    with pytest.raises(AssertionError, match="other samples have a value"):
        gpu_student.error("entropy", "nan", torch.float32, "cpu")


def test_caps():
    assert gpu_check.caps("mission=20,score=3") == {**gpu_check.CAPS, "mission": 20.0, "score": 3.0}
    assert sum(gpu_check.CAPS.values()) <= 490
    with pytest.raises(argparse.ArgumentTypeError, match="unknown stage 'x'"):
        gpu_check.caps("x=1")


def test_monitor(tmp_path, monkeypatch):
    """``seen`` summarizes the samples since the last call; an invalid line is reported only if there are no samples."""
    from benchmarks import gpu_mission  # loads torch's compiler

    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho '1980, 2619, 310.5, 51, 0x0000000000000000'\nsleep 1\n"
                    "echo '1755, 2619, 699.1, 60, 0x0000000000000004'\necho '1700, 2619, 70'\nsleep 60\n")  # fmt: skip
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monitor = gpu_mission.Monitor()
    try:
        first = _wait_for(monitor)
        second = _wait_for(monitor)
    finally:
        monitor.close()
    assert first == {"sm_mhz": 1980, "sm_mhz_min": 1980, "power_w_max": 310.5, "temperature_c": 51, "throttle": []}
    assert (second["sm_mhz"], second["throttle"]) == (1755, ["power cap"])


def _wait_for(monitor: Any) -> dict[str, Any]:
    for _ in range(100):
        time.sleep(0.1)
        seen = monitor.seen()
        if "sm_mhz" in seen:
            return seen
    raise AssertionError(seen)


def test_every_operation_is_checked_in_every_dtype():
    found = {(check.op, dtype) for check in gpu_parity.checks("cuda") for dtype in check.dtypes}
    for op in ("row_stats", "logit_stats", "head_grad_norm", "hidden_grad", "grad_sketch", "mutual_information"):
        assert {(op, dtype) for dtype in gpu_parity.ALL} <= found
    for op in gpu_parity.OPERATIONS:
        for kind in ("repeats", "batch invariance"):
            assert any(check.op == kind and check.case == op for check in gpu_parity.checks("cuda"))


def test_a_wrong_backend_is_found(tmp_path, monkeypatch):
    """A norm that is 1 % off is reported in its row, and the exit status is not zero."""
    right = acqcore.head_grad_norm

    def wrong(*arguments, backend, **options):
        return right(*arguments, backend=backend, **options) * (1.0 if backend == "eager" else 1.01)

    monkeypatch.setattr(acqcore, "head_grad_norm", wrong)
    two = [_check("head_grad_norm"), _check("row_stats")]
    monkeypatch.setattr(gpu_parity, "checks", lambda device: two)
    monkeypatch.setattr(sys, "argv", ["x", "--device", "cpu", "--backends", "cpu", "--rows", str(tmp_path / "r.jsonl")])
    with pytest.raises(SystemExit) as status:
        gpu_parity.main()
    assert status.value.code == 1
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(row["op"], row["ok"]) for row in rows] == [("head_grad_norm", False), ("row_stats", True)]
    assert rows[0]["worst"] == pytest.approx(100, rel=0.05)
    assert rows[0]["message"].startswith("error ")


def _check(op: str) -> gpu_parity.Check:
    found = next(check for check in gpu_parity.checks("cpu") if check.op == op)
    return gpu_parity.Check(found.op, found.case, (torch.float32,), found.run)


def test_preferences_are_by_geometric_mean():
    rows = [
        {"case": f"statistics, N={n} D=64 V={v} bfloat16", "peer": f"row_stats, {name}", "ms": ms}
        for n, v, name, ms in [
            (512, 40000, "cuda", 4.0), (512, 40000, "triton", 3.0), (1024, 40000, "cuda", 4.0),
            (1024, 40000, "triton", 6.0), (512, 40000, "automatic", 1.0), (16, 100, "triton", 1.0),
        ]
    ]  # fmt: skip
    found = gpu_tables.preferences({"machine": {"capability": "9.0"}, "mission": rows})
    shape = {"capability": "9.0", "op": "row_stats", "dtype": "bfloat16", "rows": "many", "vocab": "large"}
    assert found == [{**shape, "order": ["cuda", "triton"]}]
