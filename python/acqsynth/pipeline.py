"""A recipe from seed rows to a report, top to bottom.

    seeds -> train generator -> write questions -> label -> fit students -> evaluate -> report

:func:`plan` lists the steps of a recipe, arm by arm; the functions below it do the work, one or more a stage. Planning
runs nothing: a step names a folder, a function and its arguments, among them the steps whose artefacts it reads.
:class:`acqsynth.steps.Store` runs a step and all that it reads, and skips what is done.

All arms are fitted from the same student on the same number of rows, with the same options and seeds:

=================  ====================================================================================================
``grpo``, ``dpo``  the recipe's method: the generator learns from the reward, writes questions, the student labels them
``no_rl``          the same generator untrained (the recipe's own arm with method ``none``)
``best_of_n``      rejection sampling on the same reward; as a baseline with as many completions as training drew
``random_real``    real rows, drawn at random
``filtered_real``  real rows that the reward's signals rank first
``error_driven``   the generator untrained, shown what the student gets wrong, weak skills more often
=================  ====================================================================================================
"""

from __future__ import annotations

import json
import math
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from acqsynth import engines
from acqsynth.config import (
    BUNDLED,
    Config,
    ConfigError,
    DataConfig,
    EngineConfig,
    LabellingConfig,
    OtherSource,
    RewardConfig,
    SamplingConfig,
    Source,
    ValidityConfig,
)
from acqsynth.domains import Domain, Sample, domain as find_domain
from acqsynth.engines import Engine, Sampling
from acqsynth.report.metrics import IN_DISTRIBUTION, STUDENT
from acqsynth.seeds import bundled
from acqsynth.steps import (
    Model,
    Step,
    StepContext,
    StepError,
    read_rows,
    read_table,
    seconds_of,
    write_rows,
    write_table,
)

CHUNK = 64  #: samples that are kept together over a kill
_PROBE = 32  # samples whose order before and after a move of the student measures staleness

DESCRIPTIONS = {
    "grpo": "generator taught by GRPO on the reward",
    "dpo": "generator taught by DPO on pairs of the reward",
    "no_rl": "generator untrained",
    "best_of_n": "generator untrained, best of several by the reward",
    "random_real": "real rows at random",
    "filtered_real": "real rows the signals rank first",
    "error_driven": "generator untrained, shown the student's errors",
}


# --- the plan ---------------------------------------------------------------------------------------------------------


@dataclass
class Arm:
    """One way to training rows: its steps, one a round. In a report, the folders that they filled."""

    name: str
    rows: list[Any] = field(default_factory=list)  #: write ``samples.parquet``, the rows learnt
    trained: list[Any] = field(default_factory=list)
    written: list[Any] = field(default_factory=list)
    labelled: list[Any] = field(default_factory=list)
    fits: dict[tuple[str, int, int], Any] = field(default_factory=dict)  #: by student, rows and seed
    answers: dict[tuple[str, int, int], Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scoring:
    """What the reward of a step is built from."""

    reward: RewardConfig
    domain: str
    engine: EngineConfig
    student: Any  #: the model that scores
    seeds: Any  #: rows that the generator is shown, and the reference of influence
    evaluation: Any  #: rows that no sample may repeat

    def find_domain(self) -> Domain:
        """The domain as the seeds complete it."""
        return find_domain(self.domain).with_seeds(read_rows(self.seeds))

    def build(self) -> Any:
        """The reward."""
        from acqsynth.rewards.build import build

        return build(
            self.reward,
            find_domain(self.domain),
            str(self.student),
            self.engine,
            seeds=read_rows(self.seeds),
            evaluation=read_rows(self.evaluation),
        )


@dataclass(frozen=True)
class Writing:
    """How a generator is asked for questions."""

    scoring: Scoring
    generator: Any  #: model
    sampling: SamplingConfig
    shown: int
    turns: bool
    n: int
    seed: int
    held_out: Any  #: rows to show


@dataclass(frozen=True)
class Replay:
    """Rows mixed in against forgetting."""

    share: float
    domain: str
    rows: Any


@dataclass
class Plan:
    """The steps of a recipe, each after those it reads; the report is last."""

    config: Config
    sets: dict[str, str]  #: evaluation set -> its domain
    main: str  #: the arm that the recipe is about
    steps: list[Step] = field(default_factory=list)
    base: dict[str, Step] = field(default_factory=dict)  #: student -> answers before it learns
    arms: dict[str, Arm] = field(default_factory=dict)
    validity: Step | None = None

    @property
    def report(self) -> Step:
        """The last step."""
        return self.steps[-1]

    def of(self, stage: str) -> list[Step]:
        """The steps of a stage, in order."""
        return [step for step in self.steps if step.stage == stage]


def plan(config: Config) -> Plan:
    """The plan of a recipe. Arms that need the same step share it.

    Raises:
        ConfigError: an option that a library, the domain or the reward does not have, or a value that it refuses.
    """
    check(config)
    others = {name: other.domain or config.domain for name, other in config.evaluation.others.items()}
    method = config.generator.method
    found = Plan(config, {IN_DISTRIBUTION: config.domain, **others}, "no_rl" if method == "none" else method)
    students = {STUDENT: config.student.model, **config.student.others}
    known: dict[str, Step] = {}

    def step(stage: str, name: str, function: Callable[..., None], **arguments: Any) -> Step:
        new = Step(stage, name, function, arguments)
        key = json.dumps([stage, new.settings()])
        if key not in known:
            known[key] = new
            found.steps.append(new)
        return known[key]

    rows = step(
        "seeds", "rows", collect_rows,
        domain=config.domain, data=config.data, others=config.evaluation.others, limit=config.evaluation.rows,
    )  # fmt: skip
    n = max(config.student.rows)
    questions = config.generator.questions or n
    own_student = Model(config.student.model)

    def scoring(student: Any = None) -> Scoring:
        scorer = student if student is not None else Model(config.reward.student or config.student.model)
        evaluation = rows / f"evaluation-{IN_DISTRIBUTION}.parquet"
        return Scoring(config.reward, config.domain, config.engine, scorer, rows / "seeds.parquet", evaluation)

    def answer(name: str, model: Any, sets: Mapping[str, str] | None = None) -> Step:
        asked = {f"evaluation-{key}": domain for key, domain in found.sets.items()} if sets is None else sets
        return step(
            "evaluate", name, answer_rows,
            model=model, engine=config.engine, max_tokens=config.evaluation.max_tokens, seed=config.seed,
            sets={key.removeprefix("evaluation-"): (domain, rows / f"{key}.parquet") for key, domain in asked.items()},
        )  # fmt: skip

    def fit(arm: Arm, name: str, student: str, n: int, seed: int) -> Step:
        replay, share = None, config.student.replay
        if share:
            again = config.data.replay
            domain = (again.domain if again else None) or config.domain
            replay = Replay(share, domain, rows / ("replay.parquet" if again else "real.parquet"))
        return step(
            "fit", name, fit_student,
            domain=config.domain, student=Model(students[student]), n=n, replay=replay,
            options=config.student.options, seed=seed, samples=[each / "samples.parquet" for each in arm.rows],
        )  # fmt: skip

    def writing(**changed: Any) -> Writing:
        asking = Writing(
            scoring(), Model(config.generator.model), config.generator.sampling, config.generator.shown,
            config.generator.turns, questions, config.seed, rows / "held_out.parquet",
        )  # fmt: skip
        return replace(asking, **changed)

    def write(name: str, **more: Any) -> Step:
        return step("generate", name, write_questions, **({"writing": writing()} | more))

    def label(name: str, written: Step, student: Any = own_student) -> Step:
        answering = {"majority": student, "teacher": Model(config.labelling.teacher or "")}.get(config.labelling.method)
        return step(
            "label", name, label_questions,
            domain=config.domain, engine=config.engine, labelling=config.labelling, model=answering,
            samples=written / "samples.parquet", seed=config.seed,
        )  # fmt: skip

    def train(name: str, i: int, model: Any, student: Any) -> Step:
        generator = config.generator
        drawn = (generator.sampling, generator.candidates) if method == "dpo" else None
        return step(
            "train", name, train_generator,
            scoring=scoring(student), method=method, generator=model, prompts=generator.prompts, shown=generator.shown,
            turns=generator.turns, candidates=drawn, options=generator.options, seed=config.seed + i,
        )  # fmt: skip

    def taught() -> Arm:
        """Rounds of generator and student: the student fitted in a round scores and labels the next."""
        arm = Arm(method)
        model: Any = Model(config.generator.model)
        student: Any = None
        for i in range(config.rounds):
            name = f"{method}-round-{i + 1}" if config.rounds > 1 else method
            trained = train(name, i, model, student)
            model = trained / "model"
            share = _share(questions, i, config.rounds)
            written = write(
                name, writing=writing(scoring=scoring(student), generator=model, n=share, seed=config.seed + i)
            )
            labelled = label(name, written, own_student if student is None else student)
            arm.trained.append(trained)
            arm.written.append(written)
            arm.labelled.append(labelled)
            arm.rows.append(labelled)
            if i + 1 < config.rounds:
                so_far = sum(_share(n, j, config.rounds) for j in range(i + 1))
                student = fit(arm, name, STUDENT, so_far, config.student.seeds[0]) / "model"
        return arm

    def arm(name: str) -> Arm:
        match name:
            case "grpo" | "dpo":
                return taught()
            case "random_real":
                drawn = step("generate", name, random_rows, real=rows / "real.parquet", n=n, seed=config.seed)
                return Arm(name, [drawn])
            case "filtered_real":
                filtered = step("generate", name, filter_rows, scoring=scoring(), real=rows / "real.parquet", n=n)
                return Arm(name, [filtered])
            case "best_of_n":
                trained = found.arms[found.main].trained if found.arms else []
                spent = trained[0] / "counts.json" if trained else None
                written = step(
                    "generate", name, select_questions,
                    writing=writing(), candidates=config.generator.candidates, spent=spent,
                )  # fmt: skip
            case "error_driven":
                answers = answer("base-held-out", own_student, {"held_out": config.domain})
                written = write(name, mistakes=answers / "answers-held_out.parquet")
            case _:
                written = write(name)
        labelled = label(name, written)
        return Arm(name, [labelled], written=[written], labelled=[labelled])

    found.base = {name: answer(f"base-{name}", Model(model)) for name, model in students.items()}
    for name in dict.fromkeys((found.main, *config.baselines)):
        found.arms[name] = made = arm(name)
        for student in students:
            for size in config.student.rows:
                for seed in config.student.seeds:
                    key = f"{name}-{student}-{size}-s{seed}"
                    made.fits[student, size, seed] = fitted = fit(made, key, student, size, seed)
                    made.answers[student, size, seed] = answer(key, fitted / "model")
    if config.evaluation.validity.batches:
        found.validity = step(
            "evaluate", "validity", measure_validity,
            scoring=scoring(), student=own_student, validity=config.evaluation.validity, options=config.student.options,
            max_tokens=config.evaluation.max_tokens, seed=config.seed, real=rows / "real.parquet",
            base=found.base[STUDENT] / f"answers-{IN_DISTRIBUTION}.parquet",
        )  # fmt: skip
    step(
        "report", "report", write_report,
        recipe=config.model_dump(exclude={"output"}), sets=found.sets, main=found.main, base=found.base,
        arms=found.arms, validity=found.validity,
    )  # fmt: skip
    return found


def check(config: Config) -> None:
    """Makes every object that the recipe configures, so that a dry run finds what a run would find hours later.

    Raises:
        ConfigError: names the key.
    """
    from acqsynth import label, train
    from acqsynth.rewards import build

    domain = _checked("domain", find_domain, config.domain)
    generator, student, reward = config.generator, config.student, config.reward
    if generator.method in ("grpo", "dpo"):
        _checked("generator", train.configuration, generator.method, generator.options, "unused")
    _checked("student", train.configuration, "sft", student.options, "unused")
    fits = {"save_strategy": "no", **student.options, **config.evaluation.validity.options}
    _checked("evaluation.validity", train.configuration, "sft", fits, "unused")
    _checked("engine", engines.check, config.engine.name, config.engine.options)
    for key, labelling in (("labelling", config.labelling), ("reward.labelling", reward.labelling)):
        if labelling is not None and labelling.method != "own":
            _checked(key, label.Labeller, labelling, domain, lambda: None)
    _checked("reward", build.check, reward, domain)
    if config.evaluation.validity.batches:
        _checked("evaluation.validity", build.check, _validity_reward(reward, config.evaluation.validity), domain)
    for name, other in config.evaluation.others.items():
        _checked(f"evaluation.others.{name}", find_domain, other.domain or config.domain)


def _checked(key: str, make: Callable[..., Any], *arguments: Any) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):
            return make(*arguments)
    except (ValueError, TypeError) as error:
        told = " ".join(str(error).split())
        raise ConfigError(told if told.startswith(f"{key}:") else f"{key}.{told}") from error


def _share(n: int, i: int, rounds: int) -> int:
    """Rows of round i; the first rounds take the remainder."""
    return n // rounds + (i < n % rounds)


# --- seeds ------------------------------------------------------------------------------------------------------------


def collect_rows(
    context: StepContext, *, domain: str, data: DataConfig, others: Mapping[str, OtherSource], limit: int | None
) -> None:
    """Writes ``seeds``, ``held_out``, ``real``, ``evaluation-<set>`` and, if the recipe has it, ``replay`` as parquet,
    and ``rows.json`` with their sizes. Rows of an evaluation set are left out of the first three."""
    own = find_domain(domain)

    def load(key: str, source: Source) -> list[Sample]:
        theirs = source.domain if isinstance(source, OtherSource) else None
        return _load(key, find_domain(theirs) if theirs else own, source)

    tests = {IN_DISTRIBUTION: load("data.evaluation", data.evaluation)[:limit]}
    tests |= {name: load(f"evaluation.others.{name}", other)[:limit] for name, other in others.items()}
    sizes = {f"evaluation-{name}": {"rows": len(found), "left_out": 0} for name, found in tests.items()}
    for name, found in tests.items():
        write_rows(context.folder / f"evaluation-{name}.parquet", found)
    known = {_plain(sample.question) for found in tests.values() for sample in found}
    seeds = load("data.seeds", data.seeds)
    for name, source in (("seeds", None), ("held_out", data.held_out), ("real", data.real)):
        loaded = seeds if source is None else load(f"data.{name}", source)
        pool = [sample for sample in loaded if _plain(sample.question) not in known]
        if not pool:
            raise StepError(f"data.{name}: every row is also in an evaluation set")
        if left_out := len(loaded) - len(pool):
            context.say(f"data.{name}: {left_out} rows are also in an evaluation set and are left out")
        sizes[name] = {"rows": len(pool), "left_out": left_out}
        write_rows(context.folder / f"{name}.parquet", pool)
    if data.replay is not None:
        again = load("data.replay", data.replay)
        sizes["replay"] = {"rows": len(again), "left_out": 0}
        write_rows(context.folder / "replay.parquet", again)
    context.write("rows.json", sizes)


def _load(key: str, domain: Domain, source: Source) -> list[Sample]:
    limit = None if source.limit is None or source.per_label else source.skip + source.limit
    try:
        if source.source.startswith(BUNDLED):
            found = bundled(source.source.removeprefix(BUNDLED))[:limit]
        else:
            found = domain.load(source.source, source.split, source.columns, limit)
    except (OSError, ValueError, ImportError) as error:
        raise StepError(f"{key}: {' '.join(str(error).split())}") from error
    kept = found[source.skip :] if source.per_label is None else _of_each_label(domain, found, source)
    if not kept:
        raise StepError(f"{key}: {source.source} has no rows after the first {source.skip}")
    return kept


def _of_each_label(domain: Domain, found: Sequence[Sample], source: Source) -> list[Sample]:
    """Of each answer the ``per_label`` rows after the first ``skip``, in file order."""
    assert source.per_label is not None
    seen = Counter[str]()
    kept = []
    for sample in found:
        label = domain.canonical(sample.answer)
        seen[label] += 1
        if source.skip < seen[label] <= source.skip + source.per_label:
            kept.append(sample)
    return kept[: source.limit]


def _plain(question: str) -> str:
    return " ".join(question.lower().split())


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
    """Teaches the generator: ``model/`` with the trainer's log and completions, and ``counts.json``.

    ``candidates``, for DPO: how the candidates of a prompt are drawn, and how many.
    """
    from acqsynth import train, write

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
        drawn = prompts * candidates[1]
    else:
        refresh = None
        if scoring.reward.refresh_steps:
            folder = Path(scoring.reward.refresh_from or output)

            def newer(step: int) -> None:
                if (path := train.newest_checkpoint(folder, step)) is not None:
                    context.say(f"step {step}: the reward scores with {path}")
                    reward.refresh(str(path))

            refresh = train.Refresh(
                scoring.reward.refresh_steps,
                newer,
                lambda: _fused(_values(reward, seeds[:_PROBE]), reward),
            )
        train.grpo(str(generator), asked, reward, output, options, refresh=refresh, callbacks=callbacks)
        drawn = sum(len(read_table(path)["prompt"]) for path in output.glob("completions/*.parquet"))
        drawn = drawn or prompts * options.get("num_generations", 8)
    context.write("counts.json", {"completions": drawn})


# --- generate ---------------------------------------------------------------------------------------------------------


def write_questions(context: StepContext, *, writing: Writing, mistakes: Path | None = None) -> None:
    """Writes ``samples.parquet``, up to n samples that pass the reward's gates, and ``counts.json``.

    ``mistakes``: a student's answers to the held-out rows. Only rows that it got wrong are shown, weak skills more
    often.
    """
    from acqsynth import write

    pool = read_rows(writing.held_out)
    if mistakes is not None:
        pool = sample_mistakes(pool, read_table(mistakes)["right"], max(writing.n, writing.shown), writing.seed)
    domain, reward = writing.scoring.find_domain(), writing.scoring.build()
    engine = _engine(writing.scoring.engine, writing.generator)

    def chunk(start: int, some: Sequence[Any]) -> dict[str, Any]:
        sampling = _sampling(writing.sampling, 1, writing.seed + start)
        made = write.write(engine, domain, some, sampling, rows=len(some), gates=reward.gates)
        rows = [{"sample": asdict(sample), "scores": {}} for sample in made.rows]
        return {"rows": rows, "completions": made.completions, "dropped": made.dropped}

    chunks = context.chunks("samples", _asked(writing, pool), CHUNK, chunk, reward)
    _write_kept(context, chunks, writing.n)


def select_questions(context: StepContext, *, writing: Writing, candidates: int, spent: Path | None) -> None:
    """Rejection sampling: ``samples.parquet`` with the best of several completions a prompt, and ``counts.json``.

    ``spent``: counts of a training run; then as many completions are drawn as training and writing took together,
    instead of ``candidates`` a prompt.
    """
    from acqsynth import write

    if spent is not None:
        candidates = max(2, math.ceil((_json(spent)["completions"] + writing.n) / writing.n))
    reward, engine = writing.scoring.build(), _engine(writing.scoring.engine, writing.generator)

    def chunk(start: int, some: Sequence[Any]) -> dict[str, Any]:
        sampling = _sampling(writing.sampling, candidates, writing.seed + start)
        made = write.best(engine, some, reward, sampling, rows=len(some))
        rows = []
        for best in made.rows:
            parts = {f"reward_{name}": value for name, value in best.components.items()}
            assert best.sample is not None
            rows.append({"sample": asdict(best.sample), "scores": {"reward": best.total, **parts}})
        return {"rows": rows, "completions": made.completions, "dropped": made.dropped}

    chunks = context.chunks("samples", _asked(writing, read_rows(writing.held_out)), CHUNK, chunk, reward)
    _write_kept(context, chunks, writing.n)


def _asked(writing: Writing, pool: Sequence[Sample]) -> list[Any]:
    """The prompts."""
    from acqsynth import write

    shown = min(writing.shown, len(pool))
    domain = writing.scoring.find_domain()
    return write.prompts(domain, pool, writing.n, shown=shown, turns=writing.turns, seed=writing.seed)


def random_rows(context: StepContext, *, real: Path, n: int, seed: int) -> None:
    """Writes ``samples.parquet``: n real rows, drawn without replacement."""
    pool = read_rows(real)
    write_rows(context.folder / "samples.parquet", random.Random(seed).sample(pool, min(n, len(pool))))


def filter_rows(context: StepContext, *, scoring: Scoring, real: Path, n: int) -> None:
    """Writes ``samples.parquet``: the n real rows that the reward's signals rank first, fused over the whole pool as
    one group. The gates are not asked: the rows are real."""
    pool, reward = read_rows(real), scoring.build()

    columns: dict[str, list[float | None]] = {signal.name: [] for signal in reward.signals}
    for scores in context.chunks("scores", pool, 4 * CHUNK, lambda start, some: _values(reward, some)):
        for name, values in scores.items():
            columns[name] += values
    totals = _fused(columns, reward)
    order = [i for _, i in sorted((-total, i) for i, total in enumerate(totals) if total is not None)[:n]]
    if not order:
        raise StepError("not one real row could be scored")
    scored = {"reward": totals} | {f"reward_{name}": values for name, values in columns.items()}
    picked = {name: [values[i] for i in order] for name, values in scored.items()}
    write_rows(context.folder / "samples.parquet", [pool[i] for i in order], picked)


def sample_mistakes(pool: Sequence[Sample], right: Sequence[bool], n: int, seed: int) -> list[Sample]:
    """n draws of the samples answered wrongly, each skill in proportion to its share of wrong answers.

    Raises:
        StepError: there are none.
    """
    wrong = [sample for sample, ok in zip(pool, right, strict=True) if not ok]
    if not wrong:
        raise StepError("error_driven: the student makes no mistake on the held-out rows")
    # m of the a rows of a skill are wrong: its share m / a, split among its m mistakes, is 1 / a each.
    asked = Counter(sample.extra.get("skill") for sample in pool)
    return random.Random(seed).choices(wrong, [1 / asked[sample.extra.get("skill")] for sample in wrong], k=n)


def _write_kept(context: StepContext, chunks: Iterable[Mapping[str, Any]], n: int) -> None:
    """Writes the samples of all chunks, each question once, and what became of the completions."""
    found: dict[str, Mapping[str, Any]] = {}
    completions, dropped = 0, Counter[str]()
    for chunk in chunks:
        for row in chunk["rows"]:
            found.setdefault(row["sample"]["question"], row)
        completions += chunk["completions"]
        dropped.update(chunk["dropped"])
        context.say(f"{len(found)} samples of {n} from {completions} completions")
    if not found:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
        raise StepError(f"none of {completions} completions is a sample ({reasons})")
    rows = list(found.values())
    scores = {name: [row["scores"][name] for row in rows] for name in rows[0]["scores"]}
    write_rows(context.folder / "samples.parquet", [Sample(**row["sample"]) for row in rows], scores)
    counts = {"wanted": n, "kept": len(rows), "completions": completions, "dropped": dict(dropped.most_common())}
    context.write("counts.json", counts)


# --- label ------------------------------------------------------------------------------------------------------------


def label_questions(
    context: StepContext,
    *,
    domain: str,
    engine: EngineConfig,
    labelling: LabellingConfig,
    model: str | Path | None,
    samples: Path,
    seed: int,
) -> None:
    """Writes ``samples.parquet``, the labelled rows, and ``counts.json``: how many have a label, how many are right.

    ``model`` answers the questions, for the methods ``majority`` and ``teacher``.
    """
    from acqsynth.label import Labeller

    own, asked = find_domain(domain), read_rows(samples)
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
    if not kept:
        raise StepError(f"the answers agree on none of {len(asked)} questions; lower labelling.threshold or raise k")
    known = [verdict for verdict in own.verify(kept) if verdict is not None]
    write_rows(context.folder / "samples.parquet", kept, {"agreement": agreement})
    counts = {"asked": len(asked), "labelled": len(kept), "truth_known": len(known), "right": sum(known)}
    context.write("counts.json", counts)


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
    """Writes ``model/``, the student that learnt n of the samples, and ``counts.json``."""
    from acqsynth import train

    pool = [row for path in samples for row in read_rows(path)]
    picked = random.Random(seed).sample(pool, min(n, len(pool)))
    train.sft(
        student,
        find_domain(domain),
        picked,
        context.folder / "model",
        {"seed": seed, "disable_tqdm": True, **options},
        replay=train.training_rows(find_domain(replay.domain), read_rows(replay.rows)) if replay else [],
        replay_share=replay.share if replay else 0.0,
        callbacks=[train.Progress(context.say, context.status)],
    )
    context.write("counts.json", {"wanted": n, "rows": len(picked)})


def answer_rows(
    context: StepContext,
    *,
    sets: Mapping[str, tuple[str, Path]],
    model: str | Path,
    engine: EngineConfig,
    max_tokens: int | None,
    seed: int,
) -> None:
    """Writes ``answers-<set>.parquet``: question, gold answer, skill, completion, answer, right.

    ``sets``: name -> domain and rows.
    """
    from acqsynth.evaluate import evaluate

    answering = _engine(engine, model)
    for name, (domain, path) in sets.items():
        own, gold = find_domain(domain), read_rows(path)

        def chunk(start: int, some: Sequence[Sample], own: Domain = own) -> dict[str, list[Any]]:
            return asdict(evaluate(answering, own, some, max_tokens=max_tokens, seed=seed))

        columns: dict[str, list[Any]] = {"completions": [], "answers": [], "right": []}
        for some in context.chunks(f"answers-{name}", gold, 2 * CHUNK, chunk):
            for column, values in columns.items():
                values += some[column]
        write_table(
            context.folder / f"answers-{name}.parquet",
            {
                "question": [sample.question for sample in gold],
                "gold": [sample.answer for sample in gold],
                "skill": [sample.extra.get("skill") for sample in gold],
                "completion": columns["completions"],
                "answer": columns["answers"],
                "right": columns["right"],
            },
        )


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
    """Writes ``batches.json``: for each small batch of real rows its skill, each signal's mean, and the accuracy that a
    student of its own gained by learning it. A batch has rows of one skill if the rows have skills."""
    from acqsynth import train
    from acqsynth.evaluate import evaluate

    domain, gold = find_domain(scoring.domain), read_rows(scoring.evaluation)
    reward = replace(scoring, reward=_validity_reward(scoring.reward, validity)).build()
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


def _validity_reward(reward: RewardConfig, validity: ValidityConfig) -> RewardConfig:
    """The reward whose signals are put to the test."""
    from acqsynth.rewards.build import DEFAULT_SIGNALS

    if not validity.signals:
        return reward
    signals = {name: (reward.signals or DEFAULT_SIGNALS).get(name, {}) for name in validity.signals}
    return reward.model_copy(update={"signals": signals, "weights": {}, "paper_compat": False})


def _batches(pool: Sequence[Sample], n: int, size: int, seed: int) -> list[tuple[str | None, list[Sample]]]:
    """n batches, each with its skill, disjoint as long as the pool lasts."""
    rng = random.Random(seed)
    by_skill: dict[str | None, list[Sample]] = {}
    for sample in pool:
        by_skill.setdefault(sample.extra.get("skill"), []).append(sample)
    left = {skill: rng.sample(members, len(members)) for skill, members in by_skill.items() if len(members) >= size}
    if not left:
        raise StepError(f"expected {size} real rows of a skill for one batch (evaluation.validity.rows), got fewer")
    found = []
    for i in range(n):
        skill = list(left)[i % len(left)]
        if len(left[skill]) < size:
            left[skill] += rng.sample(by_skill[skill], size)
        found.append((skill, [left[skill].pop() for _ in range(size)]))
    return found


# --- report -----------------------------------------------------------------------------------------------------------


def write_report(
    context: StepContext,
    *,
    recipe: dict[str, Any],
    sets: Mapping[str, str],
    main: str,
    base: Mapping[str, Path],
    arms: Mapping[str, Arm],
    validity: Path | None,
) -> None:
    """Writes ``metrics.json`` and ``report.html``."""
    from acqsynth import train
    from acqsynth.report import metrics, render

    bootstrap = {key: recipe["evaluation"][key] for key in ("resamples", "level")} | {"seed": recipe["seed"]}
    found = metrics.collect(
        sets=sets,
        main=main,
        descriptions={name: DESCRIPTIONS[name] for name in arms},
        base={(student, name): _answers(folder, name) for student, folder in base.items() for name in sets},
        answers={
            (arm.name, *key, name): _answers(folder, name)
            for arm in arms.values()
            for key, folder in arm.answers.items()
            for name in sets
        },
        learnt={
            (arm.name, *key): _json(folder / "counts.json")["rows"]
            for arm in arms.values()
            for key, folder in arm.fits.items()
        },
        bootstrap=bootstrap,
    )
    found["recipe"] = recipe
    for name, arm in arms.items():
        for kind, folders in (("written", arm.written), ("labelled", arm.labelled)):
            counts = [_json(folder / "counts.json") for folder in folders]
            found["arms"][name][kind] = metrics.sum_counts(counts) if counts else None
        found["arms"][name]["seconds"] = {
            "train": sum(map(seconds_of, arm.trained)),
            "write": sum(map(seconds_of, arm.written or arm.rows)),
            "label": sum(map(seconds_of, arm.labelled)),
            "fit": sum(map(seconds_of, arm.fits.values())),
        }
    trained = [folder / "model" for folder in arms[main].trained]
    found["training"] = metrics.training([train.read_log(model) for model in trained]) if trained else None
    tables = [read_table(path) for model in trained for path in sorted(model.glob("completions/*.parquet"))]
    found["samples"] = metrics.samples(tables or [read_table(arms[main].written[0] / "samples.parquet")])
    found["validity"] = metrics.validity(_json(validity / "batches.json"), **bootstrap) if validity else None
    context.write("metrics.json", found)
    (context.folder / "report.html").write_text(render(found), encoding="utf-8")


def _answers(folder: Path, name: str) -> Any:
    from acqsynth.report import metrics

    table = read_table(folder / f"answers-{name}.parquet")
    return metrics.Answers([float(right) for right in table["right"]], table["skill"])


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# --- what several steps need ------------------------------------------------------------------------------------------


def _engine(config: EngineConfig, model: str | Path) -> Engine:
    return engines.load(config.name, str(model), **config.options)


def _sampling(config: SamplingConfig, n: int, seed: int) -> Sampling:
    return Sampling(n, config.temperature, config.top_p, config.max_tokens, seed)


def _values(reward: Any, samples: Sequence[Sample]) -> dict[str, list[float | None]]:
    """Each signal's values of the samples; signals share what they compute."""
    from acqsynth.rewards.batch import Batch

    batch = Batch(samples)
    return {signal.name: list(signal(batch)) for signal in reward.signals}


def _fused(columns: Mapping[str, Sequence[float | None]], reward: Any) -> list[float | None]:
    """The signals' values of samples, as one group, fused like the reward fuses them."""
    from acqsynth.rewards.fusion import fuse

    n = len(next(iter(columns.values())))
    return fuse(columns, [0] * n, reward.fusion, reward.weights)
