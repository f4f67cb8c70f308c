"""The registry of acquisition functions: larger means more worth acquiring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from acqcore.bayes import BayesStats
from acqcore.head import Head
from acqcore.head_grad import Bounds
from acqcore.head_visit import HeadVisit
from acqcore.row_stats import RowStats


@dataclass(frozen=True, eq=False)
class SampleBatch:
    """The scored tokens of B samples one after another, for an acquisition of whole samples.

    Attributes:
        hidden: ``[N, D]``.
        head: the last layer.
        stats: of the N rows, with targets.
        bounds: ``[begin, end)`` rows of each sample, on the host.
        backend: the name asked for, or None.
        visit: the visit of the head's weights that gave ``stats``, where it kept Gram matrices.
    """

    hidden: torch.Tensor
    head: Head
    stats: RowStats
    bounds: Bounds
    backend: str | None
    visit: HeadVisit | None = None


@dataclass(frozen=True)
class Acquisition:
    """An acquisition function: of row statistics token by token, or of a whole sample.

    It has one of the functions below; with none, ``score`` computes it in a pass of its own.

    Attributes:
        name: how ``score`` is asked for it.
        description: one line, with the formula.
        per_token: RowStats of T scored tokens -> ``[T]``.
        per_draws: BayesStats of T scored tokens -> ``[T]``, for one of several draws of the student's weights.
        per_sample: SampleBatch and the acquisition's own arguments -> ``[B]``, for one of whole samples.
        needs_gram: it reads the Gram matrices that a visit of the head's weights keeps on request.
        needs_targets: the value depends on the token that was written, not only on the prediction.
        finish: applied to a per-token value and to the reduced value, for those that are averaged on another scale
            (perplexity is averaged as a loss); None leaves them.
    """

    name: str
    description: str
    per_token: Callable[[RowStats], torch.Tensor] | None = None
    per_draws: Callable[[BayesStats], torch.Tensor] | None = None
    per_sample: Callable[..., torch.Tensor] | None = None
    needs_gram: bool = False
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
        REGISTRY[name] = Acquisition(
            name, _description(name, function), per_token=function, needs_targets=needs_targets, finish=finish
        )
        return function

    return decorate


def register_sample(
    name: str, *, needs_targets: bool = True, needs_gram: bool = False
) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """As :func:`register`, for a function of a :class:`SampleBatch`, whose value is not a reduction over tokens."""

    def decorate(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        REGISTRY[name] = Acquisition(
            name,
            _description(name, function),
            per_sample=function,
            needs_gram=needs_gram,
            needs_targets=needs_targets,
        )
        return function

    return decorate


def register_draws(
    name: str,
) -> Callable[[Callable[[BayesStats], torch.Tensor]], Callable[[BayesStats], torch.Tensor]]:
    """As :func:`register`, for a function of BayesStats."""

    def decorate(function: Callable[[BayesStats], torch.Tensor]) -> Callable[[BayesStats], torch.Tensor]:
        REGISTRY[name] = Acquisition(name, _description(name, function), per_draws=function)
        return function

    return decorate


def _description(name: str, function: Callable[..., torch.Tensor]) -> str:
    """First line of the docstring of a function that is about to be registered."""
    if name in REGISTRY:
        raise ValueError(f"name: the acquisition {name!r} is registered already")
    description = (function.__doc__ or "").strip().split("\n")[0]
    if not description:
        raise ValueError(f"{name}: an acquisition function needs a docstring that says what it measures")
    return description
