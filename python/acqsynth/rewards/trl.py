"""The contract of TRL 1.16: what a reward function is given, what it logs, what it warns about.

A masked sample (None) is left out of the advantage only if every reward masks it; beside other rewards TRL counts it as
0 for the one that does. :func:`combined` adds several rewards and masks a sample for all of them.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from acqsynth.rewards.reliability import Watch

logger = logging.getLogger(__name__)

Completion = str | list[dict[str, Any]]
LogExtra = Callable[[str, list[Any]], None]  #: takes a column name and n values, for the table of completions
LogMetric = Callable[[str, float], None]  #: takes a name and a number


class Log(NamedTuple):
    """What TRL gives a call to log with."""

    extra: LogExtra | None
    metric: LogMetric | None

    @property
    def trainer(self) -> Any:
        """The trainer, if these are its own methods."""
        return getattr(self.metric, "__self__", None)

    @property
    def evaluates(self) -> bool:
        """Whether the trainer is evaluating."""
        model = getattr(self.trainer, "model", None)
        return isinstance(model, torch.nn.Module) and not model.training


class TrlReward:
    """A reward function of TRL, and what it keeps between calls.

    Args:
        name: the name TRL logs.
    """

    def __init__(self, name: str) -> None:
        self.__name__ = name
        self.masked = 0  #: samples without a reward so far
        self._watch = Watch(name)
        self._checked_form = False

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        log_extra: LogExtra | None = None,
        log_metric: LogMetric | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Rewards of n completions, None for those that are masked from the advantage.

        Args:
            prompts: n prompts of the generator. Equal ones are a group, in a composed reward only where they follow
                each other.
            completions: n texts, or n lists of messages whose last assistant message is the text.
            log_extra: takes columns for the table of completions.
            log_metric: takes numbers; if it is a trainer's own, it also says whether the trainer evaluates.
            columns: what else TRL passes; not read.

        Raises:
            RuntimeError, ValueError, TypeError: as the class says.
        """
        return self._reward(prompts, completions, Log(log_extra, log_metric))

    def _reward(self, prompts: Sequence[Any], completions: Sequence[Completion], log: Log) -> list[float | None]:
        raise NotImplementedError

    def _check_form(self, samples: Sequence[Any], advice: str, *values: object) -> None:
        """Warns if none of the first samples parses; ``advice % values`` completes the sentence."""
        if not samples or self._checked_form:
            return
        self._checked_form = True
        if all(sample is None for sample in samples):
            logger.warning(f"%s: none of the first %d completions {advice}", self.__name__, len(samples), *values)

    def _log(
        self,
        totals: Sequence[float | None],
        columns: Mapping[str, Sequence[Any]],
        metrics: Mapping[str, float],
        log: Log,
    ) -> None:
        """Logs the columns and metrics of a call under the reward's name, and warns once if others hide a mask."""
        if log.extra is not None:
            for key, values in columns.items():
                log.extra(f"{self.__name__}_{key}", list(values))
        if log.metric is not None:
            for key, number in metrics.items():
                log.metric(f"{self.__name__}/{key}", number)
        functions = getattr(log.trainer, "reward_funcs", ())
        if None in totals and isinstance(functions, Sequence) and len(functions) > 1:
            warn_of_mask()


@functools.cache
def warn_of_mask() -> None:
    """Warns, once a process, that TRL does not leave a masked sample out."""
    logger.warning(
        "a sample that could not be scored counts as 0 for its reward beside the others: "
        "acqsynth.rewards.combined([...]) makes one reward of several, and masks it"
    )


def summary(values: Sequence[float | None], lengths: Sequence[int]) -> dict[str, float]:
    """Mean of the values and their correlation with the lengths, as far as they are defined."""
    scored = [(value, length) for value, length in zip(values, lengths, strict=True) if value is not None]
    if not scored:
        return {}
    found = {"mean": statistics.fmean(value for value, _ in scored)}
    if min(len(set(column)) for column in zip(*scored, strict=True)) > 1:
        found["length_correlation"] = statistics.correlation(*zip(*scored, strict=True))
    return found


def completion_text(completion: Completion) -> str | None:
    """The text of a completion: itself, or its last assistant message's; None if that has none."""
    if isinstance(completion, str):
        return completion
    for message in reversed(completion):
        if message.get("role") == "assistant":
            content = message.get("content")
            if isinstance(content, list):  # blocks, as for a model that also takes images
                content = "".join(block.get("text", "") for block in content if block.get("type") == "text")
            return content if isinstance(content, str) else None
    return None


def prompt_key(prompt: Any) -> str:
    """The same text for equal prompts, whatever objects (images) they hold."""
    return prompt if isinstance(prompt, str) else json.dumps(_hashable(prompt), sort_keys=True)


def _hashable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _hashable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_hashable(part) for part in value]
    if value is None or isinstance(value, str | int | float):
        return value
    content = value.tobytes() if hasattr(value, "tobytes") else value if isinstance(value, bytes) else b""
    return [type(value).__qualname__, hashlib.sha256(content).hexdigest() if content else str(value)]


def combined(
    rewards: Sequence[Callable[..., Any]], weights: Sequence[float] | None = None, *, name: str = "combined"
) -> Callable[..., Any]:
    """One reward function of several: their weighted sum, None if one of them gives None.

    TRL itself adds the rewards of a sample without those that are None, so that a sample which one reward could not
    score competes with the rest of its sum.

    Args:
        rewards: reward functions of TRL, coroutines among them.
        weights: one a reward, 1 by default.
        name: the name TRL logs; each reward is logged under its own name.

    Raises:
        ValueError: no rewards, or not one weight a reward.
    """
    scales = [1.0] * len(rewards) if weights is None else [float(weight) for weight in weights]
    if not rewards or len(scales) != len(rewards):
        raise ValueError(f"weights: expected {max(1, len(rewards))}, one a reward, got {len(scales)}")

    def total(columns: Sequence[Sequence[float | None]]) -> list[float | None]:
        return [
            None
            if any(value is None for value in row)
            else sum(scale * value for scale, value in zip(scales, row, strict=True) if value is not None)
            for row in zip(*columns, strict=True)
        ]

    def together(*arguments: Any, **columns: Any) -> list[float | None]:
        return total([reward(*arguments, **columns) for reward in rewards])

    async def awaited(*arguments: Any, **columns: Any) -> list[float | None]:
        given = [reward(*arguments, **columns) for reward in rewards]
        return total([await value if inspect.isawaitable(value) else value for value in given])

    waits = any(inspect.iscoroutinefunction(f) or inspect.iscoroutinefunction(type(f).__call__) for f in rewards)
    function: Callable[..., Any] = awaited if waits else together
    function.__name__ = name
    return function
