"""``acqcore.grad_sketch``: one name for the head's gradients in hand and for those of a student's samples."""

from __future__ import annotations

from typing import Any, overload

import torch

from acqcore import ghost, head_grad
from acqcore.head import Head
from acqcore.samples import Samples
from acqcore.student import StudentLike


@overload
def grad_sketch(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    offsets: torch.Tensor,
    *,
    dim: int = 4096,
    seed: int = 0,
    loss: str = "mean",
    token_weights: torch.Tensor | None = None,
    temperature: float = 1.0,
    backend: str | None = None,
) -> torch.Tensor: ...


@overload
def grad_sketch(
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
) -> torch.Tensor: ...


def grad_sketch(*arguments: Any, **options: Any) -> torch.Tensor:
    """A sketch of each sample's gradient that keeps inner products: ``E <S_i, S_j> = <G_i, G_j>``.

    Two forms: ``grad_sketch(hidden, head, targets, offsets, ...)`` for the head's gradient of hidden states in hand
    (:func:`acqcore.head_grad.grad_sketch`), and ``grad_sketch(student, samples, parameters="head"|n|"trainable"|"all",
    ...)`` for a student's samples (:func:`acqcore.ghost.grad_sketch_model`), from one batched forward and backward.

    Returns:
        ``[B, dim]`` float32; sketches of the same parameters, dim and seed can be compared.

    Raises: as those functions.
    """
    tensors = isinstance(arguments[0], torch.Tensor) if arguments else "hidden" in options
    function: Any = head_grad.grad_sketch if tensors else ghost.grad_sketch_model
    return function(*arguments, **options)
