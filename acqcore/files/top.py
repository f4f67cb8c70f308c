"""Selects the rows with the highest values from blocks on disk."""

from __future__ import annotations

import csv
import heapq
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def keep_top(blocks: Sequence[Path], k: int, name: str, columns: Sequence[str], folder: Path) -> list[Path]:
    """Write the ``k`` rows with the largest values of acquisition ``name`` to parts in ``folder``, in the order of
    ``blocks``, which are files from ``write_block``.

    Ties keep the earlier rows; rows without a value are dropped. Memory holds ``k`` values and one block.
    """

    def values() -> Iterator[tuple[float, int, int]]:
        for b, block in enumerate(blocks):
            for r, value in enumerate(_column(block, name, columns)):
                if math.isfinite(value):
                    yield value, -b, -r

    kept: dict[int, list[int]] = {}
    for _, b, r in heapq.nlargest(k, values()):
        kept.setdefault(-b, []).append(-r)
    if not kept:
        kept = {0: []}  # an output without rows still has columns
    return [_write(blocks[b], sorted(rows), folder / blocks[b].name) for b, rows in sorted(kept.items())]


def _column(block: Path, name: str, columns: Sequence[str]) -> Iterator[float]:
    """The values of a column, NaN where missing."""
    if block.suffix == ".parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(block) as file:
            cells: list[Any] = file.read(columns=[name]).column(0).to_pylist()
        yield from (math.nan if cell is None else cell for cell in cells)
        return
    place = list(columns).index(name)
    for row in _texts(block):
        if block.suffix == ".jsonl":
            value = json.loads(row)[name]
            yield math.nan if value is None else value
        else:
            yield float(next(csv.reader([row]))[place] or "nan")


def _texts(block: Path) -> Iterator[str]:
    """The text of each row; a csv row may span several lines."""
    with block.open(newline="", encoding="utf-8") as file:
        if block.suffix == ".jsonl":
            yield from file
            return
        held: list[str] = []

        def lines() -> Iterator[str]:
            for line in file:
                held.append(line)
                yield line

        for _ in csv.reader(lines()):
            yield "".join(held)
            held.clear()


def _write(block: Path, rows: list[int], out: Path) -> Path:
    if block.suffix == ".parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(block) as file:
            pyarrow.parquet.write_table(file.read().take(rows), out)
        return out
    wanted = set(rows)
    with out.open("w", newline="", encoding="utf-8") as text:
        text.writelines(row for i, row in enumerate(_texts(block)) if i in wanted)
    return out
