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
        student, samples, tokenizer, batch_tokens: as in :func:`acqcore.score`.
        max_length: keep at most this many tokens of a prompt, the last ones, or of a text, the first ones.

    Returns:
        ``[n, D]`` float32 on the CPU, in the order of the samples; 0 for a prompt without tokens.

    Raises:
        TypeError, ValueError: as :func:`acqcore.score`.
    """
    batch_tokens = checks.positive_int("batch_tokens", batch_tokens)
    student = as_student(student)
    max_length = checks.max_length(max_length, student.max_length)
    tokenizer = tokenizer if tokenizer is not None else student.tokenizer
    with student.in_step():
        head = student.head  # read once: with an adapter it is a new [V, D] tensor
        rows = encode(samples, tokenizer, vocab_size=head.vocab_size, limit=student.max_length, max_length=max_length)
        longest = student.max_length if max_length is None else max_length
        prompts = [_prompt(row, longest) for row in rows]
        filled = [i for i, ids in enumerate(prompts) if len(ids)]
        lengths = [len(prompts[i]) for i in filled]
        vectors = torch.zeros(len(rows), head.weight.shape[1])
        overhead = OVERHEAD_TOKENS.get(student.device.type, OVERHEAD_TOKENS["cuda"])
        groups = student.length_groups(lengths, batch_tokens)
        for picked in partition(lengths, batch_tokens, overhead, groups):
            input_ids = pad_sequence([prompts[filled[i]] for i in picked], batch_first=True).to(student.device)
            with student.scoring():
                hidden = student.hidden(input_ids).float()  # [B, T, D]
            for i, states in zip(picked, hidden, strict=True):
                vectors[filled[i]] = states[: lengths[i]].mean(dim=0).cpu()
    return vectors


def _prompt(row: Row, longest: int | None) -> torch.Tensor:
    """Token ids of the prompt, whose length must not depend on the completion. Without one: those before the first
    scored token, or all of them if that is the second token."""
    if row.prompt is not None:
        return row.prompt if longest is None else row.prompt[-longest:]
    return row.ids[: row.first + 1] if row.first else row.ids
