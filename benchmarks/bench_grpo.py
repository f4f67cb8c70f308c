"""Reward overhead per GRPO step: SmolLM2-135M-Instruct is both generator and student, as in ``make demo``.

``python -m benchmarks.bench_grpo`` trains a few steps with each reward and writes ``results/grpo.json``: the seconds of
each step and of its reward, as measured by the trainer. Every reward starts from the same weights, prompts and seed.
The reference of ``influence`` is 16 of the bundled rows; the first step includes computing its gradient.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

import acqcore
from acqsynth.models import smollm2_path
from acqsynth.rewards import AcquisitionReward
from acqsynth.seeds import load_seeds
from benchmarks import harness
from examples import demo

REFERENCE = 16
BLOCKS = 4  # of 30
#: Title -> acquisition and its arguments.
REWARDS: dict[str, tuple[str, dict[str, Any]]] = {
    "entropy": ("entropy", {}),
    "varentropy": ("varentropy", {}),
    "grad_norm, head": ("grad_norm", {}),
    "mutual_information, last hidden state": ("mutual_information", {"layers": 0, "draws": 8}),
    f"mutual_information, last {BLOCKS} blocks": ("mutual_information", {"layers": BLOCKS, "draws": 8}),
    "mutual_information, all blocks, 8 draws": ("mutual_information", {"layers": "all", "draws": 8}),
    "mutual_information, linear, 2 probes": ("mutual_information", {"form": "linear", "probes": 2}),
    "mutual_information, linear, 4 probes": ("mutual_information", {"form": "linear", "probes": 4}),
    "mutual_information, completions, 2 probes": ("mutual_information", {"probes": 2, "positions": "completion"}),
    "mutual_information, completions, 4 probes": ("mutual_information", {"probes": 4, "positions": "completion"}),
    f"influence, last {BLOCKS} blocks": ("influence", {"parameters": BLOCKS}),
}


def steps_of(acquisition: str, arguments: dict[str, Any]) -> list[dict[str, float]]:
    """Seconds of each step and of its reward."""
    path = smollm2_path()
    student = acqcore.Student.load(path, dtype=torch.float32)
    if acquisition == "influence":
        rows = [{key: seed[key] for key in ("prompt", "completion")} for seed in load_seeds(kind="ordinary")]
        arguments = {"reference": rows[:REFERENCE], **arguments}
    steps: list[dict[str, float]] = demo.teach(str(path), AcquisitionReward(student, acquisition, arguments=arguments))[
        "steps"
    ]
    return steps


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: for each reward the median seconds of a step and of the reward, and the reward's share of the step."""
    rows = []
    for name, steps in results.items():
        shares = [step["reward_share"] for step in steps]
        seconds, own = (statistics.median(step[key] for step in steps) for key in ("seconds", "reward_seconds"))
        rows.append([name, f"{seconds:.1f}", f"{own:.2f}", f"{statistics.median(shares):.1%}", f"{max(shares):.1%}"])
    return "\n".join(harness.markdown(["reward", "s per step", "s of the reward", "share, median", "maximum"], *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=list(REWARDS))
    arguments = parser.parse_args()
    demo.quiet()
    results = {}
    for name in arguments.rewards:
        print(name, flush=True)
        results[name] = steps_of(*REWARDS[name])
    settings = {
        "steps": demo.STEPS,
        "completions": demo.PROMPTS_PER_STEP * demo.GROUP,
        "tokens": demo.COMPLETION_TOKENS,
    }
    content = {"machine": harness.machine(), "settings": settings, "rewards": results}
    harness.write(harness.RESULTS / "grpo.json", content)
    print(table(results))


if __name__ == "__main__":
    main()
