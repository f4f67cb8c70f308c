"""Draw ``docs/_static/rewards.png``: accuracy of a student after the rows of each reward, of ``bench_loop``'s results.

    python docs/rewards_figure.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from matplotlib.figure import Figure
from scipy.stats import t as student_t

ROOT = Path(__file__).parent.parent
NAMES = {
    "random_real": "real rows at random",
    "no_rl": "generator without reward",
    "rl: default": "composed reward",
    "rl: mutual_information": "mutual information (draws)",
    "rl: entropy": "entropy",
    "rl: confidence": "lack of confidence",
    "rl: grad_norm": "gradient norm of the head",
}
GOOD, BAD, QUIET = "#1f5fa8", "#b3382c", "#5d6b7a"


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half of the 95 % interval of Student's t, in points of 100."""
    half = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return 100 * statistics.fmean(values), 100 * float(half)


def main() -> None:
    seeds = json.loads((ROOT / "benchmarks" / "results" / "loop.json").read_text(encoding="utf-8"))["seeds"]
    base, _ = interval([statistics.fmean(seed["base"].values()) for seed in seeds])
    figure = Figure(figsize=(7.6, 2.9), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for y, (arm, name) in enumerate(reversed(NAMES.items())):
        mean, half = interval([statistics.fmean(seed["arms"][arm]["skills"].values()) for seed in seeds])
        colour = BAD if mean + half < base else GOOD if arm.startswith("rl") else QUIET
        axes.errorbar(mean, y, xerr=half, fmt="o", color=colour, capsize=3, markersize=6, linewidth=1.8)
        axes.annotate(f"{mean:.1f}", (mean, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8, color=colour)
    axes.axvline(base, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate("before", (base, -0.75), xytext=(4, 0), textcoords="offset points", fontsize=8, color=QUIET)
    axes.set_yticks(range(len(NAMES)), list(NAMES.values())[::-1], fontsize=9)
    axes.set_ylim(-0.9, len(NAMES) - 0.4)
    axes.set_xlabel("right answers after fine-tuning on 900 rows, %", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#edf0f3")
    axes.set_axisbelow(True)
    figure.savefig(ROOT / "docs" / "_static" / "rewards.png", dpi=160)


if __name__ == "__main__":
    main()
