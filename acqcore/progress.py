"""A progress bar on stderr, by tqdm if it is installed, and tables on stdout, by rich if it is installed."""

from __future__ import annotations

import importlib.util
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

_DELAY_S = 3.0  # delay before the bar appears by default


def progress_bar(total: int, show: bool | None, unit: str = "tokens") -> Any:
    """A context whose ``update(done)`` counts ``done`` more units of work and reports the progress on stderr.

    Args:
        total: units of work.
        show: True or False; None shows the bar on terminals only, after a few seconds.
        unit: name of the unit.
    """
    wanted = sys.stderr.isatty() if show is None else show
    delay = _DELAY_S if show is None else 0.0
    if wanted and importlib.util.find_spec("tqdm"):
        from tqdm import tqdm  # type: ignore[import-untyped]

        return tqdm(total=total, desc="scoring", unit=f" {unit}", unit_scale=True, delay=delay)
    return _Plain(total, delay if wanted else math.inf, unit)


class _Plain:
    """One line, rewritten in place, from ``delay`` seconds on."""

    def __init__(self, total: int, delay: float, unit: str) -> None:
        self.total, self.delay, self.unit = total, delay, unit
        self.done, self.start, self.written = 0, time.monotonic(), False

    def update(self, done: int) -> None:
        self.done += done
        seconds = time.monotonic() - self.start
        if seconds >= self.delay:
            rate = self.done / max(seconds, 1e-9)
            line = f"\rscoring: {self.done}/{self.total} {self.unit}, {rate:.0f}/s "
            print(line, end="", file=sys.stderr, flush=True)
            self.written = True

    def __enter__(self) -> _Plain:
        return self

    def __exit__(self, *_: object) -> None:
        if self.written:
            print(file=sys.stderr)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with rich if it is installed, else in plain columns; an empty header is omitted."""
    if importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(show_header=any(header))
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i in (0, len(header) - 1) else "right")
        for row in rows:
            table.add_row(*map(Text, row))  # Text: brackets in a sample are not markup
        console = Console()
        console.print(Text(title))  # a table's own title would wrap at its width
        console.print(table)
        return
    print(title)
    lines = [header, *rows] if any(header) else rows
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
