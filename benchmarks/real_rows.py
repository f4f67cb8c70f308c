"""Rows of five public data sets as samples for ``acqcore.score``: a prompt and a scored completion.

=========  ======================  ==================================  =======================
name       prompt                  completion                          file
=========  ======================  ==================================  =======================
GSM8K      the question            the worked answer                   math/gsm8k_test.jsonl
PubMedQA   the question alone      the long answer                     medical/pubmedqa_test.jsonl
MBPP       the task                the program                         code/mbpp.jsonl
BANKING77  the customer's message  its intent in words, ~4 tokens      intents/banking77_test.jsonl
CLINC150   the user's message      its intent in words, ~3 tokens      intents/clinc150_test.jsonl
=========  ======================  ==================================  =======================
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import acqcore

#: Folder with the files of the table, as published.
FOLDER = Path(os.environ.get("ACQCORE_DATA", "../shared/data"))

SHORT = ("BANKING77", "CLINC150")  #: data sets with completions of a few tokens


@dataclass(frozen=True)
class DataSet:
    """A file under ``FOLDER``, and a function from its record to prompt and completion."""

    file: str
    read: Callable[[Mapping[str, Any]], tuple[str, str]]


def _intent(record: Mapping[str, Any]) -> tuple[str, str]:
    return f"{record['text']}\nIntent:", " " + record["intent"].replace("_", " ")


SETS: dict[str, DataSet] = {
    "GSM8K": DataSet("math/gsm8k_test.jsonl", lambda r: (r["question"] + "\n", r["answer"])),
    "PubMedQA": DataSet("medical/pubmedqa_test.jsonl", lambda r: (r["question"] + "\n", r["long_answer"])),
    "MBPP": DataSet("code/mbpp.jsonl", lambda r: (r["text"] + "\n", r["code"])),
    "BANKING77": DataSet("intents/banking77_test.jsonl", _intent),
    "CLINC150": DataSet("intents/clinc150_test.jsonl", _intent),
}


def load(name: str, rows: int, seed: int = 0, folder: Path = FOLDER) -> list[dict[str, str]]:
    """``rows`` samples of a data set, drawn at random because the intent files are sorted by intent.

    Raises:
        SystemExit: the file is missing or has fewer rows.
    """
    path = folder / SETS[name].file
    if not path.is_file():
        raise SystemExit(f"{path}: no such file. Set ACQCORE_DATA to a folder with {SETS[name].file}, as published")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if len(records) < rows:
        raise SystemExit(f"{path}: expected at least {rows} rows, found {len(records)}")
    pairs = (SETS[name].read(record) for record in random.Random(seed).sample(records, rows))
    return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]


def encode(student: acqcore.Student, samples: list[dict[str, str]], scored: int | None) -> list[acqcore.Row]:
    """The samples as rows, cut after ``scored`` scored tokens; None keeps them whole."""
    limit = student.max_length
    rows = acqcore.encode(samples, student.tokenizer, vocab_size=student.head.vocab_size, limit=limit, max_length=limit)
    return rows if scored is None else [_cut(row, scored) for row in rows]


def _cut(row: acqcore.Row, scored: int) -> acqcore.Row:
    places = (row.targets >= 0).nonzero().flatten()
    end = int(places[min(scored, len(places)) - 1]) + 1
    return acqcore.Row(row.ids[:end], row.targets[:end])
