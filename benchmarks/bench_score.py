"""The cost of scoring real questions relative to the student's own forward pass.

``python -m benchmarks.bench_score`` scores the first rows of a GSM8K file (question as prompt, answer as completion)
with SmolLM2-135M-Instruct, and writes ``results/score.json`` and ``.png``. Ratios are to the trunk alone, run one
sample at a time: no padding, no head.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import acqcore
from acqsynth.models import smollm2_path
from benchmarks import gsm8k, harness
from benchmarks.bench_row_stats import eager
from benchmarks.gsm8k import TRUNK

TEN = (
    "loss", "perplexity", "entropy", "varentropy", "least_confidence", "margin", "gini", "el2n",
    "expected_gradient_length", "token_grad_norm",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=gsm8k.TEST)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    student = acqcore.Student.load(smollm2_path(), dtype=torch.float32)
    samples = gsm8k.load_samples(arguments.data, arguments.rows)
    rows = gsm8k.token_rows(student, samples)
    weight = student.head.weight

    def one_at_a_time() -> list[tuple[torch.Tensor, ...]]:
        with student.scoring():
            return [eager(student.hidden(ids[None])[0, prompt - 1 : -1], weight, ids[prompt:]) for ids, prompt in rows]

    peers: dict[str, Callable[[], object]] = {
        TRUNK: partial(gsm8k.run_trunk, student, rows),
        "acqcore.score, ten acquisitions": lambda: acqcore.score(student, samples, TEN, progress=False),
        "eager, the same statistics from full logits": one_at_a_time,
    }
    tokens = sum(len(ids) for ids, _ in rows)
    scored = sum(len(ids) - prompt for ids, prompt in rows)
    case = f"SmolLM2-135M float32, {len(rows)} GSM8K rows, {tokens} tokens, {scored} scored"
    measured = harness.measure(case, peers, baseline=TRUNK, turns=arguments.turns, memory=False)
    harness.report("score", measured, unit="", notes={"ratio_to": TRUNK, "tokens": tokens, "scored": scored})


if __name__ == "__main__":
    main()
