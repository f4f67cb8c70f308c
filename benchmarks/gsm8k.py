"""GSM8K, real text for the benchmarks to score."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import acqcore
from benchmarks.real_rows import FOLDER

TEST = FOLDER / "math" / "gsm8k_test.jsonl"
TRAIN = FOLDER / "math" / "gsm8k_train.jsonl"
TRUNK = "trunk alone, unpadded"  #: title of :func:`run_trunk`


def load_samples(path: Path, rows: int) -> list[dict[str, str]]:
    """The first rows, as samples for ``acqcore.score``."""
    if not path.is_file():
        raise SystemExit(
            f"{path}: no such file. Set ACQCORE_DATA to a folder with math/{TEST.name} (GSM8K as published), or pass "
            "the file with --data"
        )
    with path.open(encoding="utf-8") as file:
        records = [json.loads(line) for line, _ in zip(file, range(rows), strict=False)]
    return [{"prompt": r["question"] + "\n", "completion": r["answer"]} for r in records]


def run_trunk(student: acqcore.Student, rows: list[tuple[torch.Tensor, int]]) -> None:
    """Runs the trunk over the rows of :func:`token_rows`, one at a time: no padding, no head."""
    with student.scoring():
        for ids, _ in rows:
            student.hidden(ids[None])


def token_rows(student: acqcore.Student, samples: list[dict[str, str]]) -> list[tuple[torch.Tensor, int]]:
    """(ids ``[T]``, length of the prompt) for each sample."""
    tokenizer = student.tokenizer
    rows = []
    for sample in samples:
        text = sample["prompt"] + sample["completion"]
        rows.append((torch.tensor(tokenizer(text).input_ids), len(tokenizer(sample["prompt"]).input_ids)))
    return rows
