"""Profile of the arithmetic world's base model: accuracy on each skill, and the samples it writes as a generator.

``python -m benchmarks.bench_world`` makes the model if it is not cached, and prints its profile.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections import Counter
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from acqsynth import engines
from acqsynth.domains.arithmetic import SKILLS, Arithmetic
from acqsynth.engines import Engine, Sampling
from acqsynth.evaluate import evaluate
from acqsynth.world import Settings, base_model

WRITING_TOKENS = 64  #: maximum tokens of a written sample; the longest takes 44


@dataclass(frozen=True)
class Profile:
    """Results of :func:`profile`. Shares are fractions of 1.

    Attributes:
        accuracy: skill -> share of correct greedy answers to test questions; for the coin, of tosses it guessed.
        parsed: share of the written samples in the right format.
        valid: share of the written samples that ask a question of the world.
        mix: skill -> its share of the valid written samples.
        right: skill -> share of its written samples with a correct answer; only skills that occur and can be verified.
    """

    accuracy: dict[str, float]
    parsed: float
    valid: float
    mix: dict[str, float]
    right: dict[str, float]


def profile(engine: Engine, *, questions: int = 150, written: int = 256, shown: int = 2, seed: int = 0) -> Profile:
    """Measures a model as student and as generator (at temperature 1, ``shown`` samples in each prompt).

    Args:
        questions: test questions per skill, or all if the test split has fewer.
        written: number of samples to request.
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
    """Skill -> share of correct greedy answers to ``questions`` of its test split, or to all if it has fewer."""
    domain = Arithmetic()
    found = {}
    for name, skill in SKILLS.items():
        rows = domain.rows(min(questions, len(skill.questions["test"])), seed, skills=[name], split="test")
        found[name] = evaluate(engine, domain, rows).accuracy
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="seed of the model's weights and data (default: 0)")
    parser.add_argument("--model", help="profile this folder or hub id instead of the base model")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("acqsynth.world").setLevel(logging.INFO)
    console = Console()
    path = arguments.model
    if path is None:
        begin = time.perf_counter()
        folder = base_model(Settings(seed=arguments.seed))
        console.print(f"base model of seed {arguments.seed}: {folder} ({time.perf_counter() - begin:.0f} s)")
        curve = json.loads((folder / "pretrain.json").read_text())["loss"]
        console.print(f"final loss: practice {curve[-1]['practice']:.3f}, writing {curve[-1]['writing']:.3f}")
        path = str(folder)
    show(console, profile(engines.load("transformers", path)))


def show(console: Console, measured: Profile) -> None:
    table = Table(box=SIMPLE_HEAD)
    for heading in ("skill", "kind", "accuracy", "share of samples", "samples correct"):
        table.add_column(heading, justify="left" if heading in ("skill", "kind") else "right")
    for name, skill in SKILLS.items():
        right = f"{measured.right[name]:.0%}" if name in measured.right else "-"
        table.add_row(name, skill.kind, f"{measured.accuracy[name]:.0%}", f"{measured.mix[name]:.0%}", right)
    console.print(table)
    console.print(f"Of the written samples, {measured.parsed:.0%} parse and {measured.valid:.0%} are valid questions.")


if __name__ == "__main__":
    main()
