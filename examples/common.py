"""Shared by the examples: a default model, sample rows, and a short fine-tuning run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

#: Mutual information without draws: one forward pass, and a backward pass per probe.
LINEAR = {"form": "linear", "probes": 2}

#: Sums, facts, and coin tosses, which cannot be learned.
ROWS = [
    *({"prompt": f"{a} * {b} =", "completion": f" {a * b}."} for a in range(11, 19) for b in (7, 12, 23)),
    *({"prompt": f"The capital of {land} is", "completion": f" {city}."} for land, city in [
        ("France", "Paris"), ("Peru", "Lima"), ("Kenya", "Nairobi"), ("Burkina Faso", "Ouagadougou"),
        ("Palau", "Ngerulmud"), ("Bhutan", "Thimphu"), ("Nauru", "Yaren"), ("Japan", "Tokyo"),
    ]),
    *({"prompt": f"Coin {i} shows", "completion": " heads." if i * 7919 % 13 < 6 else " tails."} for i in range(16)),
]  # fmt: skip


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options shared by the examples: the student, and rows to use instead of :data:`ROWS`."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--student", default=MODEL, help="hub id or local path (default: SmolLM2-135M-Instruct)")
    options.add_argument("--data", type=Path, help="jsonl with prompt and completion (default: built-in rows)")
    return options


def rows(path: Path | None) -> list[dict[str, str]]:
    """The rows of a jsonl file, or the default rows."""
    if path is None:
        return ROWS
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def loss(model: Any, tokenizer: Any, samples: list[dict[str, str]]) -> torch.Tensor:
    """Mean negative log-likelihood of completion tokens, a differentiable scalar."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids, labels = [], []
    for sample in samples:
        context, whole = (tokenizer(text)["input_ids"] for text in (sample["prompt"], "".join(sample.values())))
        ids.append(torch.tensor(whole))
        labels.append(torch.tensor([-100] * len(context) + whole[len(context) :]))
    batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)
    targets = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    return model(input_ids=batch, attention_mask=(targets != -100) | (batch != pad), labels=targets).loss


def fine_tune(model: Any, tokenizer: Any, samples: list[dict[str, str]], steps: int, lr: float, batch: int = 4) -> None:
    """Runs a few steps of AdamW on the completions."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    order = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        picked = torch.randint(len(samples), (batch,), generator=order).tolist()
        loss(model, tokenizer, [samples[i] for i in picked]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def pair(student: str) -> tuple[Any, Any]:
    """Loads the model, in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32), AutoTokenizer.from_pretrained(student)
