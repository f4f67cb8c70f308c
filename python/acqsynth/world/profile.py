"""What a model of the arithmetic world can do: each skill's accuracy, and what it writes when asked for samples."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from acqsynth.domains.arithmetic import SKILLS, Arithmetic
from acqsynth.engines import Engine, Sampling

WRITING_TOKENS = 64  #: most tokens of a written sample; the longest takes 44


@dataclass(frozen=True)
class Profile:
    """Shares are of 1.

    Attributes:
        accuracy: skill -> share of right answers to test questions, greedy; of the coin, of tosses it hit.
        parsed: share of the written samples that keep to the format; ``valid``: that ask a question of the world.
        mix: skill -> share of the valid written samples.
        right: skill -> share of its written samples whose answer is right; only of skills that were written and can
            be verified.
    """

    accuracy: dict[str, float]
    parsed: float
    valid: float
    mix: dict[str, float]
    right: dict[str, float]


def profile(engine: Engine, *, questions: int = 150, written: int = 256, shown: int = 2, seed: int = 0) -> Profile:
    """Measures a model as student and as generator (at temperature 1, ``shown`` samples in each prompt).

    Args:
        questions: of each skill, or as many as its test split has.
        written: samples asked for.
    """
    domain = Arithmetic()
    rng = random.Random(seed)
    seeds = domain.rows(40 * len(SKILLS), seed)
    prompts = [domain.generator_prompt(rng.sample(seeds, shown)) for _ in range(written)]
    texts = engine.generate(prompts, Sampling(max_tokens=WRITING_TOKENS, seed=seed))
    samples = [sample for (draw,) in texts if (sample := domain.parse(draw.text)) is not None]
    valid = [sample for sample in samples if domain.fault(sample) is None]
    count = Counter(sample.extra["skill"] for sample in valid)
    verdicts: dict[str, list[bool]] = {}
    for sample, verdict in zip(valid, domain.verify(valid), strict=True):
        if verdict is not None:
            verdicts.setdefault(sample.extra["skill"], []).append(verdict)
    return Profile(
        accuracy=accuracy(engine, questions, seed),
        parsed=len(samples) / written,
        valid=len(valid) / written,
        mix={name: count[name] / max(1, len(valid)) for name in SKILLS},
        right={name: sum(verdicts[name]) / len(verdicts[name]) for name in SKILLS if name in verdicts},
    )


def accuracy(engine: Engine, questions: int, seed: int) -> dict[str, float]:
    """Skill -> share of right greedy answers to ``questions`` of its test split, or to all where it has fewer."""
    domain = Arithmetic()
    rows = []
    for name, skill in SKILLS.items():
        rows += domain.rows(min(questions, len(skill.questions["test"])), seed, skills=[name], split="test")
    greedy = Sampling(temperature=0, max_tokens=domain.answer_tokens)
    drawn = engine.generate([domain.student_prompt(row.question) for row in rows], greedy)
    right: dict[str, list[bool]] = {name: [] for name in SKILLS}
    answers = [domain.answer_of(draw.text) for (draw,) in drawn]
    for row, verdict in zip(rows, domain.equivalent(rows, answers), strict=True):
        right[row.extra["skill"]].append(verdict)
    return {name: sum(verdicts) / len(verdicts) for name, verdicts in right.items()}
