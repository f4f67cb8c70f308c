"""Writing rows of real language: which signal makes SmolLM2 write messages that teach a student intents?

``python -m benchmarks.bench_write --student MODEL --data FOLDER`` tunes on CLINC150, runs BANKING77 once, and writes
``results/write.json`` and its section of ``docs/evidence-write.md`` with a plot. ``--stage tune|report|table`` runs one
stage. Each finished unit (one arm of one seed) is appended to ``<out>/write.jsonl``, and a rerun resumes from there.

Protocol, written before any run on BANKING77
---------------------------------------------
Question: a student and a generator have seen two messages of each of 77 intents. The generator writes five more of
each. Which of them should the student learn?

Student and generator are SmolLM2-135M-Instruct. The student reads ``Message: <text>\\nIntent:`` and writes the intent's
name; it is fitted to the 154 rows (the warm student, the source of every signal). The generator's prompt for a message
holds the two rows of its intent (``Intent: <name>\\nMessage: <text>`` twice, then the name again); it writes to the end
of the line. An arm is a set of 385 texts, one for each of 385 requests, labelled with the requested intent; the student
learns them and the 154 rows. Outcome: share of 1,000 real test messages whose intent greedy decoding writes exactly, in
percentage points.

Arms, on the same requests:

- ``as it is``: the generator's first non-empty completion.
- ``best of 8: ...``: eight completions per request; among those that pass the package's model-free gates (sound,
  length, repetition, leak, near copies of the seeds, test messages) and are not near copies of a text already taken,
  the one with the highest value: at random; ``agreement``, the probability that the warm student gives the requested
  label; entropy; varentropy; mutual information (linear form, 8 probes); ``default``.
- ``of all: ...``: of all 3,080 completions that pass those gates, 385 by the recipe that ``bench_pool`` recommends:
  those whose label the other completions and the 154 rows predict (``acqcore.label_trust`` of the warm student's states
  of the prompts, above 0), of near copies the most trusted, then the highest loss, one of each label in turn. Added
  after the other arms had been seen on seeds 0 to 5, which it does not use: it and ``as it is`` run on six new seeds.
  Nothing was chosen for it.
- ``GRPO: ...``: the generator after GRPO on entropy, on mutual information, on the default reward (groups of 8, the
  same gates); then chosen as in ``best of 8: random``.

``default`` is the package's default reward: mutual information, influence towards the 154 rows (cosine, all
parameters), learnability p (1 - p) and diversity, with the weights of ``DEFAULT_WEIGHTS``, fused by ``z``, behind the
gates above and ``answerable`` (p of the requested label at least a quarter: two of eight sampled answers). If no
completion of a request passes, the one with the highest p is taken. p is exact, not sampled.

The warm student itself and 385 real rows are included for orientation; they are not arms.

Choices: temperature and the fit's rate, epochs and start are chosen on CLINC150 (77 of its intents per seed, seeds 100
and 101) with the texts of ``as it is``; GRPO's learning rate on the same data with the default reward, seed 100. The
highest mean accuracy wins; ties go to the earlier grid entry. BANKING77 is run once with these choices: ``--seeds``
seeds for all arms except GRPO's, which use the first ``--grpo-seeds`` of them.

Primary outcome: ``best of 8: default`` minus ``as it is``, mean over seeds, 95 % t interval of the paired differences.
Secondary: every other arm minus ``as it is``, and ``GRPO: default`` minus ``GRPO: entropy``; p values adjusted by Holm
within the family. An interval that contains 0 is reported as "no gain shown", with the difference that a test of this
size would have detected.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from acqsynth.domains import Sample
from acqsynth.domains.classification import Classification, spoken
from acqsynth.models import smollm2_path
from acqsynth.rewards.gates import Check, default_gates
from acqsynth.rewards.reward import DEFAULT_WEIGHTS, ComposedReward
from acqsynth.rewards.signals import Diversity
from acqsynth.rewards.texts import NgramEmbedder
from benchmarks import resumable, write_report
from benchmarks.pool_data import Message, load
from benchmarks.pool_fit import Fitter, Rows
from benchmarks.resumable import LABEL_LENGTH, LENGTH, REPORTED_ON, TUNED_ON, WARM_EPOCHS, Encoder, Log
from benchmarks.write_signals import CANDIDATES, DEFAULT, Answerable, Candidates, StudentSignal, StudentSignals
from benchmarks.writer import Draws, Writer

TUNING_SEEDS = (100, 101)

AS_IT_IS = "as it is"
RANKED = ("random", "agreement", "entropy", "varentropy", "mutual information", DEFAULT)
TAUGHT = ("entropy", "mutual information", DEFAULT)
BEST, GRPO = "best of 8: ", "GRPO: "
TRUSTED = "of all: trusted labels, then the highest loss"
ORIENTATION = ("warm", "real rows")

RATES, EPOCHS, STARTS, TEMPERATURES = (3e-4, 1e-3), (4.0, 8.0), ("warm", "anew"), (0.7, 1.0)
GRPO_RATES = (1e-5, 3e-5)


@dataclass(frozen=True)
class Scale:
    """All sizes; tests use tiny ones."""

    intents: int = 77
    each: int = 5  # rows to write per intent
    test: int = 1000
    batch: int = 32
    warm_epochs: float = WARM_EPOCHS
    length: int = LENGTH
    label_length: int = LABEL_LENGTH
    prompt_length: int = 112
    new_tokens: int = 28
    steps: int = 12
    prompts: int = 32  # per step of GRPO
    rows_at_once: int = 1600  # 385 requests in two batches; a quarter on a CPU: 2.5 GB of keys and values, not 10
    tuning_seeds: tuple[int, ...] = TUNING_SEEDS
    rates: tuple[float, ...] = RATES
    epochs: tuple[float, ...] = EPOCHS
    grpo_rates: tuple[float, ...] = GRPO_RATES


@dataclass(frozen=True)
class Choices:
    """The choices made on the tuning data."""

    temperature: float = 1.0
    rate: float = 3e-4
    epochs: float = 4.0
    start: str = "anew"
    grpo_rate: float = 1e-5

    @classmethod
    def read(cls, path: Path) -> Choices:
        return cls(**json.loads(path.read_text())["choices"])


@dataclass
class Bench(resumable.Bench):
    """A student and a generator on one folder of data."""

    writer: Writer = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.generator = self.writer.weights()


class Seed:
    """Seed rows, requests, test messages and the warm student of one seed."""

    def __init__(self, bench: Bench, data: str, number: int, choices: Choices) -> None:
        self.bench, self.number, self.choices = bench, number, choices
        train, test, _ = load(bench.folder, data)
        rng = random.Random(number)
        every = sorted({row.intent for row in train})
        intents = sorted(rng.sample(every, min(bench.scale.intents, len(every))))
        rng.shuffle(train)
        of_intent = {intent: [row for row in train if row.intent == intent and self._fits(row)] for intent in intents}
        short = [intent for intent, rows in of_intent.items() if len(rows) < 2 + bench.scale.each]
        if short:
            raise ValueError(f"data: fewer than {2 + bench.scale.each} rows of {', '.join(short)} are short enough")
        self.shown = {intent: rows[:2] for intent, rows in of_intent.items()}
        self.real = [row for rows in of_intent.values() for row in rows[2 : 2 + bench.scale.each]]
        tested = [row for row in test if row.intent in of_intent and bench.encode.fits(row)]
        self.test = rng.sample(tested, min(bench.scale.test, len(tested)))
        #: Requested intents; each occurs once before any repeats, so that near copies are judged across intents.
        self.requests = intents * bench.scale.each
        seeds = [Sample(row.text, row.intent) for rows in self.shown.values() for row in rows]
        self.seeds = seeds
        self.domain = Classification().with_seeds(seeds)
        self.test_rows, self.warm_rows = bench.placed(self.test), self.placed(seeds)
        self.steps: list[dict[str, float]] = []  #: steps of the last GRPO run
        self._candidates: Candidates | None = None
        self._start()

    def _fits(self, row: Message) -> bool:
        """Whether the row fits the student, and two such examples fit a generator's prompt."""
        written = len(self.bench.encode.tokenizer(row.text, add_special_tokens=False).input_ids)
        return self.bench.encode.fits(row) and written <= self.bench.scale.new_tokens

    def adopt(self, choices: Choices) -> None:
        """Adopts other choices; keeps the warm student and the candidates unless the choices affect them."""
        known, self.choices = self.choices, choices
        if choices.temperature != known.temperature:
            self._candidates = None
        if choices.rate != known.rate:
            self._start()

    def _start(self) -> None:
        self.warm = self.bench.warmed(self.warm_rows, self.choices.rate, self.number)

    def placed(self, samples: Sequence[Sample]) -> Rows:
        """Samples in the student's format."""
        return self.bench.placed([Message(sample.question, sample.answer) for sample in samples])

    def tested(self, learnt: Sequence[Message]) -> dict[str, float]:
        """Accuracy and loss of a student that learnt ``learnt`` and the seed rows, or of the warm student if ``learnt``
        is empty."""
        if not learnt:
            return self.bench.tested(self.test_rows)
        rows = self.bench.placed(learnt) + self.warm_rows
        return self.bench.outcome(rows, self.test_rows, self.choices, self.warm, self.number)

    # --- writing --------------------------------------------------------------------------------------------------

    def prompt(self, intent: str) -> list[int]:
        """Token ids of the prompt for one more message of an intent."""
        name = spoken(intent)
        lines = [f"Intent: {name}\nMessage: {row.text}\n" for row in self.shown[intent]]
        ids: list[int] = self.bench.encode.tokenizer(
            f"{''.join(lines)}Intent: {name}\nMessage:", add_special_tokens=False
        ).input_ids
        return ids

    def written(self, intents: Sequence[str], seed: int) -> tuple[Draws, list[str]]:
        """``CANDIDATES`` completions of each request by the current writer, and their texts."""
        draws = self.bench.writer.draw(
            [self.prompt(intent) for intent in intents], CANDIDATES, temperature=self.choices.temperature, seed=seed
        )
        return draws, draws.texts(self.bench.encode.tokenizer)

    @property
    def candidates(self) -> Candidates:
        """Completions of the untrained generator, shared by all arms that choose among them."""
        if self._candidates is None:
            self.bench.writer.restore(self.bench.generator)
            self._candidates = Candidates(self, *self.written(self.requests, self.number))
        return self._candidates

    def rows_of(self, arm: str) -> list[Message]:
        """The rows that an arm teaches."""
        if arm == "warm":
            return []
        if arm == "real rows":
            return self.real
        if arm == AS_IT_IS:
            return self.candidates.first()
        if arm == TRUSTED:
            return self.candidates.trusted()
        if arm.startswith(BEST):
            return self.candidates.best(arm.removeprefix(BEST))
        self.teach(arm.removeprefix(GRPO))
        return Candidates(self, *self.written(self.requests, self.number)).best("random")

    # --- signals and gates ------------------------------------------------------------------------------------------

    def gates(self) -> list[Any]:
        """The package's model-free gates, and a check that the sample fits a student's row."""
        tests = [Sample(row.text, row.intent) for row in self.test]
        fits = Check("fits", lambda sample: self.bench.encode.fits(Message(sample.question, sample.answer)))
        return [fits, *default_gates(self.domain, seeds=self.seeds, evaluation=tests)]

    def reward(self, name: str) -> ComposedReward:
        """GRPO's reward: one signal, or the default."""
        students = StudentSignals(self)
        if name != DEFAULT:
            return ComposedReward(self.domain, [StudentSignal(students, name)], gates=self.gates(), fusion="z")
        signals = [StudentSignal(students, key) for key in ("mutual_information", "influence", "learnability")]
        return ComposedReward(
            self.domain, [*signals, Diversity(NgramEmbedder())],
            gates=[*self.gates(), Answerable(students)], fusion="z", weights=DEFAULT_WEIGHTS,
        )  # fmt: skip

    def teach(self, name: str) -> None:
        """Trains the writer by GRPO on a reward and records each step in :attr:`steps`."""
        bench, scale = self.bench, self.bench.scale
        bench.writer.restore(bench.generator)
        reward = self.reward(name)
        rng = random.Random(self.number)
        intents = list(self.shown)
        deck: list[str] = []
        self.steps = []
        for step in range(scale.steps):
            bench.check_time()
            while len(deck) < scale.prompts:
                deck += rng.sample(intents, len(intents))
            asked, deck = deck[: scale.prompts], deck[scale.prompts :]
            begin = time.perf_counter()
            draws, texts = self.written(asked, 1000 * self.number + step)
            wrote = time.perf_counter()
            labels = [intent for intent in asked for _ in range(CANDIDATES)]
            groups = [i for i in range(len(asked)) for _ in range(CANDIDATES)]
            tagged = [
                self.domain.tagged(Sample(text, label)) if done else None
                for text, label, done in zip(texts, labels, draws.finished.tolist(), strict=True)
            ]
            found = reward.score(tagged, groups)
            scored = time.perf_counter()
            norm = bench.writer.learn(
                draws, advantages(found.total), temperature=self.choices.temperature, rate=self.choices.grpo_rate
            )
            passed = statistics.fmean(found.passed)
            values = [v for row in found.components.values() for v in row if v is not None]
            self.steps.append(
                {
                    "passed": passed, "signal": statistics.fmean(values) if values else 0.0, "norm": norm,
                    "tokens": float(draws.kept.sum(dim=1).double().mean()),
                    "writing": wrote - begin, "reward": scored - wrote, "learning": time.perf_counter() - scored,
                }
            )  # fmt: skip

    def unit(self, stage: str, arm: str, learnt: Callable[[], list[Message]]) -> None:
        """Writes, fits, tests and logs, unless already logged. An arm that fails is logged with its error."""
        bench = self.bench
        key = {"stage": stage, "seed": self.number, "pool": "", "arm": arm}
        if bench.done(key):
            return
        bench.fitter.restore(self.warm)  # another seed may have used the fitter since
        self.steps = []

        def learn() -> dict[str, Any]:
            begin = time.perf_counter()
            rows = learnt()
            chosen = time.perf_counter()
            outcome = self.tested(rows)
            # Share of the rows for which the warm student writes the label.
            agreed = float(bench.fitter.losses(bench.placed(rows))[1].double().mean()) if rows else 0.0
            return {
                **outcome, "rows": len(rows), "agreed": agreed, "examples": [row.text for row in rows[:4]],
                "steps": self.steps, "writing": round(chosen - begin, 3),
                "fitting": round(time.perf_counter() - chosen, 3),
            }  # fmt: skip

        outcome = bench.attempt(key, self.warm, learn)
        if outcome is not None:
            bench.log.add(**key, **outcome)


def advantages(totals: Sequence[float | None]) -> torch.Tensor:
    """Each total minus the mean of its group of ``CANDIDATES``; 0 if the total is None."""
    known = torch.tensor([float("nan") if total is None else total for total in totals]).view(-1, CANDIDATES)
    return (known - known.nanmean(dim=1, keepdim=True)).nan_to_num(0.0).flatten()


def tune(bench: Bench) -> Choices:
    """Makes the choices on the tuning data by accuracy alone."""
    scale, log, seeds = bench.scale, bench.log, bench.scale.tuning_seeds
    made: dict[int, Seed] = {}

    def best(stage: str, grid: dict[str, Choices], numbers: Sequence[int], arm: str) -> Choices:
        for number, (name, choices) in product(numbers, grid.items()):
            if log.get(stage=stage, seed=number, pool="", arm=name) is None:
                if number not in made:
                    made[number] = Seed(bench, TUNED_ON, number, choices)
                made[number].adopt(choices)
                made[number].unit(stage, name, partial(made[number].rows_of, arm))
        return grid[log.best(stage, "", list(grid), numbers)]

    training = {
        f"temperature {t:g}, rate {rate:g}, {epochs:g} epochs, {start}": Choices(t, rate, epochs, start)
        for t, rate, epochs, start in product(TEMPERATURES, scale.rates, scale.epochs, STARTS)
    }
    choices = best("training", training, seeds, AS_IT_IS)
    grpo = {f"GRPO rate {rate:g}": replace(choices, grpo_rate=rate) for rate in scale.grpo_rates}
    return best("grpo rate", grpo, seeds[:1], GRPO + DEFAULT)


def run(bench: Bench, choices: Choices, seeds: int, grpo_seeds: int, data: str = REPORTED_ON) -> None:
    """Runs the arms that choose, then ``TRUSTED`` on as many new seeds, then those that train a generator."""
    cheap = (*ORIENTATION, AS_IT_IS, *(BEST + name for name in RANKED))
    taught = tuple(GRPO + name for name in TAUGHT)
    fresh = range(seeds, 2 * seeds)
    for arms, numbers in ((cheap, range(seeds)), ((AS_IT_IS, TRUSTED), fresh), (taught, range(grpo_seeds))):
        for number in numbers:
            if all(bench.log.get(stage="report", seed=number, pool="", arm=arm) is not None for arm in arms):
                continue
            made = Seed(bench, data, number, choices)
            for arm in arms:
                made.unit("report", arm, partial(made.rows_of, arm))


def line_ends(tokenizer: Any) -> list[int]:
    """Tokens that end a line, and the end-of-text token."""
    pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return sorted({i for i, piece in enumerate(pieces) if "\n" in piece} | {tokenizer.eos_token_id})


def make(arguments: argparse.Namespace, scale: Scale) -> Bench:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    deadline = time.monotonic() + arguments.seconds
    student, on_gpu = arguments.student or str(smollm2_path()), torch.device(arguments.device).type == "cuda"
    tokenizer = AutoTokenizer.from_pretrained(student)
    own, writing = (
        AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).to(arguments.device) for _ in range(2)
    )
    writer = Writer(
        writing, line_ends(tokenizer), prompt_length=scale.prompt_length, new_tokens=scale.new_tokens,
        rows_at_once=scale.rows_at_once if on_gpu else scale.rows_at_once // 4,
    )  # fmt: skip
    fitter = Fitter(own, batch=scale.batch, length=scale.length, label_length=scale.label_length)
    encode, log = Encoder(tokenizer, scale.length, scale.label_length), Log(arguments.out / "write.jsonl")
    return Bench(fitter, encode, arguments.data, scale, log, deadline, writer=writer)


#: Runs in minutes on two cores; only shows that everything runs.
SMALL = Scale(
    intents=4, each=1, test=12, batch=4, warm_epochs=2.0, steps=1, prompts=2, rows_at_once=16, tuning_seeds=(100,),
    rates=(3e-4,), epochs=(1.0,), grpo_rates=(1e-5,),
)  # fmt: skip


def main() -> None:
    parser = resumable.options(__doc__, "write", 6)
    parser.add_argument("--grpo-seeds", type=int, default=3, help="seeds of GRPO's arms (default: %(default)s)")
    arguments = parser.parse_args()
    choices = arguments.out / "write-choices.json"
    if arguments.stage != "table":
        bench = make(arguments, SMALL if arguments.small else Scale())
        resumable.run_stages(
            arguments, choices, bench, lambda: tune(bench),
            lambda: run(bench, Choices.read(choices), arguments.seeds, arguments.grpo_seeds),
        )  # fmt: skip
    write_report.write(Log(arguments.out / "write.jsonl").rows, choices, arguments.out, small=arguments.small)


if __name__ == "__main__":
    main()
