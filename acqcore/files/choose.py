"""``acqcore select``: chooses the rows of a data file that a student would learn most from."""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args

import torch

from acqcore import checks
from acqcore.acquisitions import REGISTRY
from acqcore.files import data as data_files
from acqcore.files.data import Record, located
from acqcore.files.parts import check_output
from acqcore.files.table import column_types, write_rows
from acqcore.files.worker import TOP_ROWS, encode_records, load_student, record_error, shorten, shown_column
from acqcore.literals import Method
from acqcore.options import at_least, table_output
from acqcore.progress import print_table
from acqcore.scoring.api import score
from acqcore.scoring.gradients import badge_embedding
from acqcore.scoring.plan import Plan
from acqcore.scoring.prompts import prompt_embedding
from acqcore.scoring.run import Runner
from acqcore.selection.subsets import select
from acqcore.selection.trust import label_trust
from acqcore.students.samples import Row
from acqcore.students.student import Student

POOL_FACTOR = 4  #: candidates of a diverse method per requested row

_RANK = "rank"
_OF_STUDENT = (
    "acquisition_args", "prompt_column", "completion_column", "text_column", "max_length", "dtype", "device", "backend",
)  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options specific to ``acqcore select``."""
    add = parser.add_argument
    add("--student", metavar="M", help="hub id or local path; not needed if --signal is a column of the data")
    add("--out", required=True, type=table_output, metavar="F", help=".jsonl, .csv or .parquet")
    add("--n", required=True, type=at_least(1), metavar="N", help="number of rows to choose")
    add(
        "--signal",
        metavar="A",
        help="acquisition to rank by, see 'acqcore score --help'; without --student, a numeric column of the data",
    )
    add(
        "--method",
        default="top_k",
        help=f"one of {', '.join(get_args(Method))} (default: top_k, the highest signal); the others choose diverse "
        "rows by their BADGE embeddings",
    )
    add(
        "--among",
        type=at_least(1),
        metavar="N",
        help=f"number of highest-signal rows that a diverse method chooses from (default: {POOL_FACTOR} times --n, or "
        "all rows without --signal)",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of --method badge (default: 0)")
    add(
        "--label-column",
        metavar="C",
        help="with --method top_k: column of possibly wrong labels; chooses rows whose label agrees with the labels of "
        "similar prompts, one of each label in turn, and adds other rows only to reach --n",
    )


def run(options: argparse.Namespace) -> int:
    """Choose rows and write them in the order of the data.

    Input columns are kept unchanged. New columns are ``row`` (from 0, unless the data have such a column), the signal,
    and ``rank``, the order of choice from 1: with the same candidates, a smaller --n chooses the first rows by rank.
    Rows that cannot be read or scored are reported on stderr and skipped. Ties go to the earlier row. Everything that
    does not depend on the student is checked before it is loaded.
    """
    _check(options)
    with tempfile.TemporaryDirectory(prefix="acqcore-") as folder:
        data = data_files.local_file(options.data, options.data_config, options.split, Path(folder))
        pool = _read(options, data)
        if options.student is not None and options.signal is not None:
            _score(options, pool)
        picked = _pick(options, pool)
        _write(options, data, pool, picked)
    _report(options, pool, picked)
    return 0


@dataclass
class _Pool:
    """All rows of the data; ``indices`` are those that can be chosen, and ``rows`` and ``signal`` belong to them.

    Without a student, ``rows``, ``student`` and ``shown`` are not set; without --signal, ``signal`` stays empty.
    """

    records: list[Record]
    columns: list[str]
    errors: dict[int, str] = field(default_factory=dict)
    indices: list[int] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    signal: list[Any] = field(default_factory=list)  # finite numbers
    student: Student = field(init=False)
    shown: str = field(init=False)  # column of the scored text


def _check(options: argparse.Namespace) -> None:
    """Check what does not depend on the data."""
    checks.literal("method", options.method, Method)
    checks.seed(options.seed)
    diverse = options.method != "top_k"
    if options.student is None and (diverse or options.signal is None):
        raise ValueError("--student: expected a model, or --signal with a column of the data and --method top_k")
    if not diverse and options.signal is None:
        raise ValueError("--signal: required with --method top_k")
    if options.among is not None:
        if not diverse or options.signal is None:
            raise ValueError("--among: requires --signal and a diverse --method")
        if options.among < options.n:
            raise ValueError(f"--among: expected at least --n = {options.n}, got {options.among}")
    if options.label_column is not None and (diverse or options.student is None):
        raise ValueError("--label-column: requires --student and --method top_k")
    for name in _OF_STUDENT if options.student is None else ():
        if getattr(options, name) is not None:
            raise ValueError(f"{name}: requires --student")
    if options.student is not None:
        if options.signal is not None:
            checks.one_of("signal", options.signal, REGISTRY)
        Plan.of(
            options.signal or "entropy", options.acquisition_args,
            reduction=options.reduction, topk=options.topk, batch_tokens=options.batch_tokens, backend=options.backend,
        )  # fmt: skip
    data_files.check_extension(options.out)
    check_output(options.out, options.data, options.overwrite)


def _read(options: argparse.Namespace, data: Path) -> _Pool:
    """Read and tokenize the rows; raises before any forward if there are too few."""
    blocks, present = data_files.scan(data, data_files.BLOCK_ROWS, options.limit)
    if not blocks:
        raise ValueError(f"data: {options.data} has no rows")
    count = sum(block.rows for block in blocks)
    checks.at_most("n", options.n, count, f"the number of rows of {options.data}")
    for column in (_RANK, *([options.signal] if options.student is not None else [])):
        if column in present:
            raise ValueError(f"data: the column {column!r} has the name of an output column; rename it")
    reader = data_files.Reader(data)
    pool = _Pool([record for block in blocks for record in reader.read(block)], present)
    if options.student is None:
        _read_column(options, pool)
    else:
        _tokenize(options, pool)
    _reject(options, pool, pool.errors)
    checks.at_most("n", options.n, len(pool.indices), "the number of rows that can be chosen")
    return pool


def _read_column(options: argparse.Namespace, pool: _Pool) -> None:
    name = options.signal
    if name not in pool.columns:
        raise ValueError(
            f"signal: no column {name!r} in the data (columns: {', '.join(pool.columns) or 'none'}); "
            "pass --student to compute it"
        )
    for index, record in enumerate(pool.records):
        message = record_error(record, {name: "score"})
        number = None if message else _number(record.values[name])
        if number is None:
            pool.errors[index] = message or f"{name}: expected a finite number, got {record.values[name]!r:.60}"
        else:
            pool.indices.append(index)
            pool.signal.append(number)


def _number(value: Any) -> Any:
    """The value as a finite number, else None. Ints and decimals are kept, because floats round beyond 2**53."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = int(value)
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        number = value if isinstance(value, int | Decimal) else float(value)
        return number if math.isfinite(number) else None
    return None


def _tokenize(options: argparse.Namespace, pool: _Pool) -> None:
    of_label = options.label_column
    if of_label is not None and of_label not in pool.columns:
        raise ValueError(f"label_column: no column {of_label!r} in the data, only {', '.join(pool.columns)}")
    columns = data_files.choose_columns(
        pool.columns, options.prompt_column, options.completion_column, options.text_column
    )
    pool.shown = shown_column(columns)
    pool.student = load_student(options.student, options.dtype, options.device)
    runner = Runner(pool.student, (), options.batch_tokens, options.backend)
    rows = encode_records(pool.records, columns, runner, options.max_length, pool.errors)
    for index, record in enumerate(pool.records if of_label is not None else ()):
        label = record.values.get(of_label)
        if index not in pool.errors and _label(label) is None:
            pool.errors[index] = f"{of_label}: expected a string or an int, got {label!r:.60}"
    pool.indices = [i for i in range(len(rows)) if i not in pool.errors]
    pool.rows = [rows[i] for i in pool.indices]


def _label(value: Any) -> str | None:
    """A label's name; None for an empty string, such as a missing csv cell, and for other types. A float that is an
    integer counts as one, because tables with missing cells store ints as floats."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) or None if isinstance(value, str | int) else None


def _reject(options: argparse.Namespace, pool: _Pool, errors: Mapping[int, str]) -> None:
    """Report rows that cannot be chosen."""
    pool.errors.update(errors)
    for index, message in sorted(errors.items()):
        print(located(options.data, pool.records[index].line, message), file=sys.stderr)


def _score(options: argparse.Namespace, pool: _Pool) -> None:
    """Compute the signal; rows without a finite value can no longer be chosen."""
    errors: dict[int, str] = {}
    scores = score(
        pool.student, pool.rows, options.signal,
        acquisition_args=options.acquisition_args, reduction=options.reduction, topk=options.topk,
        batch_tokens=options.batch_tokens, backend=options.backend, errors=errors,
    )  # fmt: skip
    values = scores[options.signal].tolist()
    nan = [i for i, value in enumerate(values) if math.isnan(value)]
    bad = {pool.indices[i]: errors.get(i, "a value is not finite") for i in nan}
    _reject(options, pool, bad)
    keep = [i for i, index in enumerate(pool.indices) if index not in bad]
    pool.indices, pool.rows = [pool.indices[i] for i in keep], [pool.rows[i] for i in keep]
    pool.signal = [values[i] for i in keep]
    checks.at_most("n", options.n, len(keep), "the number of rows with a finite value")


def _pick(options: argparse.Namespace, pool: _Pool) -> list[int]:
    """Chosen positions among the rows that can be chosen, in order of choice."""
    ranked = sorted(range(len(pool.signal)), key=pool.signal.__getitem__, reverse=True)  # keeps the order of equals
    if options.method != "top_k":
        most = options.among or POOL_FACTOR * options.n
        among = sorted(ranked[:most]) if pool.signal else list(range(len(pool.indices)))
        vectors = badge_embedding(
            pool.student, [pool.rows[i] for i in among], batch_tokens=options.batch_tokens, backend=options.backend
        )
        finite = vectors.isfinite().all(dim=1)
        bad = [pool.indices[i] for i, whole in zip(among, finite, strict=True) if not whole]
        _reject(options, pool, dict.fromkeys(bad, "its gradient is not finite"))
        among = [i for i, whole in zip(among, finite, strict=True) if whole]
        checks.at_most("n", options.n, len(among), "the number of rows with a finite gradient")
        return [among[i] for i in select(vectors[finite], options.n, options.method, seed=options.seed).tolist()]
    if options.label_column is None:
        return ranked[: options.n]
    names = [str(_label(pool.records[i].values[options.label_column])) for i in pool.indices]
    number = {name: i for i, name in enumerate(sorted(set(names)))}
    labels = torch.tensor([number[name] for name in names])
    vectors = prompt_embedding(
        pool.student, pool.rows, batch_tokens=options.batch_tokens, max_length=options.max_length
    )
    trust = label_trust(vectors, labels)
    agree = int((trust > 0).sum())
    rest = f"; {options.n - agree} of the chosen rows are not trusted" if agree < options.n else ""
    print(f"{agree} of {len(trust)} labels agree with those of similar prompts{rest}", file=sys.stderr)
    return select(torch.tensor(pool.signal), options.n, labels=labels, trust=trust).tolist()


def _write(options: argparse.Namespace, data: Path, pool: _Pool, picked: Sequence[int]) -> None:
    extra: dict[int, dict[str, Any]] = {}
    for place, i in enumerate(picked, 1):
        value = {} if options.student is None or not pool.signal else {options.signal: pool.signal[i]}
        extra[pool.indices[i]] = {**value, _RANK: place}
    number = [] if "row" in pool.columns else ["row"]
    rows = [{**dict.fromkeys(number, i), **pool.records[i].values, **extra[i]} for i in sorted(extra)]
    write_rows(options.out, rows, [*number, *pool.columns, *next(iter(extra.values()))], column_types(data))


def _report(options: argparse.Namespace, pool: _Pool, picked: Sequence[int]) -> None:
    title = f"{len(picked)} of {len(pool.records)} rows chosen by {options.method}"
    if pool.errors:
        title += f"; {len(pool.errors)} row{'s' if len(pool.errors) > 1 else ''} with an error"
    title += f"; written to {options.out}"
    if not pool.signal:
        print_table(title, ("rows", "number"), [("chosen", str(len(picked))), ("pool", str(len(pool.indices)))])
        return
    lines = []
    for name, values in (("chosen", [pool.signal[i] for i in picked]), ("pool", pool.signal)):
        figures = statistics.mean(values), min(values), max(values)
        lines.append((name, str(len(values)), *(f"{float(figure):.4g}" for figure in figures)))
    print_table(title, (options.signal, "rows", "mean", "min", "max"), lines)
    if options.student is not None:
        first = [(pool.indices[i], pool.signal[i]) for i in picked[:TOP_ROWS]]
        print_table(
            "first choices",
            ("row", options.signal, pool.shown),
            [(str(i), f"{value:.4g}", shorten(pool.records[i].values[pool.shown])) for i, value in first],
        )
