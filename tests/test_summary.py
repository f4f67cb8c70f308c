"""Block reports add up to the summary of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from acqcore.files.summary import Summary


def report(**fields: Any) -> dict[str, Any]:
    """Report on two rows with losses of 1 and 3, scored by one process from second 10 to second 12."""
    return {
        "rows": 2,
        "valid": 2,
        "errors": [],
        "stats": {"loss": (4.0, 1.0, 3.0)},
        "top": [(3.0, 1, "b"), (1.0, 0, "a")],
        "new_rows": 2,
        "new_tokens": 50,
        "started": 10.0,
        "ended": 12.0,
        "worker": "here:1",
        **fields,
    }


@pytest.fixture(autouse=True)
def plain_tables(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def test_blocks_add_up(capsys):
    summary = Summary(["loss"], "text")
    summary.add(report(), new=True)
    tops = [(3.0, 2, "c"), (2.0, 3, "d"), (1.5, 4, "e"), (1.25, 5, "f")]
    summary.add(report(rows=5, valid=4, errors=[[9, "bad"]], stats={"loss": (7.75, 1.25, 3.0)}, top=tops), new=False)
    summary.add(report(started=11.0, ended=14.0, worker="there:1", stats={"loss": (9.0, 0.5, 8.5)}, top=[]), new=True)
    summary.add_failed(3)
    summary.print(Path("out.csv"), begun=7.5)
    assert (summary.rows, summary.valid, summary.errors, summary.failed_blocks) == (12, 8, 4, 1)
    assert capsys.readouterr().out.splitlines() == [
        "8 of 12 rows scored, written to out.csv; 4 rows with an error; 1 failed block; rerun the command to retry",
        "acquisition  mean   min  max",
        "loss         2.594  0.5  8.5",
        "highest loss",
        "row  loss  text",
        "1    3     b",
        "2    3     c",
        "3    2     d",
        "4    1.5   e",
        "5    1.25  f",
        "4 rows, 100 tokens in 4.0 s by 2 processes: 1 rows/s, 25 tokens/s (started in 2.5 s)",
    ]


def test_no_row_could_be_scored(capsys):
    summary = Summary(["loss"], "text")
    summary.add(report(valid=0, errors=[[1, "bad"], [2, "bad"]], stats={}, top=[], new_rows=0, new_tokens=0), new=True)
    summary.print(Path("out.csv"), begun=7.5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "0 of 2 rows scored, written to out.csv; 2 rows with an error"
    assert lines[2] == "loss"
    assert lines[-1].startswith("row")
