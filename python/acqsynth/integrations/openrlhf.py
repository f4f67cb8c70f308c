"""A reward for OpenRLHF 0.11: ``--reward.remote_url my_reward.py``, a file with the line

    from acqsynth.integrations.openrlhf import reward_func

``ACQSYNTH_REWARD`` names the reward. OpenRLHF calls it from threads with lists of one element, which are scored in
batches. It never raises, which would break OpenRLHF's batch; failures are masked, logged and counted in ``extra_logs``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import isnan
from typing import Any

import torch

from acqsynth.integrations.scorer import Scored, TextScorer, scorer_from_environment
from acqsynth.rewards.fusion import BOUNDED

logger = logging.getLogger(__name__)


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any]) -> dict[str, Any]:
    """Rewards of n responses.

    Args:
        queries: n prompts, each followed by its response, special tokens included.
        prompts: the n prompts; responses to equal prompts in a batch form a group.
        labels: ignored.

    Returns:
        ``rewards``, float32 ``[n]``; ``scores``, float32 ``[n]`` between 0 and 1: the rewards themselves if the fusion
        is bounded, else their logistic; ``extra_logs``, name -> float32 ``[n]``: ``masked`` and ``gated``, 0 or 1, and
        each signal, 0 if it has no value.
    """
    names: list[str] = []
    bounded = True
    scorer = scorer_from_environment()
    try:
        names = [signal.name for signal in scorer.reward.signals]
        bounded = scorer.reward.fusion in BOUNDED
        found = _scored(scorer, queries, prompts, names)
    except Exception:
        logger.exception("the reward failed, %d responses are masked", len(queries))
        found = [scorer.masked(names)] * len(queries)
    rewards = torch.tensor([scored.score for scored in found], dtype=torch.float32)
    logs = {
        "masked": [float(scored.masked) for scored in found],
        "gated": [float(scored.gated) for scored in found],
        **{name: [0.0 if isnan(x := scored.components[name]) else x for scored in found] for name in names},
    }
    return {
        "rewards": rewards,
        "scores": rewards.clamp(0, 1) if bounded else rewards.sigmoid(),
        "extra_logs": {name: torch.tensor(values, dtype=torch.float32) for name, values in logs.items()},
    }


def response_of(query: str, prompt: str) -> str | None:
    """The text after the prompt; None if the query does not contain the prompt, or one of them is not a string.

    The query is decoded from tokens, so it may start with special tokens and differ in white space.
    """
    if not (isinstance(query, str) and isinstance(prompt, str)):
        return None
    if query.startswith(prompt):
        return query[len(prompt) :]
    plain = "".join(prompt.split())  # ignore white space
    begin = "".join(query.split()).find(plain)
    if begin < 0:
        return None
    ends = [0, *(i + 1 for i, character in enumerate(query) if not character.isspace())]
    return query[ends[begin + len(plain)] :]


def _scored(scorer: TextScorer, queries: Sequence[str], prompts: Sequence[str], names: Sequence[str]) -> list[Scored]:
    if len(queries) != len(prompts):
        raise ValueError(f"prompts: expected {len(queries)}, one per query, got {len(prompts)}")
    responses = [response_of(query, prompt) for query, prompt in zip(queries, prompts, strict=True)]
    lost = responses.count(None)
    if lost:
        logger.error("%d of %d queries do not contain their prompt and are masked", lost, len(queries))
    futures = [
        None if response is None else scorer.submit(response, prompt)
        for response, prompt in zip(responses, prompts, strict=True)
    ]
    found = [None if future is None else future.result()[0] for future in futures]
    return [scored or scorer.masked(names) for scored in found]  # after the results, whose mean masked ones get
