"""The cost of scoring real questions relative to the student's own forward pass.

``python -m benchmarks.bench_score`` scores the first rows of a GSM8K file (question as prompt, answer as completion)
with SmolLM2-135M-Instruct, and writes ``results/score.json`` and ``.png``. Ratios are to the trunk alone, run one
sample at a time: no padding, no head.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch

import acqcore
from acqsynth.models import smollm2_path
from benchmarks import harness, real_rows
from benchmarks.bench_row_stats import eager
from benchmarks.real_rows import TRUNK

TEN = (
    "loss", "perplexity", "entropy", "varentropy", "least_confidence", "margin", "gini", "el2n",
    "expected_gradient_length", "token_grad_norm",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    student = acqcore.Student.load(smollm2_path(), dtype=torch.float32)
    samples = real_rows.gsm8k(arguments.rows)
    rows = real_rows.token_rows(student, samples)
    weight = student.head.weight

    def one_at_a_time() -> list[tuple[torch.Tensor, ...]]:
        with student.scoring():
            return [eager(student.hidden(ids[None])[0, prompt - 1 : -1], weight, ids[prompt:]) for ids, prompt in rows]

    peers: dict[str, Callable[[], object]] = {
        TRUNK: partial(real_rows.run_trunk, student, rows),
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
