"""TRL 1.16's contract for reward functions: arguments, logging and warnings.

GRPO and RLOO exclude a masked sample (None) from the advantage only if every reward masks it; otherwise the reward that
masks it counts as 0. :func:`combined` adds several rewards and masks a sample for all of them. The experimental
OnlineDPO counts every masked sample as 0.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import json
import logging
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch

from acqsynth.rewards.batch import Guard, Watch
from acqsynth.rewards.fusion import finite_weight

logger = logging.getLogger(__name__)

Completion = str | list[dict[str, Any]]
LogExtra = Callable[[str, list[Any]], None]  #: takes a column name and n values, for the table of completions
LogMetric = Callable[[str, float], None]  #: takes a name and a number


class Log(NamedTuple):
    """The logging callbacks that TRL passes to a call."""

    extra: LogExtra | None
    metric: LogMetric | None

    @property
    def trainer(self) -> Any:
        """The trainer, if the callbacks are its methods."""
        return getattr(self.metric, "__self__", None)

    @property
    def evaluates(self) -> bool:
        """Whether the trainer is evaluating."""
        model = getattr(self.trainer, "model", None)
        return isinstance(model, torch.nn.Module) and not model.training


class TrlReward:
    """Base class of TRL reward functions, with the state kept between calls.

    Args:
        name: name under which TRL logs.
    """

    def __init__(self, name: str) -> None:
        self.__name__ = name
        self.masked = 0  #: number of samples masked so far
        self._guard = Guard(name)
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
        """Rewards of n completions; None masks a completion from the advantage.

        Args:
            prompts: n prompts of the generator. Equal prompts form a group; in a composed reward, only if they are
                consecutive.
            completions: n texts, or n lists of messages whose last assistant message is the text.
            log_extra: logs a column of the table of completions.
            log_metric: logs a number; if it is a trainer's method, it also shows whether the trainer is evaluating.
            columns: other columns that TRL passes; ignored.

        Raises:
            TypeError: a string in place of a list. ValueError: prompts and completions differ in number. RuntimeError,
            ValueError, TypeError: as documented by the class.
        """
        for name, values in (("prompts", prompts), ("completions", completions)):
            if isinstance(values, str):
                raise TypeError(f"{name}: expected a list with one entry for each completion, got a string")
        if len(prompts) != len(completions):
            raise ValueError(f"prompts: expected {len(completions)}, one for each completion, got {len(prompts)}")
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
        """Logs a call's columns and metrics under the reward's name; warns once if other rewards defeat a mask."""
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
    """Warns, once per process, that TRL does not exclude a masked sample."""
    logger.warning(
        "TRL counts a sample that could not be scored as 0 if there are other rewards: "
        "acqsynth.rewards.combined([...]) merges the rewards into one, which masks the sample"
    )


@functools.cache
def warn_of_ranks(name: str) -> None:
    """Warns, once per process, that a reward compares only the samples of its own rank."""
    logger.warning(
        "%s: each rank compares only its own samples, so the rewards of a group that straddles ranks do not compare; "
        "make the reward with sync=True if all ranks call it together, as in TRL",
        name,
    )


def summary(values: Sequence[float | None], lengths: Sequence[int]) -> dict[str, float]:
    """Mean of the values and their correlation with the lengths, where defined."""
    scored = [(value, length) for value, length in zip(values, lengths, strict=True) if value is not None]
    if not scored:
        return {}
    found = {"mean": statistics.fmean(value for value, _ in scored)}
    if min(len(set(column)) for column in zip(*scored, strict=True)) > 1:
        with suppress(statistics.StatisticsError):  # the squares of tiny differences underflow
            found["length_correlation"] = statistics.correlation(*zip(*scored, strict=True))
    return found


def completion_text(completion: Completion) -> str | None:
    """The text of a completion: itself, or that of its last assistant message; None if there is none."""
    if isinstance(completion, str):
        return completion
    messages = list(completion) if isinstance(completion, Iterable) else []  # verl's are arrays
    for message in reversed(messages):
        if isinstance(message, Mapping) and message.get("role") == "assistant":
            content = message.get("content")
            if isinstance(content, list):  # content blocks, as for multimodal models
                blocks = [block for block in content if isinstance(block, Mapping) and block.get("type") == "text"]
                content = "".join(str(block.get("text") or "") for block in blocks)
            return content if isinstance(content, str) else None
    return None


def prompt_key(prompt: Any) -> str:
    """A key that is the same for equal prompts, including those that contain objects such as images."""
    return prompt if isinstance(prompt, str) else json.dumps(_hashable(prompt), sort_keys=True)


def _hashable(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.hasobject:  # pandas reads nested columns as such
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _hashable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_hashable(part) for part in value]
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, torch.Tensor):  # as text it lacks most of its elements
        value = value.detach().cpu().flatten().view(torch.uint8).numpy()
    content = value.tobytes() if hasattr(value, "tobytes") else value if isinstance(value, bytes) else b""
    return [type(value).__qualname__, hashlib.sha256(content).hexdigest() if content else str(value)]


def combined(
    rewards: Sequence[Callable[..., Any]], weights: Sequence[float] | None = None, *, name: str = "combined"
) -> Callable[..., Any]:
    """Combines several reward functions into their weighted sum; None if any of them returns None.

    TRL itself leaves None out of the sum, so a sample that one reward could not score competes with the sum of the
    others. The result has the ``state_dict`` and ``load_state_dict`` of a reward, for the rewards that have state.

    Args:
        rewards: TRL reward functions; coroutine functions are allowed.
        weights: one per reward, 1 by default.
        name: name under which TRL logs; each reward is also logged under its own name.

    Raises:
        ValueError: no rewards, not one weight per reward, or a weight that is not a finite number. A call raises it
            for a reward that returns another number of values than there are completions.
        TypeError: a reward that is not a function, such as the name of a reward model.
    """
    if callable(rewards) or not all(map(callable, rewards)):
        raise TypeError(f"rewards: expected a list of reward functions, got {rewards!r:.80}")
    if not rewards:
        raise ValueError("rewards: expected at least one")
    scales = [1.0] * len(rewards) if weights is None else [finite_weight(weight) for weight in weights]
    if len(scales) != len(rewards):
        raise ValueError(f"weights: expected {len(rewards)}, one per reward, got {len(scales)}")
    waits = any(inspect.iscoroutinefunction(f) or inspect.iscoroutinefunction(type(f).__call__) for f in rewards)
    return (_Awaited if waits else _Combined)(rewards, scales, name)


class _Combined:
    """The weighted sum of reward functions; an object, as AsyncGRPO pickles rewards."""

    def __init__(self, rewards: Sequence[Callable[..., Any]], weights: Sequence[float], name: str) -> None:
        self.__name__ = name
        self._rewards = list(rewards)
        self._weights = weights

    def __call__(self, *arguments: Any, **columns: Any) -> Any:
        return self._total([reward(*arguments, **columns) for reward in self._rewards])

    def state_dict(self) -> dict[str, Any]:
        return {key: reward.state_dict() for key, reward in self._stateful().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        stateful = self._stateful()
        if state.keys() != stateful.keys():
            raise ValueError(f"state: expected that of rewards {list(stateful)}, got {list(state)}")
        for key, reward in stateful.items():
            reward.load_state_dict(state[key])

    def _stateful(self) -> dict[str, Any]:
        return {str(i): reward for i, reward in enumerate(self._rewards) if hasattr(reward, "state_dict")}

    def _total(self, columns: Sequence[Sequence[float | None]]) -> list[float | None]:
        for reward, column in zip(self._rewards, columns, strict=True):
            if len(column) != len(columns[0]):
                name = getattr(reward, "__name__", type(reward).__name__)
                raise ValueError(f"{self.__name__}: {name} returned {len(column)} rewards, expected {len(columns[0])}")
        return [
            None
            if any(value is None for value in row)
            else sum(weight * value for weight, value in zip(self._weights, row, strict=True) if value is not None)
            for row in zip(*columns, strict=True)
        ]


class _Awaited(_Combined):
    async def __call__(self, *arguments: Any, **columns: Any) -> list[float | None]:
        async def values(reward: Callable[..., Any]) -> Any:
            found = reward(*arguments, **columns)
            return await found if inspect.isawaitable(found) else found

        return self._total(await asyncio.gather(*map(values, self._rewards)))
