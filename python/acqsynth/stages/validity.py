"""Whether a signal foretells what a student gains: small batches are scored, learnt and measured."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from acqsynth.config import EngineConfig, RewardConfig, ValidityConfig
from acqsynth.domains.base import Sample
from acqsynth.evaluate import evaluate
from acqsynth.stages import components, rows
from acqsynth.stages.train import composed
from acqsynth.stages.unit import StageError, Work


def validity(
    work: Work,
    *,
    domain: str,
    student: str,
    engine: EngineConfig,
    reward: RewardConfig,
    validity: ValidityConfig,
    options: dict[str, Any],
    max_tokens: int | None,
    seed: int,
) -> None:
    """Writes ``batches.json``: for each batch its skill, the mean value of each signal, and the gain of accuracy.

    Where the real rows carry skills a batch has rows of one skill, else any rows. A batch is learnt by a student of its
    own, which then answers the recipe's evaluation set.

    Inputs: ``real``, ``seeds``, ``evaluation``; ``base``, the answers of the base student to the evaluation set.

    Raises:
        StageError: too few real rows for one batch.
    """
    own = components.domain(domain)
    wanted = reward
    if validity.signals:
        own_options = reward.signals or {}
        picked = {name: own_options.get(name, {}) for name in validity.signals}
        wanted = replace(reward, signals=picked, weights={}, paper_compat=False)
    scorer = composed(work, own, wanted, engine, student)
    gold = rows.read(work.inputs["evaluation"])
    before = fmean(rows.read_table(work.inputs["base"])["right"])
    batches = _batches(rows.read(work.inputs["real"]), validity.batches, validity.rows, seed)
    path = components.model(student)

    def measure(start: int, some: Sequence[tuple[str | None, list[Sample]]]) -> dict[str, Any]:
        [(skill, batch)] = some
        scores: dict[str, float | None] = {}
        for signal in scorer.signals:
            values = [value for value in signal(batch) if value is not None]
            scores[signal.name] = fmean(values) if values else None
        folder = work.kept / f"student-{start}"
        fit_options = {"save_strategy": "no", "seed": seed} | options | validity.options
        components.fit(path, own, batch, folder, fit_options, replay=None, replay_share=0.0, say=lambda line: None)
        after = evaluate(components.engine(engine, str(folder)), own, gold, max_tokens=max_tokens, seed=seed)
        shutil.rmtree(folder)
        work.say(f"batch {start + 1} of {len(batches)}: accuracy {before:.3f} -> {after.accuracy:.3f}")
        return {"skill": skill, "rows": len(batch), "scores": scores, "gain": after.accuracy - before}

    work.write("batches.json", list(work.chunks("batches", batches, 1, measure)))


def _batches(pool: Sequence[Sample], n: int, size: int, seed: int) -> list[tuple[str | None, list[Sample]]]:
    """n batches, each with its skill, disjoint as far as the pool reaches."""
    rng = random.Random(seed)
    by_skill: dict[str | None, list[Sample]] = {}
    for sample in pool:
        by_skill.setdefault(sample.extra.get("skill"), []).append(sample)
    for members in by_skill.values():
        rng.shuffle(members)
    skills = [skill for skill, members in by_skill.items() if len(members) >= size]
    if not skills:
        raise StageError(f"expected {size} real rows of a skill for one batch (evaluation.validity.rows), got fewer")
    found = []
    for i in range(n):
        members = by_skill[skills[i % len(skills)]]
        if len(members) < size:
            members += rng.sample([s for s in pool if s.extra.get("skill") == skills[i % len(skills)]], size)
        found.append((skills[i % len(skills)], [members.pop() for _ in range(size)]))
    return found
