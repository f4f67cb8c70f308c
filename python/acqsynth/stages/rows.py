"""Rows that exist: collects those of a recipe's sets, and draws or ranks real ones to learn."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from acqsynth.artefacts import read_rows, write_rows
from acqsynth.config import DataConfig, OtherSource, Source
from acqsynth.domains import Sample, domain as find_domain
from acqsynth.normal_form import normal_form
from acqsynth.report.metrics import IN_DISTRIBUTION
from acqsynth.seeds import load_source
from acqsynth.stages.shared import CHUNK, Scoring, fused, joined, signal_values
from acqsynth.steps import StepContext, StepError


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

    ``replay`` gives the share of replay and the most rows beside it, ``per_batch`` the rows of a batch that tests
    signals: too few rows for them fail here, not after the training.
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
