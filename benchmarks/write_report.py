"""Tables, JSON and plot of ``bench_write``, made from its log alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import evidence, harness
from benchmarks.paired import Difference, difference, holm, plural

PAGE, SECTION = evidence.DOCS / "evidence-write.md", evidence.marks("results", "bench_write")
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
        adjusted = holm({pair: one.p for pair, one in found.items()})
        return {pair: (one, adjusted[pair]) for pair, one in found.items()}

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
    for folder in [out] if small else [out, None]:
        evidence.publish("write", content, partial(picture, results), PAGE, SECTION, text, folder)


def tables(results: Results, choices: dict[str, Any]) -> str:
    primary = results.minus(PRIMARY, AS_IT_IS)
    lines = [primary.primary(f"{PRIMARY} minus {AS_IT_IS}", f" over {plural(primary.n, 'paired seed')}")]
    lines += [f"- {name}: {results.mean(name):.1f} %." for name in ORIENTATION if name in results.found]
    compared = results.comparisons()
    if TAUGHT in compared:
        one, p = compared[TAUGHT]
        lines.append(f"- {' minus '.join(TAUGHT)}: {one} points ({one.verdict(p)}, Holm).")
    if choices:
        one = choices["choices"]
        lines.append(
            f"- Chosen on CLINC150: temperature {one['temperature']:g}, rate {one['rate']:g}, {one['epochs']:g} epochs,"
            f" start {one['start']}, GRPO rate {one['grpo_rate']:g}."
        )
    table = []
    for arm in sorted(results.arms, key=lambda arm: -results.mean(arm)):
        cells = [arm, str(len(results.found[arm])), f"{results.mean(arm):.1f}"]
        if arm == PRIMARY:
            cells += [str(primary), f"{primary.p:.3g} (own)", primary.verdict()]
        elif (arm, AS_IT_IS) not in compared:  # itself, or without a seed in common
            cells += ["", "", ""]
        else:
            one, p = compared[arm, AS_IT_IS]
            cells += [str(one), f"{p:.3g}", one.verdict(p)]
        cells.append(f"{results.mean(arm, 'agreed'):.0f}")
        table.append(cells)
    headings = ("arm", "seeds", "accuracy, %", f"minus {AS_IT_IS}", "p", "verdict", "label agrees, %")
    lines += ["", *harness.markdown(headings, *table)]
    lines += [f"\n{arm}, seed {seed}, failed: {error}" for (arm, seed), error in results.failed.items()]
    return "\n".join(lines)


def picture(results: Results, path: Path) -> None:
    """Plots accuracy relative to the unchanged generator with 95 % intervals."""
    from matplotlib.figure import Figure

    arms = [arm for arm in results.arms if arm != AS_IT_IS and results.meet(arm, AS_IT_IS)]
    found = sorted(((results.minus(arm, AS_IT_IS), arm) for arm in arms), key=lambda pair: pair[0].mean)
    figure = Figure(figsize=(8, 0.36 * len(found) + 1.2), layout="constrained")
    axis = figure.subplots()
    evidence.draw_differences(axis, enumerate(one for one, _ in found), color="#c44e52")
    names = [arm for _, arm in found]
    titles = [f"{arm} ({plural(one.n, 'seed')})" for one, arm in found]
    evidence.label_rows(axis, titles, names.index(PRIMARY))
    axis.set_xlabel(f"minus the generator {AS_IT_IS}, points (95 % interval)")
    harness.save(figure, path)
