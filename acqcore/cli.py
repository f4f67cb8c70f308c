"""The command line: ``acqcore score`` scores a data file, ``acqcore plan`` tells beforehand what that would take,
``acqcore info`` tells what runs here."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acqcore import __version__, checks, data_files
from acqcore.acquisitions import REGISTRY
from acqcore.backends import backends
from acqcore.data_files import Record
from acqcore.head import Head
from acqcore.parts import Parts
from acqcore.plan import command as plan_command
from acqcore.progress import Progress
from acqcore.samples import Row, encode
from acqcore.score import REDUCTIONS, Request, iterate
from acqcore.student import Student

CHUNK_ROWS = 4096  # tokenized and packed at a time; bounds memory, and costs little packing
_TOP_ROWS = 5
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """One sentence without the usage text."""
        self.exit(2, f"acqcore: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 where no row could be scored, 2 for wrong usage."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except _UsageError as error:
        print(f"acqcore: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("acqcore: interrupted; the same command goes on from the last finished batch", file=sys.stderr)
        return 130


class _UsageError(Exception):
    """Wrong usage; its text is what the user is told."""


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="acqcore", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    score = commands.add_parser("score", help="score the rows of a data file with a student")
    score.set_defaults(command=_score)
    score.add_argument("--student", required=True, metavar="M", help="hub id or local path")
    score.add_argument("--data", required=True, type=Path, metavar="F", help=".jsonl, .csv or .parquet")
    score.add_argument("--out", required=True, type=Path, metavar="F", help=".parquet, .jsonl or .csv")
    score.add_argument(
        "--acquisitions",
        default="entropy",
        metavar="A,B",
        help=f"comma-separated, by default entropy; any of {', '.join(REGISTRY)}",
    )
    score.add_argument("--prompt-column", metavar="C", help="context; with --completion-column")
    score.add_argument("--completion-column", metavar="C", help="what is scored")
    score.add_argument("--text-column", metavar="C", help="scored whole")
    score.add_argument("--reduction", default="mean", help=f"one of {', '.join(REDUCTIONS)}")
    score.add_argument("--topk", type=int, default=8, metavar="N", help="tokens of --reduction topk")
    score.add_argument("--batch-tokens", type=int, default=8192, metavar="N", help="per forward, padded")
    score.add_argument("--max-length", type=int, metavar="N", help="truncate samples to N tokens")
    score.add_argument("--dtype", choices=list(_DTYPES), help="of the weights, by default as stored")
    score.add_argument("--device", metavar="D", help="by default cpu")
    score.add_argument("--backend", metavar="B", help="a name from 'acqcore info'")
    score.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    plan = commands.add_parser("plan", help="memory and time that scoring would take")
    plan.set_defaults(command=_plan)
    plan_command.add_options(plan)
    info = commands.add_parser("info", help="versions and backends")
    info.set_defaults(command=_info)
    return parser


def _info(options: argparse.Namespace) -> int:
    rows = [("python", platform.python_version())]
    rows.append(("acqcore", __version__))
    for name in ("torch", "numpy", "transformers", "peft", "datasets", "trl"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        rows.append((name, version))
    rows.append(("threads", str(torch.get_num_threads())))
    _print_table("versions", ("", ""), rows)
    _print_table(
        "backends, in order of preference",
        ("name", "available", "instruction set", "description"),
        [
            (
                backend.name,
                "yes" if backend.available else f"no: {backend.reason}",
                backend.instruction_set or "",
                backend.description,
            )
            for backend in backends()
        ],
    )
    return 0


def _plan(options: argparse.Namespace) -> int:
    try:
        return plan_command.run(options, _print_table)
    except (ValueError, TypeError, RuntimeError, OSError, ModuleNotFoundError) as error:
        raise _UsageError(str(error).strip().split("\n")[0]) from error


def _score(options: argparse.Namespace) -> int:
    try:
        records, columns, request, student, head, parts = _prepare(options)
    except (ValueError, TypeError, RuntimeError, OSError, ModuleNotFoundError) as error:
        raise _UsageError(str(error).strip().split("\n")[0]) from error
    names = request.acquisitions
    values = np.full((len(records), len(names)), np.nan, dtype=np.float32)
    n_tokens = np.zeros(len(records), dtype=np.int64)
    errors: dict[int, str] = {}
    with Progress(len(records), None, "rows") as bar:
        for chunk, start in enumerate(range(0, len(records), CHUNK_ROWS)):
            stop = min(start + CHUNK_ROWS, len(records))
            rows = _encode(records[start:stop], columns, student, head, options.max_length, start, errors)
            n_tokens[start:stop] = [row.n_scored for row in rows]
            done = parts.load(chunk)
            for i, row_values in done.items():
                values[start + i] = row_values
            bar.update(len(done) + sum(row.n_scored == 0 for row in rows))
            for batch in iterate(student, head, rows, request, done):
                values[[start + i for i in batch.indices]] = batch.values.T.numpy()
                parts.append(chunk, batch.indices, batch.values.T.tolist())
                bar.update(len(batch.indices))
    place = "line" if options.data.suffix == ".jsonl" else "row"
    for i, message in sorted(errors.items()):
        print(f"{options.data}: {place} {records[i].line}: {message}", file=sys.stderr)
    _write(options.out, records, columns, names, values, n_tokens, errors, parts)
    _summary(options, records, columns, names, values, errors)
    return 0 if len(errors) < len(records) or not records else 1


def _prepare(
    options: argparse.Namespace,
) -> tuple[list[Record], dict[str, str], Request, Student, Head, Parts]:
    """Everything that can be wrong with the arguments, the cheap things first."""
    names = [name.strip() for name in options.acquisitions.split(",")]
    request = Request.checked(names, options.reduction, options.topk, options.batch_tokens, options.backend)
    checks.one_pass(request.own_passes)
    if options.limit is not None:
        checks.positive_int("limit", options.limit)
    checks.one_of("extension of " + options.out.name, options.out.suffix, data_files.SUFFIXES)
    checks.parent_folder("out", options.out)
    records = data_files.read(options.data, options.limit)
    columns = data_files.choose_columns(records, options.prompt_column, options.completion_column, options.text_column)
    checks.output_columns(columns, ("row", *names, "n_tokens", "valid", "error"))
    records = [_with_columns(record, columns) for record in records]
    if not sys.stderr.isatty() and importlib.util.find_spec("transformers"):
        from transformers.utils import logging

        logging.disable_progress_bar()  # in a log file they are noise between the messages
    student = Student.load(
        options.student, dtype=_DTYPES[options.dtype] if options.dtype else None, device=options.device
    )
    checks.max_length(options.max_length, student.max_length)
    head = request.fitting_head(student)
    return records, columns, request, student, head, Parts(options.out, _manifest(options, columns))


def _with_columns(record: Record, columns: dict[str, str]) -> Record:
    """The record with an error where it has none of its own but lacks a column."""
    missing = [column for column in columns if column not in record.values]
    if record.error is not None or not missing:
        return record
    return Record(record.line, record.values, f"no column {missing[0]!r}")


def _encode(
    records: Sequence[Record],
    columns: dict[str, str],
    student: Student,
    head: Head,
    max_length: int | None,
    start: int,
    errors: dict[int, str],
) -> list[Row]:
    """Rows of a chunk that begins at row ``start``; those with an entry in ``errors`` are empty."""
    good = [i for i, record in enumerate(records) if record.error is None]
    errors.update({start + i: r.error for i, r in enumerate(records) if r.error is not None})
    samples = [{key: records[i].values[column] for column, key in columns.items()} for i in good]
    bad: dict[int, str] = {}
    encoded = encode(
        samples,
        student.tokenizer,
        vocab_size=head.vocab_size,
        limit=student.max_length,
        max_length=max_length,
        errors=bad,
    )
    errors.update({start + good[i]: message for i, message in bad.items()})
    empty = torch.empty(0, dtype=torch.int64)
    rows = [Row(empty, empty)] * len(records)
    for i, row in zip(good, encoded, strict=True):
        rows[i] = row
    return rows


def _manifest(options: argparse.Namespace, columns: dict[str, str]) -> dict[str, Any]:
    """What decides the numbers and which rows share a batch."""
    digest = hashlib.sha256()
    with options.data.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    keys = ("student", "acquisitions", "reduction", "topk", "batch_tokens", "max_length", "dtype", "device")
    files = sorted(Path(options.student).rglob("*")) if os.path.isdir(options.student) else []
    return {
        **{key: getattr(options, key) for key in (*keys, "backend", "limit")},
        "columns": columns,
        "data": digest.hexdigest(),
        "student_files": [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()],
        "chunk_rows": CHUNK_ROWS,
        "version": __version__,
    }


def _write(
    out: Path,
    records: Sequence[Record],
    columns: dict[str, str],
    names: Sequence[str],
    values: np.ndarray,  # [n, A] float32
    n_tokens: np.ndarray,  # [n] int64
    errors: dict[int, str],
    parts: Parts,
) -> None:
    table: dict[str, Any] = {"row": range(len(records))}
    for column in columns:
        table[column] = [None if i in errors else record.values[column] for i, record in enumerate(records)]
    table.update({name: values[:, a] for a, name in enumerate(names)})
    table["n_tokens"] = n_tokens
    table["valid"] = valid = np.isfinite(values).all(axis=1)
    table["error"] = [errors.get(i, None if valid[i] else "a value is not finite") for i in range(len(records))]
    try:
        data_files.write(out, table)
    except (ValueError, TypeError) as error:
        raise _UsageError(f"{out}: {error}; the scores stay in {parts.folder}, a .jsonl holds them") from error
    parts.remove()


def _summary(
    options: argparse.Namespace,
    records: Sequence[Record],
    columns: dict[str, str],
    names: Sequence[str],
    values: np.ndarray,  # [n, A] float32
    errors: dict[int, str],
) -> None:
    scored = np.flatnonzero(np.isfinite(values).all(axis=1))
    lines = []
    for a, name in enumerate(names):
        column = values[scored, a].astype(np.float64)
        cells = [f"{f(column):.4g}" if len(column) else "" for f in (np.mean, np.min, np.max)]
        lines.append((name, *cells))
    title = f"{len(scored)} of {len(records)} rows scored, written to {options.out}"
    if errors:
        title += f"; {len(errors)} rows with an error"
    _print_table(title, ("acquisition", "mean", "min", "max"), lines)
    top = scored[np.argsort(-values[scored, 0], kind="stable")][:_TOP_ROWS]
    last = list(columns)[-1]
    _print_table(
        f"highest {names[0]}",
        ("row", names[0], last),
        [(str(i), f"{values[i, 0]:.4g}", _shorten(records[i].values[last])) for i in top],
    )


def _shorten(value: Any) -> str:
    """One line of a text, or of a conversation's last message."""
    if not isinstance(value, str):
        value = str(value[-1]["content"])
    value = " ".join(value.split())
    return value if len(value) <= 60 else value[:57] + "..."


def _print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """By rich where it is installed, else in plain columns."""
    if importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left")
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i in (0, len(header) - 1) else "right")
        for row in rows:
            table.add_row(*map(Text, row))  # as Text: brackets in a sample are no markup
        Console().print(table)
        return
    print(title)
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
