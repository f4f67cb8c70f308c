"""The real rows of a recipe: read once, kept as parquet, those that stand in an evaluation set left out."""

from __future__ import annotations

import random
from collections.abc import Mapping

from acqsynth import seeds
from acqsynth.config import BUNDLED, DataConfig, OtherSource, Source
from acqsynth.domains.base import Domain, Sample
from acqsynth.stages import components, rows
from acqsynth.stages.unit import StageError, Work

IN_DISTRIBUTION = "in_distribution"  #: name of the recipe's own evaluation set
_POOLS = ("seeds", "held_out", "real")


def collect(
    work: Work, *, domain: str, data: DataConfig, others: Mapping[str, OtherSource], evaluation_rows: int | None
) -> None:
    """Writes ``seeds``, ``held_out``, ``real`` and ``evaluation-<set>`` as parquet, and ``rows.json`` with their sizes.

    Raises:
        StageError: a source can not be read or gives no rows; names its key.
    """
    own = components.domain(domain)
    tests = {IN_DISTRIBUTION: _load("data.evaluation", own, data.evaluation)[:evaluation_rows]}
    for name, other in others.items():
        theirs = components.domain(other.domain) if other.domain else own
        tests[name] = _load(f"evaluation.others.{name}", theirs, other)[:evaluation_rows]
    for name, found in tests.items():
        rows.write(work.folder / f"evaluation-{name}.parquet", found)
    known = {_plain(sample.question) for found in tests.values() for sample in found}
    pools: dict[str, list[Sample]] = {}
    sizes = {f"evaluation-{name}": {"rows": len(found), "left_out": 0} for name, found in tests.items()}
    for name, source in zip(_POOLS, (data.seeds, data.held_out, data.real), strict=True):
        loaded = _load(f"data.{name}", own, source) if source is not None else pools["seeds"]
        pools[name] = [sample for sample in loaded if _plain(sample.question) not in known]
        if not pools[name]:
            raise StageError(f"data.{name}: every row also stands in an evaluation set")
        if left_out := len(loaded) - len(pools[name]):
            work.say(f"data.{name}: {left_out} rows also stand in an evaluation set and are left out")
        sizes[name] = {"rows": len(pools[name]), "left_out": left_out}
        rows.write(work.folder / f"{name}.parquet", pools[name])
    if data.replay is not None:
        theirs = components.domain(data.replay.domain) if data.replay.domain else own
        again = _load("data.replay", theirs, data.replay)
        sizes["replay"] = {"rows": len(again), "left_out": 0}
        rows.write(work.folder / "replay.parquet", again)
    work.write("rows.json", sizes)


def random_real(work: Work, *, n: int, seed: int) -> None:
    """``samples.parquet``: n rows of the real pool, drawn without replacement."""
    pool = rows.read(work.inputs["real"])
    rows.write(work.folder / "samples.parquet", random.Random(seed).sample(pool, min(n, len(pool))))


def _load(key: str, domain: Domain, source: Source) -> list[Sample]:
    limit = None if source.limit is None else source.skip + source.limit
    try:
        if source.source.startswith(BUNDLED):
            found = _bundled(source.source.removeprefix(BUNDLED))[:limit]
        else:
            found = domain.load(source.source, source.split, source.columns, limit)
    except (OSError, ValueError, ImportError) as error:
        raise StageError(f"{key}: {' '.join(str(error).split())}") from error
    found = found[source.skip :]
    if not found:
        raise StageError(f"{key}: {source.source} has no rows after the first {source.skip}")
    return found


def _bundled(name: str) -> list[Sample]:
    """Rows of the package; the seeds without reasoning, which small models forget to end when they are shown some."""
    if name == "mathematics":
        rows = [row for row in seeds.load_seeds(name) if "answer" in row]
        return [Sample(row["prompt"].strip(), row["answer"]) for row in rows]
    if name == "word_problems":
        return [Sample(row["question"], row["answer"], row["reasoning"]) for row in seeds.load_word_problems()]
    raise ValueError(f"{BUNDLED}{name}: unknown, expected {BUNDLED}mathematics or {BUNDLED}word_problems")


def _plain(question: str) -> str:
    return " ".join(question.lower().split())
