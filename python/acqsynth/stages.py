"""The work of each stage: functions that read artefacts of other steps and write their own.

:mod:`acqsynth.pipeline` decides which functions a recipe needs, and with which arguments. Model libraries are imported
inside the functions, so that planning does not need them.
"""

from __future__ import annotations

import math
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from acqsynth import engines, write
from acqsynth.config import (
    DataConfig,
    EngineConfig,
    LabellingConfig,
    OtherSource,
    RewardConfig,
    SamplingConfig,
    Source,
    ValidityConfig,
)
from acqsynth.domains import Domain, Messages, Sample, domain as find_domain
from acqsynth.engines import Engine, Sampling
from acqsynth.evaluate import Evaluation, evaluate, evaluate_by_likelihood
from acqsynth.label import Labeller
from acqsynth.normal_form import normal_form
from acqsynth.preflight import validity_reward
from acqsynth.report.metrics import IN_DISTRIBUTION
from acqsynth.rewards.batch import Batch, numbers, sample_length
from acqsynth.rewards.fusion import LengthBins, fuse
from acqsynth.rewards.gates import sample_gates
from acqsynth.rewards.texts import NearCopies
from acqsynth.seeds import load_source
from acqsynth.steps import StepContext, StepError, read_json, read_rows, read_table, write_rows, write_table

CHUNK = 64  #: samples saved together; a kill loses at most this many
_PROBE = 32  # samples whose order before and after a student refresh measures staleness


# --- inputs shared by stages ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scoring:
    """Inputs for a step's reward."""

    reward: RewardConfig
    domain: str
    engine: EngineConfig
    student: Any  #: the model that scores
    seeds: Any  #: rows shown to the generator in training
    evaluation: Any  #: rows for in-distribution accuracy, which no sample may repeat
    reference: Any  #: rows whose loss should fall, for influence
    models: Sequence[Any] = ()  #: the other models that it loads, so that a change of their files is noticed
    other_evaluation: Sequence[Any] = ()  #: the rows of the other evaluation sets, which no sample may repeat either

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
            evaluation=[row for path in (self.evaluation, *self.other_evaluation) for row in read_rows(path)],
            reference=read_rows(self.reference),
            shown=shown,
        )


@dataclass(frozen=True)
class Writing:
    """How a generator is prompted for questions."""

    scoring: Scoring
    generator: Any  #: model
    sampling: SamplingConfig
    shown: int
    turns: bool
    n: int
    seed: int
    held_out: Any  #: rows to show
    earlier: Sequence[Any] = ()  #: samples of earlier rounds, whose questions are not asked again


@dataclass(frozen=True)
class Replay:
    """Rows mixed in to prevent forgetting."""

    share: float
    domain: str
    rows: Any


# --- seeds ------------------------------------------------------------------------------------------------------------


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
            _by_skill(pool, per_batch)
    context.write("rows.json", sizes)


def _check_replay(available: int, share: float, n: int) -> None:
    from acqsynth import train

    try:
        train.replay_count(available, share, n)
    except ValueError as error:
        raise StepError(f"student.{error}") from error


# --- train ------------------------------------------------------------------------------------------------------------


def train_generator(
    context: StepContext,
    *,
    scoring: Scoring,
    method: str,
    generator: str | Path,
    prompts: int,
    shown: int,
    turns: bool,
    candidates: tuple[SamplingConfig, int] | None,
    options: dict[str, Any],
    seed: int,
) -> None:
    """Trains the generator; writes ``model/``, with the trainer's log and completions, and ``counts.json``.

    ``candidates`` gives, for DPO, how the candidates of a prompt are sampled, and how many.
    """
    from acqsynth import train

    reward = scoring.build()
    seeds = read_rows(scoring.seeds)
    asked = write.prompts(scoring.find_domain(), seeds, prompts, shown=shown, turns=turns, seed=seed)
    output = context.folder / "model"
    options = {"seed": seed, "disable_tqdm": True, **options}
    callbacks = [train.Progress(context.say, context.status)]
    if candidates is not None:
        train.dpo(
            str(generator),
            asked,
            reward,
            output,
            options,
            sampling=_sampling(*candidates, seed),
            engine=lambda: _engine(scoring.engine, generator),
            callbacks=callbacks,
        )
        drawn, masked = prompts * candidates[1], read_json(output / train.PAIRS)["masked"]
    else:
        refresh = None
        if scoring.reward.refresh_steps:

            def use(path: Path) -> None:
                context.say(f"the reward scores with {path.name}")
                reward.refresh(str(path))

            refresh = train.Refresh(
                scoring.reward.refresh_steps,
                Path(scoring.reward.refresh_from or output),
                context.scratch / "students",
                use,
                lambda: _fused(_values(reward, seeds[:_PROBE]), reward, seeds[:_PROBE]),
            )
        train.grpo(str(generator), asked, reward, output, options, refresh=refresh, callbacks=callbacks)
        drawn, masked = reward.scored, reward.masked
    context.write("counts.json", {"completions": drawn, "masked": masked})


# --- generate ---------------------------------------------------------------------------------------------------------


def write_questions(context: StepContext, *, writing: Writing, mistakes: Path | None = None) -> None:
    """Writes ``samples.parquet``, up to n samples that pass the reward's gates, and ``counts.json``.

    ``mistakes``: a student's answers to the held-out rows. Only rows it got wrong are shown, weak skills more often.
    """
    pool = read_rows(writing.held_out)
    if mistakes is not None:
        pool = sample_mistakes(pool, read_table(mistakes)["right"], max(writing.n, writing.shown), writing.seed)
    domain, engine = writing.scoring.find_domain(), _engine(writing.scoring.engine, writing.generator)
    prompts, shown = _prompts(writing, domain, pool)
    reward, asked = writing.scoring.build(shown), _earlier(writing)

    def chunk(start: int, some: Sequence[Any]) -> dict[str, Any]:
        sampling = _sampling(writing.sampling, 1, writing.seed + start)
        made = write.write(engine, domain, some, sampling, rows=len(some), gates=reward.gates, asked=asked)
        rows = [{"sample": asdict(sample), "scores": {}} for sample in made.rows]
        return {"rows": rows, "completions": made.completions, "dropped": made.dropped}

    chunks = context.chunks("samples", prompts, CHUNK, chunk, reward)
    _write_kept(context, chunks, writing.n, asked, later=bool(writing.earlier))


def select_questions(
    context: StepContext, *, writing: Writing, candidates: int, spent: Path | Sequence[Path] | None
) -> None:
    """Rejection sampling: writes ``samples.parquet``, the best of several completions per prompt, and ``counts.json``.

    ``spent``: counts of a training run's round or rounds; instead of ``candidates`` per prompt, as many completions
    are drawn as training and writing used together.
    """
    if spent:
        drawn = sum(read_json(path)["completions"] for path in ([spent] if isinstance(spent, Path) else spent))
        candidates = max(2, math.ceil((drawn + writing.n) / writing.n))
    domain, engine = writing.scoring.find_domain(), _engine(writing.scoring.engine, writing.generator)
    prompts, shown = _prompts(writing, domain, read_rows(writing.held_out))
    reward, asked = writing.scoring.build(shown), _earlier(writing)

    def chunk(start: int, some: Sequence[Any]) -> dict[str, Any]:
        sampling = _sampling(writing.sampling, candidates, writing.seed + start)
        made = write.best(engine, some, reward, sampling, rows=len(some), asked=asked)
        rows = []
        for best in made.rows:
            parts = {f"reward_{name}": value for name, value in best.components.items()}
            assert best.sample is not None
            rows.append({"sample": asdict(best.sample), "scores": {"reward": best.total, **parts}})
        return {"rows": rows, "completions": made.completions, "dropped": made.dropped}

    _write_kept(context, context.chunks("samples", prompts, CHUNK, chunk, reward), writing.n, asked)


def _prompts(writing: Writing, domain: Domain, pool: Sequence[Sample]) -> tuple[list[Messages], list[Sample]]:
    """The prompts, and the rows of the pool that they show."""
    hands = write.deal(domain, pool, writing.n, shown=min(writing.shown, len(pool)), seed=writing.seed)
    shown = {sample.question: sample for hand in hands for sample in hand}
    return [write.prompt(domain, hand, writing.turns) for hand in hands], list(shown.values())


def _earlier(writing: Writing) -> NearCopies:
    asked = write.questions()
    asked.add(sample.question for path in writing.earlier for sample in read_rows(path))
    return asked


def random_rows(context: StepContext, *, real: Path, n: int, seed: int) -> None:
    """Writes ``samples.parquet``: n real rows, drawn without replacement."""
    pool = read_rows(real)
    write_rows(context.folder / "samples.parquet", random.Random(seed).sample(pool, min(n, len(pool))))


def filter_rows(context: StepContext, *, scoring: Scoring, real: Path, n: int) -> None:
    """Writes ``samples.parquet``: the n real rows that the reward's signals rank first, fused over the whole pool as
    one group. Gates are skipped, as the rows are real."""
    pool, reward = read_rows(real), scoring.build()
    columns = _joined(context.chunks("scores", pool, 4 * CHUNK, lambda start, some: _values(reward, some)))
    totals = _fused(columns, reward, pool)
    order = [i for _, i in sorted((-total, i) for i, total in enumerate(totals) if total is not None)[:n]]
    if not order:
        raise StepError("none of the real rows could be scored")
    scored = {"reward": totals} | {f"reward_{name}": values for name, values in columns.items()}
    picked = {name: [values[i] for i in order] for name, values in scored.items()}
    write_rows(context.folder / "samples.parquet", [pool[i] for i in order], picked)


def sample_mistakes(pool: Sequence[Sample], right: Sequence[bool], n: int, seed: int) -> list[Sample]:
    """Draws n of the wrongly answered samples, each skill in proportion to its share of wrong answers.

    Raises:
        StepError: no sample was answered wrongly.
    """
    wrong = [sample for sample, ok in zip(pool, right, strict=True) if not ok]
    if not wrong:
        raise StepError("error_driven: the student makes no mistake on the held-out rows")
    # If m of a skill's a rows are wrong, its share m / a is split among m mistakes, giving 1 / a each.
    asked = Counter(sample.extra.get("skill") for sample in pool)
    return random.Random(seed).choices(wrong, [1 / asked[sample.extra.get("skill")] for sample in wrong], k=n)


def _write_kept(
    context: StepContext, chunks: Iterable[Mapping[str, Any]], n: int, asked: NearCopies, *, later: bool = False
) -> None:
    """Writes the samples of all chunks and the counts of kept and dropped completions. Questions of chunks finished
    before a kill are added to ``asked``, so that the next chunk does not repeat them. A later round may be empty, so
    that the run can go on with the rows of earlier ones."""
    rows: list[Mapping[str, Any]] = []
    completions, dropped = 0, Counter[str]()
    for chunk in chunks:
        rows += chunk["rows"]
        asked.add(row["sample"]["question"] for row in chunk["rows"])
        completions += chunk["completions"]
        dropped.update(chunk["dropped"])
        context.say(f"{len(rows)} samples of {n} from {completions} completions")
    if not rows:
        none = f"none of {completions} completions is a sample ({_reasons(dropped)})"
        if not later:
            raise StepError(none)
        context.say(f"{none}; this round adds no rows: set fewer rounds or a higher generator.sampling.temperature")
    scores = {name: [row["scores"][name] for row in rows] for name in (rows[0]["scores"] if rows else ())}
    write_rows(context.folder / "samples.parquet", [Sample(**row["sample"]) for row in rows], scores)
    counts = {"wanted": n, "kept": len(rows), "completions": completions, "dropped": dict(dropped.most_common())}
    context.write("counts.json", counts)


def _reasons(dropped: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())


# --- label ------------------------------------------------------------------------------------------------------------


def label_questions(
    context: StepContext,
    *,
    domain: str,
    engine: EngineConfig,
    labelling: LabellingConfig,
    model: str | Path | None,
    gates: Sequence[str] | None,
    seeds: Path,
    samples: Path,
    seed: int,
) -> None:
    """Writes ``samples.parquet``, the labelled rows, and ``counts.json``: numbers of labels, of rows that a gate drops
    because of their label, and of right labels.

    ``model`` answers the questions, for the methods ``majority`` and ``teacher``. ``gates`` are those of the reward;
    ``sound`` always applies. ``seeds`` complete the domain, so that it drops labels that no seed has.
    """
    own, asked = find_domain(domain).with_seeds(read_rows(seeds)), read_rows(samples)
    kept: list[Sample] = []
    agreement: list[float | None] = []
    if labelling.method == "own":
        kept, agreement = asked, [None] * len(asked)
    else:
        labeller = Labeller(labelling, own, lambda: _engine(engine, str(model)))

        def chunk(start: int, some: Sequence[Sample]) -> list[dict[str, Any]]:
            labels = labeller(some, seed + start)
            return [{"sample": asdict(x.sample), "agreement": x.agreement} for x in labels if x.sample is not None]

        for some in context.chunks("labels", asked, CHUNK, chunk):
            kept += [Sample(**row["sample"]) for row in some]
            agreement += [row["agreement"] for row in some]
            context.say(f"{len(kept)} questions labelled of {len(asked)}")
    if asked and not kept:
        raise StepError(f"the answers agree on none of {len(asked)} questions; lower labelling.threshold or raise k")
    dropped = Counter[str]()
    if labelling.method != "own":
        checks = [gate for gate in sample_gates(own) if gates is None or gate.name in ("sound", *gates)]
        passed = set(map(id, write.passing(checks, kept, dropped)))
        if kept and not passed:
            raise StepError(f"none of {len(kept)} labelled questions passes the gates ({_reasons(dropped)})")
        agreement = [value for sample, value in zip(kept, agreement, strict=True) if id(sample) in passed]
        kept = [sample for sample in kept if id(sample) in passed]
    known = [verdict for verdict in own.verify(kept) if verdict is not None]
    proven = known if own.proves else []  # of what can only be refuted, the share that is right remains unknown
    write_rows(context.folder / "samples.parquet", kept, {"agreement": agreement})
    counts = {"asked": len(asked), "labelled": len(kept), "truth_known": len(proven), "right": sum(proven)}
    counts["refuted"] = known.count(False)
    context.write("counts.json", {**counts, "dropped": dict(dropped.most_common())})


# --- fit and evaluate -------------------------------------------------------------------------------------------------


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
) -> None:
    """Fits the student on n of the samples; writes ``model/`` and ``counts.json``, with the number really learnt."""
    from acqsynth import train

    pool = [row for path in samples for row in read_rows(path)]
    picked = random.Random(seed).sample(pool, min(n, len(pool)))
    model = train.sft(
        student,
        find_domain(domain),
        picked,
        context.folder / "model",
        {"seed": seed, "disable_tqdm": True, **options},
        replay=train.training_rows(find_domain(replay.domain), read_rows(replay.rows)) if replay else [],
        replay_share=replay.share if replay else 0.0,
        callbacks=[train.Progress(context.say, context.status)],
    )
    learnt = read_json(model / train.ROWS)
    if learnt["dropped"] or learnt["cut"]:
        context.say(
            f"of {len(picked)} rows, {learnt['dropped']} are not learnt, as the prompt alone fills max_length = "
            f"{learnt['max_length']} tokens, and {learnt['cut']} fill it and may be cut"
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
    answering = _engine(engine, model)
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
        write_table(
            context.folder / f"answers-{name}.parquet",
            {
                "question": [sample.question for sample in gold],
                "gold": [sample.answer for sample in gold],
                "skill": [sample.extra.get("skill") for sample in gold],
                "completion": columns["completions"],
                "answer": columns["answers"],
                "right": columns["right"],
                **likely,
            },
        )


def _evaluated(
    context: StepContext, name: str, gold: Sequence[Sample], answer: Callable[[Sequence[Sample]], Evaluation]
) -> dict[str, list[Any]]:
    """The columns of an :class:`Evaluation` of all rows."""
    return _joined(context.chunks(name, gold, 2 * CHUNK, lambda start, some: asdict(answer(some))))


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

    domain, gold = find_domain(scoring.domain), read_rows(scoring.evaluation)
    reward = replace(scoring, reward=validity_reward(scoring.reward, validity)).build()
    before = fmean(read_table(base)["right"])
    batches = _batches(read_rows(real), validity.batches, validity.rows, seed)

    def measure(start: int, some: Sequence[tuple[str | None, list[Sample]]]) -> dict[str, Any]:
        [(skill, batch)] = some
        scores: dict[str, float | None] = {}
        for name, values in _values(reward, batch).items():
            known = [value for value in values if value is not None]
            scores[name] = fmean(known) if known else None
        folder = context.scratch / f"student-{start}"
        fixed = {"save_strategy": "no", "seed": seed, "disable_tqdm": True}
        train.sft(student, domain, batch, folder, fixed | options | validity.options)
        after = evaluate(_engine(scoring.engine, folder), domain, gold, max_tokens=max_tokens, seed=seed)
        shutil.rmtree(folder)
        context.say(f"batch {start + 1} of {len(batches)}: accuracy {before:.3f} -> {after.accuracy:.3f}")
        return {"skill": skill, "rows": len(batch), "scores": scores, "gain": after.accuracy - before}

    context.write("batches.json", list(context.chunks("batches", batches, 1, measure)))


def _batches(pool: Sequence[Sample], n: int, size: int, seed: int) -> list[tuple[str | None, list[Sample]]]:
    """n batches, each with its skill, disjoint until the pool is exhausted."""
    rng, by_skill = random.Random(seed), _by_skill(pool, size)
    left = {skill: rng.sample(members, len(members)) for skill, members in by_skill.items()}
    found = []
    for i in range(n):
        skill = list(left)[i % len(left)]
        if len(left[skill]) < size:
            left[skill] += rng.sample(by_skill[skill], size)
        found.append((skill, [left[skill].pop() for _ in range(size)]))
    return found


def _by_skill(pool: Sequence[Sample], least: int) -> dict[str | None, list[Sample]]:
    """The samples of each skill that has enough."""
    found: dict[str | None, list[Sample]] = {}
    for sample in pool:
        found.setdefault(sample.extra.get("skill"), []).append(sample)
    if most := {skill: members for skill, members in found.items() if len(members) >= least}:
        return most
    raise StepError(f"evaluation.validity.rows: expected {least} real rows of a skill for one batch, got fewer")


# --- shared by stages -------------------------------------------------------------------------------------------------


def _engine(config: EngineConfig, model: str | Path) -> Engine:
    return engines.load(config.name, str(model), **config.options)


def _sampling(config: SamplingConfig, n: int, seed: int) -> Sampling:
    return Sampling(n, config.temperature, config.top_p, config.max_tokens, seed)


def _values(reward: Any, samples: Sequence[Sample]) -> dict[str, list[float | None]]:
    """Each signal's values of the samples; signals share intermediate results."""
    batch = Batch(samples)
    return {signal.name: numbers(signal, batch) for signal in reward.signals}


def _fused(columns: Mapping[str, Sequence[float | None]], reward: Any, samples: Sequence[Sample]) -> list[float | None]:
    """Fuses the signals' values of samples like the reward, as one group."""
    weighted = {name: columns[name] for name in reward.weights}  # a signal of weight 0 is only logged
    lengths = [sample_length(sample) for sample in samples]
    for name in weighted.keys() & set(reward.length_bins):
        weighted[name] = LengthBins()(weighted[name], lengths)
    return fuse(weighted, [0] * len(samples), reward.fusion, reward.weights)


def _joined(chunks: Iterable[Mapping[str, Sequence[Any]]]) -> dict[str, list[Any]]:
    """Concatenates the columns of all chunks."""
    columns: dict[str, list[Any]] = {}
    for chunk in chunks:
        for name, values in chunk.items():
            columns.setdefault(name, []).extend(values)
    return columns
