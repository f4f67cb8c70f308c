"""Mass scoring: 100,000 short rows with each engine of ``acqcore score``, including a Ray actor killed half-way.

``python -m benchmarks.bench_mass`` creates a two-block student and the rows, and scores them from the command line with
one process, with two processes of ``accelerate launch``, with two Ray actors, and with two Ray actors of which one gets
SIGKILL when half of the blocks are finished. Every run must give every row once, with the values of the first run. Next
to the rates it reports the peak resident memory, by quarter of the blocks finished, of the started process and of the
scoring processes (Linux). Writes ``results/mass.json`` and ``.png``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from acqcore.files.parts import Parts
from benchmarks import harness

SENTENCES = ["the fox says no", "two and two is four", "a lazy dog sleeps", "what is it that 17 foxes want?"]
LAUNCH = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
LAUNCH += " --dynamo_backend no --main_process_port 0 -m acqcore"
KILLED = "ray, 2 actors, one killed half-way"
#: name -> module to run and its command-line options
RUNS = {
    "local, 1 process": (["acqcore"], []),
    "accelerate, 2 processes": (LAUNCH.split(), ["--engine", "accelerate", "--device", "cpu"]),
    "ray, 2 actors": (["acqcore"], ["--engine", "ray", "--workers", "2"]),
    KILLED: (["acqcore"], ["--engine", "ray", "--workers", "2"]),
}


def make_student(folder: Path) -> None:
    """Saves a random two-block Llama and a tokenizer of 512 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
    )
    PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def make_rows(path: Path, n: int) -> None:
    import pyarrow.parquet

    texts = [f"{SENTENCES[i % 4]} {i} " + "no " * (i % 7) for i in range(n)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)


class Watch:
    """Peaks of resident memory in MiB, ``[4]`` by quarter of the blocks finished: of the started process, and of the
    largest process that has finished a block."""

    def __init__(self, pid: int, parts: Parts, n_blocks: int) -> None:
        self.pid, self.parts, self.n_blocks = pid, parts, n_blocks
        self.started, self.scoring = [0.0] * 4, [0.0] * 4
        self.workers: list[int] = []
        self._seen: set[int] = set()

    def look(self) -> float:
        """The share of blocks finished."""
        for block in range(self.n_blocks):
            if block not in self._seen:
                # None: the part was joined and removed since finished() was called, so the run is over.
                report = self.parts.report(block) if self.parts.finished(block) else None
                if report is not None:
                    self._seen.add(block)
                    worker = int(report["worker"].rpartition(":")[2])
                    self.workers += [worker] if worker not in self.workers else []
        share = len(self._seen) / self.n_blocks
        quarter = min(int(share * 4), 3)
        self.started[quarter] = max(self.started[quarter], resident_mib(self.pid))
        self.scoring[quarter] = max([self.scoring[quarter], *map(resident_mib, self.workers)])
        return share


def resident_mib(pid: int) -> float:
    """Resident memory of a process; 0 if it has ended."""
    try:
        return harness.memory_mib("VmRSS", pid)
    except (OSError, IndexError):  # no such process, or one without memory
        return 0.0


def run(name: str, options: list[str], out: Path, n_blocks: int) -> tuple[dict[str, float], Watch]:
    """Seconds, rows/s and tokens/s as printed by the command, and its memory peaks; raises if it fails."""
    module, extra = RUNS[name]
    command = [sys.executable, "-m", *module, "score", *options, "--out", str(out), *extra]
    environment = {**os.environ, "RAY_worker_niceness": "0"}  # the default of 15 yields to all other work
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    watch = Watch(process.pid, Parts(out), n_blocks)
    to_kill = name == KILLED
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):  # the parts are removed at the end
            if watch.look() >= 0.5 and to_kill:
                os.kill(watch.workers[0], signal.SIGKILL)
                to_kill = False
        time.sleep(0.1)
    printed, errors = process.communicate()
    if process.returncode or to_kill:
        raise RuntimeError(f"{name}: status {process.returncode}, actor killed: {not to_kill}\n{printed}{errors}")
    found = re.search(r"tokens in ([\d.]+) s by (\d+) process.* ([\d]+) rows/s, (\d+) tokens/s.*in ([\d.]+) s", printed)
    if found is None:
        raise RuntimeError(f"{name}: no throughput in\n{printed}")
    names = ("seconds", "processes", "rows_per_s", "tokens_per_s", "start_s")
    return dict(zip(names, map(float, found.groups()), strict=True)), watch


def check(out: Path, reference: Path, rows: int) -> float:
    """Checks that every row occurs once and is valid; the largest relative difference from ``reference``."""
    import pyarrow.parquet

    table, other = pyarrow.parquet.read_table(out), pyarrow.parquet.read_table(reference)
    if table["row"].to_pylist() != list(range(rows)) or not all(table["valid"].to_pylist()):
        raise RuntimeError(f"{out.name}: rows are missing, repeated or invalid")
    if table["text"] != other["text"]:
        raise RuntimeError(f"{out.name}: texts differ from the first run")
    a, b = table["entropy"].to_numpy(), other["entropy"].to_numpy()
    return float(np.abs(a / b - 1).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--block-rows", type=int, default=2000)
    arguments = parser.parse_args()
    n_blocks = -(-arguments.rows // arguments.block_rows)
    rows, memory, details = [], {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_student(folder / "student")
        make_rows(folder / "rows.parquet", arguments.rows)
        options = ["--student", str(folder / "student"), "--data", str(folder / "rows.parquet")]
        options += ["--acquisitions", "entropy,margin,loss", "--block-rows", str(arguments.block_rows)]
        outs = [folder / f"{i}.parquet" for i in range(len(RUNS))]
        for name, out in zip(RUNS, outs, strict=True):
            figures, watch = run(name, options, out, n_blocks)
            figures["largest_relative_difference"] = check(out, outs[0], arguments.rows)
            details[name] = figures
            memory[name] = {"started": watch.started, "scoring": watch.scoring, "processes_seen": len(watch.workers)}
            ratio = figures["seconds"] / details["local, 1 process"]["seconds"]
            case = f"{arguments.rows} rows, blocks of {arguments.block_rows}"
            rows.append(harness.Row(case, name, figures["seconds"], ratio, figures["rows_per_s"], None))
            print(f"{name}: every row once; {figures}; peak MiB by quarter: {memory[name]}", flush=True)
    notes = {"details": details, "peak_mib_by_quarter": memory}
    harness.report("mass", rows, unit="rows/s", notes=notes)


if __name__ == "__main__":
    main()
