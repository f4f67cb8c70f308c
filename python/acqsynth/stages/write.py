"""Questions are written by a generator: as it is, by rejection sampling, or about what a student gets wrong."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from acqsynth.config import EngineConfig, RewardConfig, SamplingConfig
from acqsynth.domains.base import Messages, Sample
from acqsynth.engines.base import Engine
from acqsynth.stages import components, rows
from acqsynth.stages.train import composed, drawn
from acqsynth.stages.unit import StageError, Work

CHUNK = 64  # samples that are kept together over a kill


def write(
    work: Work,
    *,
    domain: str,
    generator: str,
    student: str,
    engine: EngineConfig,
    sampling: SamplingConfig,
    shown: int,
    turns: bool,
    n: int,
    reward: RewardConfig,
    seed: int,
) -> None:
    """Writes ``samples.parquet`` with up to n samples that pass the reward's gates, and ``counts.json``.

    Inputs: ``held_out`` (the samples shown), ``seeds``, ``evaluation``; ``generator``, a model in the place of the one
    named; ``mistakes``, a student's answers to the samples shown, of which then only those it got wrong are shown, the
    weaker a skill, the more often.

    Raises:
        StageError: not one sample passed.
    """
    own = components.domain(domain)
    pool = rows.read(work.inputs["held_out"])
    if "mistakes" in work.inputs:
        pool = _missed(pool, rows.read_table(work.inputs["mistakes"])["right"], max(n, shown), seed)
    writer = _writer(work, generator, engine)
    gates = composed(work, own, reward, engine, student).gates
    asked = components.prompts(own, pool, n, shown=min(shown, len(pool)), turns=turns, seed=seed)
    here: set[int] = set()

    def chunk(start: int, some: Sequence[Messages]) -> dict[str, Any]:
        here.add(start)
        made = components.write(writer, own, some, drawn(sampling, 1, seed + start), rows=len(some), gates=gates)
        return {"rows": [asdict(sample) for sample in made.rows], "drawn": made.drawn, "dropped": made.dropped}

    counts = _Counts()
    found: dict[str, Sample] = {}
    for start, made in zip(range(0, n, CHUNK), work.chunks("samples", asked, CHUNK, chunk), strict=True):
        samples = [Sample(**row) for row in made["rows"]]
        if start not in here:  # written before the run was cut off: archives take it in now
            for gate in gates:
                if hasattr(gate, "accept"):
                    gate.accept(samples)
        for sample in samples:
            found.setdefault(sample.question, sample)
        counts.add(made)
        work.say(f"{len(found)} samples of {n} from {counts.completions} completions")
    if not found:
        raise StageError(f"not one of {counts.completions} completions is a sample ({counts.reasons()})")
    rows.write(work.folder / "samples.parquet", list(found.values()))
    work.write("counts.json", counts.summary(n, len(found)))


def select(
    work: Work,
    *,
    domain: str,
    generator: str,
    student: str,
    engine: EngineConfig,
    sampling: SamplingConfig,
    shown: int,
    turns: bool,
    n: int,
    candidates: int,
    reward: RewardConfig,
    seed: int,
) -> None:
    """Rejection sampling: ``samples.parquet`` with the best of several completions a prompt, and ``counts.json``.

    Inputs: as :func:`write`; ``spent``, the counts of a training run: then as many completions are drawn as training
    and writing took together, in the place of ``candidates`` a prompt.
    """
    import torch

    own = components.domain(domain)
    pool = rows.read(work.inputs["held_out"])
    if "spent" in work.inputs:
        spent = json.loads(work.inputs["spent"].read_text())["completions"]
        candidates = max(2, math.ceil((spent + n) / n))
    scorer = composed(work, own, reward, engine, student)
    writer = _writer(work, generator, engine)
    asked = components.prompts(own, pool, n, shown=shown, turns=turns, seed=seed)

    def chunk(start: int, some: Sequence[Messages]) -> dict[str, Any]:
        if start:  # also where the chunks before were done by a run that was cut off
            scorer.load_state_dict(torch.load(work.kept / f"reward-{start}.pt", weights_only=False))
        made = components.select(
            writer, some, scorer, rows=len(some), sampling=drawn(sampling, candidates, seed + start)
        )
        torch.save(scorer.state_dict(), work.kept / f"reward-{start + CHUNK}.pt")
        kept = [
            {"sample": asdict(scored.sample), "total": scored.total, "components": scored.components}
            for scored in made.rows
        ]
        return {"rows": kept, "drawn": made.drawn, "dropped": made.dropped}

    counts = _Counts()
    found: dict[str, dict[str, Any]] = {}
    for made in work.chunks("samples", asked, CHUNK, chunk):
        for row in made["rows"]:
            found.setdefault(row["sample"]["question"], row)
        counts.add(made)
        work.say(f"{len(found)} samples of {n} from {counts.completions} completions")
    if not found:
        raise StageError(f"not one of {counts.completions} completions is a sample ({counts.reasons()})")
    kept = list(found.values())
    columns: dict[str, list[Any]] = {"reward": [row["total"] for row in kept]}
    for name in kept[0]["components"]:
        columns[f"reward_{name}"] = [row["components"][name] for row in kept]
    rows.write(work.folder / "samples.parquet", [Sample(**row["sample"]) for row in kept], columns)
    work.write("counts.json", counts.summary(n, len(kept)))


def filtered(work: Work, *, domain: str, student: str, engine: EngineConfig, n: int, reward: RewardConfig) -> None:
    """``samples.parquet``: the n rows of the real pool that the reward's signals rank first.

    The signals are fused over the whole pool as one group; the gates against copies are not asked, the rows being real.

    Inputs: ``real``, ``seeds``, ``evaluation``.
    """
    own = components.domain(domain)
    pool = rows.read(work.inputs["real"])
    scorer = composed(work, own, reward, engine, student)

    def chunk(start: int, some: Sequence[Sample]) -> dict[str, list[float | None]]:
        return {signal.name: list(signal(some)) for signal in scorer.signals}

    columns: dict[str, list[float | None]] = {signal.name: [] for signal in scorer.signals}
    for scores in work.chunks("scores", pool, 4 * CHUNK, chunk):
        for name, values in scores.items():
            columns[name] += values
    totals = components.fuse(columns, scorer)
    scored = [(-total, i) for i, total in enumerate(totals) if total is not None]
    order = [i for _, i in sorted(scored)[:n]]
    if not order:
        raise StageError("not one real row could be scored")
    rows.write(
        work.folder / "samples.parquet",
        [pool[i] for i in order],
        {"reward": [totals[i] for i in order]}
        | {f"reward_{name}": [values[i] for i in order] for name, values in columns.items()},
    )


class _Counts:
    """What became of a generator's completions."""

    def __init__(self) -> None:
        self.completions = 0
        self.dropped: Counter[str] = Counter()

    def add(self, chunk: Mapping[str, Any]) -> None:
        self.completions += chunk["drawn"]
        self.dropped.update(chunk["dropped"])

    def reasons(self) -> str:
        return ", ".join(f"{count} {why}" for why, count in self.dropped.most_common())

    def summary(self, wanted: int, kept: int) -> dict[str, Any]:
        return {
            "wanted": wanted,
            "kept": kept,
            "completions": self.completions,
            "dropped": dict(self.dropped.most_common()),
        }


def _writer(work: Work, generator: str, engine: EngineConfig) -> Engine:
    path = str(work.inputs["generator"]) if "generator" in work.inputs else components.model(generator)
    return components.engine(engine, path)


def _missed(pool: Sequence[Sample], right: Sequence[bool], n: int, seed: int) -> list[Sample]:
    """n draws of samples answered wrongly, each skill by the share of it that was wrong."""
    wrong = [sample for sample, ok in zip(pool, right, strict=True) if not ok]
    if not wrong:
        raise StageError("the student answers every held-out row rightly, so there is no mistake to show")
    # A skill counts by the share of it that was wrong, m of a; shared by its m mistakes that is 1 / a each.
    asked = Counter(_skill(sample) for sample in pool)
    return random.Random(seed).choices(wrong, [1 / asked[_skill(sample)] for sample in wrong], k=n)


def _skill(sample: Sample) -> str:
    return str(sample.extra.get("skill", ""))
