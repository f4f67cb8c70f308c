"""A reward for verifiers 0.4, named in the configuration of a task:

    vf.TaskConfig(rewards={"acquisition": {"fn": "acqsynth.integrations.verifiers:acquisition"}})

or awaited in your own ``@vf.reward`` method: ``return await acquisition(self.data, trace)``. ``ACQSYNTH_REWARD`` names
the reward. verifiers requests the scores of a group's traces concurrently; they are computed in batches.
"""

from __future__ import annotations

from typing import Any

from acqsynth.integrations.scorer import scorer_from_environment
from acqsynth.rewards.trl import prompt_key


async def acquisition(task: Any, trace: Any) -> float:
    """The total reward of a trace's last reply.

    verifiers passes the arguments by name.

    Args:
        task: a ``TaskData``; traces with equal ``idx`` and prompts form a group (every environment counts from 0).
        trace: a ``Trace``; its ``last_reply`` is the text.

    Returns:
        The total; if a scorer failed, the mean of the rest of the group (see
        :class:`acqsynth.integrations.scorer.TextScorer`).

    Raises:
        RuntimeError, ValueError, ImportError, AttributeError, TypeError: the environment names no usable reward.
    """
    group = task.idx, prompt_key(_plain(task.prompt))
    return (await scorer_from_environment().ask(trace.last_reply, group)).score


def _plain(prompt: Any) -> Any:
    """verifiers messages as mappings."""
    if isinstance(prompt, list):
        return [message.model_dump() if hasattr(message, "model_dump") else message for message in prompt]
    return prompt
