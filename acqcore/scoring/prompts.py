"""Embeddings of prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from acqcore import checks
from acqcore.defaults import standard_defaults
from acqcore.students.packing import OVERHEAD_TOKENS, partition
from acqcore.students.samples import Row, Samples, encode
from acqcore.students.student import StudentLike, as_student


@standard_defaults()
def prompt_embedding(
    student: StudentLike,
    samples: Samples,
    *,
    tokenizer: Any = None,
    batch_tokens: int = 8192,
    max_length: int | None = None,
) -> torch.Tensor:
    """Mean of the student's final hidden states over the tokens of each prompt, from one forward.

    Text after the prompt is not read, so the vector cannot depend on a label that appears there. For samples without a
    prompt, such as ``{"text": ...}``, all tokens are read.

    Args:
        student, samples, tokenizer, batch_tokens, max_length: as in :func:`acqcore.score`.

    Returns:
        ``[n, D]`` float32 on the CPU, in the order of the samples.

    Raises:
        TypeError, ValueError: as :func:`acqcore.score`.
    """
    checks.positive_int("batch_tokens", batch_tokens)
    student = as_student(student)
    tokenizer = tokenizer if tokenizer is not None else student.tokenizer
    with student.in_step():
        rows = encode(
            samples, tokenizer, vocab_size=student.head.vocab_size, limit=student.max_length, max_length=max_length
        )
        prompts = [_prompt(row) for row in rows]
        lengths = [len(ids) for ids in prompts]
        vectors = torch.zeros(len(rows), student.head.weight.shape[1])
        overhead = OVERHEAD_TOKENS.get(student.device.type, OVERHEAD_TOKENS["cuda"])
        for picked in partition(lengths, batch_tokens, overhead, student.length_groups(lengths)):
            input_ids = pad_sequence([prompts[i] for i in picked], batch_first=True).to(student.device)
            with student.scoring():
                hidden = student.hidden(input_ids).float()  # [B, T, D]
            for i, states in zip(picked, hidden, strict=True):
                vectors[i] = states[: lengths[i]].mean(dim=0).cpu()
    return vectors


def _prompt(row: Row) -> torch.Tensor:
    """Token ids before the first scored token; all token ids if that is the second token."""
    first = int(row.targets.ne(checks.IGNORE_INDEX).nonzero()[0])
    return row.ids[:first] if first > 1 else row.ids
