"""``metrics.json`` as one HTML page: styles and figures within it, nothing fetched, no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import yaml

from acqsynth.report import plots
from acqsynth.report.metrics import IN_DISTRIBUTION, STUDENT, percent, points


def render(metrics: Mapping[str, Any]) -> str:
    """The page.

    Args:
        metrics: as :func:`acqsynth.report.metrics.collect` gives them, with ``recipe``, ``training``, ``samples`` and
            ``validity``, each of the latter three None where the run had none.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("acqsynth", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": percent, "points": points, "tint": _tint, "seconds": _seconds}
    return environment.get_template("page.html.jinja").render(
        metrics=metrics,
        main=metrics["main"],
        recipe=yaml.safe_dump(metrics["recipe"], sort_keys=False, allow_unicode=True),
        largest=_largest(metrics),
        table=_table(metrics),
        skills=_skills(metrics),
        figures=_figures(metrics),
        in_distribution=IN_DISTRIBUTION,
        student=STUDENT,
    )


def _largest(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Arm -> result of the recipe's own student with the most rows."""
    found = {}
    for arm, entry in metrics["arms"].items():
        own = [result for result in entry["results"] if result["student"] == STUDENT]
        found[arm] = max(own, key=lambda result: result["rows_wanted"])
    return found


def _table(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line for each arm, student and size, the recipe's own student first."""
    lines = []
    for arm, entry in metrics["arms"].items():
        lines += [{"arm": arm, **result} for result in entry["results"]]
    return sorted(lines, key=lambda line: (line["student"] != STUDENT, line["student"], line["rows_wanted"]))


def _skills(metrics: Mapping[str, Any]) -> list[tuple[str, int, list[float | None]]]:
    """Skill, its rows, and accuracy of the base student and of each arm."""
    base = metrics["base"][STUDENT][IN_DISTRIBUTION]["skills"]
    arms = [result["sets"][IN_DISTRIBUTION]["skills"] for result in _largest(metrics).values()]
    return [
        (skill, entry["rows"], [entry["accuracy"], *(arm[skill]["accuracy"] for arm in arms)])
        for skill, entry in base.items()
    ]


def _figures(metrics: Mapping[str, Any]) -> dict[str, str | None]:
    """Name -> SVG; None where there is nothing to show."""
    main, largest = metrics["main"], _largest(metrics)
    base = metrics["base"][STUDENT][IN_DISTRIBUTION]["accuracy"]
    bars = [("base student", base)]
    bars += [(arm, result["sets"][IN_DISTRIBUTION]["accuracy"]) for arm, result in largest.items()]
    curves: dict[str, list[tuple[int, Any]]] = {}
    for line in _table(metrics):
        if line["student"] == STUDENT:
            point = (line["rows_wanted"], line["sets"][IN_DISTRIBUTION]["accuracy"])
            curves.setdefault(line["arm"], []).append(point)
    several = len(next(iter(curves.values()))) > 1
    figures: dict[str, str | None] = {
        "accuracy": plots.accuracy(bars, main),
        "sizes": plots.sizes(curves, base["mean"], main) if several else None,
        "validity": plots.validity(metrics["validity"]["signals"]) if metrics["validity"] else None,
    }
    log: Sequence[Mapping[str, Any]] = metrics["training"]["log"] if metrics["training"] else []
    drawn = ("reward", "gates", "lengths", "length_correlation", "archives", "cost", "staleness")
    return figures | {name: getattr(plots, name)(log) for name in drawn}


def _tint(change: float) -> str:
    """Background of a cell with a change of accuracy: blue for gain, red for loss, full at ten points."""
    strength = min(1.0, abs(change) / 0.10)
    colour = "31, 95, 168" if change >= 0 else "179, 56, 44"
    return f"background: rgba({colour}, {0.45 * strength:.2f})"


def _seconds(value: float) -> str:
    """A duration for a person."""
    if value < 100:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 6000 else f"{value / 3600:.1f} h"
