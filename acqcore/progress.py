"""A progress bar on stderr, by tqdm if it is installed, and tables on stdout, by rich if it is installed."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Sequence

_DELAY_S = 3.0  # delay before the bar appears by default


class Progress:
    """Reports progress on stderr.

    Args:
        total: units of work.
        show: True or False; None shows the bar on terminals only, after a few seconds.
        unit: name of the unit.
    """

    def __init__(self, total: int, show: bool | None, unit: str = "tokens") -> None:
        wanted = sys.stderr.isatty() if show is None else show
        delay = _DELAY_S if show is None else 0.0
        self._bar: _Plain | None = None
        if wanted and importlib.util.find_spec("tqdm"):
            from tqdm import tqdm  # type: ignore[import-untyped]

            self._bar = tqdm(total=total, desc="scoring", unit=f" {unit}", unit_scale=True, delay=delay)
        elif wanted:
            self._bar = _Plain(total, delay, unit)

    def update(self, done: int) -> None:
        """Count ``done`` more units."""
        if self._bar is not None:
            self._bar.update(done)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


class _Plain:
    """One line, rewritten in place."""

    def __init__(self, total: int, delay: float, unit: str) -> None:
        self.total, self.unit, self.done, self.written = total, unit, 0, False
        self.start = time.monotonic()
        self.visible_from = self.start + delay

    def update(self, done: int) -> None:
        self.done += done
        now = time.monotonic()
        if now >= self.visible_from:
            rate = self.done / max(now - self.start, 1e-9)
            print(
                f"\rscoring: {self.done}/{self.total} {self.unit}, {rate:.0f}/s ", end="", file=sys.stderr, flush=True
            )
            self.written = True

    def close(self) -> None:
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
