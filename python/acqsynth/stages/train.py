"""The generator learns from the reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from acqsynth.config import EngineConfig, RewardConfig, SamplingConfig
from acqsynth.domains.base import Domain
from acqsynth.engines.base import Sampling
from acqsynth.stages import components, rows
from acqsynth.stages.unit import Work

_PROBE = 32  # samples whose order before and after a refresh of the student tells how stale scores had become


def train(
    work: Work,
    *,
    domain: str,
    method: str,
    generator: str,
    student: str,
    prompts: int,
    shown: int,
    turns: bool,
    candidates: int,
    sampling: SamplingConfig | None,
    options: dict[str, Any],
    reward: RewardConfig,
    engine: EngineConfig,
    seed: int,
) -> None:
    """Writes ``model/``, with the trainer's ``log.jsonl`` and ``completions/`` in it, and ``counts.json``.

    Inputs: ``seeds``, ``evaluation``; in later rounds ``generator`` and ``student``, models of the round before in the
    place of those named.
    """
    own = components.domain(domain)
    scorer = composed(work, own, reward, engine, student)
    seeds = rows.read(work.inputs["seeds"])
    asked = components.prompts(own, seeds, prompts, shown=shown, turns=turns, seed=seed)
    begun = str(work.inputs["generator"]) if "generator" in work.inputs else components.model(generator)
    output = work.folder / "model"  # a kill leaves the trainer's checkpoints here, and it goes on from the last
    refresh = None
    if reward.refresh_steps:
        refresh = (reward.refresh_steps, Path(reward.refresh_from) if reward.refresh_from else output)
    components.train(
        method,
        begun,
        asked,
        scorer,
        output,
        {"seed": seed, **options},
        sampling=drawn(sampling or SamplingConfig(), candidates, seed),
        engine=engine,
        refresh=refresh,
        probe=seeds[:_PROBE],
        say=work.say,
    )
    completions = sum(map(rows.count, output.glob("completions/*.parquet")))
    work.write("counts.json", {"completions": completions or prompts * candidates})


def composed(work: Work, domain: Domain, reward: RewardConfig, engine: EngineConfig, student: str) -> Any:
    """The reward of the recipe over the student named, or over that of the round before."""
    path = str(work.inputs["student"]) if "student" in work.inputs else components.model(reward.student or student)
    return components.reward(
        reward,
        domain,
        path,
        engine,
        seeds=rows.read(work.inputs["seeds"]),
        evaluation=rows.read(work.inputs["evaluation"]),
    )


def drawn(sampling: SamplingConfig, n: int, seed: int) -> Sampling:
    """n completions of a prompt, drawn as the recipe says."""
    return Sampling(n, sampling.temperature, sampling.top_p, sampling.max_tokens, seed)
