"""Candidates of a prompt with their scores: what best-of-n selects from and DPO makes pairs of."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from acqsynth.domains.base import Messages, Sample
from acqsynth.engines.base import Engine, Sampling


class Scorer(Protocol):
    """What is asked of a reward here; ``acqsynth.rewards.ComposedReward`` is one."""

    def score(self, texts: Sequence[str], groups: Sequence[Hashable]) -> Any:
        """``total``, ``samples``, ``components`` and ``gates`` of n texts; the candidates of a prompt are a group."""


@dataclass(frozen=True)
class Scored:
    """One candidate."""

    prompt: Messages
    text: str
    sample: Sample | None  #: None where the text is no sample
    total: float | None  #: None where a scorer failed
    components: dict[str, float | None]
    gates: dict[str, bool]

    @property
    def rejected_by(self) -> str | None:
        """Why it is no candidate for training data, None where it is one."""
        if self.sample is None:
            return "does not parse"
        gate = next((name for name, passes in self.gates.items() if not passes), None)
        if gate is not None:
            return f"gate {gate}"
        return "a scorer failed" if self.total is None else None


def candidates(engine: Engine, prompts: Sequence[Messages], reward: Scorer, sampling: Sampling) -> list[list[Scored]]:
    """``sampling.n`` candidates of each prompt, scored in one call."""
    texts = [draw.text for group in engine.generate(prompts, sampling) for draw in group]
    groups = [i for i in range(len(prompts)) for _ in range(sampling.n)]
    rewards = reward.score(texts, groups)
    scored = [
        Scored(
            prompts[groups[i]],
            text,
            rewards.samples[i],
            rewards.total[i],
            {name: values[i] for name, values in rewards.components.items()},
            {name: passes[i] for name, passes in rewards.gates.items()},
        )
        for i, text in enumerate(texts)
    ]
    return [scored[i : i + sampling.n] for i in range(0, len(scored), sampling.n)]
