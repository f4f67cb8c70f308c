"""The record of an acquisition function, and the registry of them: larger means more worth acquiring."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import torch

from acqcore.acquisitions.needs import Need, Options, RowNeed

Over: TypeAlias = Literal["token", "average", "sample", "set"]
Function = TypeVar("Function", bound=Callable[..., torch.Tensor])


@dataclass(frozen=True)
class Acquisition:
    """The record of an acquisition function, read by everything that lists or runs acquisitions.

    Attributes:
        name: as in ``acquisitions`` of :func:`acqcore.score`.
        description: one line, with the formula.
        value: the results of its needs, in order -> its values; gets its options as the parameter ``options``, if it
            has one.
        options: frozen dataclass of its arguments.
        needs: a need, a tuple of them, or a function of the options that gives either.
        over: a value for each scored token, ``[N]``, then reduced; the average over the tokens of each sample of a
            batch, ``[B]``, which can be reduced by mean or sum alone; for each sample of a batch, ``[B]``; or for each
            sample of the call, ``[n]``, in which samples are compared with each other (of gradients only); or a
            function of the options that gives one of these.
        needs_targets: the values depend on the tokens that were written, not only on the predictions.
        finish: applied to token values and to reduced values, for averages on another scale (perplexity is averaged as
            a loss).
        stderr: the results of its needs, in order, and its options -> standard errors of its values over samples,
            ``[B]``, or None where it has none.
        reference: the definition, slow and readable. Of row statistics it takes logits ``[N, V]``, targets ``[N]`` and
            hidden states ``[N, D]``, and gives ``[N]``.
    """

    name: str
    description: str
    value: Callable[..., torch.Tensor]
    options: type[Options] = Options
    needs: Any = RowNeed()  # noqa: RUF009  # frozen and without fields
    over: Over | Callable[[Any], Over] = "token"
    needs_targets: bool = False
    finish: Callable[[torch.Tensor], torch.Tensor] | None = None
    stderr: Callable[..., torch.Tensor | None] | None = None
    reference: Callable[..., torch.Tensor] | None = None

    def values_over(self, options: Options) -> Over:
        """What it has a value for under ``options``."""
        return self.over(options) if callable(self.over) else self.over

    def needed(self, options: Options) -> tuple[Need, ...]:
        """Its needs under ``options``."""
        needs = self.needs(options) if callable(self.needs) else self.needs
        return needs if isinstance(needs, tuple) else (needs,)

    def compute(self, options: Options, found: Mapping[Any, Any]) -> torch.Tensor:
        """Its values, given what each need came to."""
        results = [found[need] for need in self.needed(options)]
        if "options" in inspect.signature(self.value).parameters:
            return self.value(*results, options=options)
        return self.value(*results)

    def standard_error(self, options: Options, found: Mapping[Any, Any]) -> torch.Tensor | None:
        """Of each sample's value, ``[B]``, given what each need came to; None where it has none."""
        if self.stderr is None:
            return None
        return self.stderr(*(found[need] for need in self.needed(options)), options)


REGISTRY: dict[str, Acquisition] = {}


def register(
    name: str,
    *,
    options: type[Options] = Options,
    needs: Need | tuple[Need, ...] | Callable[[Any], Need | tuple[Need, ...]] = RowNeed(),  # noqa: B008
    over: Over | Callable[[Any], Over] = "token",
    needs_targets: bool = False,
    finish: Callable[[torch.Tensor], torch.Tensor] | None = None,
    stderr: Callable[..., torch.Tensor | None] | None = None,
    reference: Callable[..., torch.Tensor] | None = None,
) -> Callable[[Function], Function]:
    """Decorator that makes a function an acquisition; the first line of its docstring describes it.

    The arguments are those of :class:`acqcore.acquisitions.Acquisition`. Registering a name again replaces the
    acquisition.

    >>> @dataclass(frozen=True)
    ... class GapOptions(acqcore.acquisitions.Options):
    ...     power: float = 1.0
    >>> @acqcore.register("confidence_gap", options=GapOptions)
    ... def confidence_gap(stats, options):
    ...     '''(1 - 2 p1)^power.'''
    ...     return (1 - 2 * stats.top1_prob) ** options.power

    Raises:
        ValueError: the function has no docstring.
    """

    def decorate(function: Function) -> Function:
        description = (function.__doc__ or "").strip().split("\n")[0]
        if not description:
            raise ValueError(f"{name}: an acquisition function needs a docstring that says what it measures")
        REGISTRY[name] = Acquisition(
            name, description, function, options, needs, over, needs_targets, finish, stderr, reference
        )
        return function

    return decorate


def acquisitions() -> dict[str, str]:
    """Name -> one-line description of every acquisition, the user's own included."""
    return {name: entry.description for name, entry in REGISTRY.items()}
