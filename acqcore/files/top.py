"""The rows of largest value, of blocks that are on disk."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from acqcore.files.data import join_tables, read_part


def write_top(blocks: Iterable[Path], k: int, name: str, columns: Sequence[str], out: Path) -> None:
    """Write the ``k`` rows with the largest values of acquisition ``name`` as one block, the largest first.

    Equal values stay in input order; rows without a value are left out. At most ``k`` rows and one block are in memory.

    Args:
        blocks: parts that ``write_block`` wrote, in order; their extension is that of ``out``.
        columns: of the parts.
    """
    if out.suffix == ".parquet":
        _write_parquet(blocks, k, name, out)
        return
    place = list(columns).index(name)
    best: list[tuple[float, str]] = []
    for block in blocks:
        with block.open(newline="", encoding="utf-8") as file:
            rows = _csv(file, place) if out.suffix == ".csv" else _jsonl(file, name)
            best += [(value, row) for value, row in rows if math.isfinite(value)]
        best = sorted(best, key=lambda pair: -pair[0])[:k]  # stable
    with out.open("w", newline="", encoding="utf-8") as file:
        file.writelines(row for _, row in best)


def _jsonl(file: Iterable[str], name: str) -> Iterable[tuple[float, str]]:
    """Value and line of each row."""
    for line in file:
        value = json.loads(line)[name]
        yield math.nan if value is None else value, line


def _csv(file: Iterable[str], place: int) -> Iterable[tuple[float, str]]:
    """Value and text of each row, which may span lines."""
    held: list[str] = []

    def lines() -> Iterable[str]:
        for line in file:
            held.append(line)
            yield line

    for cells in csv.reader(lines()):
        yield float(cells[place] or "nan"), "".join(held)
        held.clear()


def _write_parquet(blocks: Iterable[Path], k: int, name: str, out: Path) -> None:
    import numpy as np
    import pyarrow.parquet

    best: Any = None
    for block in blocks:
        table = read_part(block)
        best = table if best is None else join_tables([best, table])
        values = best.column(name).to_numpy()
        order = np.argsort(-values, kind="stable")  # NaN sorts last
        best = best.take(order[np.isfinite(values[order])][:k])
    pyarrow.parquet.write_table(best, out)
