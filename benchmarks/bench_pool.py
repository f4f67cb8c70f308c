"""Choosing rows of real language: which signal makes SmolLM2 better, and which one selects junk?

``python -m benchmarks.bench_pool --student MODEL --data FOLDER`` tunes on CLINC150, runs BANKING77 once, and writes
``results/pool.json`` and its section of ``docs/evidence-pool.md`` with a plot. ``--stage tune|report|table`` runs one
stage. Each finished fit is appended to ``<out>/pool.jsonl``, and a rerun resumes from there.

Protocol, written before any run on BANKING77
---------------------------------------------
Question: a student that has seen two messages of each of 77 intents may learn 400 of 3,000 rows. Which rows?

Student: SmolLM2-135M-Instruct reads ``Message: <text>\\nIntent:`` and writes the intent's name; the loss covers the
name's tokens. It is first fitted to the 154 rows (the warm start); every signal is computed with that student. Then it
learns the chosen rows. Outcome: share of 1,000 test messages whose intent greedy decoding writes exactly, in percentage
points.

Pools: A, as published; B, 55 % as published and 45 % junk of four kinds (``pool_data.py``). Only the evaluation knows
which rows are junk. All arms of a seed share warm start, pool, test rows and the seed of the fit's order, all drawn
from the seed. Rows longer than 48 tokens (about 2 % of BANKING77) are excluded, so that every batch has one shape.

Arms: random; a clean oracle (random among the uncorrupted rows); loss; entropy; varentropy; gradient norm of the head;
mutual information in the linear form (8 probes), with an isotropic posterior, and by 8 draws in all blocks; influence
of all parameters towards 96 development rows (exact cosine); RHO-loss (second student fitted to those 96); BADGE;
facility location; SIFT (prompts: the 96 rows); HUDS; the default reward's fusion; and ``default``, the recipe that this
package recommends for selection. A control learns the 96 development rows in addition to random ones, since some arms
use them. One arm was added after random and ``default`` had been seen on six seeds of pool B, to separate the steps of
``default``: the same gate and spread without its value.

Choices: learning rate, epochs, start (from the warm student, or anew on warm and chosen rows), the states used for
distances, each signal's spread (the highest 400, or the highest of each label in turn), and the recipe of ``default``
are chosen on CLINC150 (77 of its intents per seed, seeds 100 to 102) by the highest mean accuracy on pool B; ties go to
the earlier grid entry. BANKING77 (seeds 0 to 7) is run once with these choices.

Primary outcome: accuracy on pool B, default minus random, mean over seeds, 95 % t interval of the paired differences.
Secondary: junk among the 400 (goal: at most half of random's); default minus each other arm and each arm minus random,
on pools A and B, p values adjusted by Holm in each family; the stochastic signals' test-retest rank correlation on this
pool. An interval that contains 0 is reported as "no gain shown", with the difference that a test of this size would
have detected.
"""

from __future__ import annotations

import argparse
import hashlib
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

from acqsynth.models import smollm2_path
from benchmarks import gsm8k, harness, pool_report
from benchmarks.pool_data import CLEAN, Message, Sizes, Task, load, task
from benchmarks.pool_fit import Fitter, Rows, pad
from benchmarks.pool_signals import (
    STOCHASTIC,
    Recipe,
    Refit,
    Signals,
    clean_oracle,
    shares,
)

TUNED_ON, REPORTED_ON = "clinc150", "banking77"
TUNING_SEEDS, SEEDS = (100, 101, 102), tuple(range(8))
CHOSEN, BATCH, LENGTH, LABEL_LENGTH = 400, 32, 48, 11
WARM_EPOCHS = 8.0

RATES, EPOCHS, STARTS = (2e-4, 5e-4, 1e-3), (4.0, 8.0), ("warm", "anew")
STATES = ("last", "mean")
#: Arms that rank rows by one signal, and the spreads available to them.
RANKING = (
    "loss", "entropy", "varentropy", "grad_norm", "mutual information", "mutual information, isotropic",
    "mutual information, draws", "influence", "rho loss", "default fusion",
)  # fmt: skip
SPREADS = ("top", "balanced")
SETS = ("badge", "facility location", "sift", "huds")
RANDOM, ORACLE, CONTROL, DEFAULT = "random", "clean oracle", "random, and development rows", "default"
#: ``default``'s gate and spread with rows in random order; the difference from ``default`` is due to its value.
VALUELESS = "default without its value"
OPTIONAL = (VALUELESS, ORACLE, *RANKING, *SETS, CONTROL)
ARMS = (RANDOM, DEFAULT, *OPTIONAL)
#: Candidates for ``default``: a gate on the label's trust, a ranking, a spread.
RECIPES = tuple(
    Recipe(*parts)
    for parts in product(
        ("agree", "half"), ("none", "mutual information", "loss", "rho loss"), ("top", "balanced", "cover")
    )
)
FIRST_RECIPE, FULL = RECIPES[0], Sizes()


@dataclass(frozen=True)
class Choices:
    """The choices made on the tuning data."""

    rate: float = 5e-4
    epochs: float = 4.0
    start: str = "warm"
    state: str = "last"
    spreads: dict[str, str] | None = None
    default: Recipe = FIRST_RECIPE

    @classmethod
    def read(cls, path: Path) -> Choices:
        content = json.loads(path.read_text())["choices"]
        return cls(**{**content, "default": Recipe(**content["default"])})


@dataclass(frozen=True)
class Scale:
    """All sizes; tests use tiny ones."""

    sizes: Sizes = FULL
    chosen: int = CHOSEN
    batch: int = BATCH
    warm_epochs: float = WARM_EPOCHS
    rates: tuple[float, ...] = RATES
    epochs: tuple[float, ...] = EPOCHS
    recipes: tuple[Recipe, ...] = RECIPES
    arms: tuple[str, ...] = ARMS


class Log:
    """Finished units, one JSON line each, identified by their keys."""

    KEYS = ("stage", "seed", "pool", "arm")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    self.rows.append(json.loads(line))
                except json.JSONDecodeError:  # a line left incomplete by a killed process
                    continue
        self._done = {self._key(row): row for row in self.rows}

    def _key(self, row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in self.KEYS)

    def get(self, **key: Any) -> dict[str, Any] | None:
        return self._done.get(self._key(key))

    def add(self, **row: Any) -> dict[str, Any]:
        harness.append(self.path, **row)
        self.rows.append(row)
        self._done[self._key(row)] = row
        return row


class Stopped(Exception):  # noqa: N818
    """The time is up; all finished units are in the log."""


class Encoder:
    """Messages as rows of token ids."""

    def __init__(self, tokenizer: Any, length: int = LENGTH, label_length: int = LABEL_LENGTH) -> None:
        self._tokenizer = tokenizer
        self._length, self._label_length = length, label_length
        self.stop: int = tokenizer.eos_token_id

    def tokens(self, message: Message) -> tuple[list[int], list[int]]:
        """Token ids of the prompt and of the label, including its end token."""
        prompt = self._tokenizer(f"Message: {message.text}\nIntent:", add_special_tokens=False).input_ids
        label = self._tokenizer(" " + message.intent.replace("_", " "), add_special_tokens=False).input_ids
        return prompt, [*label, self.stop]

    def fits(self, message: Message) -> bool:
        """Whether the message fits with any label, so that a new label cannot make the row too long."""
        return len(self.tokens(message)[0]) + self._label_length <= self._length

    def __call__(self, messages: Sequence[Message]) -> Rows:
        return pad([self.tokens(message) for message in messages], self._length, self._label_length)


class Bench:
    """One student on one data set."""

    def __init__(
        self, fitter: Fitter, encode: Encoder, folder: Path, scale: Scale, log: Log, deadline: float,
        backend: str | None = None,
    ) -> None:  # fmt: skip
        self.fitter, self.encode, self.scale, self.log, self.backend = fitter, encode, scale, log, backend
        self._folder, self._deadline = folder, deadline
        self._data: dict[str, tuple[list[Message], list[Message], list[Message]]] = {}
        self._base = fitter.weights()
        self.seconds = 0.0  #: time of the last fit and its test

    def seed(self, data: str, seed: int, choices: Choices, pools: Sequence[str] = ("A", "B")) -> Seed:
        if data not in self._data:
            train, test, stray = (list(filter(self.encode.fits, rows)) for rows in load(self._folder, data))
            self._data[data] = train, test, stray
        return Seed(self, task(*self._data[data], self.scale.sizes, seed), seed, choices, pools)

    def check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise Stopped

    def start_anew(self) -> None:
        self.fitter.restore(self._base)


class Seed:
    """Warm student, pools and test rows of one seed, and cached fits."""

    def __init__(self, bench: Bench, task: Task, seed: int, choices: Choices, pools: Sequence[str]) -> None:
        self._bench, self.task, self.number, self.choices = bench, task, seed, choices
        fitter = bench.fitter

        def placed(messages: Sequence[Message]) -> Rows:
            return bench.encode(messages).to(fitter.device)

        self.warm_rows, self.development = placed(task.warm), placed(task.development)
        self.test_rows = placed(task.test)
        self.pools = {name: placed(task.pools[name]) for name in pools}
        self.kinds = {name: [row.kind for row in task.pools[name]] for name in pools}
        self._signals: dict[str, Signals] = {}
        self._fits: dict[tuple[Any, ...], dict[str, float]] = {}
        self._start()

    @property
    def scale(self) -> Scale:
        return self._bench.scale

    def adopt(self, choices: Choices) -> None:
        """Adopts other choices: refits the warm student if its rate changes, and drops outdated signals."""
        known, self.choices = self.choices, choices
        if choices.rate != known.rate:
            self._start()
        elif choices != known:
            self._signals.clear()

    def _start(self) -> None:
        bench, choices = self._bench, self.choices
        bench.start_anew()
        bench.fitter.fit(self.warm_rows, epochs=bench.scale.warm_epochs, rate=choices.rate, seed=self.number)
        self.warm = bench.fitter.weights()
        self._signals.clear()

    def signals(self, pool: str) -> Signals:
        """Signals of a pool. Restores the warm student first, since another seed may have replaced it."""
        self._bench.fitter.restore(self.warm)
        if pool not in self._signals:
            names = self.task.intents
            labels = torch.tensor([names.index(row.intent) for row in self.task.pools[pool]])
            self._signals[pool] = Signals(
                self._bench.fitter, self.warm, self.pools[pool], self.development, labels,
                texts=[row.text for row in self.task.pools[pool]],
                refit=Refit(self.choices.epochs, self.choices.rate), stop=self._bench.encode.stop, seed=self.number,
                state=self.choices.state, backend=self._bench.backend,
            )  # fmt: skip
        return self._signals[pool]

    def tested(self, pool: str, chosen: Sequence[int], *, development: bool = False) -> dict[str, float]:
        """Accuracy and loss after learning the chosen rows; identical sets are fitted once."""
        key = (pool, development, self.choices.rate, self.choices.epochs, self.choices.start, tuple(sorted(chosen)))
        bench, choices = self._bench, self.choices
        bench.seconds = 0.0
        if key not in self._fits:
            bench.check_time()
            begin = time.perf_counter()
            rows = self.pools[pool][torch.tensor(sorted(chosen), device=bench.fitter.device)]
            if development:
                rows = rows + self.development
            if choices.start == "anew":
                bench.start_anew()
                rows = rows + self.warm_rows
            else:
                bench.fitter.restore(self.warm)
            bench.fitter.fit(rows, epochs=choices.epochs, rate=choices.rate, seed=self.number)
            found = bench.fitter.test(self.test_rows)
            bench.fitter.restore(self.warm)
            bench.seconds = time.perf_counter() - begin  # 0 for a cached fit
            self._fits[key] = {"accuracy": found.accuracy, "loss": found.loss}
        return self._fits[key]

    def chosen(self, pool: str, arm: str) -> list[int]:
        """Indices of the rows chosen by an arm."""
        k, kinds = self._bench.scale.chosen, self.kinds[pool]
        if arm in (RANDOM, CONTROL):
            return random.Random(self.number).sample(range(len(kinds)), len(kinds))[:k]
        if arm == ORACLE:
            return clean_oracle(kinds, k, self.number)
        signals = self.signals(pool)
        if arm == DEFAULT:
            return signals.follow(self.choices.default, k)
        if arm == VALUELESS:
            return signals.follow(replace(self.choices.default, value="none"), k)
        if arm in SETS:
            return signals.choose(arm, k)
        return signals.follow(Recipe("none", arm, (self.choices.spreads or {}).get(arm, "top")), k)

    def unit(self, stage: str, pool: str, arm: str, choose: Callable[[Seed], list[int]]) -> None:
        """Chooses, fits, tests and logs, unless already logged. An arm that fails is logged with its error."""
        bench = self._bench
        key = {"stage": stage, "seed": self.number, "pool": pool, "arm": arm}
        if bench.log.get(**key) is not None:
            return
        bench.check_time()
        begin = time.perf_counter()
        try:
            chosen = choose(self)
        except Exception as error:  # one arm's failure must not cost the others their only run
            bench.fitter.restore(self.warm)
            bench.log.add(**key, failed=harness.first_line(error))
            return
        choosing = time.perf_counter() - begin
        outcome = self.tested(pool, chosen, development=arm == CONTROL)
        kinds = shares(self.kinds[pool], chosen)
        bench.log.add(
            **key, **outcome, junk=1 - kinds.get(CLEAN, 0.0), kinds=kinds, rows=_digest(chosen),
            choosing=round(choosing, 3), fitting=round(bench.seconds, 3),
        )  # fmt: skip


def _digest(chosen: Sequence[int]) -> str:
    """A hash that identifies a set of rows."""
    return hashlib.blake2b(json.dumps(sorted(chosen)).encode(), digest_size=8).hexdigest()


def best(log: Log, stage: str, names: Sequence[str], seeds: Sequence[int]) -> str:
    """The name with the highest mean accuracy over seeds; ties go to the first; names that failed are excluded."""
    means: dict[str, float] = {}
    for name in names:
        found = [log.get(stage=stage, seed=seed, pool="B", arm=name) for seed in seeds]
        values = [row["accuracy"] for row in found if row is not None and "accuracy" in row]
        if len(values) == len(seeds):
            means[name] = statistics.fmean(values)
    if not means:
        return names[0]
    return max(means, key=lambda name: means[name])


def tune(bench: Bench, seeds: Sequence[int] = TUNING_SEEDS) -> Choices:
    """Makes the choices on pool B of the tuning data by accuracy alone.

    First it chooses the training (rate, epochs, start) with random rows, then the states with facility location, then
    the spreads and the recipe of ``default``.
    """
    scale, log = bench.scale, bench.log
    made: dict[int, Seed] = {}

    def choose(stage: str, variants: dict[str, tuple[Choices, Callable[[Seed], list[int]]]]) -> None:
        for seed in seeds:
            for name, (choices, function) in variants.items():
                if log.get(stage=stage, seed=seed, pool="B", arm=name) is not None:
                    continue
                if seed not in made:
                    made[seed] = bench.seed(TUNED_ON, seed, choices, ("B",))
                made[seed].adopt(choices)
                made[seed].unit(stage, "B", name, function)

    grid = {
        f"rate {rate:g}, {epochs:g} epochs, {start}": Choices(rate, epochs, start)
        for rate, epochs, start in product(scale.rates, scale.epochs, STARTS)
    }
    at_random = partial(Seed.chosen, pool="B", arm=RANDOM)
    choose("training", {name: (choices, at_random) for name, choices in grid.items()})
    choices = grid[best(log, "training", list(grid), seeds)]

    states = {f"facility location, {state}": replace(choices, state=state) for state in STATES}
    covering = partial(Seed.chosen, pool="B", arm="facility location")
    choose("states", {name: (choices, covering) for name, choices in states.items()})
    choices = states[best(log, "states", list(states), seeds)]

    recipes = {f"default: {recipe.gate}, {recipe.value}, {recipe.spread}": recipe for recipe in scale.recipes}
    ranking = {
        f"{arm}, {spread}": Recipe("none", arm, spread)
        for arm, spread in product(RANKING, SPREADS)
        if arm in scale.arms
    }
    choose("recipes", {name: (choices, _following(recipe)) for name, recipe in (recipes | ranking).items()})
    spreads = {
        arm: ranking[best(log, "recipes", [f"{arm}, {spread}" for spread in SPREADS], seeds)].spread
        for arm in RANKING
        if arm in scale.arms
    }
    return replace(choices, spreads=spreads, default=recipes[best(log, "recipes", list(recipes), seeds)])


def _following(recipe: Recipe) -> Callable[[Seed], list[int]]:
    return lambda seed: seed.signals("B").follow(recipe, seed.scale.chosen)


def run(bench: Bench, choices: Choices, data: str = REPORTED_ON, seeds: Sequence[int] = SEEDS) -> None:
    """Runs pool B, which gives the primary outcome, then pool A; all arms of a seed run before the next seed, so that
    an interrupted run has complete seeds."""
    for pool, seed in product(("B", "A"), seeds):
        asked = [("report", arm) for arm in bench.scale.arms]
        if pool == "B":
            asked += [("warm", ""), *(("reliability", name) for name in STOCHASTIC if name in bench.scale.arms)]
        left = [(s, arm) for s, arm in asked if bench.log.get(stage=s, seed=seed, pool=pool, arm=arm) is None]
        if not left:
            continue
        made = bench.seed(data, seed, choices, (pool,))
        for stage, arm in left:
            key = {"stage": stage, "seed": seed, "pool": pool, "arm": arm}
            if stage == "report":
                made.unit("report", pool, arm, partial(Seed.chosen, pool=pool, arm=arm))
                continue
            bench.check_time()
            if stage == "warm":
                bench.fitter.restore(made.warm)
                warm = bench.fitter.test(made.test_rows)
                bench.log.add(**key, accuracy=warm.accuracy, loss=warm.loss)
                continue
            try:
                value: dict[str, Any] = {"reliability": made.signals(pool).reliability(arm)}
            except Exception as error:  # treated like a failed arm
                bench.fitter.restore(made.warm)
                value = {"failed": harness.first_line(error)}
            bench.log.add(**key, **value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", default=None, help="folder or hub id (default: the packaged SmolLM2)")
    parser.add_argument("--data", type=Path, default=gsm8k.FOLDER / "intents", help="folder of the intent files")
    parser.add_argument("--out", type=Path, default=Path("bench-pool"), help="folder of the log (default: %(default)s)")
    parser.add_argument("--stage", choices=("all", "tune", "report", "table"), default="all")
    parser.add_argument("--choices", type=Path, default=None, help="read the choices from this file instead of tuning")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop cleanly after this time")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="seeds of the report (default: %(default)s)")
    parser.add_argument("--tuning-seeds", type=int, default=len(TUNING_SEEDS), help="default: %(default)s")
    parser.add_argument("--without", nargs="*", default=[], choices=OPTIONAL, help="arms to leave out")
    parser.add_argument("--no-graph", action="store_true", help="use plain training steps instead of a CUDA graph")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="dtype of the student's weights (default: bfloat16 on a GPU)"
    )
    parser.add_argument("--backend", default=None, help="acqcore backend (default: automatic)")
    parser.add_argument("--small", action="store_true", help="a tenth of every size, only to test that the code runs")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    log = Log(arguments.out / "pool.jsonl")
    made_choices = arguments.choices or arguments.out / "pool-choices.json"
    if arguments.stage != "table":
        bench = _bench(arguments, log, deadline)
        log.add(stage="machine", machine={**harness.machine(), "graph": bench.fitter.captured})
        try:
            if arguments.choices is None and (arguments.stage in ("all", "tune")):
                choices = tune(bench, range(TUNING_SEEDS[0], TUNING_SEEDS[0] + arguments.tuning_seeds))
                harness.write(made_choices, {"tuned_on": TUNED_ON, "choices": asdict(choices)})
            if arguments.stage in ("all", "report"):
                run(bench, Choices.read(made_choices), seeds=range(arguments.seeds))
        except Stopped:
            print(f"stopped after {arguments.seconds:g} s; the same command resumes")
    pool_report.write(log.rows, made_choices, arguments.out, small=arguments.small)


def _bench(arguments: argparse.Namespace, log: Log, deadline: float) -> Bench:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student = arguments.student or str(smollm2_path())
    scale = Scale()
    if arguments.small:
        sizes = Sizes(intents=10, warm=2, development=16, pool=120, test=40)
        scale = Scale(sizes, chosen=24, batch=8, rates=(5e-4,), epochs=(2.0,), recipes=RECIPES[:3])
    scale = replace(scale, arms=tuple(arm for arm in scale.arms if arm not in arguments.without))
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).to(arguments.device)
    begin = time.perf_counter()
    fitter = Fitter(
        model, batch=scale.batch, length=LENGTH, label_length=LABEL_LENGTH, graph=not arguments.no_graph,
        dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
    )  # fmt: skip
    print(f"student ready in {time.perf_counter() - begin:.1f} s, {'CUDA graph' if fitter.captured else 'plain steps'}")
    encode = Encoder(AutoTokenizer.from_pretrained(student))
    return Bench(fitter, encode, arguments.data, scale, log, deadline, arguments.backend)


if __name__ == "__main__":
    main()
