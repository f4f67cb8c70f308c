"""Tables, JSON and plot of ``bench_pool``, made from its log alone."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import evidence, harness
from benchmarks.paired import Difference, difference, holm, plural
from benchmarks.pool_data import KINDS

PAGE, SECTION = evidence.DOCS / "evidence-pool.md", evidence.marks("results", "bench_pool")
RANDOM, DEFAULT, VARENTROPY = "random", "default", "varentropy"
#: Labels in the plot for arms whose names are not self-explanatory.
NAMES = {
    DEFAULT: "label_trust, then the loss (default)",
    "default without its value": "label_trust alone",
    "grad_norm": "gradient norm of the head",
    "rho loss": "RHO-loss",
    "badge": "BADGE",
    "sift": "SIFT",
    "huds": "HUDS",
}


class Results:
    """The report's rows. Two arms are compared on the seeds that both have.

    Attributes:
        seeds: pool -> the seeds that have both random and default; pools without such a seed are omitted.
        arms: in the order of the run.
        failed: arm -> its error.
        warm: accuracy of the warm student, in percentage points.
        reliability: stochastic signal -> mean test-retest correlation.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        report = [row for row in rows if row["stage"] == "report"]
        self.failed = {row["arm"]: row["failed"] for row in rows if "failed" in row}
        self.arms = [arm for arm in dict.fromkeys(row["arm"] for row in report) if arm not in self.failed]
        found = {(row["seed"], row["pool"], row["arm"]): row for row in report}
        pools, seeds = (sorted({row[key] for row in report}) for key in ("pool", "seed"))
        both = {
            pool: [seed for seed in seeds if all((seed, pool, arm) in found for arm in (RANDOM, DEFAULT))]
            for pool in pools
        }
        self.seeds = {pool: held for pool, held in both.items() if held}
        self._found = found
        warm = [row["accuracy"] for row in rows if row["stage"] == "warm"]
        self.warm = statistics.fmean(warm) * 100 if warm else math.nan
        kept: dict[str, list[float]] = {}
        for row in rows:
            if row["stage"] == "reliability" and "reliability" in row:
                kept.setdefault(row["arm"], []).append(row["reliability"])
        self.reliability = {arm: statistics.fmean(values) for arm, values in kept.items()}

    def of(self, pool: str) -> list[str]:
        """The arms with a seed on a pool."""
        return [arm for arm in self.arms if self._both(pool, arm)]

    def values(self, pool: str, arm: str, column: str = "accuracy", beside: str | None = None) -> list[float]:
        """Percentage points, one per seed; with ``beside``, only on seeds which that arm has too."""
        return [100 * self._found[seed, pool, arm][column] for seed in self._both(pool, arm, beside or arm)]

    def kinds(self, pool: str, arm: str) -> dict[str, float]:
        """Kind -> mean share of the chosen rows, in percentage points."""
        rows = [self._found[seed, pool, arm]["kinds"] for seed in self._both(pool, arm)]
        return {kind: 100 * statistics.fmean(row.get(kind, 0.0) for row in rows) for kind in KINDS}

    def minus(self, pool: str, arm: str, other: str, column: str = "accuracy") -> Difference:
        return difference(self.values(pool, arm, column, other), self.values(pool, other, column, arm))

    def _both(self, pool: str, *arms: str) -> list[int]:
        return [seed for seed in self.seeds[pool] if all((seed, pool, arm) in self._found for arm in arms)]


def write(rows: Sequence[dict[str, Any]], choices: Path, out: Path, *, small: bool = False) -> None:
    """Prints the tables and writes them next to the log and, unless ``small``, to ``results/`` and ``docs/``."""
    results = Results(rows)
    if "B" not in results.seeds or DEFAULT not in results.arms:
        print(f"units done: {len(rows)}; no seed of pool B is complete yet")
        return
    made = json.loads(choices.read_text()) if choices.exists() else {}
    text = tables(results, made)
    print(text)
    machines = [row["machine"] for row in rows if row["stage"] == "machine"]
    content = {"machines": machines, "choices": made, **summary(results), "units": list(rows)}
    shown = f"![Accuracy against random and junk chosen, by arm]({evidence.picture_of('pool')})"
    for folder in [out] if small else [out, None]:
        evidence.publish(
            "pool", content, partial(picture, results), PAGE, SECTION, f"{text}\n\n{shown}", folder
        )  # fmt: skip


def families(results: Results) -> dict[str, dict[str, tuple[Difference, float]]]:
    """Family -> comparison -> its difference and its p value, Holm-adjusted within the family. A single seed allows no
    test and does not count among the comparisons."""
    made = {}
    for pool in results.seeds:
        arms = [arm for arm in results.of(pool) if arm not in (DEFAULT, RANDOM)]
        for name, family in (
            (f"{pool}: default minus", {arm: results.minus(pool, DEFAULT, arm) for arm in arms}),
            (f"{pool}: minus random", {arm: results.minus(pool, arm, RANDOM) for arm in arms}),
        ):
            adjusted = holm({arm: one.p for arm, one in family.items() if one.n > 1})
            made[name] = {arm: (one, adjusted.get(arm, 1.0)) for arm, one in family.items()}
    return made


def summary(results: Results) -> dict[str, Any]:
    primary = results.minus("B", DEFAULT, RANDOM)
    return {
        "seeds": results.seeds,
        "primary": asdict(primary),
        "default_minus_random_on_A": asdict(results.minus("A", DEFAULT, RANDOM)) if "A" in results.seeds else None,
        "junk_default_minus_random": asdict(results.minus("B", DEFAULT, RANDOM, "junk")),
        "families": {
            name: {arm: {**asdict(one), "p_holm": p} for arm, (one, p) in family.items()}
            for name, family in families(results).items()
        },
        "reliability": results.reliability,
        "failed": results.failed,
    }


def tables(results: Results, choices: dict[str, Any]) -> str:
    primary = results.minus("B", DEFAULT, RANDOM)
    junk, of_random = (statistics.fmean(results.values("B", arm, "junk")) for arm in (DEFAULT, RANDOM))
    made = families(results)
    lines = [
        f"BANKING77, {len(results.seeds['B'])} paired seeds; the warm student is right in {results.warm:.1f} %.",
        "",
        primary.primary("default minus random on pool B"),
        f"- Junk chosen on pool B: {junk:.1f} % by default, {of_random:.1f} % at random.",
    ]
    if "A" in results.seeds:
        on_a = results.minus("A", DEFAULT, RANDOM)
        lines.append(f"- Default minus random on pool A: {on_a} points ({on_a.verdict()}).")
    if VARENTROPY in results.of("B"):
        one, p = made["B: default minus"][VARENTROPY]
        lines.append(f"- Default minus varentropy on pool B: {one} points ({one.verdict(p)}, Holm).")
    if choices:
        one = choices["choices"]
        recipe = one["default"]
        lines.append(
            f"- Chosen on CLINC150: rate {one['rate']:g}, {one['epochs']:g} epochs, start {one['start']}, states "
            f"{one['state']}; default = gate {recipe['gate']}, value {recipe['value']}, spread {recipe['spread']}."
        )
    for pool in sorted(results.seeds, reverse=True):
        lines += ["", f"**Pool {pool}**, {plural(len(results.seeds[pool]), 'seed')}", ""]
        headings = ["arm", "seeds", "accuracy, %", "minus random", "p (Holm)", "default minus it", "p (Holm)"]
        headings += ["junk, %", *KINDS[1:], "test-retest"] if pool == "B" else []
        table = []
        for arm in sorted(results.of(pool), key=lambda arm: -statistics.fmean(results.values(pool, arm))):
            values = results.values(pool, arm)
            cells = [arm, str(len(values)), f"{statistics.fmean(values):.1f}"]
            if arm == DEFAULT:
                one = results.minus(pool, DEFAULT, RANDOM)
                cells += [str(one), f"{one.p:.3g} (own)", "", ""]
            elif arm == RANDOM:
                cells += [""] * 2 + [str(results.minus(pool, DEFAULT, RANDOM)), "as above"]
            else:
                for family in (f"{pool}: minus random", f"{pool}: default minus"):
                    one, p = made[family][arm]
                    cells += [str(one), f"{p:.3g}" if one.n > 1 else ""]
            if pool == "B":
                kinds = results.kinds(pool, arm)
                cells.append(f"{100 - kinds[KINDS[0]]:.0f}")
                cells += [f"{kinds[kind]:.0f}" for kind in KINDS[1:]]
                reliability = results.reliability.get(arm)
                cells.append("" if reliability is None else f"{reliability:.2f}")
            table.append(cells)
        lines += harness.markdown(headings, *table)
    lines += [f"\n{arm} failed and is left out: {error}" for arm, error in results.failed.items()]
    return "\n".join(lines)


def picture(results: Results, path: Path) -> None:
    """Plots accuracy against random by arm and pool, with 95 % intervals, and the junk chosen from pool B."""
    from matplotlib.figure import Figure

    arms = [arm for arm in results.of("B") if arm != RANDOM]
    arms.sort(key=lambda arm: results.minus("B", arm, RANDOM).mean)
    figure = Figure(figsize=(10, 0.36 * len(arms) + 1.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    apart = 0.14 if len(results.seeds) > 1 else 0.0
    styles = {"B": ("#c44e52", -apart, "45 % junk"), "A": ("#4c72b0", apart, "as published")}
    for pool in results.seeds:
        colour, shift, label = styles[pool]
        held = [(i - shift, results.minus(pool, arm, RANDOM)) for i, arm in enumerate(arms) if arm in results.of(pool)]
        evidence.draw_differences(left, held, color=colour, label=f"pool {pool}: {label}")
    evidence.label_rows(left, [NAMES.get(arm, arm) for arm in arms], arms.index(DEFAULT))
    left.set_xlabel("accuracy against random, points (95 % interval)")
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower left", ncols=2)
    begin = [0.0] * len(arms)
    colours = ("#c44e52", "#dd8452", "#ccb974", "#8172b3")
    for kind, colour in zip(KINDS[1:], colours, strict=True):
        widths = [results.kinds("B", arm)[kind] for arm in arms]
        right.barh(range(len(arms)), widths, left=begin, color=colour, label=kind, height=0.62)
        begin = [a + b for a, b in zip(begin, widths, strict=True)]
    of_random = statistics.fmean(results.values("B", RANDOM, "junk"))
    right.axvline(of_random, color="#444444", lw=0.8, ls="--", label="junk in random rows")
    right.set_xlabel("junk among its rows, %")
    figure.legend(*right.get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower right", ncols=3)
    harness.save(figure, path)
