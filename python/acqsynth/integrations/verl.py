"""A reward for verl 0.9: a function of one sample, or a reward manager.

    export ACQSYNTH_REWARD=my_rewards:build          # a function that creates a ComposedReward
    reward.custom_reward_function.path=pkg://acqsynth.integrations.verl
    reward.custom_reward_function.name=compute_score

or, to identify groups, which requires the prompt,

    reward.reward_manager.source=importlib
    reward.reward_manager.module.path=pkg://acqsynth.integrations.verl
    reward.reward_manager.name=AcquisitionRewardManager

verl makes concurrent calls of one sample each, which are scored in batches. Each reward worker is a process with its
own archives, histories and student, and verl starts eight of them: set ``reward.num_workers=1``, which also keeps
groups together, or let the workers share one server (``AcquisitionReward(url=...)``, ``acqsynth serve``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Mapping
from typing import Any

import torch

from acqsynth.integrations.scorer import Scored, scorer_from_environment
from acqsynth.rewards.trl import prompt_key

#: Keys of ``extra_info`` that identify the prompt of a completion; the first one present is used.
GROUP_KEYS = ("uid", "prompt", "index")


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, float]:
    """Scores one completion.

    Args:
        data_source: the row's data set; each counts its ``index`` from 0.
        solution_str: the generator's completion.
        ground_truth, options: passed by verl; ignored.
        extra_info: its ``uid``, ``prompt`` or ``index`` identifies the group within the data set.

    Returns:
        ``score``, then 0 or 1 for ``masked`` and ``gated``, then each signal (NaN if it has no value). The keys are the
        same for every sample, as verl requires.

    Raises:
        RuntimeError, ValueError, ImportError, AttributeError, TypeError: the environment names no usable reward.
    """
    info = extra_info or {}
    group = next((_key(info[key]) for key in GROUP_KEYS if info.get(key) is not None), None)
    return _as_dict(await scorer_from_environment().ask(solution_str, (_key(data_source), group)))


class AcquisitionRewardManager:
    """The same reward as a verl reward manager: scores batches of one sample and groups by ``uid`` or prompt.

    Args:
        config, compute_score, reward_router_address, reward_model_tokenizer: passed by verl; ignored.
        tokenizer: the generator's tokenizer.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Any = None,
        reward_router_address: str | None = None,
        reward_model_tokenizer: Any = None,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer

    @classmethod
    def assemble_rm_scores(cls, data: Any, scores: list[float]) -> torch.Tensor:
        """Places the scores of a batch where verl expects them, at the last token of each response.

        Args:
            data: a ``DataProto`` of B items: ``batch`` with ``prompts [B, P]``, ``responses [B, R]``,
                ``attention_mask [B, P + R]``.
            scores: B numbers.

        Returns:
            ``[B, R]`` float32, 0 elsewhere.
        """
        responses, mask = data.batch["responses"], data.batch["attention_mask"]
        last = mask[:, -responses.shape[1] :].sum(dim=1).clamp_min(1) - 1  # [B]
        found = torch.zeros(responses.shape, dtype=torch.float32, device=responses.device)
        return found.scatter_(1, last[:, None].long(), found.new_tensor(scores)[:, None])

    async def run_single(self, data: Any) -> dict[str, Any]:
        """Scores one sample.

        Args:
            data: a ``DataProto`` of one item (with several turns the last item is used): ``batch`` with ``responses
                [R]`` and ``attention_mask [P + R]``, ``non_tensor_batch`` with ``uid`` or ``raw_prompt``.

        Returns:
            ``{"reward_score": float, "reward_extra_info": {...}}``, the latter as :func:`compute_score`.
        """
        item = data[-1:][0]
        responses = item.batch["responses"]
        length = int(item.batch["attention_mask"][-len(responses) :].sum())
        loop = asyncio.get_running_loop()
        text = await loop.run_in_executor(
            None, lambda: self.tokenizer.decode(responses[:length], skip_special_tokens=True)
        )
        other = item.non_tensor_batch
        group = next((_key(other[key]) for key in ("uid", "raw_prompt") if other.get(key) is not None), None)
        result = _as_dict(await scorer_from_environment().ask(text, group))
        return {"reward_score": result["score"], "reward_extra_info": result}


def _key(value: Any) -> Hashable:
    return value if isinstance(value, int) else prompt_key(value.tolist() if hasattr(value, "tolist") else value)


def _as_dict(scored: Scored) -> dict[str, float]:
    flags = {"masked": float(scored.masked), "gated": float(scored.gated)}
    return {"score": scored.score, **flags, **scored.components}
