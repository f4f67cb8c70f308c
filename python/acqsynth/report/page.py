"""Renders ``metrics.json`` as one HTML page with figures.

The page embeds styles, SVG and a script that sorts tables. It fetches nothing and works without the script.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import matplotlib
import yaml

matplotlib.use("svg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from acqsynth.evaluate import FEWEST
from acqsynth.report.metrics import IN_DISTRIBUTION, KNOWN, STUDENT, largest, percent, points, span

INK, QUIET, RULE = "#1d2733", "#5d6b7a", "#d9dfe6"
MAIN, OTHER, BAD = "#1f5fa8", "#a9b8c7", "#b3382c"
#: safe for colour-blind readers (Okabe and Ito)
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#5d6b7a", "#e69f00")

_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": RULE,
    "axes.labelcolor": QUIET,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#edf0f3",
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
_WIDTH = 8.6  # inches, before scaling by the page

Log = Sequence[Mapping[str, Any]]


def render(metrics: Mapping[str, Any]) -> str:
    """Renders the page.

    Args:
        metrics: from :func:`acqsynth.report.metrics.collect`, with ``recipe``, ``machine``, ``training``, ``samples``
            and ``validity``, the last three None if the run has none.
    """
    loader, undefined = jinja2.PackageLoader("acqsynth", "report"), jinja2.StrictUndefined
    environment = jinja2.Environment(
        loader=loader, undefined=undefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    arms = {arm: largest(metrics, arm) for arm in metrics["arms"]}
    # Per arm, student and size, the recipe's own student first.
    table = [{"arm": arm, **result} for arm, entry in metrics["arms"].items() for result in entry["results"]]
    table.sort(key=lambda line: (line["student"] != STUDENT, line["student"], line["rows_wanted"]))
    own = [metrics["base"][STUDENT], *(result["sets"] for result in arms.values())]
    skills = {
        skill: (entry["rows"], [each[IN_DISTRIBUTION]["skills"][skill]["accuracy"] for each in own])
        for skill, entry in metrics["base"][STUDENT][IN_DISTRIBUTION]["skills"].items()
    }
    after = 1 + list(arms).index(metrics["main"])
    moved = [(skill, shares[0], shares[after]) for skill, (_, shares) in skills.items()]
    environment.filters |= {"percent": percent, "points": points, "span": span, "tint": _tint, "seconds": _seconds}
    return environment.get_template("page.html.jinja").render(
        metrics=metrics,
        main=metrics["main"],
        recipe=yaml.safe_dump(metrics["recipe"], sort_keys=False, allow_unicode=True),
        largest=arms,
        table=table,
        skills=skills,
        moved=sorted(moved, key=lambda entry: entry[2] - entry[1]),
        figures=_figures(metrics, arms, table),
        in_distribution=IN_DISTRIBUTION,
        known_from=KNOWN,
        # Whether every arm's fits count as independent draws (:func:`acqsynth.evaluate.accuracy_interval`).
        few_generators=all(len(set(line["generators"])) < FEWEST for line in table),
        fewest=FEWEST,
    )


@matplotlib.rc_context(_STYLE)
def _figures(
    metrics: Mapping[str, Any], arms: Mapping[str, Any], table: Sequence[Mapping[str, Any]]
) -> dict[str, str | None]:
    """Name -> SVG; None if there is nothing to show."""
    main = metrics["main"]
    base = metrics["base"][STUDENT][IN_DISTRIBUTION]["accuracy"]
    bars = [("base student", base)]
    bars += [(arm, result["sets"][IN_DISTRIBUTION]["accuracy"]) for arm, result in arms.items()]
    curves: dict[str, list[tuple[int, Any]]] = {}
    for line in table:
        if line["student"] == STUDENT:
            point = (line["rows_wanted"], line["sets"][IN_DISTRIBUTION]["accuracy"])
            curves.setdefault(line["arm"], []).append(point)
    several = len(next(iter(curves.values()))) > 1
    log: Log = metrics["training"]["log"] if metrics["training"] else []
    return over_steps(log) | {
        "reward": reward(log),
        "accuracy": accuracy(bars, main),
        "sizes": sizes(curves, base["mean"], main) if several else None,
        "validity": validity(metrics["validity"]["signals"]) if metrics["validity"] else None,
    }


def _tint(change: float) -> str:
    """Cell background for a change in accuracy: blue for gains, red for losses, saturated at ten points."""
    strength = min(1.0, abs(change) / 0.10)
    colour = "31, 95, 168" if change >= 0 else "179, 56, 44"
    return f"background: rgba({colour}, {0.45 * strength:.2f})"


def _seconds(value: float) -> str:
    """Formats a duration."""
    if value < 100:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 6000 else f"{value / 3600:.1f} h"


# --- figures: SVG text to embed in HTML -------------------------------------------------------------------------------


def accuracy(bars: Sequence[tuple[str, Mapping[str, float]]], main: str) -> str:
    """Horizontal bars with intervals from ``(arm, accuracy)``, the base student first and as a vertical line."""
    axes = _axes(0.6 + 0.34 * len(bars))
    names = [name for name, _ in bars]
    means = [100 * interval["mean"] for _, interval in bars]
    spans = [
        [100 * (interval["mean"] - interval["low"]) for _, interval in bars],
        [100 * (interval["high"] - interval["mean"]) for _, interval in bars],
    ]
    axes.barh(names, means, color=[MAIN if name == main else OTHER for name in names], height=0.62)
    axes.errorbar(means, range(len(names)), xerr=spans, fmt="none", ecolor=INK, elinewidth=1.1, capsize=3)
    axes.axvline(means[0], color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)))
    right = max(100 * interval["high"] for _, interval in bars)
    for y, mean in enumerate(means):
        axes.annotate(
            f"{mean:.1f}", (max(right, 1), y), xytext=(8, 0), textcoords="offset points", va="center", color=INK
        )
    axes.set_xlim(0, max(right, 1) * 1.08)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_xlabel("right answers, %")
    return _svg(axes.figure, "accuracy")


def sizes(curves: Mapping[str, Sequence[tuple[int, Mapping[str, float]]]], base: float, main: str) -> str:
    """Accuracy over rows learnt: arm -> ``(rows, accuracy)``."""
    axes = _axes(2.8)
    axes.axhline(100 * base, color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)), label="base")
    for i, (arm, curve) in enumerate(curves.items()):
        x = [rows for rows, _ in curve]
        colour = SERIES[i % len(SERIES)]
        axes.plot(x, [100 * v["mean"] for _, v in curve], "o-", color=colour, label=arm, markersize=4)
        if arm == main:
            low, high = ([100 * v[side] for _, v in curve] for side in ("low", "high"))
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    axes.set_xlabel("rows learnt")
    axes.set_ylabel("right answers, %")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(axes.figure, "sizes")


def reward(log: Log) -> str | None:
    """The total with its spread, and each part in its own panel; None if no step logged a reward."""
    if not _points(log, "reward"):
        return None
    parts = _named(log, "reward/", "/mean")
    parts.pop("total", None)
    panels = 1 + len(parts)
    columns = 2 if panels in (2, 4) else min(3, panels)
    lines = -(-panels // columns)
    figure = Figure(figsize=(_WIDTH, 0.4 + 1.9 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    x, y = zip(*_points(log, "reward"), strict=True)
    grid[0].plot(x, y, color=MAIN, **_mark(x))
    spread = dict(_points(log, "reward_std"))
    if set(x) <= set(spread):
        low, high = ([a + sign * spread[step] for step, a in zip(x, y, strict=True)] for sign in (-1, 1))
        grid[0].fill_between(x, low, high, color=MAIN, alpha=0.12, linewidth=0)
    grid[0].set_title("reward \u00b1 deviation")
    for axes, (name, key), colour in zip(grid[1:], parts.items(), SERIES[1:] * 4, strict=False):
        steps, values = zip(*_points(log, key), strict=True)
        axes.plot(steps, values, color=colour, **_mark(steps))
        axes.set_title(name)
    for axes in grid[panels:]:
        axes.set_visible(False)
    for axes in grid[:panels]:
        _steps(axes)
    return _svg(figure, "reward")


def _lines(log: Log, keys: Mapping[str, str], name: str, unit: str, share: bool) -> str | None:
    """A line for each label -> key of the log; None if no key was logged."""
    present = {label: _points(log, key) for label, key in keys.items()}
    present = {label: line for label, line in present.items() if line}
    if not present:
        return None
    axes = _axes(2.5)
    for i, (label, line) in enumerate(present.items()):
        x, y = zip(*line, strict=True)
        values = [100 * value for value in y] if share else y
        axes.plot(x, values, color=SERIES[i % len(SERIES)], label=label, **_mark(x))
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0 if share or min(min(y for _, y in line) for line in present.values()) >= 0 else None)
    _steps(axes)
    if len(present) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(axes.figure, name)


def over_steps(log: Log) -> dict[str, str | None]:
    """Line figures by name: gate rejections, lengths, correlation with length, archives, cost and staleness."""
    rejected = _named(log, "reward/gated/", "") | {"masked": "reward/masked"}
    rejected = {label: key for label, key in rejected.items() if any(value for _, value in _points(log, key))}
    drawn: dict[str, tuple[Mapping[str, str], str, bool]] = {
        "gates": (rejected, "of completions, %", True),
        "lengths": ({word: f"completions/{word}_length" for word in ("mean", "min", "max")}, "tokens", False),
        "length_correlation": (_named(log, "reward/", "/length_correlation"), "correlation", False),
        "archives": (_named(log, "reward/archive/", ""), "entries held", False),
        "cost": ({"reward": "reward_share"}, "of the step's time, %", True),
        "staleness": (
            {"since the last refresh": "staleness", "since the start": "staleness_since_start"},
            "rank correlation",
            False,
        ),
    }
    return {name: _lines(log, keys, name, unit, share) for name, (keys, unit, share) in drawn.items()}


def validity(signals: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Rank correlation of each signal with the measured gain, with intervals; None if all are undefined."""
    found = sorted(
        ((name, s["correlation"]) for name, s in signals.items() if s["correlation"]), key=lambda pair: pair[1]["mean"]
    )
    if not found:
        return None
    axes = _axes(0.7 + 0.32 * len(found))
    for y, (_, interval) in enumerate(found):
        axes.plot([interval["low"], interval["high"]], [y, y], color=OTHER, linewidth=2.2, solid_capstyle="round")
        axes.plot(interval["mean"], y, "o", color=MAIN, markersize=6)
    axes.set_yticks(range(len(found)), [name for name, _ in found])
    axes.axvline(0, color=QUIET, linewidth=0.9)
    axes.set_xlim(-1.05, 1.05)
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_xlabel("rank correlation with the measured gain")
    return _svg(axes.figure, "validity")


def _points(log: Log, key: str) -> list[tuple[int, float]]:
    """(step, value) of each step that logged a number under the key."""
    return [(int(e["step"]), float(e[key])) for e in log if isinstance(e.get(key), int | float)]


def _named(log: Log, prefix: str, suffix: str) -> dict[str, str]:
    """Name -> key, for keys ``<prefix><name><suffix>`` whose name has no further parts."""
    keys = dict.fromkeys(key for entry in log for key in entry if key.startswith(prefix) and key.endswith(suffix))
    names = {key.removeprefix(prefix).removesuffix(suffix): key for key in keys if _points(log, key)}
    return {name: key for name, key in names.items() if "/" not in name}


def _mark(x: Sequence[int]) -> dict[str, Any]:
    """Markers for few points: a line through one step is invisible."""
    return {"marker": "o", "markersize": 3.5} if len(x) <= 25 else {}


def _axes(height: float) -> Any:
    """Axes of a figure with this height in inches."""
    return Figure(figsize=(_WIDTH, height), layout="constrained").subplots()


def _steps(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _svg(figure: Figure, name: str) -> str:
    """The bare ``<svg>`` element without metadata; identifiers are prefixed with the name to be unique on a page."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"<svg[^>]*viewBox=\"([^\"]*)\"[^>]*>", r'<svg viewBox="\1" role="img">', svg, count=1)
    return svg.replace("xlink:href", "href")
