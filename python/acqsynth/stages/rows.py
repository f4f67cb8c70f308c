"""Collects the rows of a recipe's sets, draws or ranks real rows to learn, and builds what scores rows."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acqsynth import engines
from acqsynth.artefacts import read_rows, write_rows
from acqsynth.config import DataConfig, EngineConfig, OtherSource, RewardConfig, Source
from acqsynth.domains import Domain, Sample, domain as find_domain
from acqsynth.engines import Engine
from acqsynth.normal_form import normal_form
from acqsynth.report.metrics import IN_DISTRIBUTION
from acqsynth.rewards.batch import Batch, numbers, sample_length
from acqsynth.rewards.fusion import LengthBins, fuse
from acqsynth.seeds import load_source
from acqsynth.steps import StepContext, StepError

CHUNK = 64  #: samples saved together; a kill loses at most this many


@dataclass(frozen=True)
class Scoring:
    """Inputs of a step's reward, which several stages use."""

    reward: RewardConfig
    domain: str
    engine: EngineConfig
    student: Any  #: the model that scores
    seeds: Any  #: rows shown to the generator in training
    evaluation: Sequence[Any]  #: rows of each evaluation set, the recipe's own first, which no sample may repeat
    reference: Any  #: rows whose loss should fall, for influence
    models: Sequence[Any] = ()  #: the other models that it loads, so that a change of their files is noticed

    def find_domain(self) -> Domain:
        """The domain, completed by the seeds."""
        return find_domain(self.domain).with_seeds(read_rows(self.seeds))

    def build(self, shown: Sequence[Sample] = ()) -> Any:
        """The reward; ``shown`` are rows besides the seeds that prompts show."""
        from acqsynth.rewards.build import build

        return build(
            self.reward,
            find_domain(self.domain),
            str(self.student),
            self.engine,
            seeds=read_rows(self.seeds),
            evaluation=[row for path in self.evaluation for row in read_rows(path)],
            reference=read_rows(self.reference),
            shown=shown,
        )


def load_engine(config: EngineConfig, model: str | Path) -> Engine:
    return engines.load(config.name, str(model), **config.options)


def signal_values(reward: Any, samples: Sequence[Sample]) -> dict[str, list[float | None]]:
    """Each signal's values of the samples; signals share intermediate results."""
    batch = Batch(samples)
    return {signal.name: numbers(signal, batch) for signal in reward.signals}


def fused(columns: Mapping[str, Sequence[float | None]], reward: Any, samples: Sequence[Sample]) -> list[float | None]:
    """Fuses the signals' values of samples like the reward, as one group."""
    weighted = {name: columns[name] for name in reward.weights}  # a signal of weight 0 is only logged
    # Samples that lack a value are left out of all statistics.
    lacking = {i for values in weighted.values() for i, value in enumerate(values) if value is None}
    lengths = [sample_length(sample) for sample in samples]
    for name, values in weighted.items():
        known = [None if i in lacking else value for i, value in enumerate(values)]
        weighted[name] = LengthBins()(known, lengths) if name in reward.length_bins else known
    return fuse(weighted, [0] * len(samples), reward.fusion, reward.weights)


def joined(chunks: Iterable[Mapping[str, Sequence[Any]]]) -> dict[str, list[Any]]:
    """Concatenates the columns of all chunks."""
    columns: dict[str, list[Any]] = {}
    for chunk in chunks:
        for name, values in chunk.items():
            columns.setdefault(name, []).extend(values)
    return columns


def collect_rows(
    context: StepContext,
    *,
    domain: str,
    data: DataConfig,
    others: Mapping[str, OtherSource],
    limit: int | None,
    replay: tuple[float, int] | None = None,
    per_batch: int = 0,
) -> None:
    """Writes ``seeds``, ``held_out``, ``real``, ``evaluation-<set>`` and, if the recipe has them, ``reference`` and
    ``replay`` as parquet, and ``rows.json`` with their sizes. Rows of an evaluation set are left out of the other
    sets, rows of ``seeds`` also of ``reference``.

    ``replay``: share of replayed rows, and the maximum number of other rows. ``per_batch``: rows of a batch that tests
    signals. Given so that a set with too few rows for them fails here, not after the training.
    """
    own = find_domain(domain)

    def load(key: str, source: Source) -> list[Sample]:
        theirs = source.domain if isinstance(source, OtherSource) else None
        try:
            return load_source(find_domain(theirs) if theirs else own, source)
        except (OSError, ValueError, ImportError) as error:
            raise StepError(f"{key}: {' '.join(str(error).split())}") from error

    tests = {IN_DISTRIBUTION: load("data.evaluation", data.evaluation)[:limit]}
    tests |= {name: load(f"evaluation.others.{name}", other)[:limit] for name, other in others.items()}
    sizes = {f"evaluation-{name}": {"rows": len(found), "left_out": 0} for name, found in tests.items()}
    for name, found in tests.items():
        write_rows(context.folder / f"evaluation-{name}.parquet", found)
    known = {normal_form(sample.question) for found in tests.values() for sample in found}
    seeds = load("data.seeds", data.seeds)
    shown = {normal_form(sample.question) for sample in seeds}
    pools = [("seeds", None, known), ("held_out", data.held_out, known), ("real", data.real, known)]
    if data.reference is not None:
        pools.append(("reference", data.reference, known | shown))
    if data.replay is not None:
        pools.append(("replay", data.replay, known))
    for name, source, taken in pools:
        loaded = seeds if source is None else load(f"data.{name}", source)
        pool = [sample for sample in loaded if normal_form(sample.question) not in taken]
        others_of = "the seeds or an evaluation set" if name == "reference" else "an evaluation set"
        if not pool:
            raise StepError(f"data.{name}: every row is also in {others_of}")
        if left_out := len(loaded) - len(pool):
            context.say(f"data.{name}: {left_out} rows are also in {others_of} and are left out")
        sizes[name] = {"rows": len(pool), "left_out": left_out}
        write_rows(context.folder / f"{name}.parquet", pool)
        if replay and name == ("replay" if data.replay else "real"):
            _check_replay(len(pool), *replay)
        if per_batch and name == "real":
            rows_of_skills(pool, per_batch)
    context.write("rows.json", sizes)


def _check_replay(available: int, share: float, n: int) -> None:
    from acqsynth import train

    try:
        train.replay_count(available, share, n)
    except ValueError as error:
        raise StepError(f"student.{error}") from error


def rows_of_skills(pool: Sequence[Sample], least: int) -> dict[str | None, list[Sample]]:
    """The samples of each skill that has enough."""
    found: dict[str | None, list[Sample]] = {}
    for sample in pool:
        found.setdefault(sample.extra.get("skill"), []).append(sample)
    if most := {skill: members for skill, members in found.items() if len(members) >= least}:
        return most
    raise StepError(f"evaluation.validity.rows: expected {least} real rows of a skill for one batch, got fewer")


def random_rows(context: StepContext, *, real: Path, n: int, seed: int) -> None:
    """Writes ``samples.parquet``: n real rows, drawn without replacement."""
    pool = read_rows(real)
    write_rows(context.folder / "samples.parquet", random.Random(seed).sample(pool, min(n, len(pool))))


def filter_rows(context: StepContext, *, scoring: Scoring, real: Path, n: int) -> None:
    """Writes ``samples.parquet``: the n real rows that the reward's signals rank first, fused over the whole pool as
    one group. Gates are skipped, as the rows are real."""
    pool, reward = read_rows(real), scoring.build()
    columns = joined(context.chunks("scores", pool, 4 * CHUNK, lambda start, some: signal_values(reward, some)))
    totals = fused(columns, reward, pool)
    order = [i for _, i in sorted((-total, i) for i, total in enumerate(totals) if total is not None)[:n]]
    if not order:
        raise StepError("none of the real rows could be scored")
    scored = {"reward": totals} | {f"reward_{name}": values for name, values in columns.items()}
    picked = {name: [values[i] for i in order] for name, values in scored.items()}
    write_rows(context.folder / "samples.parquet", [pool[i] for i in order], picked)
