"""The units of a recipe: what runs for which arm. Arms that need the same unit share it.

Arms, beside the base student as it is:

=================  ====================================================================================================
``grpo``, ``dpo``  the recipe's method: the generator learns from the reward, writes questions, the student labels them
``no_rl``          the same generator as it is (also the recipe's own arm with method ``none``)
``best_of_n``      rejection sampling on the same reward; as a baseline with as many completions as training drew
``random_real``    real rows, drawn at random
``filtered_real``  real rows that the reward's signals rank first
``error_driven``   the generator as it is, shown what the student gets wrong, weak skills more often
=================  ====================================================================================================

All are fitted from the same student on the same number of rows with the same options and seeds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from acqsynth.config import Config, sources
from acqsynth.stages import answer, data, fit, label, report, train, validity, write
from acqsynth.stages.data import IN_DISTRIBUTION
from acqsynth.stages.unit import Artefact, Unit

BASE = "base"
STUDENT = "student"  #: name of the recipe's own student beside its others

DESCRIPTIONS = {
    "grpo": "generator taught by GRPO on the reward",
    "dpo": "generator taught by DPO on pairs of the reward",
    "no_rl": "generator as it is",
    "best_of_n": "generator as it is, best of several by the reward",
    "random_real": "real rows at random",
    "filtered_real": "real rows the signals rank first",
    "error_driven": "generator as it is, shown the student's errors",
}


@dataclass
class Arm:
    """One way to training rows."""

    name: str
    #: units that give rows to learn, one a round, with an artefact ``samples.parquet``
    rows: list[Unit]
    #: units on the way there that wrote questions, and those that labelled them, one a round
    written: list[Unit] = field(default_factory=list)
    labelled: list[Unit] = field(default_factory=list)
    trained: list[Unit] = field(default_factory=list)
    #: (student, rows, seed) -> its fit and its answers
    fits: dict[tuple[str, int, int], Unit] = field(default_factory=dict)
    answers: dict[tuple[str, int, int], Unit] = field(default_factory=dict)


class Plan:
    """All units of a recipe.

    Args:
        config: the recipe.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        #: each after those it needs
        self.units: list[Unit] = []
        self._known: dict[str, Unit] = {}
        self.sets = {IN_DISTRIBUTION: config.domain} | {
            name: other.domain or config.domain for name, other in config.evaluation.others.items()
        }
        self.students = {STUDENT: config.student.model, **config.student.others}
        self.real = self._rows()
        self.base = {name: self._answers(f"{BASE}-{name}", model) for name, model in self.students.items()}
        self.main = "no_rl" if config.generator.method == "none" else config.generator.method
        self.arms = {name: self._arm(name) for name in dict.fromkeys((self.main, *config.baselines))}
        for arm in self.arms.values():
            self._fits(arm)
        self.validity = self._validity() if config.evaluation.validity.batches else None
        self.report = self._report()

    def of(self, stage: str) -> list[Unit]:
        """The units of a stage, in order."""
        return [unit for unit in self.units if unit.stage == stage]

    def add(
        self,
        stage: str,
        name: str,
        function: Callable[..., None],
        arguments: Mapping[str, Any],
        inputs: Mapping[str, Artefact],
        outside: tuple[str, ...] = (),
    ) -> Unit:
        """A unit; the one there is where an arm before needs the very same."""
        unit = Unit(stage, name, function, arguments, inputs, outside)
        key = json.dumps([stage, unit.settings(), {role: str(artefact) for role, artefact in inputs.items()}])
        if key not in self._known:
            self._known[key] = unit
            self.units.append(unit)
        return self._known[key]

    def _rows(self) -> Unit:
        config = self.config
        return self.add(
            "seeds",
            "rows",
            data.collect,
            {
                "domain": config.domain,
                "data": config.data,
                "others": config.evaluation.others,
                "evaluation_rows": config.evaluation.rows,
            },
            {},
            tuple(source.source for source in sources(config).values()),
        )

    def _arm(self, name: str) -> Arm:
        n = max(self.config.student.rows)
        if name in ("random_real", "filtered_real"):
            return Arm(name, [self._random(n) if name == "random_real" else self._filtered(n)])
        if name in ("grpo", "dpo"):
            return self._taught(name, n)
        if name == "best_of_n":
            written = self._select(n)
        elif name == "error_driven":
            written = self._write(name, n, mistakes=True)
        else:
            written = self._write(name, n)
        labelled = self._label(name, written)
        return Arm(name, [labelled], [written], [labelled])

    def _taught(self, method: str, n: int) -> Arm:
        """Rounds of generator and student: each round's student scores the next round."""
        arm = Arm(method, [])
        student: Unit | None = None
        rounds = self.config.rounds
        for i in range(1, rounds + 1):
            suffix = f"-round-{i}" if rounds > 1 else ""
            before = arm.trained[-1] if arm.trained else None
            trained = self._train(method, suffix, i, before, student)
            questions = self._share(self._questions(n), i)
            written = self._write(method + suffix, questions, trained=trained, student=student, number=i)
            labelled = self._label(method + suffix, written, student)
            arm.trained.append(trained)
            arm.written.append(written)
            arm.labelled.append(labelled)
            arm.rows.append(labelled)
            if i < rounds:
                so_far = sum(self._share(n, j) for j in range(1, i + 1))
                student = self._fit(arm, f"{method}{suffix}", STUDENT, so_far, self.config.student.seeds[0])
        return arm

    def _share(self, n: int, number: int) -> int:
        """Rows of a round; the first ones take what can not be shared out."""
        rounds = self.config.rounds
        return n // rounds + (number <= n % rounds)

    def _questions(self, n: int) -> int:
        return self.config.generator.questions or n

    def _train(self, method: str, suffix: str, number: int, before: Unit | None, student: Unit | None) -> Unit:
        config, generator = self.config, self.config.generator
        inputs = self._scoring(student)
        if before is not None:
            inputs["generator"] = before / "model"
        arguments = {
            "domain": config.domain,
            "method": method,
            "generator": generator.model,
            "student": config.student.model,
            "prompts": generator.prompts,
            "shown": generator.shown,
            "turns": generator.turns,
            "candidates": generator.candidates,
            "sampling": generator.sampling if method == "dpo" else None,
            "options": generator.options,
            "reward": config.reward,
            "engine": config.engine,
            "seed": config.seed + number - 1,
        }
        return self.add("train", method + suffix, train.train, arguments, inputs, (generator.model, self._scorer))

    def _write(
        self,
        name: str,
        n: int,
        *,
        trained: Unit | None = None,
        student: Unit | None = None,
        mistakes: bool = False,
        number: int = 1,
    ) -> Unit:
        config = self.config
        inputs = self._scoring(student) | {"held_out": self.real / "held_out.parquet"}
        if trained is not None:
            inputs["generator"] = trained / "model"
        if mistakes:
            asked = {"held_out": config.domain}
            found = self._answers("base-held-out", config.student.model, sets=asked)
            inputs["mistakes"] = found / "answers-held_out.parquet"
        questions = n if trained is not None else self._questions(n)
        arguments = self._writing(questions) | {"seed": config.seed + number - 1}
        return self.add("generate", name, write.write, arguments, inputs, (config.generator.model, self._scorer))

    def _select(self, n: int) -> Unit:
        config = self.config
        inputs = self._scoring(None) | {"held_out": self.real / "held_out.parquet"}
        if self.main in ("grpo", "dpo"):
            first = self._train(self.main, "-round-1" if config.rounds > 1 else "", 1, None, None)
            inputs["spent"] = first / "counts.json"
        arguments = self._writing(self._questions(n)) | {
            "candidates": config.generator.candidates,
            "seed": config.seed,
        }
        return self.add(
            "generate", "best_of_n", write.select, arguments, inputs, (config.generator.model, self._scorer)
        )

    def _writing(self, n: int) -> dict[str, Any]:
        config = self.config
        return {
            "domain": config.domain,
            "generator": config.generator.model,
            "student": config.student.model,
            "engine": config.engine,
            "sampling": config.generator.sampling,
            "shown": config.generator.shown,
            "turns": config.generator.turns,
            "n": n,
            "reward": config.reward,
        }

    def _random(self, n: int) -> Unit:
        inputs = {"real": self.real / "real.parquet"}
        return self.add("generate", "random_real", data.random_real, {"n": n, "seed": self.config.seed}, inputs)

    def _filtered(self, n: int) -> Unit:
        config = self.config
        arguments = {
            "domain": config.domain,
            "student": config.student.model,
            "engine": config.engine,
            "n": n,
            "reward": config.reward,
        }
        inputs = self._scoring(None) | {"real": self.real / "real.parquet"}
        return self.add("generate", "filtered_real", write.filtered, arguments, inputs, (self._scorer,))

    def _label(self, name: str, written: Unit, student: Unit | None = None) -> Unit:
        config = self.config
        inputs = {"samples": written / "samples.parquet"}
        if student is not None and config.labelling.method == "majority":
            inputs["student"] = student / "model"
        arguments = {
            "domain": config.domain,
            "student": config.student.model,
            "engine": config.engine,
            "labelling": config.labelling,
            "seed": config.seed,
        }
        answering = config.labelling.teacher or config.student.model
        return self.add("label", name, label.label, arguments, inputs, (answering,))

    def _fits(self, arm: Arm) -> None:
        settings = self.config.student
        for student in self.students:
            for n in settings.rows:
                for seed in settings.seeds:
                    name = f"{arm.name}-{student}-{n}-s{seed}"
                    fitted = self._fit(arm, name, student, n, seed)
                    arm.fits[student, n, seed] = fitted
                    arm.answers[student, n, seed] = self._answers(name, self.students[student], fitted)

    def _fit(self, arm: Arm, name: str, student: str, n: int, seed: int) -> Unit:
        config, settings = self.config, self.config.student
        inputs = {f"samples-{i}": unit / "samples.parquet" for i, unit in enumerate(arm.rows, 1)}
        replayed = config.data.replay
        if settings.replay:
            inputs["replay"] = self.real / ("replay.parquet" if replayed else "real.parquet")
        arguments = {
            "domain": config.domain,
            "student": self.students[student],
            "n": n,
            "replay": settings.replay,
            "replay_domain": (replayed.domain if replayed else None) or config.domain,
            "options": settings.options,
            "seed": seed,
            "sources": len(arm.rows),
        }
        return self.add("fit", name, fit.fit, arguments, inputs, (self.students[student],))

    def _answers(
        self, name: str, model: str, fitted: Unit | None = None, sets: Mapping[str, str] | None = None
    ) -> Unit:
        config = self.config
        asked = self.sets if sets is None else sets
        inputs = {key: self.real / (f"evaluation-{key}.parquet" if sets is None else f"{key}.parquet") for key in asked}
        if fitted is not None:
            inputs["model"] = fitted / "model"
        arguments = {
            "sets": dict(asked),
            "model": model,
            "engine": config.engine,
            "max_tokens": config.evaluation.max_tokens,
            "seed": config.seed,
        }
        return self.add("evaluate", name, answer.answer, arguments, inputs, (model,))

    def _validity(self) -> Unit:
        config = self.config
        inputs = self._scoring(None) | {
            "real": self.real / "real.parquet",
            "base": self.base[STUDENT] / f"answers-{IN_DISTRIBUTION}.parquet",
        }
        arguments = {
            "domain": config.domain,
            "student": config.student.model,
            "engine": config.engine,
            "reward": config.reward,
            "validity": config.evaluation.validity,
            "options": config.student.options,
            "max_tokens": config.evaluation.max_tokens,
            "seed": config.seed,
        }
        return self.add("evaluate", "validity", validity.validity, arguments, inputs, (self._scorer,))

    def _report(self) -> Unit:
        inputs = {
            f"base/{name}/{each}": unit / f"answers-{each}.parquet"
            for name, unit in self.base.items()
            for each in self.sets
        }
        for arm in self.arms.values():
            for (student, n, seed), unit in arm.answers.items():
                key = f"{arm.name}/{student}/{n}/{seed}"
                inputs[f"fit/{key}"] = arm.fits[student, n, seed] / "counts.json"
                inputs |= {f"answers/{key}/{each}": unit / f"answers-{each}.parquet" for each in self.sets}
            for kind, units, artefact in (
                ("training", arm.trained, "model"),
                ("written", arm.written, "counts.json"),
                ("labelled", arm.labelled, "counts.json"),
                ("samples", arm.written or arm.rows, "samples.parquet"),
            ):
                inputs |= {f"{kind}/{arm.name}/{i}": unit / artefact for i, unit in enumerate(units, 1)}
        if self.validity is not None:
            inputs["validity"] = self.validity / "batches.json"
        recipe = asdict(self.config)
        del recipe["output"]
        arguments = {
            "recipe": recipe,
            "sets": self.sets,
            "main": self.main,
            "arms": {name: DESCRIPTIONS[name] for name in self.arms},
        }
        return self.add("report", "report", report.report, arguments, inputs)

    def _scoring(self, student: Unit | None) -> dict[str, Artefact]:
        """What the reward reads."""
        inputs = {
            "seeds": self.real / "seeds.parquet",
            "evaluation": self.real / f"evaluation-{IN_DISTRIBUTION}.parquet",
        }
        return inputs | ({"student": student / "model"} if student is not None else {})

    @property
    def _scorer(self) -> str:
        return self.config.reward.student or self.config.student.model
