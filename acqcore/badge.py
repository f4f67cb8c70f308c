"""BADGE vectors: the gradient that each sample would give if the student's own predictions were right."""

from __future__ import annotations

from typing import Any

import torch

from acqcore.ghost import grad_sketch_model
from acqcore.samples import Samples
from acqcore.student import StudentLike


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
    counts only as context of those after it.

    Args:
        student, samples, parameters, dim, seed, loss, tokenizer, batch_tokens, max_length, backend: as in
            :func:`acqcore.grad_sketch`.

    Returns:
        ``[n, dim]`` float32 on the CPU, in the order of the samples.

    Raises: as :func:`acqcore.grad_sketch`.

    Source: Ash et al. 2020, "Deep batch active learning by diverse, uncertain gradient lower bounds", with
    each token a label of its own.
    """
    return grad_sketch_model(
        student,
        samples,
        parameters,
        dim=dim,
        seed=seed,
        loss=loss,
        predicted=True,
        tokenizer=tokenizer,
        batch_tokens=batch_tokens,
        max_length=max_length,
        backend=backend,
    )
