"""Aggregates the reports of blocks into the summary of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from acqcore.files.worker import TOP_ROWS
from acqcore.progress import print_table


class Summary:
    """Aggregates block reports in constant memory.

    Args:
        acquisitions: names, in order.
        shown: column whose text is shown next to the highest rows.
    """

    def __init__(self, acquisitions: Sequence[str], shown: str) -> None:
        self.acquisitions, self.shown = acquisitions, shown
        self.rows = self.valid = self.errors = self.failed_blocks = 0
        self._stats = dict.fromkeys(acquisitions, (0.0, math.inf, -math.inf))
        self._top: list[tuple[float, int, str]] = []
        self._new_rows = self._new_tokens = 0
        self._started, self._ended = math.inf, 0.0
        self._workers: set[str] = set()

    def add(self, report: Mapping[str, Any], new: bool) -> None:
        """Add a report of ``acqcore.files.worker``; ``new`` if this run finished the block."""
        self.rows += report["rows"]
        self.valid += report["valid"]
        self.errors += len(report["errors"])
        for name, (total, least, largest) in report["stats"].items():
            so_far = self._stats[name]
            self._stats[name] = so_far[0] + total, min(so_far[1], least), max(so_far[2], largest)
        top = [*self._top, *((value, row, text) for value, row, text in report["top"])]
        self._top = sorted(top, key=lambda entry: (-entry[0], entry[1]))[:TOP_ROWS]
        if new:
            self._new_rows += report["new_rows"]
            self._new_tokens += report["new_tokens"]
            self._started = min(self._started, report["started"])
            self._ended = max(self._ended, report["ended"])
            self._workers.add(report["worker"])

    def add_failed(self, rows: int) -> None:
        """Add a block of ``rows`` rows that was given up."""
        self.rows += rows
        self.errors += rows
        self.failed_blocks += 1

    def print(self, out: Path, begun: float, top_k: int | None = None) -> None:
        """Print tables of the values and the highest rows, and the throughput of a run that started at ``begun``
        (seconds since the epoch); ``top_k`` is the requested number of rows."""
        written = "" if top_k is None else f"the {min(top_k, self.valid)} highest "
        title = f"{self.valid} of {self.rows} rows scored, {written}written to {out}"
        if self.errors:
            title += f"; {_count(self.errors, 'row')} with an error"
        if self.failed_blocks:
            title += f"; {_count(self.failed_blocks, 'failed block')}; rerun the command to retry"
        lines = []
        for name, (total, least, largest) in self._stats.items():
            figures = (total / self.valid, least, largest) if self.valid else ()
            lines.append((name, *(f"{figure:.4g}" for figure in figures), *[""] * (3 - len(figures))))
        print_table(title, ("acquisition", "mean", "min", "max"), lines)
        first = self.acquisitions[0]
        print_table(
            f"highest {first}",
            ("row", first, self.shown),
            [(str(row), f"{value:.4g}", text) for value, row, text in self._top],
        )
        if self._new_rows:
            seconds = max(self._ended - self._started, 1e-3)
            print(
                f"{self._new_rows} rows, {self._new_tokens} tokens in {seconds:.1f} s by "
                f"{_count(len(self._workers), 'process', 'es')}: {self._new_rows / seconds:.0f} rows/s, "
                f"{self._new_tokens / seconds:.0f} tokens/s (started in {max(self._started - begun, 0.0):.1f} s)"
            )


def _count(n: int, what: str, plural: str = "s") -> str:
    return f"{n} {what}{plural if n > 1 else ''}"
