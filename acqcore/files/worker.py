"""Scores blocks of a file in one process: reads and scores a block, then writes its rows and report."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acqcore import checks
from acqcore.files.data import Block, Reader, Record, parse_json
from acqcore.files.parts import Parts
from acqcore.files.table import column_types, write_block
from acqcore.scoring.plan import Plan
from acqcore.scoring.run import Runner
from acqcore.students.loading import DTYPES
from acqcore.students.samples import EMPTY, Row
from acqcore.students.student import Student
from acqcore.students.tables import BESIDE, OPTIONAL

ATTEMPTS = 3  # per block
TOP_ROWS = 5

_PAUSE_S = 1.0  # pause before a retry, so that a file server or a full GPU may recover


@dataclass(frozen=True)
class Job:
    """The request, sent to every scoring process."""

    student: str  # hub id, or absolute path
    data: Path  # absolute
    out: Path  # absolute
    columns: Mapping[str, str]  # data column -> sample key
    kept: Sequence[str]  # every column of the data, in order
    plan: Plan
    max_length: int | None
    dtype: str | None  # a name in ``DTYPES``; None keeps the stored one
    device: str | None  # None for the CPU
    keep_tokens: bool = False  # whether per-token values are written too

    @property
    def of_tokens(self) -> list[str]:
        """Acquisitions whose per-token values are written."""
        return self.plan.of_tokens if self.keep_tokens else []

    @cached_property
    def names(self) -> dict[str, str]:
        """Map data columns to output names; names taken by this run's own columns get the prefix ``data_``."""
        found: dict[str, str] = {}
        own = {"row", *self._own}
        for column in self.kept:
            name = column
            while name in own or name in found.values():
                name = f"data_{name}"
            found[column] = name
        return found

    @cached_property
    def types(self) -> dict[str, Any]:
        """Output column -> type of the data's column, if the data are parquet."""
        return {self.names[column]: kind for column, kind in column_types(self.data).items()}

    @property
    def output_columns(self) -> list[str]:
        return ["row", *self.names.values(), *self._own]

    @property
    def _own(self) -> list[str]:
        return [*self.measured, *self.token_columns, "n_tokens", "valid", "error"]

    @property
    def token_columns(self) -> list[str]:
        """Columns of lists with an entry per scored token."""
        return ["token_ids", *(f"{name}_tokens" for name in self.of_tokens)] if self.keep_tokens else []

    @property
    def measured(self) -> list[str]:
        """Numeric columns: acquisitions, then ``<name>_stderr`` for those with standard errors."""
        return [*self.plan.names, *(f"{name}_stderr" for name in self.plan.estimated)]


class BlockScorer:
    """Scores the blocks of a job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.parts = Parts(job.out)
        self.student = load_student(job.student, job.dtype, job.device)
        if "messages" in job.columns.values() and not getattr(self.student.tokenizer, "chat_template", None):
            raise ValueError(f"student: the tokenizer of {job.student} has no chat template, which messages require")
        self.runner = job.plan.runner(self.student)
        checks.max_length(job.max_length, self.runner.limit)
        self.reader = Reader(job.data)

    def complete(self, block: Block, on_rows: Callable[[int], None] = lambda n: None) -> None:
        """Complete a block, or give it up after ``ATTEMPTS`` attempts, including those of killed processes.

        ``on_rows`` is called with the number of newly completed rows; the numbers add up to the block's rows.
        """
        counted = 0

        def count(rows: int) -> None:
            nonlocal counted
            rows = min(max(rows, counted), block.rows)  # a retry may score some rows again
            on_rows(rows - counted)
            counted = rows

        reason = f"all {ATTEMPTS} processes that scored it died"
        while not self.parts.finished(block.index):
            if self.parts.attempt(block.index) > ATTEMPTS:
                self.parts.fail(block.index, reason)
                break
            try:
                self._score(block, count)
            except Exception as error:  # one block must not stop the others
                reason = f"{traceback.format_exception_only(error)[0].splitlines()[0]}\n\n{traceback.format_exc()}"
                time.sleep(_PAUSE_S)
        count(block.rows)

    def _score(self, block: Block, count: Callable[[int], None]) -> None:
        started = time.time()
        job = self.job
        records = self.reader.read(block)
        errors: dict[int, str] = {}
        rows = encode_records(records, job.columns, self.runner, job.max_length, errors)
        done = self.parts.load(block.index)
        ready = len(done) + sum(row.n_scored == 0 for row in rows)
        new_rows = new_tokens = 0
        count(ready)
        for batch in job.plan.batches(self.runner, rows, done):
            found = torch.cat([batch.values, *(batch.stderr[name][None] for name in job.plan.estimated)]).T
            of_tokens = [[sample[name].tolist() for name in job.of_tokens] for sample in batch.tokens]
            self.parts.append(block.index, batch.indices, found.tolist(), of_tokens if job.keep_tokens else None)
            new_rows += len(batch.indices)
            new_tokens += batch.n_input_tokens
            count(ready + new_rows)
        figures = np.full((len(records), len(job.measured)), np.nan, dtype=np.float32)
        tokens: list[list[list[float]]] = [[[] for _ in job.of_tokens] for _ in records]  # row, acquisition, token
        for i, (row_figures, row_tokens) in self.parts.load(block.index).items():
            figures[i], tokens[i] = row_figures, row_tokens
        n_tokens = np.array([row.n_scored for row in rows], dtype=np.int64)
        lists: dict[str, Sequence[Any]] = {}
        if job.keep_tokens:
            ids = [row.scored.tolist() for row in rows]
            lists = dict(zip(job.token_columns, (ids, *zip(*tokens, strict=True)), strict=True))
        table = _table(job, block, records, figures, lists, n_tokens, errors)
        write_block(self.parts.path(block.index), table, job.types)
        values = figures[:, : len(job.plan.names)]
        valid = np.flatnonzero(np.isfinite(values).all(axis=1))
        top = valid[np.argsort(-values[valid, 0], kind="stable")][:TOP_ROWS]
        columns = values[valid].astype(np.float64).T
        shown = shown_column(job.columns)
        report = {
            "rows": len(records),
            "valid": len(valid),  # rows with a finite value of every acquisition
            "errors": [(records[i].line, message) for i, message in sorted(errors.items())],
            "stats": {  # acquisition -> sum, minimum, maximum over valid rows, if any
                name: (float(column.sum()), float(column.min()), float(column.max()))
                for name, column in zip(job.plan.names, columns, strict=True)
                if len(valid)
            },
            # The highest rows by the first acquisition: value, row of the data from 0, text.
            "top": [(float(values[i, 0]), block.start + int(i), shorten(records[i].values[shown])) for i in top],
            "new_rows": new_rows,  # scored since the last interruption
            "new_tokens": new_tokens,
            "started": started,  # seconds since the epoch
            "ended": time.time(),
            "worker": f"{platform.node()}:{os.getpid()}",
        }
        self.parts.finish(block.index, report)


def load_student(source: str, dtype: str | None, device: str | None) -> Student:
    """Load the student at a hub id or path, which must have a tokenizer; ``dtype`` is a name in ``DTYPES``."""
    if not sys.stderr.isatty() and importlib.util.find_spec("transformers"):
        from transformers.utils import logging

        logging.disable_progress_bar()  # noise in a log file
    student = Student.load(source, dtype=None if dtype is None else DTYPES[dtype], device=device)
    if student.tokenizer is None:
        raise ValueError(f"student: {source} has no tokenizer, which rows of a file require")
    return student


def write_failed(job: Job, block: Block, reason: str) -> None:
    """Write the rows of a block that was given up, without values."""
    try:
        records = Reader(job.data).read(block)
    except Exception:  # possibly the reason why the block failed
        records = [Record(block.line + i, {}) for i in range(block.rows)]
    figures = np.full((block.rows, len(job.measured)), np.nan, dtype=np.float32)
    errors = dict.fromkeys(range(block.rows), f"its block failed: {reason}")
    n_tokens = np.zeros(block.rows, dtype=np.int64)
    lists: dict[str, Sequence[Any]] = {name: [[]] * block.rows for name in job.token_columns}
    table = _table(job, block, records, figures, lists, n_tokens, errors)
    write_block(Parts(job.out).path(block.index), table, job.types)


def _table(
    job: Job,
    block: Block,
    records: Sequence[Record],
    figures: np.ndarray,  # [n, columns of job.measured] float32
    lists: Mapping[str, Sequence[Any]],  # token column -> n lists
    n_tokens: np.ndarray,  # [n] int64
    errors: Mapping[int, str],
) -> dict[str, Any]:
    """The columns of the output, ``n`` rows each."""
    table: dict[str, Any] = {"row": range(block.start, block.start + len(records))}
    for column, name in job.names.items():
        table[name] = [record.values.get(column) for record in records]
    table.update({name: figures[:, a] for a, name in enumerate(job.measured)})
    table.update(lists)
    table["n_tokens"] = n_tokens
    table["valid"] = valid = np.isfinite(figures[:, : len(job.plan.names)]).all(axis=1)
    table["error"] = [errors.get(i, None if valid[i] else "a value is not finite") for i in range(len(records))]
    return table


def record_error(record: Record, columns: Mapping[str, str]) -> str | None:
    """The record's error, or one that names a missing column; None for a good record."""
    missing = [column for column, key in columns.items() if column not in record.values and key not in OPTIONAL]
    return record.error or (f"no column {missing[0]!r}" if missing else None)


def encode_records(
    records: Sequence[Record],
    columns: Mapping[str, str],
    runner: Runner,
    max_length: int | None,
    errors: dict[int, str],
) -> list[Row]:
    """Tokenize records for a runner's student; a bad record becomes an empty row and an entry in ``errors``."""
    errors.update({i: message for i, record in enumerate(records) if (message := record_error(record, columns))})
    good = [i for i in range(len(records)) if i not in errors]
    bad: dict[int, str] = {}
    encoded = runner.encode([sample_of(records[i], columns) for i in good], None, max_length, bad)
    errors.update({good[i]: message.replace("max_length= ", "--max-length ") for i, message in bad.items()})
    rows = [EMPTY] * len(records)
    for i, row in zip(good, encoded, strict=True):
        rows[i] = row
    return rows


def sample_of(record: Record, columns: Mapping[str, str]) -> dict[str, Any]:
    """The record as a sample. Messages, tools and template variables stored as JSON text are parsed, and prompt and
    completion of a csv if both are conversations; in other files their text is text to score."""
    sample = {key: record.values.get(column) for column, key in columns.items()}
    for key in ("messages", *BESIDE):
        value = sample.get(key)
        if value is None and key in BESIDE:
            sample.pop(key, None)
        elif isinstance(value, str):
            with contextlib.suppress(ValueError):
                sample[key] = parse_json(value)
    if record.from_csv and "prompt" in sample:
        turns = {key: _conversation(sample[key]) for key in ("prompt", "completion")}
        if all(turns.values()):
            sample.update(turns)
    return sample


def _conversation(text: Any) -> list[Any] | None:
    """The messages of a JSON text; None if it is anything else, such as a text to score."""
    if not isinstance(text, str) or not text.startswith("["):
        return None
    try:
        found = parse_json(text)
    except ValueError:
        return None
    is_one = all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and ("content" in turn or "tool_calls" in turn)
        for turn in found
    )
    return list(found) if is_one else None


def shown_column(columns: Mapping[str, str]) -> str:
    """The column of the scored text, shown next to the highest rows."""
    return [column for column, key in columns.items() if key not in OPTIONAL][-1]


def shorten(value: Any) -> str:
    """One line of at most 60 characters from a text or a conversation's last message."""
    if isinstance(value, list):
        value = value[-1].get("content") or value[-1].get("tool_calls")
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
