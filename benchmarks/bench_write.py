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
from dataclasses import asdict, dataclass, replace
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
from benchmarks import gsm8k, harness, write_report
from benchmarks.bench_pool import Encoder, Log, Stopped
from benchmarks.pool_data import Message, load
from benchmarks.pool_fit import Fitter, Rows
from benchmarks.write_signals import CANDIDATES, DEFAULT, Answerable, Candidates, StudentSignal, StudentSignals
from benchmarks.writer import Draws, Writer

TUNED_ON, REPORTED_ON = "clinc150", "banking77"
TUNING_SEEDS = (100, 101)
WARM_EPOCHS = 8.0

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
    length: int = 48  # tokens of a student's row
    label_length: int = 11
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


class Bench:
    """A student and a generator on one folder of data."""

    def __init__(
        self, fitter: Fitter, writer: Writer, encode: Encoder, tokenizer: Any, folder: Path, scale: Scale, log: Log,
        deadline: float, backend: str | None = None,
    ) -> None:  # fmt: skip
        self.backend = backend
        self.fitter, self.writer, self.encode, self.tokenizer = fitter, writer, encode, tokenizer
        self.folder, self.scale, self.log = folder, scale, log
        self._deadline = deadline
        self.base, self.generator = fitter.weights(), writer.weights()

    def check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise Stopped


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
        self.test_rows, self.warm_rows = self._placed(self.test), self.placed(seeds)
        self.steps: list[dict[str, float]] = []  #: steps of the last GRPO run
        self._candidates: Candidates | None = None
        self._start()

    def _fits(self, row: Message) -> bool:
        """Whether the row fits the student, and two such examples fit a generator's prompt."""
        written = len(self.bench.tokenizer(row.text, add_special_tokens=False).input_ids)
        return self.bench.encode.fits(row) and written <= self.bench.scale.new_tokens

    def adopt(self, choices: Choices) -> None:
        """Adopts other choices; keeps the warm student and the candidates unless the choices affect them."""
        known, self.choices = self.choices, choices
        if choices.temperature != known.temperature:
            self._candidates = None
        if choices.rate != known.rate:
            self._start()

    def _start(self) -> None:
        """Fits the warm student, starting from the untrained one."""
        fitter, choices = self.bench.fitter, self.choices
        fitter.restore(self.bench.base)
        fitter.fit(self.warm_rows, epochs=self.bench.scale.warm_epochs, rate=choices.rate, seed=self.number)
        self.warm = fitter.weights()

    def _placed(self, messages: Sequence[Message]) -> Rows:
        return self.bench.encode(messages).to(self.bench.fitter.device)

    def placed(self, samples: Sequence[Sample]) -> Rows:
        """Samples in the student's format."""
        return self._placed([Message(sample.question, sample.answer) for sample in samples])

    def tested(self, learnt: Sequence[Message]) -> dict[str, float]:
        """Accuracy and loss of a student that learnt ``learnt`` and the seed rows, or of the warm student if ``learnt``
        is empty. The warm student is restored afterwards."""
        fitter, choices = self.bench.fitter, self.choices
        if not learnt:
            found = fitter.test(self.test_rows)
            return {"accuracy": found.accuracy, "loss": found.loss}
        rows = self._placed(learnt)
        if choices.start == "anew":
            fitter.restore(self.bench.base)
        fitter.fit(rows + self.warm_rows, epochs=choices.epochs, rate=choices.rate, seed=self.number)
        found = fitter.test(self.test_rows)
        fitter.restore(self.warm)
        return {"accuracy": found.accuracy, "loss": found.loss}

    # --- writing --------------------------------------------------------------------------------------------------

    def prompt(self, intent: str) -> list[int]:
        """Token ids of the prompt for one more message of an intent."""
        name = spoken(intent)
        lines = [f"Intent: {name}\nMessage: {row.text}\n" for row in self.shown[intent]]
        ids: list[int] = self.bench.tokenizer(
            f"{''.join(lines)}Intent: {name}\nMessage:", add_special_tokens=False
        ).input_ids
        return ids

    def written(self, intents: Sequence[str], seed: int) -> tuple[Draws, list[str]]:
        """``CANDIDATES`` completions of each request by the current writer, and their texts."""
        draws = self.bench.writer.draw(
            [self.prompt(intent) for intent in intents], CANDIDATES, temperature=self.choices.temperature, seed=seed
        )
        return draws, draws.texts(self.bench.tokenizer)

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

    def unit(self, stage: str, arm: str, learnt: Callable[[], list[Message]], pool: str = "") -> None:
        """Writes, fits, tests and logs, unless already logged. An arm that fails is logged with its error."""
        bench = self.bench
        key = {"stage": stage, "seed": self.number, "pool": pool, "arm": arm}
        if bench.log.get(**key) is not None:
            return
        bench.check_time()
        begin = time.perf_counter()
        bench.fitter.restore(self.warm)  # another seed may have used the fitter since
        self.steps = []
        try:
            rows = learnt()
            chosen = time.perf_counter()
            outcome = self.tested(rows)
        except Stopped:
            raise
        except Exception as error:  # one arm's failure must not cost the others their only run
            bench.fitter.restore(self.warm)
            bench.log.add(**key, failed=harness.first_line(error))
            return
        bench.log.add(
            **key, **outcome, rows=len(rows), agreed=self.agreed(rows) if rows else 0.0,
            examples=[row.text for row in rows[:4]], steps=self.steps,
            writing=round(chosen - begin, 3), fitting=round(time.perf_counter() - chosen, 3),
        )  # fmt: skip

    def agreed(self, rows: Sequence[Message]) -> float:
        """Share of rows for which the warm student writes the label."""
        return float(self.bench.fitter.losses(self._placed(rows))[1].double().mean())


def advantages(totals: Sequence[float | None]) -> torch.Tensor:
    """Each total minus the mean of its group of ``CANDIDATES``; 0 if the total is None."""
    known = torch.tensor([float("nan") if total is None else total for total in totals]).view(-1, CANDIDATES)
    return (known - known.nanmean(dim=1, keepdim=True)).nan_to_num(0.0).flatten()


def tune(bench: Bench) -> Choices:
    """Makes the choices on the tuning data by accuracy alone."""
    scale, log, seeds = bench.scale, bench.log, bench.scale.tuning_seeds
    made: dict[int, Seed] = {}

    def accuracy(stage: str, number: int, name: str, choices: Choices, arm: str) -> float:
        if log.get(stage=stage, seed=number, pool="", arm=name) is None:
            if number not in made:
                made[number] = Seed(bench, TUNED_ON, number, choices)
            made[number].adopt(choices)
            made[number].unit(stage, name, partial(made[number].rows_of, arm))
        row = log.get(stage=stage, seed=number, pool="", arm=name)
        assert row is not None
        return float(row.get("accuracy", 0.0))

    def best(stage: str, grid: dict[str, Choices], numbers: Sequence[int], arm: str) -> Choices:
        means: dict[str, float] = dict.fromkeys(grid, 0.0)
        for number in numbers:
            for name, choices in grid.items():
                means[name] += accuracy(stage, number, name, choices, arm) / len(numbers)
        return grid[max(grid, key=lambda name: means[name])]

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


def make(
    student: str, data: Path, out: Path, device: str, scale: Scale, *, seconds: float = float("inf"),
    graph: bool = True, backend: str | None = None,
) -> Bench:  # fmt: skip
    """The bench for a model folder or hub id."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    begin = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(student)
    models = [AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).to(device) for _ in range(2)]
    writer = Writer(
        models[1], line_ends(tokenizer), prompt_length=scale.prompt_length, new_tokens=scale.new_tokens,
        rows_at_once=scale.rows_at_once if torch.device(device).type == "cuda" else scale.rows_at_once // 4,
    )  # fmt: skip
    fitter = Fitter(models[0], batch=scale.batch, length=scale.length, label_length=scale.label_length, graph=graph)
    print(f"student and generator ready in {time.monotonic() - begin:.1f} s", flush=True)
    log = Log(out / "write.jsonl")
    encode = Encoder(tokenizer, scale.length, scale.label_length)
    return Bench(fitter, writer, encode, tokenizer, data, scale, log, begin + seconds, backend)


#: Runs in minutes on two cores; only shows that everything runs.
SMALL = Scale(
    intents=4, each=1, test=12, batch=4, warm_epochs=2.0, steps=1, prompts=2, rows_at_once=16, tuning_seeds=(100,),
    rates=(3e-4,), epochs=(1.0,), grpo_rates=(1e-5,),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", default=None, help="folder or hub id (default: the packaged SmolLM2)")
    parser.add_argument("--data", type=Path, default=gsm8k.FOLDER / "intents", help="folder of the intent files")
    parser.add_argument(
        "--out", type=Path, default=Path("bench-write"), help="folder of write.jsonl (default: %(default)s)"
    )
    parser.add_argument("--stage", choices=("all", "tune", "report", "table"), default="all")
    parser.add_argument("--choices", type=Path, default=None, help="read the choices from this file instead of tuning")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop cleanly after this time")
    parser.add_argument(
        "--seeds", type=int, default=6, help="seeds of the arms without GRPO, and new seeds of the arm that was added "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--grpo-seeds", type=int, default=3, help="seeds of GRPO's arms (default: %(default)s)")
    parser.add_argument("--no-graph", action="store_true", help="use plain training steps instead of a CUDA graph")
    parser.add_argument("--backend", default=None, help="acqcore backend (default: automatic)")
    parser.add_argument("--small", action="store_true", help="a handful of rows, only to test that the code runs")
    arguments = parser.parse_args()
    made = arguments.choices or arguments.out / "write-choices.json"
    if arguments.stage != "table":
        bench = make(
            arguments.student or str(smollm2_path()), arguments.data, arguments.out, arguments.device,
            SMALL if arguments.small else Scale(), seconds=arguments.seconds, graph=not arguments.no_graph,
            backend=arguments.backend,
        )  # fmt: skip
        bench.log.add(stage="machine", machine={**harness.machine(), "graph": bench.fitter.captured})
        try:
            if arguments.choices is None and arguments.stage in ("all", "tune"):
                choices = tune(bench)
                harness.write(made, {"tuned_on": TUNED_ON, "choices": asdict(choices)})
            if arguments.stage in ("all", "report"):
                run(bench, Choices.read(made), arguments.seeds, arguments.grpo_seeds)
        except Stopped:
            print(f"stopped after {arguments.seconds:g} s; the same command resumes")
    write_report.write(Log(arguments.out / "write.jsonl").rows, made, arguments.out, small=arguments.small)


if __name__ == "__main__":
    main()
