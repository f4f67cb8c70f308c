"""The steps of a recipe from seed rows to a report, their order, and their inputs.

    seeds -> train generator -> write questions -> label -> fit students -> evaluate -> report

:func:`plan` lists the steps of a recipe, arm by arm. Planning runs nothing: a step names a folder, a function of
:mod:`acqsynth.stages` and its arguments, which include the steps whose artefacts it reads.
:class:`acqsynth.steps.Store` runs a step and its dependencies, and skips finished steps.

All arms fit the same student on the same number of rows, with the same options and seeds. Each generator seed writes,
and is trained where the arm trains, independently; ``random_real`` draws rows for each.

=================  ====================================================================================================
``grpo``, ``dpo``  the recipe's method: the generator learns from the reward, writes questions, the student labels them
``no_rl``          the same generator, untrained (the recipe's own arm with method ``none``)
``best_of_n``      rejection sampling on the same reward; as a baseline, with as many completions as training drew
``random_real``    real rows, drawn at random
``filtered_real``  real rows that the reward's signals rank first
``error_driven``   the untrained generator, shown the student's mistakes, those of weak skills more often
=================  ====================================================================================================
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from acqsynth import preflight
from acqsynth.config import Config
from acqsynth.report import Arm as Arm, write_report
from acqsynth.report.metrics import IN_DISTRIBUTION, STUDENT
from acqsynth.stages.questions import Writing, label_questions, select_questions, train_generator, write_questions
from acqsynth.stages.rows import Scoring, collect_rows, filter_rows, random_rows
from acqsynth.stages.students import Replay, answer_rows, fit_student, measure_validity
from acqsynth.steps import Artefact, Model, Step


@dataclass
class Plan:
    """The steps of a recipe, each after its dependencies; the report is last."""

    config: Config
    main: str  #: the arm of the recipe's own method
    steps: list[Step] = field(default_factory=list)
    base: dict[str, Step] = field(default_factory=dict)  #: student -> answers before it learns
    arms: dict[str, Arm] = field(default_factory=dict)

    @property
    def report(self) -> Step:
        """The last step."""
        return self.steps[-1]

    def of(self, stage: str) -> list[Step]:
        """The steps of a stage, in order."""
        return [step for step in self.steps if step.stage == stage]


def plan(config: Config) -> Plan:
    """Plans a recipe. Arms that need the same step share it."""
    preflight.check(config)
    others = {name: other.domain or config.domain for name, other in config.evaluation.others.items()}
    sets = {IN_DISTRIBUTION: config.domain, **others}  # evaluation set -> its domain
    method = config.generator.method
    found = Plan(config, "no_rl" if method == "none" else method)
    students = {STUDENT: config.student.model, **config.student.others}
    known: dict[str, Step] = {}

    def step(stage: str, name: str, function: Callable[..., None], **arguments: Any) -> Step:
        new = Step(stage, name, function, arguments)
        key = json.dumps([stage, new.settings()])
        if key not in known:
            known[key] = new
            found.steps.append(new)
        return known[key]

    n = max(config.student.rows)
    validity = config.evaluation.validity
    rows = step(
        "seeds", "rows", collect_rows,
        domain=config.domain, data=config.data, others=config.evaluation.others, limit=config.evaluation.rows,
        replay=(config.student.replay, n) if config.student.replay else None,
        per_batch=validity.rows if validity.batches else 0,
    )  # fmt: skip
    evaluation = {name: (domain, rows / f"evaluation-{name}.parquet") for name, domain in sets.items()}
    questions = config.generator.questions or n
    own_student, own_generator = Model(config.student.model), Model(config.generator.model)

    teacher = config.reward.labelling.teacher if config.reward.labelling else None
    # Unlike Path.is_dir, os.path.isdir is False for a name too long and below the home of an unknown user.
    embedder = config.reward.embedder if os.path.isdir(os.path.expanduser(config.reward.embedder)) else None

    def scoring(student: Any = None) -> Scoring:
        scorer = student or Model(config.reward.student or config.student.model)
        reference = rows / ("reference.parquet" if config.data.reference else "seeds.parquet")
        return Scoring(
            config.reward, config.domain, config.engine, scorer, rows / "seeds.parquet",
            [path for _, path in evaluation.values()], reference, [Model(name) for name in (teacher, embedder) if name],
        )  # fmt: skip

    def answer(name: str, model: Any, sets: Mapping[str, tuple[str, Artefact]] = evaluation) -> Step:
        return step(
            "evaluate", name, answer_rows,
            model=model, engine=config.engine, max_tokens=config.evaluation.max_tokens, seed=config.seed,
            likelihood=config.evaluation.likelihood, sets=sets,
        )  # fmt: skip

    def fit(rows_of: list[Step], name: str, student: str, n: int, seed: int, ranked: bool = False) -> Step:
        replay, share = None, config.student.replay
        if share:
            again = config.data.replay
            domain = (again.domain if again else None) or config.domain
            replay = Replay(share, domain, rows / ("replay.parquet" if again else "real.parquet"))
        return step(
            "fit", name, fit_student,
            domain=config.domain, student=Model(students[student]), n=n, replay=replay,
            samples=[each / "samples.parquet" for each in rows_of], ranked=ranked, options=config.student.options,
            seed=seed,
        )  # fmt: skip

    def writing(
        seed: int, student: Any = None, generator: Any = own_generator, n: int = questions, earlier: Sequence[Any] = ()
    ) -> Writing:
        return Writing(
            scoring(student), generator, config.generator.sampling, config.generator.shown, config.generator.turns, n,
            seed, rows / "held_out.parquet", earlier,
        )  # fmt: skip

    def label(name: str, written: Step, seed: int, student: Any = own_student) -> Step:
        answering = {"majority": student, "teacher": Model(config.labelling.teacher or "")}.get(config.labelling.method)
        return step(
            "label", name, label_questions,
            domain=config.domain, engine=config.engine, labelling=config.labelling, model=answering,
            gates=config.reward.gates, seeds=rows / "seeds.parquet", samples=written / "samples.parquet", seed=seed,
        )  # fmt: skip

    def train(name: str, seed: int, model: Any, student: Any) -> Step:
        generator = config.generator
        drawn = (generator.sampling, generator.candidates) if method == "dpo" else None
        return step(
            "train", name, train_generator,
            scoring=scoring(student), generator=model, prompts=generator.prompts, shown=generator.shown,
            turns=generator.turns, candidates=drawn, options=generator.options, seed=seed,
        )  # fmt: skip

    def taught(arm: Arm, name: str, seed: int) -> list[Step]:
        """Rounds of generator and student: the student fitted in one round scores and labels the next, which asks no
        question of an earlier one again."""
        rows_of: list[Step] = []
        asked: list[Any] = []
        model: Any = own_generator
        student: Any = None
        for i in range(config.rounds):
            of_round = f"{name}-round-{i + 1}" if config.rounds > 1 else name
            trained = train(of_round, seed + i, model, student)
            model = trained / "model"
            share = _share(questions, i, config.rounds)
            asking = writing(seed + i, student, model, share, tuple(asked))
            written = step("generate", of_round, write_questions, writing=asking)
            asked.append(written / "samples.parquet")
            rows_of.append(label(of_round, written, seed, student or own_student))
            arm.trained.append(trained)
            arm.written.append(written)
            arm.labelled.append(rows_of[-1])
            if i + 1 < config.rounds:
                so_far = sum(_share(n, j, config.rounds) for j in range(i + 1))
                student = fit(rows_of, of_round, STUDENT, so_far, config.student.seeds[0]) / "model"
        return rows_of

    def rows_for(arm: Arm, name: str, seed: int) -> list[Step]:
        """The steps that write an arm's training rows, for one generator seed."""
        match arm.name:
            case "grpo" | "dpo":
                return taught(arm, name, seed)
            case "random_real":
                return [step("generate", name, random_rows, real=rows / "real.parquet", n=n, seed=seed)]
            case "filtered_real":
                return [step("generate", arm.name, filter_rows, scoring=scoring(), real=rows / "real.parquet", n=n)]
            case "best_of_n":
                trained = found.arms[found.main].trained if found.main in found.arms else []
                of_seed = [each for each in trained if each.arguments["seed"] - seed in range(config.rounds)]
                written = step(
                    "generate", name, select_questions,
                    writing=writing(seed), candidates=config.generator.candidates,
                    spent=[each / "counts.json" for each in of_seed],
                )  # fmt: skip
            case "error_driven":
                answers = answer("base-held-out", own_student, {"held_out": (config.domain, rows / "held_out.parquet")})
                mistakes = answers / "answers-held_out.parquet"
                written = step("generate", name, write_questions, writing=writing(seed), mistakes=mistakes)
            case _:
                written = step("generate", name, write_questions, writing=writing(seed))
        arm.written.append(written)
        arm.labelled.append(label(name, written, seed))
        return arm.labelled[-1:]

    found.base = {name: answer(f"base-{name}", Model(model)) for name, model in students.items()}
    for name in dict.fromkeys((found.main, *config.baselines)):
        found.arms[name] = arm = Arm(name)
        for generator in config.generator.seeds:
            of_generator = f"{name}@{generator}" if generator else name  # student names contain no @
            learnt = rows_for(arm, of_generator, config.seed + config.rounds * generator)
            if learnt in arm.rows.values():
                continue  # equal rows are not a second draw
            arm.rows[generator] = learnt
            for student in students:
                for size in config.student.rows:
                    for seed in config.student.seeds:
                        key = f"{of_generator}-{student}-{size}-s{seed}"
                        fitted = fit(learnt, key, student, size, seed, ranked=name == "filtered_real")
                        arm.fits[student, size, generator, seed] = fitted
                        arm.answers[student, size, generator, seed] = answer(key, fitted / "model")
    measured: Step | None = None
    if validity.batches:
        measured = step(
            "evaluate", "validity", measure_validity,
            scoring=scoring(), student=own_student, validity=validity, options=config.student.options,
            max_tokens=config.evaluation.max_tokens, seed=config.seed, real=rows / "real.parquet",
            base=found.base[STUDENT] / f"answers-{IN_DISTRIBUTION}.parquet",
        )  # fmt: skip
    step(
        "report", "report", write_report,
        recipe=config.model_dump(exclude={"output"}), sets=sets, main=found.main, base=found.base, arms=found.arms,
        validity=measured,
    )  # fmt: skip
    return found


def _share(n: int, i: int, rounds: int) -> int:
    """Number of rows in round i; the first rounds take the remainder."""
    return n // rounds + (i < n % rounds)
