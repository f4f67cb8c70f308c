"""The ``acqcore`` command line."""

from __future__ import annotations

import argparse
import errno
import hashlib
import importlib.metadata
import io
import os
import platform
import re
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, get_args

import torch

from acqcore import __version__, checks
from acqcore.acquisitions import REGISTRY
from acqcore.backends import NAMES, backends
from acqcore.costs import command as plan_command
from acqcore.files import choose, data as data_files, reference as reference_command
from acqcore.files.data import BLOCK_ROWS, Block, located
from acqcore.files.executors import Executor, executor_of
from acqcore.files.parts import Parts, check_output
from acqcore.files.summary import Summary
from acqcore.files.table import join, keep_top
from acqcore.files.worker import ATTEMPTS, Job, shown_column, write_failed
from acqcore.literals import Reduction
from acqcore.options import at_least, json_value, table_output
from acqcore.progress import print_table, progress_bar
from acqcore.scoring.plan import Plan
from acqcore.students.loading import DTYPES, checked_source

_DESCRIPTION = (
    "Scores data files with a student (score), keeps the best rows (select), computes the reference that influence is "
    "measured against (reference), estimates memory and time (plan), and lists versions and backends (info)."
)


class _Help(argparse.HelpFormatter):
    """Formats each help text as a sentence."""

    def _expand_help(self, action: argparse.Action) -> str:
        text = super()._expand_help(action)
        return text[:1].upper() + text[1:] + "." * (not text.endswith("."))


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options, formatter_class=_Help, allow_abbrev=False)  # --top is not --topk

    def error(self, message: str) -> Any:
        """Exit with one sentence, without the usage text."""
        self.exit(2, f"acqcore: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0; 1 if no row could be scored, a block failed, or stdout or a disk is full; 2 for a usage error;
        130 if interrupted.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # rows and paths may hold what its encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except _UsageError as error:
        # A leading argument is spelled as an option: ``--max-length: expected ...``.
        name = re.split(r"[:\[]", str(error), maxsplit=1)[0]
        message = str(error).replace(name, f"--{name.replace('_', '-')}", 1) if name in vars(options) else str(error)
        print(f"acqcore: error: {message}", file=sys.stderr)
        return 2
    except OSError as error:  # such as a full disk under stdout
        print(f"acqcore: error: {_first_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        resumable = options.command is _score
        result = "the same command resumes after the last finished batch" if resumable else "nothing was written"
        print(f"acqcore: interrupted; {result}", file=sys.stderr)
        return 130


class _UsageError(Exception):
    """A usage error whose text is shown to the user."""


#: Raised for invalid arguments, files or students, and for missing packages.
_WRONG_USAGE = (ValueError, TypeError, RuntimeError, OSError, ImportError)


@contextmanager
def _usage_errors() -> Iterator[None]:
    """Context or decorator that reports invalid arguments, files or students, and missing packages, in one line."""
    try:
        yield
    except _WRONG_USAGE as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EPIPE):
            raise  # a full disk or a closed stdout
        raise _UsageError(_first_line(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="acqcore", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"acqcore {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    score = commands.add_parser("score", help="score the rows of a data file with a student")
    score.set_defaults(command=_score)
    add = score.add_argument
    add("--student", required=True, type=os.path.expanduser, metavar="M", help="hub id or local path")
    add(
        "--out",
        required=True,
        type=table_output,
        metavar="F",
        help=".parquet, .jsonl or .csv; without an extension a folder of parquet files; keeps every column of the data",
    )
    add("--top-k", type=at_least(1), metavar="K", help="write only the top K rows by the first acquisition")
    add(
        "--acquisitions",
        default="entropy",
        metavar="A,B",
        help="comma-separated list (default: entropy); choose from "
        f"{', '.join(name for name, entry in REGISTRY.items() if entry.over != 'set')}",
    )
    _add_scoring_options(score, "set by the engine: cpu or one GPU per process")
    add(
        "--keep-tokens",
        action="store_true",
        help="also write the scored tokens (token_ids) and their values (<acquisition>_tokens) as lists",
    )
    add(
        "--engine",
        choices=["local", "accelerate", "ray"],
        default="local",
        help="run in this process, under 'accelerate launch -m acqcore score ...', or on Ray actors",
    )
    add("--workers", type=at_least(1), metavar="N", help="Ray actors (default: one per GPU)")
    add("--ray-address", metavar="A", help="address of a running Ray cluster (default: start one)")
    add(
        "--block-rows",
        type=at_least(1),
        default=BLOCK_ROWS,
        metavar="N",
        help=f"rows per block, the unit of reading, retrying and writing (default: {BLOCK_ROWS})",
    )
    chosen = commands.add_parser("select", help="choose the rows of a data file that a student would learn most from")
    chosen.set_defaults(command=_usage_errors()(choose.run))
    choose.add_options(chosen)
    _add_scoring_options(chosen, "cpu")
    reference = commands.add_parser("reference", help="compute the reference that influence is measured against")
    reference.set_defaults(command=_usage_errors()(reference_command.run))
    reference_command.add_options(reference)
    _add_sample_options(reference, "cpu")
    plan = commands.add_parser("plan", help="estimate memory and time of scoring")
    plan.set_defaults(command=_usage_errors()(plan_command.run))
    plan_command.add_options(plan)
    info = commands.add_parser("info", help="versions and backends")
    info.set_defaults(command=_usage_errors()(_info))
    return parser


def _add_scoring_options(parser: argparse.ArgumentParser, device: str) -> None:
    """The options of the commands that score the rows of a file."""
    add = parser.add_argument
    add(
        "--data", required=True, type=Path, metavar="F", help="a .jsonl, .csv or .parquet file, or a data set: org/name"
    )
    add("--data-config", metavar="C", help="configuration of a hub data set")
    add("--split", default="train", metavar="S", help="split of a hub data set (default: train)")
    add("--acquisition-args", type=json_value, metavar="JSON", help=plan_command.ARGUMENTS_HELP)
    add("--reduction", default="mean", help=f"reduce token values by {', '.join(get_args(Reduction))} (default: mean)")
    add("--topk", type=int, default=8, metavar="N", help="tokens averaged by --reduction topk (default: 8)")
    _add_sample_options(parser, device)


def _add_sample_options(parser: argparse.ArgumentParser, device: str) -> None:
    """The options of the commands that run a student on the rows of a file; ``device`` names the default."""
    add = parser.add_argument
    add("--overwrite", action="store_true", help="replace an existing --out")
    add("--prompt-column", metavar="C", help="column with the context; needs --completion-column")
    add("--completion-column", metavar="C", help="column with the scored text")
    add("--text-column", metavar="C", help="column with text to score in full")
    add("--batch-tokens", type=int, default=8192, metavar="N", help="maximum padded tokens per forward (default: 8192)")
    add("--max-length", type=at_least(2), metavar="N", help="truncate samples to N tokens")
    add("--dtype", choices=list(DTYPES), help="dtype of the weights (default: as stored)")
    add("--device", metavar="D", help=f"device (default: {device})")
    add("--backend", choices=NAMES, help="backend; 'acqcore info' describes them")
    add("--limit", type=at_least(1), metavar="N", help="read only the first N rows")


def _info(options: argparse.Namespace) -> int:
    rows = [("python", platform.python_version()), ("acqcore", __version__)]
    for name in ("torch", "numpy", "transformers", "peft", "datasets", "trl", "accelerate", "ray"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        rows.append((name, version))
    rows.append(("threads", str(torch.get_num_threads())))
    print_table("versions", ("", ""), rows)
    found = [
        (row.name, "yes" if row.available else f"no: {row.reason}", row.instruction_set or "", row.description)
        for row in backends()
    ]
    print_table("backends, in order of preference", ("name", "available", "instruction set", "description"), found)
    return 0


def _score(options: argparse.Namespace) -> int:
    begun = time.time()
    parts = Parts(options.out.absolute())
    try:
        with _usage_errors():
            job, blocks, manifest = _prepare(options, parts)
            executor = executor_of(options.engine, options.workers, options.ray_address, options.device)
            if executor.reports:
                parts.claim(manifest)
        return _run(options, job, blocks, executor, parts, begun)
    except (_UsageError, OSError):
        with suppress(ValueError, OSError):  # another process's folder, an impossible name
            parts.remove_unclaimed()
        raise
    finally:
        parts.release()


def _run(
    options: argparse.Namespace, job: Job, blocks: Sequence[Block], executor: Executor, parts: Parts, begun: float
) -> int:
    pending = [block for block in blocks if not parts.finished(block.index)]
    n_rows, left = sum(block.rows for block in blocks), sum(block.rows for block in pending)
    with progress_bar(n_rows, None if executor.reports else False, "rows") as bar:
        bar.update(n_rows - left)
        try:
            executor.run(job, pending, bar.update)
        except Exception as error:  # a student's files may raise anything; errors of blocks are recorded instead
            if executor.reports:
                parts.remove_unused()
            kind = "" if isinstance(error, _WRONG_USAGE) else f"{type(error).__name__}: "
            raise _UsageError(kind + _first_line(error)) from error
    if not executor.reports:
        return 0
    try:
        summary = _collect(options, job, parts, blocks, {block.index for block in pending})
        written = [parts.path(block.index) for block in blocks]
        if options.top_k is not None:
            written = keep_top(written, options.top_k, job.plan.names[0], job.output_columns)
        join(written, job.out, job.output_columns)
    except OSError as error:
        raise _UsageError(f"{options.out}: {_first_line(error)}; the scores are kept in {parts.folder}") from error
    if not summary.failed_blocks:
        parts.remove()
    summary.print(options.out, begun, options.top_k)
    return 1 if summary.failed_blocks or not summary.valid else 0


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error).strip().split("\n")[0] or type(error).__name__


def _prepare(options: argparse.Namespace, parts: Parts) -> tuple[Job, list[Block], dict[str, Any]]:
    """The job, its blocks and its manifest. Checks every argument before any weights are read, cheapest first."""
    names = [name.strip() for name in options.acquisitions.split(",")]
    plan = Plan.of(
        names, options.acquisition_args,
        reduction=options.reduction, topk=options.topk, batch_tokens=options.batch_tokens, backend=options.backend,
    )  # fmt: skip
    plan.sample_by_sample("call acqcore.score from Python")
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if n_processes > 1 and options.engine != "accelerate":
        raise ValueError(
            f"engine: {n_processes} processes were launched, expected --engine accelerate, got {options.engine}"
        )
    for option, value in (("--workers", options.workers), ("--ray-address", options.ray_address)):
        if value is not None and options.engine != "ray":
            raise ValueError(f"{option}: requires --engine ray, got --engine {options.engine}")
    if options.engine == "ray" and options.device not in (None, "cpu", "cuda"):
        raise ValueError(
            f"device: expected cpu or cuda with --engine ray, which assigns each worker's device, got {options.device}"
        )
    checked_source(options.student)
    if options.engine != "ray":  # whose workers may have other devices
        checks.device("device", options.device)
    check_output(options.out, options.data, options.overwrite or parts.begun)
    data = data_files.local_file(options.data, options.data_config, options.split, parts.folder)
    blocks, present = data_files.scan(data, options.block_rows, options.limit)
    if not blocks:
        raise ValueError(f"data: {options.data} has no rows")
    columns = data_files.choose_columns(present, options.prompt_column, options.completion_column, options.text_column)
    job = Job(
        student=os.path.abspath(options.student) if os.path.isdir(options.student) else options.student,
        data=data.absolute(),
        out=options.out.absolute(),
        columns=columns,
        kept=present,
        plan=plan,
        max_length=options.max_length,
        dtype=options.dtype,
        device=options.device,
        keep_tokens=options.keep_tokens,
    )
    return job, blocks, _manifest(options, data, columns, parts.folder)


def _manifest(options: argparse.Namespace, data: Path, columns: dict[str, str], parts: Path) -> dict[str, Any]:
    """Everything that values and batches depend on; the engine is not part of it."""
    keys = (
        "student", "acquisitions", "acquisition_args", "reduction", "topk", "batch_tokens", "max_length", "dtype",
        "device", "backend", "limit", "block_rows", "keep_tokens",
    )  # fmt: skip
    return {
        **{key: getattr(options, key) for key in keys},
        "columns": columns,
        "data": _content(data, parts),
        "student_files": _content(Path(options.student), parts),
        "argument_files": {path: _content(Path(path), parts) for path in _paths(options.acquisition_args)},
        "version": __version__,
    }


def _content(path: Path, parts: Path) -> str | list[list[Any]]:
    """The digest of a file, or the sizes and times of a folder's files outside ``parts``."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return data_files.listing(path, parts)


def _paths(value: Any) -> Iterator[str]:
    """The names of existing files and folders within a JSON value."""
    if isinstance(value, str):
        if os.path.exists(path := os.path.expanduser(value)):
            yield path
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _paths(part)


def _collect(
    options: argparse.Namespace, job: Job, parts: Parts, blocks: Sequence[Block], new: Collection[int]
) -> Summary:
    """Summary of all blocks. Reports rows that could not be scored and marks the rows of failed blocks."""
    summary = Summary(job.plan.names, shown_column(job.columns))
    for block in blocks:
        report = parts.report(block.index)
        if report is not None:
            for line, message in report["errors"]:
                print(located(options.data, line, message), file=sys.stderr)
            summary.add(report, block.index in new)
            continue
        failure = parts.failure(block.index)
        reason = failure.read_text(encoding="utf-8").splitlines()[0]
        print(
            f"{options.data}: rows {block.start} to {block.start + block.rows - 1} of the output failed {ATTEMPTS} "
            f"times: {reason}; details in {failure}",
            file=sys.stderr,
        )
        write_failed(job, block, reason)
        summary.add_failed(block.rows)
    return summary
