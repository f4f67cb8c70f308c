"""Tables, JSON and plot of ``bench_write``, made from its log alone."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.paired import Difference, difference, holm, plural
from benchmarks.pool_report import DOCS, interval, verdict, write_section

PAGE, PICTURE = DOCS / "evidence-write.md", DOCS / "evidence-write.png"
BEGIN, END = "<!-- results: written by bench_write -->", "<!-- end of results -->"
AS_IT_IS, PRIMARY, ORIENTATION = "as it is", "best of 8: default", ("warm", "real rows")
TAUGHT = ("GRPO: default", "GRPO: entropy")


class Results:
    """The report's rows by arm. Comparisons use the seeds that both arms have."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        report = [row for row in rows if row["stage"] == "report"]
        self.failed = {(row["arm"], row["seed"]): row["failed"] for row in report if "failed" in row}
        self.found: dict[str, dict[int, dict[str, Any]]] = {}
        for row in report:
            if "accuracy" in row:
                self.found.setdefault(row["arm"], {})[row["seed"]] = row

    @property
    def arms(self) -> list[str]:
        return [arm for arm in self.found if arm not in ORIENTATION]

    def mean(self, arm: str, column: str = "accuracy") -> float:
        """Mean of a column over seeds, in percentage points."""
        return 100 * statistics.fmean(row[column] for row in self.found[arm].values())

    def minus(self, arm: str, other: str) -> Difference:
        seeds = sorted(self.found[arm].keys() & self.found[other].keys())
        return difference(*([100 * self.found[name][seed]["accuracy"] for seed in seeds] for name in (arm, other)))

    def comparisons(self) -> dict[tuple[str, str], tuple[Difference, float]]:
        """The secondary family: (arm, other) -> difference and its Holm-adjusted p value."""
        pairs = [(arm, AS_IT_IS) for arm in self.arms if arm not in (AS_IT_IS, PRIMARY)]
        pairs += [TAUGHT] if all(arm in self.found for arm in TAUGHT) else []
        found = {pair: self.minus(*pair) for pair in pairs if self.meet(*pair)}
        adjusted = holm({" minus ".join(pair): one.p for pair, one in found.items()})
        return {pair: (one, adjusted[" minus ".join(pair)]) for pair, one in found.items()}

    def meet(self, arm: str, other: str) -> bool:
        """Whether two arms have a seed in common."""
        return bool(self.found[arm].keys() & self.found[other].keys())


def write(rows: Sequence[dict[str, Any]], choices: Path, out: Path, *, small: bool = False) -> None:
    """Prints the tables and writes them next to the log and, unless ``small``, to ``results/`` and ``docs/``."""
    results = Results(rows)
    if PRIMARY not in results.found or AS_IT_IS not in results.found:
        print(f"units done: {len(rows)}; no seed of the report is complete yet")
        return
    made = json.loads(choices.read_text()) if choices.exists() else {}
    text = tables(results, made)
    print(text)
    content = {
        "machines": [row["machine"] for row in rows if row["stage"] == "machine"],
        "choices": made,
        "primary": asdict(results.minus(PRIMARY, AS_IT_IS)),
        "secondary": {
            " minus ".join(pair): {**asdict(one), "p_holm": p} for pair, (one, p) in results.comparisons().items()
        },
        "units": list(rows),
    }
    for path in [out / "write.json"] if small else [out / "write.json", harness.RESULTS / "write.json"]:
        harness.write(path, content)
    picture(results, out / PICTURE.name)
    if not small:
        picture(results, PICTURE)
        write_section(PAGE, BEGIN, END, text)


def tables(results: Results, choices: dict[str, Any]) -> str:
    primary = results.minus(PRIMARY, AS_IT_IS)
    lines = [
        f"- **Primary: {PRIMARY} minus {AS_IT_IS}: {interval(primary)} points** over "
        f"{plural(primary.n, 'paired seed')} ({verdict(primary, primary.p)}; "
        f"paired standard deviation {primary.deviation:.1f}, a difference of "
        f"{primary.detectable:.1f} would be found in 80 % of such runs)."
    ]
    lines += [f"- {name}: {results.mean(name):.1f} %." for name in ORIENTATION if name in results.found]
    compared = results.comparisons()
    if TAUGHT in compared:
        one, p = compared[TAUGHT]
        lines.append(f"- {' minus '.join(TAUGHT)}: {interval(one)} points ({verdict(one, p)}, Holm).")
    if choices:
        one = choices["choices"]
        lines.append(
            f"- Chosen on CLINC150: temperature {one['temperature']:g}, rate {one['rate']:g}, {one['epochs']:g} epochs,"
            f" start {one['start']}, GRPO rate {one['grpo_rate']:g}."
        )
    lines += [
        "",
        f"| arm | seeds | accuracy, % | minus {AS_IT_IS} | p | verdict | label agrees, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in sorted(results.arms, key=lambda arm: -results.mean(arm)):
        cells = [arm, str(len(results.found[arm])), f"{results.mean(arm):.1f}"]
        if arm == PRIMARY:
            cells += [interval(primary), f"{primary.p:.3g} (own)", verdict(primary, primary.p)]
        elif (arm, AS_IT_IS) not in compared:  # itself, or without a seed in common
            cells += ["", "", ""]
        else:
            one, p = compared[arm, AS_IT_IS]
            cells += [interval(one), f"{p:.3g}", verdict(one, p)]
        cells.append(f"{results.mean(arm, 'agreed'):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"\n{arm}, seed {seed}, failed: {error}" for (arm, seed), error in results.failed.items()]
    return "\n".join(lines)


def picture(results: Results, path: Path) -> None:
    """Plots accuracy relative to the unchanged generator with 95 % intervals; does nothing without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    arms = [arm for arm in results.arms if arm != AS_IT_IS and results.meet(arm, AS_IT_IS)]
    found = sorted(((results.minus(arm, AS_IT_IS), arm) for arm in arms), key=lambda pair: pair[0].mean)
    figure = Figure(figsize=(8, 0.36 * len(found) + 1.2), layout="constrained")
    axis = figure.subplots()
    half = [0.0 if math.isinf(one.high) else one.high - one.mean for one, _ in found]
    axis.errorbar(
        [one.mean for one, _ in found], range(len(found)), xerr=half, fmt="o", color="#c44e52", ms=4, capsize=2, lw=1
    )
    axis.axvline(0, color="#888888", lw=0.8)
    axis.set_yticks(range(len(found)), [f"{arm} ({plural(one.n, 'seed')})" for one, arm in found])
    for tick, (_, arm) in zip(axis.get_yticklabels(), found, strict=True):
        tick.set_fontweight("bold" if arm == PRIMARY else "normal")
    axis.set_xlabel(f"minus the generator {AS_IT_IS}, points (95 % interval)")
    harness.save(figure, path)
