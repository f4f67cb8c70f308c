"""BADGE vectors: the gradient that each sample would give if the student's own predictions were right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from acqcore import checks
from acqcore.ghost import grad_sketch_model
from acqcore.packing import OVERHEAD_TOKENS, partition
from acqcore.row_stats import row_stats
from acqcore.samples import Row, Samples, encode
from acqcore.student import Student, StudentLike, as_student


def badge_embedding(
    student: StudentLike,
    samples: Samples,
    parameters: str | int = "head",
    *,
    dim: int = 4096,
    seed: int = 0,
    loss: str = "mean",
    tokenizer: Any = None,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Sketch of each sample's gradient with the student's most likely tokens as the targets.

    Short where the student is sure, so that k-means++ over it (``acqcore.select(..., method="badge")``)
    takes samples that are uncertain and different. It needs no labels: what is written at a scored position
    counts only as context of those after it. The student runs once to predict and once for the gradients.

    Args:
        student, samples, parameters, dim, seed, loss, tokenizer, batch_tokens, max_length, backend: as in
            :func:`acqcore.grad_sketch`.

    Returns:
        ``[n, dim]`` float32 on the CPU, in the order of the samples.

    Raises: as :func:`acqcore.grad_sketch`.

    Source: Ash et al. 2020, "Deep batch active learning by diverse, uncertain gradient lower bounds", with
    each token a label of its own.
    """
    checks.positive_int("batch_tokens", batch_tokens)
    student = as_student(student)
    rows = encode(
        samples,
        tokenizer if tokenizer is not None else student.tokenizer,
        vocab_size=student.head.weight.shape[0],
        limit=student.max_length,
        max_length=max_length,
    )
    return grad_sketch_model(
        student,
        _predicted(student, rows, batch_tokens, backend),
        parameters,
        dim=dim,
        seed=seed,
        loss=loss,
        batch_tokens=batch_tokens,
        backend=backend,
    )


def _predicted(
    student: Student, rows: Sequence[Row], batch_tokens: int, backend: str | None
) -> dict[str, torch.Tensor]:
    """The rows as tensors ``[n, T]`` padded on the right, each scored label replaced by the most likely token."""
    longest = max((len(row.ids) for row in rows), default=0)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full_like(input_ids, checks.IGNORE_INDEX)
    mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, : len(row.ids)] = row.ids
        labels[i, : len(row.ids)] = row.targets
        mask[i, : len(row.ids)] = 1
    head = student.head
    overhead = OVERHEAD_TOKENS.get(student.device.type, OVERHEAD_TOKENS["cuda"])
    for indices in partition([len(row.ids) for row in rows], batch_tokens, overhead):
        length = len(rows[indices[0]].ids)  # the longest comes first
        sample, position = (labels[indices, :length] != checks.IGNORE_INDEX).nonzero(as_tuple=True)
        with student.scoring():
            hidden = student.hidden(input_ids[indices, :length].to(student.device))
            hidden = hidden[sample.to(hidden.device), position.to(hidden.device) - 1]  # [N, D]
            dtype = torch.promote_types(hidden.dtype, head.weight.dtype)
            with torch.autocast(hidden.device.type, enabled=False):
                stats = row_stats(hidden.to(device=head.weight.device, dtype=dtype), head, backend=backend)
        # A row without a finite logit has no most likely token, and no finite gradient for any.
        labels[torch.tensor(indices)[sample], position] = stats.top1_index.clamp_min(0).cpu()
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
