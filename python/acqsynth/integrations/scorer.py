"""Rewards for single texts, for verl, OpenRLHF and verifiers."""

from __future__ import annotations

import asyncio
import functools
import importlib
import logging
import math
import os
import statistics
import threading
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from acqsynth.batching import Batcher
from acqsynth.rewards import ComposedReward

logger = logging.getLogger(__name__)

REWARD_VARIABLE = "ACQSYNTH_REWARD"


@dataclass(frozen=True)
class Scored:
    """The result for one text; every field is always a number."""

    score: float  #: the total; if masked, see :class:`TextScorer`
    masked: bool  #: a scorer failed
    gated: bool  #: a gate rejected it
    components: dict[str, float]  #: each signal; NaN if it has no value


class TextScorer:
    """Scores single texts in batches with a composed reward; never raises because of a text.

    A batch may lack part of a group, so the reward's fusion should compare across calls, as ``quantile`` (the default)
    and ``raw`` do. These trainers do not support masked samples, which get the mean score of their group in the batch,
    else of the batch, else of the last batch with a score (1/2 if there is none): an advantage close to zero.

    Args:
        reward: the reward; None uses the one named by the environment.
        limit, wait: as in :class:`acqsynth.batching.Batcher`, in texts and seconds.

    Raises:
        TypeError: another kind of reward, such as ``AcquisitionReward``.
    """

    def __init__(self, reward: ComposedReward | None = None, *, limit: int = 64, wait: float = 0.05) -> None:
        if not isinstance(reward, ComposedReward | None):
            raise TypeError(f"reward: expected a ComposedReward or None, got {reward!r:.60}")
        self._given = reward
        self.batcher = Batcher(self._score, limit=limit, wait=wait)
        self._typical = 0.5

    @property
    def reward(self) -> ComposedReward:
        """The reward; created here if the environment names it."""
        return self._given if self._given is not None else reward_from_environment()

    def submit(self, text: str | None, group: Hashable) -> Future[list[Scored]]:
        """Queues a text and returns a future of its result, in a list of one."""
        return self.batcher.submit(None, [(text, group)])

    async def ask(self, text: str | None, group: Hashable) -> Scored:
        """Awaits the result of a text."""
        [scored] = await asyncio.wrap_future(self.submit(text, group))
        return scored

    def _score(self, lane: None, items: list[tuple[str | None, Hashable]]) -> Sequence[Scored]:
        reward = self.reward
        names = [signal.name for signal in reward.signals]
        try:
            rewards = reward.score([text for text, _ in items], [group for _, group in items])
        except Exception:
            logger.exception("%s failed, %d texts are masked", reward.__name__, len(items))
            return [self.masked(names)] * len(items)
        known: dict[Hashable, list[float]] = {}
        for (_, group), total in zip(items, rewards.total, strict=True):
            if total is not None:
                known.setdefault(group, []).append(total)
        if known:
            self._typical = statistics.fmean(total for totals in known.values() for total in totals)
        return [
            Scored(
                statistics.fmean(known.get(group, [self._typical])) if total is None else total,
                total is None,
                not passed,
                {name: math.nan if (x := rewards.components[name][i]) is None else x for name in names},
            )
            for i, ((_, group), total, passed) in enumerate(zip(items, rewards.total, rewards.passed, strict=True))
        ]

    def masked(self, names: Sequence[str]) -> Scored:
        """The result of a text that could not be scored."""
        return Scored(self._typical, True, False, dict.fromkeys(names, math.nan))


#: Many threads may make their first request at the same time.
_making = threading.RLock()


def reward_from_environment() -> ComposedReward:
    """The reward that ``ACQSYNTH_REWARD`` names, created once per process.

    Raises:
        RuntimeError: the variable is not set. ValueError: it is not ``module:attribute``. ImportError, AttributeError:
            no such module or attribute. TypeError: the attribute is not a ComposedReward and does not create one.
    """
    path = os.environ.get(REWARD_VARIABLE)
    if not path:
        raise RuntimeError(
            f"{REWARD_VARIABLE} is not set: expected package.module:attribute, a ComposedReward or a function that "
            "creates one"
        )
    with _making:
        return _make(path)


@functools.cache
def _scorer(path: str | None) -> TextScorer:
    return TextScorer()


def scorer_from_environment() -> TextScorer:
    """The scorer for the environment's reward, one per process, so that all callers share its batches."""
    with _making:
        return _scorer(os.environ.get(REWARD_VARIABLE))


@functools.cache
def _make(path: str) -> ComposedReward:
    module, colon, attribute = path.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"{REWARD_VARIABLE}: expected package.module:attribute, got {path!r}")
    found = getattr(importlib.import_module(module), attribute)
    reward = found if isinstance(found, ComposedReward) or not callable(found) else found()
    if not isinstance(reward, ComposedReward):
        raise TypeError(f"{REWARD_VARIABLE}: expected {path!r} to give a ComposedReward, got {type(reward).__name__}")
    return reward
