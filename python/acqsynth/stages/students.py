"""Students: fits them, evaluates them, and measures what batches of real rows teach them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from acqsynth.artefacts import read_json, read_rows, read_table, write_table
from acqsynth.config import EngineConfig, ValidityConfig
from acqsynth.domains import Sample, domain as find_domain
from acqsynth.evaluate import Evaluation, evaluate, evaluate_by_likelihood
from acqsynth.preflight import validity_reward
from acqsynth.stages.rows import CHUNK, Scoring, joined, load_engine, rows_of_skills, signal_values
from acqsynth.steps import StepContext


@dataclass(frozen=True)
class Replay:
    """Rows mixed in to prevent forgetting."""

    share: float
    domain: str
    rows: Any


def fit_student(
    context: StepContext,
    *,
    domain: str,
    student: str,
    samples: Sequence[Path],
    n: int,
    replay: Replay | None,
    options: dict[str, Any],
    seed: int,
    ranked: bool = False,
) -> None:
    """Fits the student on n of the samples, the first n if they are ``ranked``, else drawn at random; writes ``model/``
    and ``counts.json``, with the number actually learnt."""
    from acqsynth import train
    from acqsynth.callbacks import Progress

    pool = [row for path in samples for row in read_rows(path)]
    picked = pool[:n] if ranked else random.Random(seed).sample(pool, min(n, len(pool)))
    replayed: dict[str, Any] = {}
    if replay is not None:
        again = train.training_rows(find_domain(replay.domain), read_rows(replay.rows))
        replayed = {"replay": again, "replay_share": replay.share}
    arguments = (student, find_domain(domain), picked, context.folder / "model")
    options = {"seed": seed, "disable_tqdm": True, **options}
    model = train.sft(*arguments, options, **replayed, callbacks=[Progress(context.say, context.status)])
    learnt = read_json(model / train.ROWS)
    if learnt["dropped"] or learnt["cut"]:
        context.say(
            f"of {len(picked)} rows, {learnt['dropped']} are not learnt, as the prompt alone fills max_length = "
            f"{learnt['max_length']} tokens, and {learnt['cut']} fill it and may be cut"
        )
    if learnt["endless"]:
        context.say(
            "the chat template closes answers with no token at which the student stops, so that it learns no end; "
            "student.options.eos_token may name one"
        )
    context.write("counts.json", {"wanted": n, "rows": learnt["learnt"]})


def answer_rows(
    context: StepContext,
    *,
    sets: Mapping[str, tuple[str, Path]],
    model: str | Path,
    engine: EngineConfig,
    max_tokens: int | None,
    seed: int,
    likelihood: bool = False,
) -> None:
    """Writes ``answers-<set>.parquet``: question, gold answer, skill, completion, answer, right; with ``likelihood``
    also the most likely of the set's labels and whether it is right.

    ``sets``: name -> domain and rows.
    """
    answering = load_engine(engine, model)
    for name, (domain, path) in sets.items():
        own, gold = find_domain(domain), read_rows(path)
        answer = partial(evaluate, answering, own, max_tokens=max_tokens, seed=seed)
        columns = _evaluated(context, f"answers-{name}", gold, answer)
        likely: dict[str, list[Any]] = {}
        if likelihood:
            labels = list(dict.fromkeys(sample.answer for sample in gold))
            choose = partial(evaluate_by_likelihood, answering, own, labels=labels)
            chosen = _evaluated(context, f"likelihood-{name}", gold, choose)
            likely = {"likeliest": chosen["answers"], "likeliest_right": chosen["right"]}
            written, best = fmean(columns["right"]), fmean(chosen["right"])
            context.say(f"{name}: {written:.1%} right as written, {best:.1%} by the likeliest of {len(labels)} labels")
        said = {"completion": columns["completions"], "answer": columns["answers"], "right": columns["right"]}
        asked = {"question": [sample.question for sample in gold], "gold": [sample.answer for sample in gold]}
        skills = {"skill": [sample.extra.get("skill") for sample in gold]}
        write_table(context.folder / f"answers-{name}.parquet", {**asked, **skills, **said, **likely})


def _evaluated(
    context: StepContext, name: str, gold: Sequence[Sample], answer: Callable[[Sequence[Sample]], Evaluation]
) -> dict[str, list[Any]]:
    """The columns of an :class:`Evaluation` of all rows."""
    return joined(context.chunks(name, gold, 2 * CHUNK, lambda start, some: asdict(answer(some))))


def measure_validity(
    context: StepContext,
    *,
    scoring: Scoring,
    student: str,
    validity: ValidityConfig,
    options: dict[str, Any],
    max_tokens: int | None,
    seed: int,
    real: Path,
    base: Path,
) -> None:
    """Writes ``batches.json``: for each small batch of real rows its skill, each signal's mean, and the accuracy gained
    by a separate student that learnt it. A batch has rows of one skill if the rows have skills."""
    from acqsynth import train

    domain, gold = find_domain(scoring.domain), read_rows(scoring.evaluation[0])
    reward = replace(scoring, reward=validity_reward(scoring.reward, validity)).build()
    before = fmean(read_table(base)["right"])
    batches = _batches(read_rows(real), validity.batches, validity.rows, seed)

    def measure(start: int, some: Sequence[tuple[str | None, list[Sample]]]) -> dict[str, Any]:
        [(skill, batch)] = some
        scores: dict[str, float | None] = {}
        for name, values in signal_values(reward, batch).items():
            known = [value for value in values if value is not None]
            scores[name] = fmean(known) if known else None
        folder = context.scratch / f"student-{start}"
        fixed = {"save_strategy": "no", "seed": seed, "disable_tqdm": True}
        train.sft(student, domain, batch, folder, fixed | options | validity.options)
        after = evaluate(load_engine(scoring.engine, folder), domain, gold, max_tokens=max_tokens, seed=seed)
        shutil.rmtree(folder)
        context.say(f"batch {start + 1} of {len(batches)}: accuracy {before:.3f} -> {after.accuracy:.3f}")
        return {"skill": skill, "rows": len(batch), "scores": scores, "gain": after.accuracy - before}

    context.write("batches.json", list(context.chunks("batches", batches, 1, measure)))


def _batches(pool: Sequence[Sample], n: int, size: int, seed: int) -> list[tuple[str | None, list[Sample]]]:
    """n batches, each with its skill, disjoint until the pool is exhausted."""
    rng, by_skill = random.Random(seed), rows_of_skills(pool, size)
    left = {skill: rng.sample(members, len(members)) for skill, members in by_skill.items()}
    found = []
    for i in range(n):
        skill = list(left)[i % len(left)]
        if len(left[skill]) < size:
            left[skill] += rng.sample(by_skill[skill], size)
        found.append((skill, [left[skill].pop() for _ in range(size)]))
    return found
