"""The parts of a composed reward, its signals and gates: their names, their state, and what happens if one fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from acqsynth.rewards.batch import Batch

logger = logging.getLogger(__name__)

_TRIES = 3  # single samples in a row that fail before the part itself is taken to be broken


class Guard:
    """Calls parts. A part that raises masks samples; it does not end the run.

    Args:
        name: of the reward, for the log.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.failures = 0  #: calls that raised so far

    def __call__(
        self, part: str, function: Callable[[Any], Sequence[Any]], samples: Sequence[Any], *, singly: bool = True
    ) -> Sequence[Any]:
        """What the function gives for n samples; None for each that it fails on.

        A function that fails on all together is called for one sample at a time, so that a bad sample masks itself
        alone, until the first ``_TRIES`` have failed too.

        Args:
            part: its name.
            function: n samples -> n values.
            samples: the n samples; anything but a :class:`Batch` is passed on as it is and never split.
            singly: whether a single sample is a fair question.
        """
        if not samples:
            return []
        try:
            return _called(part, function, samples)
        except Exception as error:
            logger.exception("%s: %r failed on %d samples", self.name, part, len(samples))
            self.failures += 1
            singly = singly and not (isinstance(error, _WrongLengthError) or getattr(function, "set_level", False))
        found: list[Any] = [None] * len(samples)
        if len(samples) > 1 and isinstance(samples, Batch) and singly:
            failed = 0
            for i, sample in enumerate(samples):
                try:
                    [found[i]] = _called(part, function, samples.part([sample]))
                    failed = 0
                except Exception:
                    failed += 1
                    if failed == _TRIES and all(value is None for value in found):
                        break
        return found


class _WrongLengthError(ValueError):
    """A part gives another number of values than it got samples; no sample is to blame."""


def _called(part: str, function: Callable[[Any], Sequence[Any]], samples: Sequence[Any]) -> Sequence[Any]:
    values = function(samples)
    if len(values) != len(samples):
        raise _WrongLengthError(f"{part}: expected {len(samples)} values, one a sample, got {len(values)}")
    return values


def check_names(argument: str, parts: Sequence[Any], taken: tuple[str, ...]) -> None:
    """
    Raises:
        TypeError: a part that cannot be called or has no name. ValueError: a name that is repeated or ``taken``.
    """
    seen = set(taken)
    for part in parts:
        name = getattr(part, "name", None)
        if not callable(part) or not isinstance(name, str):
            raise TypeError(f"{argument}: expected callable objects with a name, got {part!r}")
        if name in seen:
            raise ValueError(f"{argument}: {name!r} is there twice or is taken, give one of them another name")
        seen.add(name)


def stateful(signals: Sequence[Any], gates: Sequence[Any]) -> dict[str, Any]:
    """Key -> part, of those that have a state."""
    kinds = (("signal", signals), ("gate", gates))
    return {f"{kind}/{part.name}": part for kind, parts in kinds for part in parts if hasattr(part, "state_dict")}


def refresh(parts: Sequence[Any], student: Any) -> None:
    """Moves the parts, and the answers and labels that they share, to another student; each object once."""
    held = [getattr(part, name, None) for part in parts for name in ("answers", "label")]
    for part in {id(part): part for part in (*parts, *held)}.values():
        if hasattr(part, "refresh"):
            part.refresh(student)


def logged(parts: Sequence[Any]) -> Mapping[str, float]:
    """What parts log beside their values, and the sizes of their archives."""
    found = {f"{part.name}/{key}": value for part in parts for key, value in getattr(part, "logged", {}).items()}
    return found | {f"archive/{part.name}": len(part) for part in parts if hasattr(part, "__len__")}
