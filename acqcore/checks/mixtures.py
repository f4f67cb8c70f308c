"""Checks for draws of hidden states: dropout and ensembles."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from acqcore.checks.basic import describe, finite, float_tensor, within

MOST_DRAWS = 2**16 - 1  # a draw takes half a word of a mask's counter


def draws(value: object) -> None:
    within("draws", value, 2, MOST_DRAWS)


def dropout(value: object) -> None:
    finite("dropout", value)
    if not 0 <= value < 1:  # type: ignore[operator]
        raise ValueError(f"dropout: expected a probability in [0, 1), got {value}")


def seed(value: object) -> None:
    within("seed", value, 0, 2**63 - 1)


def drawn_hidden(value: object, count: int, weights: Sequence[torch.Tensor]) -> None:
    """Hidden states of every draw ``[K, N, D]``, and the weights ``[V, D]`` of their heads: one, or K."""
    float_tensor("hidden", value, "[K, N, D]", 3)
    assert isinstance(value, torch.Tensor)
    draws(len(value))
    if count not in (1, len(value)):
        raise ValueError(f"head: expected one, or one for each of the {len(value)} draws, got {count}")
    for k, weight in enumerate(weights):
        if weight.shape != weights[0].shape or weight.dtype != weights[0].dtype or weight.device != weights[0].device:
            raise ValueError(
                f"head: expected heads with the same shape, dtype and device, got {describe(weights[0])} and "
                f"{describe(weight)} for draw {k}"
            )


def alike(what: str, first: object, other: object, draw: int) -> None:
    if first != other:
        raise ValueError(f"head: expected heads with the same {what}, got {first} and {other} for draw {draw}")


def some_blocks(count: int) -> None:
    if not count:
        raise ValueError("layers: no list of transformer blocks found in the student's trunk; layers=0 needs none")


def layers(value: object) -> None:
    if isinstance(value, str):
        if value not in ("all", "own"):
            raise ValueError(f"layers: expected a number of blocks, 'all' or 'own', got {value!r}")
    elif isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"layers: expected a number of blocks, 'all' or 'own', got {describe(value)}")
    elif value < 0:
        raise ValueError(f"layers: expected at least 0 blocks, got {value}")


def enough_blocks(name: str, asked: int, present: int) -> None:
    if asked > present:
        raise ValueError(f"{name}: expected at most {present} transformer blocks, got {asked}")


def probes(value: object) -> None:
    within("probes", value, 1, MOST_DRAWS)
