"""The registry of acquisition functions: larger means more worth acquiring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from acqcore.row_stats import RowStats


@dataclass(frozen=True)
class Acquisition:
    """An acquisition function of row statistics.

    Attributes:
        name: how ``score`` is asked for it.
        description: one line, with the formula.
        per_token: RowStats of T scored tokens -> ``[T]``.
        needs_targets: the value depends on the token that was written, not only on the prediction.
        finish: applied to a per-token value and to the reduced value, for those that are averaged on another scale
            (perplexity is averaged as a loss); None leaves them.
    """

    name: str
    description: str
    per_token: Callable[[RowStats], torch.Tensor]
    needs_targets: bool = False
    finish: Callable[[torch.Tensor], torch.Tensor] | None = None


REGISTRY: dict[str, Acquisition] = {}


def register(
    name: str,
    *,
    needs_targets: bool = False,
    finish: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Callable[[Callable[[RowStats], torch.Tensor]], Callable[[RowStats], torch.Tensor]]:
    """Decorator that makes a function of RowStats an acquisition; its docstring's first line describes it.

    >>> @acqcore.register("confidence_gap")
    ... def confidence_gap(stats):
    ...     '''1 - 2 p1.'''
    ...     return 1 - 2 * stats.top1_prob

    Raises:
        ValueError: the name is taken, or the function has no docstring.
    """

    def decorate(
        function: Callable[[RowStats], torch.Tensor],
    ) -> Callable[[RowStats], torch.Tensor]:
        if name in REGISTRY:
            raise ValueError(f"name: the acquisition {name!r} is registered already")
        description = (function.__doc__ or "").strip().split("\n")[0]
        if not description:
            raise ValueError(f"{name}: an acquisition function needs a docstring that says what it measures")
        REGISTRY[name] = Acquisition(name, description, function, needs_targets, finish)
        return function

    return decorate
