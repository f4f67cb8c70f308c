"""The predictions of ``acqcore plan`` against the measured time and memory of scoring.

``python -m benchmarks.bench_plan`` plans and scores in turns, each in its own process: SmolLM2-135M on rows of one
length, the same with gradients of all parameters, the same on rows of GSM8K (question as prompt, answer as completion;
the plan knows only their mean lengths, so its batches are larger than those of packing), and a Qwen2 with random
weights and another shape, vocabulary and dtype. The plan sees nothing of a model but its configuration. The results go
to ``results/plan.json``. Time is that of the call to ``acqcore.score`` after loading, memory the peak resident size of
the process during the call; "beyond libraries" excludes the memory of the interpreter and its libraries, as measured by
the plan.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

import acqcore
from acqsynth.models import smollm2_path
from benchmarks import harness, real_rows

QWEN = {
    "vocab_size": 151936, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A case to plan and score: rows of GSM8K if ``real``, else random tokens in rows of equal length."""

    name: str
    student: str
    dtype: str
    rows: int
    tokens: int
    scored: int
    acquisitions: str
    arguments: dict[str, Any]
    real: bool = False


def planned(case: Case) -> dict[str, Any]:
    """The plan, from the configuration alone."""
    flags = {
        "config": f"{case.student}/config.json",
        "rows": case.rows,
        "tokens": case.tokens,
        "scored": case.scored,
        "dtype": case.dtype,
        "acquisitions": case.acquisitions,
        "acquisition-args": json.dumps(case.arguments),
    }
    options = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return _json_of([sys.executable, "-m", "acqcore", "plan", *options, "--json"])


def scored(case: Case) -> dict[str, Any]:
    """Seconds and peak MiB of scoring, in a separate process."""
    return _json_of([sys.executable, "-m", "benchmarks.bench_plan", "--child", json.dumps(asdict(case))])


def _json_of(command: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def child(case: Case) -> None:
    """Scores and prints the time and memory taken."""
    samples: Any
    dtype = getattr(torch, case.dtype)
    if case.real:
        student = acqcore.Student.load(case.student, dtype=dtype)
        samples = real_rows.gsm8k(case.rows)
    else:
        from transformers import AutoModelForCausalLM

        student = acqcore.Student.from_model(AutoModelForCausalLM.from_pretrained(case.student, dtype=dtype).eval())
        vocabulary = student.head.weight.shape[0]
        ids = torch.randint(vocabulary, (case.rows, case.tokens), generator=torch.Generator().manual_seed(1))
        labels = ids.clone()
        labels[:, : case.tokens - case.scored] = -100
        samples = {"input_ids": ids, "labels": labels}
    start = time.perf_counter()
    names = case.acquisitions.split(",")
    peak = harness.process_peak_mib(
        lambda: acqcore.score(student, samples, names, acquisition_args=case.arguments, progress=False)
    )
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_mib": peak}))


def cases(rows: int, folder: str) -> list[Case]:
    """Cases of at most ``rows`` rows; the random model is written to ``folder``."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**QWEN)).to(torch.bfloat16).save_pretrained(folder)
    smol = str(smollm2_path())
    lengths = real_rows.token_rows(acqcore.Student.load(smol), real_rows.gsm8k(rows))
    tokens = round(statistics.mean(len(ids) for ids, _ in lengths))
    completion = round(statistics.mean(len(ids) - prompt for ids, prompt in lengths))
    three = "entropy,margin,grad_norm"
    deep = {"grad_norm": {"parameters": "all"}}
    return [
        Case("SmolLM2-135M", smol, "float32", rows, 256, 255, three, {}),
        Case("Qwen2 of 16 blocks", folder, "bfloat16", rows // 2, 384, 383, three, {}),
        Case("SmolLM2-135M, gradients of all", smol, "float32", rows // 6, 256, 255, "grad_norm", deep),
        Case("SmolLM2-135M, uneven rows", smol, "float32", rows, tokens, completion, three, {}, real=True),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(Case(**json.loads(arguments.child)))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(arguments.rows, folder):
            turns = []
            for _ in range(arguments.turns):
                turns.append(compared(planned(case), scored(case)))
                print(case.name, {key: round(value, 2) for key, value in turns[-1].items()}, flush=True)
            medians = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
            described = {key: value for key, value in asdict(case).items() if key not in ("student", "real")}
            results.append({**described, **medians})
    content = {"machine": harness.machine(), "turns": arguments.turns, "qwen2": QWEN, "cases": results}
    harness.write(harness.RESULTS / "plan.json", content)
    print(table(results))


def compared(plan: dict[str, Any], real: dict[str, Any]) -> dict[str, float]:
    """Planned and measured values of a turn, and their ratios."""
    libraries = next(f["value"] for f in plan["memory"] if f["name"] == "interpreter and libraries") / 2**20
    peak = plan["peak_bytes"] / 2**20
    return {
        "planned_seconds": plan["scoring_seconds"],
        "measured_seconds": real["seconds"],
        "seconds_ratio": plan["scoring_seconds"] / real["seconds"],
        "planned_peak_mib": peak,
        "measured_peak_mib": real["peak_mib"],
        "peak_ratio": peak / real["peak_mib"],
        "peak_ratio_beyond_libraries": (peak - libraries) / (real["peak_mib"] - libraries),
    }


def table(results: list[dict[str, Any]]) -> str:
    """The medians as Markdown."""
    rows = []
    for row in results:
        title = f"{row['name']}, {row['dtype']}, {row['rows']} x {row['tokens']} tokens, {row['acquisitions']}"
        seconds = [f"{row[key]:.1f}" for key in ("planned_seconds", "measured_seconds")]
        mib = [f"{row[key]:.0f}" for key in ("planned_peak_mib", "measured_peak_mib")]
        ratios = [f"{row[key]:.2f}" for key in ("seconds_ratio", "peak_ratio", "peak_ratio_beyond_libraries")]
        rows.append([title, *seconds, ratios[0], *mib, *ratios[1:]])
    headings = ["", "s, planned", "s, measured", "ratio", "MiB, planned", "MiB, measured", "ratio", "beyond libraries"]
    return "\n".join(harness.markdown(headings, *rows))


if __name__ == "__main__":
    main()
