"""Sections and plots of the evidence pages in ``docs/``, which benchmarks write."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.paired import Difference

DOCS = Path(__file__).resolve().parents[1] / "docs"


def marks(section: str, bench: str) -> tuple[str, str]:
    """The comments around a section of a page."""
    return f"<!-- {section}: written by {bench} -->", f"<!-- end of {section} -->"


def write_section(page: Path, begin: str, end: str, text: str) -> None:
    """Replaces the text between the two marks of a page."""
    held = page.read_text()
    page.write_text(f"{held[: held.index(begin) + len(begin)]}\n\n{text}\n\n{held[held.index(end) :]}")


def publish(
    name: str,
    content: dict[str, Any],
    draw: Callable[[Path], None],
    page: Path,
    section: tuple[str, str],
    text: str,
    out: Path | None = None,
) -> None:
    """Writes JSON and plot to ``results/`` and ``docs/``, and the text to its section of the page; with ``out``, only
    JSON and plot, to that folder. A page is left as it is if its plot cannot be drawn."""
    harness.write((out or harness.RESULTS) / f"{name}.json", content)
    try:
        draw((out or DOCS) / picture_of(name))
    except ModuleNotFoundError as error:
        print(f"no plot: {error}; install matplotlib and write the table again to draw it")
        return
    if out is None:
        write_section(page, *section, text)


def picture_of(name: str) -> str:
    return f"evidence-{name.replace('_', '-')}.png"


def draw_differences(axis: Any, found: Iterable[tuple[float, Difference]], **style: Any) -> None:
    """Differences at their heights, with 95 % intervals."""
    places, differences = zip(*found, strict=True)
    half = [0.0 if math.isinf(one.high) else one.high - one.mean for one in differences]
    axis.errorbar([one.mean for one in differences], places, xerr=half, fmt="o", ms=4, capsize=2, lw=1, **style)


def label_rows(axis: Any, names: Sequence[str], bold: int) -> None:
    """Names the heights 0, 1, ... and draws a line at no difference."""
    axis.axvline(0, color="#888888", lw=0.8)
    axis.set_yticks(range(len(names)), names)
    axis.get_yticklabels()[bold].set_fontweight("bold")
