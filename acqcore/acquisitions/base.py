"""Acquisition functions and their registry. Larger values mean more worth acquiring."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch

from acqcore import checks
from acqcore.acquisitions.needs import Need, Options, RowNeed

Over: TypeAlias = Literal["token", "average", "sample", "set"]
Function = TypeVar("Function", bound=Callable[..., torch.Tensor])


@dataclass(frozen=True)
class Acquisition:
    """Record of an acquisition function, used by everything that lists or runs acquisitions.

    Attributes:
        name: as in ``acquisitions`` of :func:`acqcore.score`.
        description: one line, with the formula.
        value: maps the results of its needs, in order, to its values; a parameter ``options``, if there is one,
            receives its options.
        options: frozen dataclass of its arguments.
        needs: a need, a tuple of them, or a function of the options that returns either.
        over: what a value covers, or a function of the options that returns this. ``"token"``: each scored token,
            ``[N]``, reduced afterwards. ``"average"``: the average over each sample's tokens, ``[B]``, which can be
            reduced only by mean or sum. ``"sample"``: each sample of a batch, ``[B]``. ``"set"``: each sample of the
            call, ``[n]``, compared with the others (for gradients only).
        needs_targets: whether the values depend on the written tokens, not only on the predictions.
        finish: applied to token values and to reduced values, for averages on another scale (perplexity is averaged as
            a loss).
        stderr: maps the results of its needs, in order, and its options to the standard error of each sample's
            value, ``[B]``, or to None if there is none.
        reference: a slow, readable definition. For row statistics it takes logits ``[N, V]``, targets ``[N]`` and
            hidden states ``[N, D]``, and returns ``[N]``.
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
        """What a value covers under ``options``."""
        return self.over(options) if callable(self.over) else self.over

    def needed(self, options: Options) -> tuple[Need, ...]:
        """Its needs under ``options``."""
        return all_needs(self.needs(options) if callable(self.needs) else self.needs)

    @torch.no_grad()
    def compute(self, options: Options, found: Mapping[Any, Any]) -> torch.Tensor:
        """Its values, given the result of each need."""
        results = [found[need] for need in self.needed(options)]
        if "options" in inspect.signature(self.value).parameters:
            return self.value(*results, options=options)
        return self.value(*results)

    def standard_error(self, options: Options, found: Mapping[Any, Any]) -> torch.Tensor | None:
        """Standard error of each sample's value, ``[B]``, given the result of each need; None if there is none."""
        if self.stderr is None:
            return None
        return self.stderr(*(found[need] for need in self.needed(options)), options)


def all_needs(given: Any) -> tuple[Need, ...]:
    """One need or several as a tuple."""
    needs = given if isinstance(given, tuple) else (given,)
    for need in needs:
        if not isinstance(need, get_args(Need)):
            raise TypeError(f"needs: expected needs, such as RowNeed(), or a function, got {checks.describe(need)}")
    return needs


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
    """Decorator that registers a function as an acquisition; the first line of its docstring is the description.

    The arguments are those of :class:`acqcore.acquisitions.Acquisition`. Registering a name again replaces the
    acquisition. The function runs without gradients.

    >>> @dataclass(frozen=True)
    ... class GapOptions(acqcore.acquisitions.Options):
    ...     power: float = 1.0
    >>> @acqcore.register("confidence_gap", options=GapOptions)
    ... def confidence_gap(stats, options):
    ...     '''(1 - 2 p1)^power.'''
    ...     return (1 - 2 * stats.top1_prob) ** options.power

    Raises:
        ValueError: the function has no docstring, or an unknown ``over``. TypeError: a name that is not a string, as
            in ``@register`` without one, ``needs`` that are not needs, ``options`` that do not extend
            :class:`acqcore.acquisitions.Options`.
    """
    checks.instance("name", name, str, "the acquisition's name, as in @acqcore.register('confidence_gap')")
    if not (isinstance(options, type) and issubclass(options, Options) and "__dataclass_fields__" in vars(options)):
        raise TypeError(f"options: expected a dataclass that extends acqcore.acquisitions.Options, got {options!r}")
    if not callable(over):
        checks.literal("over", over, Over)
    if isinstance(needs, type) or not callable(needs):
        all_needs(needs)

    def decorate(function: Function) -> Function:
        description = (function.__doc__ or "").strip().split("\n")[0]
        if not description and sys.flags.optimize < 2:  # python -OO drops docstrings
            raise ValueError(f"{name}: an acquisition function needs a docstring that says what it measures")
        REGISTRY[name] = Acquisition(
            name, description, function, options, needs, over, needs_targets, finish, stderr, reference
        )
        return function

    return decorate


def acquisitions() -> dict[str, str]:
    """Names and one-line descriptions of all acquisitions, including user-defined ones."""
    return {name: entry.description for name, entry in REGISTRY.items()}
