"""``acqcore reference``: computes the mean gradient of a reference set for the influence acquisition."""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import get_args

from acqcore.acquisitions import GradientNeed
from acqcore.files import data as data_files
from acqcore.files.parts import check_replaceable
from acqcore.files.table import atomically
from acqcore.files.worker import encode_records, load_student, record_error
from acqcore.literals import Loss
from acqcore.options import output
from acqcore.scoring.gradients import influence_reference
from acqcore.scoring.plan import Plan


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options specific to ``acqcore reference``."""
    add = parser.add_argument
    add("--student", required=True, metavar="M", help="hub id or local path")
    add("--data", required=True, type=Path, metavar="F", help=".jsonl, .csv or .parquet")
    add("--out", required=True, type=output, metavar="F", help="file to write")
    add(
        "--parameters",
        type=lambda text: int(text) if text.isdecimal() else text,
        default="all",
        metavar="P",
        help="which weights: all, trainable, head, or the number of last blocks (default: all)",
    )
    add("--loss", choices=get_args(Loss), default="mean", help="mean or sum over a sample's tokens (default: mean)")
    add("--dim", type=int, default=4096, metavar="N", help="sketch length (default: 4096)")
    add("--seed", type=int, default=0, metavar="N", help="sketch seed (default: 0)")


def run(options: argparse.Namespace) -> int:
    """Compute and write the reference of a file's rows. An unreadable row is an error, as a reference set is small and
    should be complete."""
    GradientNeed(options.parameters, options.loss, dim=options.dim, seed=options.seed)  # raises for invalid ones
    if options.out.is_dir():
        raise ValueError(f"out: expected a file, {options.out} is a folder")
    check_replaceable(options.out, options.data, options.overwrite)
    blocks, present = data_files.scan(options.data, data_files.BLOCK_ROWS, options.limit)
    if not blocks:
        raise ValueError(f"data: {options.data} has no rows")
    columns = data_files.choose_columns(present, options.prompt_column, options.completion_column, options.text_column)
    records = list(islice(data_files.records(options.data), options.limit))
    for record in records:
        if message := record_error(record, columns):
            raise ValueError(data_files.located(options.data, record.line, message))
    student = load_student(options.student, options.dtype, options.device)
    errors: dict[int, str] = {}
    rows = encode_records(records, columns, Plan.of("loss").runner(student), options.max_length, errors)
    for i, message in errors.items():
        raise ValueError(data_files.located(options.data, records[i].line, message))
    reference = influence_reference(
        student, rows,
        parameters=options.parameters, dim=options.dim, seed=options.seed, loss=options.loss,
        batch_tokens=options.batch_tokens, max_length=options.max_length, backend=options.backend,
    )  # fmt: skip
    with atomically(options.out) as temporary:
        reference.save(temporary)
    print(
        f"{reference.n} rows, sketched to {reference.dim} numbers, written to {options.out}; score with --acquisitions "
        f"influence --acquisition-args '{json.dumps({'influence': {'reference': str(options.out)}})}'"
    )
    return 0
