"""Every engine writes every row exactly once, even if a scoring process is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from acqcore.cli import main
from acqcore.files.executors import _connected
from acqcore.files.parts import Parts

ROWS, BLOCKS = 1250, 50
LAUNCH = ["accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCH += ["--dynamo_backend", "no", "--main_process_port", "0", "--multi_gpu", "-m", "acqcore"]


def texts(n: int) -> list[dict[str, str]]:
    return [{"text": f"the fox {i} " + "no " * (i % 5)} for i in range(n)]


def kill_a_worker(parts: Parts, ended: Callable[[], bool]) -> None:
    """Kills the process that finished the first block, once five blocks are finished."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert not ended(), "the run ended before a worker could be killed"
        reports = [report for block in range(BLOCKS) if (report := parts.report(block))]
        if len(reports) >= 5:
            assert len(reports) < BLOCKS - 5
            worker = int(reports[0]["worker"].rpartition(":")[2])
            assert worker != os.getpid()
            os.kill(worker, signal.SIGKILL)
            return
        time.sleep(0.02)
    raise AssertionError("the workers finished no blocks")


@pytest.fixture
def arguments(command, tmp_path):
    """``arguments(name, **options)``: a command that scores ``ROWS`` rows into ``name`` in small blocks and batches."""

    def build(name, **options):
        settings = {"block_rows": ROWS // BLOCKS, "batch_tokens": 256, "acquisitions": "entropy,loss"}
        return command(texts(ROWS), out=tmp_path / name, **settings, **options)

    return build


@pytest.fixture(scope="module", autouse=True)
def not_behind_other_work():
    """Ray's default is to run workers at niceness 15."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The cluster of a run that is given none, for all runs of this module, because a start takes seconds."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    with _connected(None, tmp_path_factory.mktemp("cluster")):
        yield
    assert not ray.is_initialized()


@pytest.mark.skipif(os.cpu_count() == 1, reason="two actors at once need two cores")
@pytest.mark.usefixtures("cluster")
def test_every_row_is_there_once_when_an_actor_of_ray_is_killed(arguments, tmp_path, read, capsys):
    words = arguments("ray.jsonl", engine="ray", workers=2)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(main, words)
        kill_a_worker(Parts(tmp_path / "ray.jsonl"), run.done)
    captured = capsys.readouterr()
    assert run.result() == 0, captured.err
    assert f"{ROWS} of {ROWS} rows scored" in captured.out
    assert not (tmp_path / "ray.jsonl.parts").exists()
    assert main(arguments("local.jsonl")) == 0
    scored = read(tmp_path / "ray.jsonl")
    assert [row["row"] for row in scored] == list(range(ROWS))
    assert all(row["valid"] for row in scored)
    for row, local in zip(scored, read(tmp_path / "local.jsonl"), strict=True):
        values = {name: pytest.approx(local[name], rel=1e-4) for name in ("entropy", "loss")}
        assert row == local | values


@pytest.mark.usefixtures("cluster")
def test_blocks_that_fail_in_an_actor_are_reported(command, tmp_path, capsys):
    out = tmp_path / "out.parquet"
    arguments = command(texts(12), out=out, block_rows=5, engine="ray", workers=1)
    in_the_way = tmp_path / "out.parquet.parts" / "block-000001.batches"
    in_the_way.mkdir(parents=True)
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert "7 of 12 rows scored" in captured.out
    assert "rows 5 to 9 of the output failed 3 times: IsADirectoryError" in captured.err
    in_the_way.rmdir()
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "12 of 12 rows scored" in captured.out
    assert "\n5 rows, " in captured.out


@pytest.mark.usefixtures("cluster")
def test_a_student_that_does_not_load_in_an_actor_is_one_sentence(command, tmp_path, capsys):
    assert main(command(texts(3), engine="ray", workers=1, max_length=65)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "acqcore: error: --max-length: the student takes at most 64 tokens, got 65" in lines
    assert not list(tmp_path.glob("out*"))


def test_no_cluster_at_the_address(command, capsys):
    pytest.importorskip("ray.data")
    assert main(command(texts(3), engine="ray", ray_address="127.0.0.1:1")) == 2
    assert capsys.readouterr().err.startswith("acqcore: error: ray-address: nothing answers at 127.0.0.1:1 (")


def test_processes_of_accelerate_launch_go_on_after_one_is_killed(arguments, tmp_path, read):
    pytest.importorskip("accelerate")
    run = [sys.executable, "-m", *LAUNCH, *arguments("out.jsonl", engine="accelerate", device="cpu")]
    process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    parts = Parts(tmp_path / "out.jsonl")
    kill_a_worker(parts, lambda: process.poll() is not None)
    process.communicate(timeout=300)
    assert process.returncode != 0
    assert not (tmp_path / "out.jsonl").exists()
    finished = [block for block in range(BLOCKS) if parts.finished(block)]
    assert finished
    again = subprocess.run(run, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    assert f"{ROWS} of {ROWS} rows scored" in again.stdout
    assert "by 2 processes" in again.stdout
    [new] = [int(line.split()[0]) for line in again.stdout.splitlines() if " rows, " in line]
    assert 0 < new <= ROWS - ROWS // BLOCKS * len(finished)
    scored = read(tmp_path / "out.jsonl")
    assert [row["row"] for row in scored] == list(range(ROWS))
    assert all(row["valid"] for row in scored)
