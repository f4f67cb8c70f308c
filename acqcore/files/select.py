"""``acqcore select``: the rows of a scored file that are worth most."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from acqcore import checks
from acqcore.files.data import records, scan
from acqcore.files.output import check_output
from acqcore.files.table import join, write_block
from acqcore.selection.subsets import select


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``acqcore select``."""
    parser.add_argument("--data", required=True, type=Path, metavar="F", help=".jsonl, .csv or .parquet with scores")
    parser.add_argument("--by", required=True, metavar="C", help="column of the scores; larger is better")
    parser.add_argument("--count", required=True, type=int, metavar="N", help="rows to keep")
    parser.add_argument("--lowest", action="store_true", help="keep the rows of the lowest scores instead")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="F", help=".parquet, .jsonl or .csv; the best row comes first"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out")


def run(options: argparse.Namespace) -> int:
    """Write the rows and say how many they are. A row without a number as its score is never kept.

    Raises:
        ValueError, TypeError, OSError, ModuleNotFoundError: the first line is for the user.
    """
    checks.positive_int("count", options.count)
    check_output(options.out, options.data, options.overwrite)
    if not options.out.suffix:
        raise ValueError(f"out: expected a name with an extension, got {options.out}")
    _, columns = scan(options.data, 1 << 20, None)
    checks.one_of("by", options.by, columns)
    rows = [record.values for record in records(options.data)]
    scores = torch.tensor([_number(values.get(options.by)) for values in rows], dtype=torch.float64)
    scored = int(scores.isfinite().sum())
    if options.count > scored:
        raise ValueError(
            f"count: expected at most {scored}, the rows with a score in {options.by!r}, got {options.count}"
        )
    scores = (-scores if options.lowest else scores).where(scores.isfinite(), torch.nan)
    chosen = [rows[i] for i in select(scores, options.count).tolist()]
    part = options.out.with_name(f".{options.out.name}.{os.getpid()}{options.out.suffix}")
    write_block(part, {column: [values.get(column) for values in chosen] for column in columns})
    join([part], options.out, columns)
    part.unlink()
    print(f"{len(chosen)} of {len(rows)} rows written to {options.out}")
    return 0


def _number(value: object) -> float:
    """NaN for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return float("nan")
    try:
        return float(value)
    except (ValueError, OverflowError):
        return float("nan")
