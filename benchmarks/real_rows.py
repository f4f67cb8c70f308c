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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import acqcore

#: Folder with the files of the table, as published.
FOLDER = Path(os.environ.get("ACQCORE_DATA", "../shared/data"))

TRUNK = "trunk alone, unpadded"  #: title of :func:`run_trunk`
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
    """``rows`` samples of a data set, drawn at random because the intent files are sorted by intent."""
    records = random.Random(seed).sample(_records(folder / SETS[name].file, rows), rows)
    return _samples(name, records)


def gsm8k(rows: int, part: str = "test") -> list[dict[str, str]]:
    """The first rows of a part of GSM8K."""
    return _samples("GSM8K", _records(FOLDER / f"math/gsm8k_{part}.jsonl", rows)[:rows])


def _records(path: Path, rows: int) -> list[dict[str, Any]]:
    """All records of a file; exits if it is missing or has fewer than ``rows``."""
    if not path.is_file():
        raise SystemExit(
            f"{path}: no such file. Set ACQCORE_DATA to a folder with {path.parent.name}/{path.name}, as published"
        )
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if len(records) < rows:
        raise SystemExit(f"{path}: expected at least {rows} rows, found {len(records)}")
    return records


def _samples(name: str, records: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [dict(zip(("prompt", "completion"), SETS[name].read(record), strict=True)) for record in records]


def token_rows(student: acqcore.Student, samples: list[dict[str, str]]) -> list[tuple[torch.Tensor, int]]:
    """(ids ``[T]``, length of the prompt) for each sample."""
    tokenizer = student.tokenizer
    rows = []
    for sample in samples:
        text = sample["prompt"] + sample["completion"]
        rows.append((torch.tensor(tokenizer(text).input_ids), len(tokenizer(sample["prompt"]).input_ids)))
    return rows


def run_trunk(student: acqcore.Student, rows: list[tuple[torch.Tensor, int]]) -> None:
    """Runs the trunk over the rows of :func:`token_rows`, one at a time: no padding, no head."""
    with student.scoring():
        for ids, _ in rows:
            student.hidden(ids[None])


def encode(student: acqcore.Student, samples: list[dict[str, str]], scored: int | None) -> list[acqcore.Row]:
    """The samples as rows, cut after ``scored`` scored tokens; None keeps them whole."""
    limit = student.max_length
    rows = acqcore.encode(samples, student.tokenizer, vocab_size=student.head.vocab_size, limit=limit, max_length=limit)
    return rows if scored is None else [_cut(row, scored) for row in rows]


def _cut(row: acqcore.Row, scored: int) -> acqcore.Row:
    places = (row.targets >= 0).nonzero().flatten()
    end = int(places[min(scored, len(places)) - 1]) + 1
    return acqcore.Row(row.ids[:end], row.targets[:end])
