"""Summary of the units of a reliability run: tables, JSON, and a plot of the frontier."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from benchmarks import harness, real_rows, toy_student
from benchmarks.reliability_signals import ENTROPY, MANY_DRAWS, SIGNALS, TRUNK, Signal
from benchmarks.reliability_units import Store, interval, spearman, stepped_up

WORLDS = {"world": "uniform traps", "skewed": "skewed traps"}
Units: TypeAlias = Mapping[Any, Mapping[str, Any]]
TICKS = (1, 2, 4, 8, 16, 32)  # of cost


def summary(store: Store) -> list[dict[str, Any]]:
    """One entry per signal: reliability and cost by data set, separation in the toy students."""
    real, flops, toy = {**_shared(store), **store.found("real")}, store.found("flops"), store.found("toy")
    sets = [name for name in real_rows.SETS if any(key[0] == name for key in (*real, *flops))]
    table = []
    for name, signal in SIGNALS.items():
        row: dict[str, Any] = {"signal": name, "family": signal.family, "sets": {}}
        for of_set in sets:
            units = {key[2]: unit for key, unit in real.items() if key[:2] == (of_set, name)}
            if units or (of_set, name) in flops:
                row["sets"][of_set] = _of_set(of_set, name, signal, units, real, flops)
        row["toy"] = _of_toys(name, toy)
        row |= {kind: _of_worlds(name, store.found(kind)) for kind in WORLDS}
        table.append(row)
    return [row for row in table if any(row[kind] for kind in ("sets", "toy", *WORLDS))]


def _shared(store: Store) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Units of the part ``shared`` by data set, signal and seed, with their rows concatenated."""
    joined: dict[tuple[Any, ...], dict[str, Any]] = {}
    for (of_set, *_), unit in sorted(store.found("shared").items()):
        for found in unit["signals"]:
            into = joined.setdefault((of_set, found["signal"], found["seed"]), {})
            for column in {"values", "stderr"} & set(found):
                values = [math.nan if value is None else value for value in found[column]]
                into.setdefault(column, []).extend(values)
    return joined


def _of_set(of_set: str, name: str, signal: Signal, units: Units, real: Units, flops: Units) -> dict[str, Any]:
    cell: dict[str, Any] = {"seeds": len(units)}
    seconds = [u["seconds"] for u in units.values() if "seconds" in u]
    if seconds:
        cell["seconds"] = round(statistics.median(seconds), 4)
    for column, unit in (("entropy", ENTROPY), ("trunks", TRUNK)):
        cell |= _cost_of(column, [(u, real.get((of_set, unit, s))) for s, u in units.items()])
        if (of_set, name) in flops and (of_set, unit) in flops:
            cell[f"{column}_counted"] = round(flops[of_set, name]["flops"] / flops[of_set, unit]["flops"], 2)
    if signal.stochastic and len(units) > 1:
        values = _values(real, of_set, name)
        cell["rows"] = values.shape[1]
        cell["test_retest"], cell["interval"] = _or_none(spearman(values)), interval(values)
        if signal.half is not None:
            halves = _values(real, of_set, signal.half)
            if len(halves) > 1:
                cell["split_half"] = _or_none(stepped_up(float(spearman(halves))))
        if all("stderr" in unit for unit in units.values()):
            errors = np.array([unit["stderr"] for unit in units.values()])
            if np.isfinite(errors).any():  # one probe has no standard error
                kept = 1 - np.nanmean(errors**2, axis=1) / np.nanvar(values, axis=1, ddof=1)
                cell["from_stderr"] = round(float(np.clip(kept, 0, 1).mean()), 3)
    for many in MANY_DRAWS:
        truth = _values(real, of_set, many)
        if many != name and len(truth) > 1 and len(units) > 0 and "values" in next(iter(units.values())):
            of_signal = _values(real, of_set, name).mean(axis=0)
            cell[f"to {many}"] = _or_none(spearman(np.stack([of_signal, truth.mean(axis=0)])))
    return cell


def _cost_of(column: str, pairs: Iterable[tuple[Mapping[str, Any], Mapping[str, Any] | None]]) -> dict[str, float]:
    """The median ratio of the seconds of a unit to those of its baseline, where both have them."""
    ratios = [u["seconds"] / base["seconds"] for u, base in pairs if "seconds" in u and base is not None]
    return {column: round(statistics.median(ratios), 2)} if ratios else {}


def _pairs(name: str, many: str, units: Units, others: Units, *place: Any) -> list[np.ndarray]:
    """Values ``[2, n]`` of a signal and of many draws, for each seed with both."""
    found = [(u, others.get((*place, s, many))) for s, u in units.items() if many != name]
    return [np.array([u["values"], other["values"]]) for u, other in found if "values" in u and other is not None]


def _values(units: Units, of_set: str, name: str) -> np.ndarray:
    """Values ``[s, n]``, one row per seed."""
    found = [units[key]["values"] for key in sorted(units) if key[:2] == (of_set, name) and "values" in units[key]]
    return np.array(found, dtype=np.float64)


def _or_none(value: Any) -> float | None:
    return round(float(value), 3) if math.isfinite(value) else None


def _of_toys(name: str, toy: Units) -> dict[str, Any]:
    found = {}
    for blocks in toy_student.STEPS:
        units = {key[1]: unit for key, unit in toy.items() if key[0] == blocks and key[2] == name}
        if not units:
            continue
        cell: dict[str, Any] = {"seeds": len(units)}
        for kind in ("ambiguous", "both"):
            values = [unit[kind] for unit in units.values()]
            cell[kind], cell[f"{kind}_least"] = round(statistics.fmean(values), 3), round(min(values), 3)
        cell |= _cost_of("entropy", [(u, toy.get((blocks, s, ENTROPY))) for s, u in units.items()])
        for many in MANY_DRAWS:
            if pairs := _pairs(name, many, units, toy, blocks):
                cell[f"to {many}"] = round(statistics.fmean(float(spearman(pair)) for pair in pairs), 3)
        found[str(blocks)] = cell
    return found


def _of_worlds(name: str, worlds: Units) -> dict[str, Any]:
    """Over seeds: the skill with the largest mean, the best rank of a trap, agreement with many draws."""
    units = {key[0]: unit for key, unit in worlds.items() if key[1] == name}
    if not units:
        return {}
    from benchmarks.bench_signals import SKILLS, TRAPS

    tops, ranks = [], []
    for unit in units.values():
        means = dict(zip(SKILLS, np.array(unit["values"]).reshape(len(SKILLS), -1).mean(axis=1), strict=True))
        order = sorted(means, key=means.__getitem__, reverse=True)
        tops.append(order[0])
        ranks.append(1 + min(order.index(trap) for trap in TRAPS))
    found: dict[str, Any] = {"seeds": sorted(units), "tops": tops, "best_trap": ranks}
    found |= _cost_of("entropy", [(u, worlds.get((s, ENTROPY))) for s, u in units.items()])
    for many in MANY_DRAWS:
        if pairs := _pairs(name, many, units, worlds):
            found[f"to {many}"] = round(statistics.fmean(float(spearman(pair)) for pair in pairs), 3)
            within = [spearman(pair.reshape(2, len(SKILLS), -1)) for pair in pairs]
            found[f"within skills to {many}"] = _or_none(np.nanmean(within))
    return found


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown tables for real rows, worlds, and toy students."""
    sets = list(dict.fromkeys(name for row in rows for name in row["sets"]))
    lines: list[str] = []
    if sets:
        columns = ("entropy", "entropy_counted", "trunks", "trunks_counted")
        cells = [
            [
                row["signal"],
                *(_reliability(row["sets"].get(name)) for name in sets),
                *(_median(row, c) for c in columns),
            ]
            for row in rows
        ]
        headings = ["signal", *sets, "cost, entropy = 1", "counted", "trunks", "counted"]
        lines += [*harness.markdown(headings, *cells), ""]
    for kind, traps in WORLDS.items():
        if worlds := [row for row in rows if row[kind]]:
            headings = [
                traps,
                "skill on top",
                "best rank of a trap",
                "as 64 draws: all samples",
                "within a skill",
                "cost",
            ]
            lines += [*harness.markdown(headings, *([row["signal"], *_world(row[kind])] for row in worlds)), ""]
    depths = list(dict.fromkeys(depth for row in rows for depth in row["toy"]))
    if depths:
        headings = ["signal"]
        for depth in depths:
            headings += [f"{depth} blocks: above ambiguous", "above both", "as 64 draws", "cost"]
        toys = [row for row in rows if row["toy"]]
        cells = [[row["signal"], *(cell for d in depths for cell in _toy(row["toy"].get(d)))] for row in toys]
        lines += harness.markdown(headings, *cells)
    return "\n".join(lines)


def _reliability(cell: Mapping[str, Any] | None) -> str:
    if not cell or cell.get("test_retest") is None:
        return ""
    low, high = cell["interval"]
    return f"{cell['test_retest']:.2f} ({low:.2f} to {high:.2f})"


def _median(row: Mapping[str, Any], column: str) -> str:
    """Median over the data sets."""
    values = [cell[column] for cell in row["sets"].values() if column in cell]
    return f"{statistics.median(values):.1f}" if values else ""


def _toy(cell: Mapping[str, Any] | None) -> list[str]:
    if cell is None:
        return [""] * 4
    texts = [f"{cell[kind]:.3f} ({cell[f'{kind}_least']:.3f})" for kind in ("ambiguous", "both")]
    return [*texts, _shown(_agreement(cell, "to"), 2), _shown(cell.get("entropy"), 1)]


def _world(cell: Mapping[str, Any]) -> list[str]:
    agreements = [_shown(_agreement(cell, what), 2) for what in ("to", "within skills to")]
    ranks = ", ".join(map(str, cell["best_trap"]))
    return [", ".join(cell["tops"]), ranks, *agreements, _shown(cell.get("entropy"), 1)]


def _shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _agreement(cell: Mapping[str, Any], what: str) -> float | None:
    """Agreement with many draws, at the first of their rates that was measured."""
    return next((cell[f"{what} {many}"] for many in MANY_DRAWS if f"{what} {many}" in cell), None)


def _cost(row: Mapping[str, Any], sets: Sequence[str]) -> float | None:
    """Cost relative to scoring entropy, averaged over data sets: counted, or timed if nothing was counted."""
    cells = [row["sets"][name] for name in sets if name in row["sets"]]
    for column in ("entropy_counted", "entropy"):
        values = [cell[column] for cell in cells if column in cell]
        if values:
            return statistics.fmean(values)
    return None


def _mean_reliability(row: Mapping[str, Any], sets: Sequence[str]) -> float | None:
    values = [row["sets"].get(name, {}).get("test_retest") for name in sets]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _separation(row: Mapping[str, Any], blocks: str) -> float | None:
    cell = row["toy"].get(blocks)
    return None if cell is None else float(cell["ambiguous"])


def _kind(signal: str) -> tuple[str, str]:
    """A signal's name without its number of probes or draws, and that number."""
    name = signal.replace(", all blocks", "")
    found = re.search(r",? (\d+)( probes?)?(?=,|$)", name)
    return (name, "") if found is None else (name[: found.start()] + name[found.end() :], found[1])


def picture(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plots cost against reliability, for long and for short completions, and against separation."""
    from matplotlib.figure import Figure

    long = [name for name in real_rows.SETS if name not in real_rows.SHORT]
    panels: list[tuple[str, Sequence[str], Callable[[Mapping[str, Any]], float | None]]] = [
        (f"test-retest: {', '.join(sets)} (mean)", sets, partial(_mean_reliability, sets=sets))
        for sets in (long, real_rows.SHORT)
    ]
    for blocks in ("3", "6"):
        title = f"toy students, {blocks} blocks: AUROC of ignorance above ambiguity"
        panels.append((title, long, partial(_separation, blocks=blocks)))
    colours = {"draws": "#8c9bb0", "linear": "#c44e52", "weights": "#55a868", "epig": "#8172b3", "influence": "#ccb974"}
    figure = Figure(figsize=(13, 9))
    axes = figure.subplots(2, 2)
    for axis, (title, sets, height) in zip(axes.flat, panels, strict=True):
        for row in rows:
            x, y = _cost(row, sets), height(row)
            if x is None or y is None or row["family"] not in colours:  # entropy is only the unit of cost
                continue
            kind, count = _kind(row["signal"])
            colour = colours[row["family"]]
            axis.scatter(x, y, s=30, color=colour, facecolor="white" if "completions" in kind else colour, label=kind)
            axis.annotate(count, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=8)
        axis.set_xscale("log")
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xticks(TICKS, [str(tick) for tick in TICKS])
        axis.minorticks_off()
        axis.set_xlabel("cost, counted, in multiples of scoring entropy", fontsize=8)
        axis.margins(x=0.25)
        if title.startswith("toy"):
            axis.set_ylim(0.9, 1.005)
        by_kind = dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
        axis.legend(by_kind.values(), by_kind.keys(), loc="lower left", fontsize=8, frameon=False)
    figure.suptitle("Beside each point: its number of probes or draws", fontsize=10, x=0.01, ha="left")
    figure.tight_layout()
    harness.save(figure, path, dpi=110)


def report(store: Store, result: Path | None, image: Path | None) -> None:
    """Prints the tables; writes JSON and plot if paths are given."""
    rows = summary(store)
    print(markdown(rows))
    if result is not None:
        harness.write(result, {**store.settings, "signals": rows})
    if image is not None:
        picture(rows, image)
