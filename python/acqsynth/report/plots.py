"""The figures of a report as SVG text to stand within HTML; text stays text, in the page's own font."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, QUIET, RULE = "#1d2733", "#5d6b7a", "#d9dfe6"
MAIN, OTHER, BAD = "#1f5fa8", "#a9b8c7", "#b3382c"
#: told apart by the colour-blind too (Okabe and Ito)
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
_WIDTH = 8.6  # inches; the page scales it

Log = Sequence[Mapping[str, Any]]


def accuracy(bars: Sequence[tuple[str, Mapping[str, float]]], main: str) -> str:
    """Horizontal bars with intervals: ``(arm, accuracy)``, the base student first and as a line through all."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 0.6 + 0.34 * len(bars)), layout="constrained")
        axes = figure.subplots()
        names = [name for name, _ in bars]
        means = [100 * interval["mean"] for _, interval in bars]
        spans = [
            [100 * (interval["mean"] - interval["low"]) for _, interval in bars],
            [100 * (interval["high"] - interval["mean"]) for _, interval in bars],
        ]
        colours = [MAIN if name == main else OTHER for name in names]
        axes.barh(names, means, color=colours, height=0.62)
        # Drawn apart: a mean can lie outside a percentile interval of few rows by rounding.
        spans = [[max(0.0, value) for value in side] for side in spans]
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
        return _svg(figure, "accuracy")


def sizes(curves: Mapping[str, Sequence[tuple[int, Mapping[str, float]]]], base: float, main: str) -> str:
    """Accuracy over rows learnt: arm -> ``(rows, accuracy)``."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 2.8), layout="constrained")
        axes = figure.subplots()
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
        return _svg(figure, "sizes")


def reward(log: Log) -> str | None:
    """The total with its spread, and each part in a panel of its own scale; None where no step logged a reward."""
    if not _points(log, "reward"):
        return None
    parts = _named(log, "reward/", "/mean", without=("total",))
    with matplotlib.rc_context(_STYLE):
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


def lines(log: Log, keys: Mapping[str, str], name: str, unit: str, *, share: bool = False) -> str | None:
    """One line each: label -> key of the log; None where nothing of it was logged."""
    present = {label: _points(log, key) for label, key in keys.items()}
    present = {label: points for label, points in present.items() if points}
    if not present:
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 2.5), layout="constrained")
        axes = figure.subplots()
        for i, (label, points) in enumerate(present.items()):
            x, y = zip(*points, strict=True)
            values = [100 * value for value in y] if share else y
            axes.plot(x, values, color=SERIES[i % len(SERIES)], label=label, **_mark(x))
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=0 if share or min(min(y for _, y in points) for points in present.values()) >= 0 else None)
        _steps(axes)
        if len(present) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return _svg(figure, name)


def gates(log: Log) -> str | None:
    """Share of the completions that each gate rejected, the share masked, over steps."""
    keys = _named(log, "reward/gated/", "") | ({"masked": "reward/masked"} if _points(log, "reward/masked") else {})
    speaking = {label: key for label, key in keys.items() if any(value for _, value in _points(log, key))}
    return lines(log, speaking, "gates", "of completions, %", share=True)


def lengths(log: Log) -> str | None:
    """Tokens of the completions over steps."""
    keys = {word: f"completions/{word}_length" for word in ("mean", "min", "max")}
    return lines(log, keys, "lengths", "tokens")


def length_correlation(log: Log) -> str | None:
    """Correlation of each part of the reward with length, over steps."""
    return lines(log, _named(log, "reward/", "/length_correlation"), "length-correlation", "correlation")


def archives(log: Log) -> str | None:
    """Entries of the archives over steps."""
    return lines(log, _named(log, "reward/archive/", ""), "archives", "entries held")


def cost(log: Log) -> str | None:
    """The reward's share of each step's time."""
    return lines(log, {"reward": "reward_share"}, "cost", "of the step's time, %", share=True)


def staleness(log: Log) -> str | None:
    """Rank correlation of scores before and after each refresh of the student."""
    keys = {"since the last refresh": "staleness", "since the start": "staleness_since_start"}
    return lines(log, keys, "staleness", "rank correlation")


def validity(signals: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Rank correlation of each signal with measured gain, with intervals; None where none is defined."""
    found = sorted(
        ((name, s["correlation"]) for name, s in signals.items() if s["correlation"]), key=lambda pair: pair[1]["mean"]
    )
    if not found:
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 0.7 + 0.32 * len(found)), layout="constrained")
        axes = figure.subplots()
        for y, (_, interval) in enumerate(found):
            axes.plot([interval["low"], interval["high"]], [y, y], color=OTHER, linewidth=2.2, solid_capstyle="round")
            axes.plot(interval["mean"], y, "o", color=MAIN, markersize=6)
        axes.set_yticks(range(len(found)), [name for name, _ in found])
        axes.axvline(0, color=QUIET, linewidth=0.9)
        axes.set_xlim(-1.05, 1.05)
        axes.set_ylim(-0.6, len(found) - 0.4)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_xlabel("rank correlation with the gain measured")
        return _svg(figure, "validity")


def _points(log: Log, key: str) -> list[tuple[int, float]]:
    """(step, value) of the steps that logged a number under the key."""
    return [(int(e["step"]), float(e[key])) for e in log if isinstance(e.get(key), int | float)]


def _named(log: Log, prefix: str, suffix: str, without: Sequence[str] = ()) -> dict[str, str]:
    """Name -> key, of the keys ``<prefix><name><suffix>`` whose name has no further parts."""
    keys = dict.fromkeys(key for entry in log for key in entry if key.startswith(prefix) and key.endswith(suffix))
    names = {key.removeprefix(prefix).removesuffix(suffix): key for key in keys if _points(log, key)}
    return {name: key for name, key in names.items() if "/" not in name and name not in without}


def _mark(x: Sequence[int]) -> dict[str, Any]:
    """Points where there are few of them: a line through one step is invisible."""
    return {"marker": "o", "markersize": 3.5} if len(x) <= 25 else {}


def _steps(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _svg(figure: Figure, name: str) -> str:
    """The bare ``<svg>`` element, without metadata; identifiers begin with the figure's name, as a page has many."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"<svg[^>]*viewBox=\"([^\"]*)\"[^>]*>", r'<svg viewBox="\1" role="img">', svg, count=1)
    return svg.replace("xlink:href", "href")
