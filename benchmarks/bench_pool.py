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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from acqsynth.models import smollm2_path
from benchmarks import pool_report, resumable
from benchmarks.pool_data import CLEAN, Message, Sizes, Task, load, task
from benchmarks.pool_fit import Fitter
from benchmarks.pool_signals import STOCHASTIC, Recipe, Signals, clean_oracle, shares
from benchmarks.resumable import LABEL_LENGTH, LENGTH, REPORTED_ON, TUNED_ON, WARM_EPOCHS, Encoder, Log

TUNING_SEEDS, SEEDS = (100, 101, 102), tuple(range(8))
CHOSEN, BATCH = 400, 32

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


@dataclass
class Bench(resumable.Bench):
    """One student on one folder of data."""

    _data: dict[str, tuple[list[Message], list[Message], list[Message]]] = field(default_factory=dict)

    def seed(self, data: str, seed: int, choices: Choices, pools: Sequence[str] = ("A", "B")) -> Seed:
        if data not in self._data:
            train, test, stray = (list(filter(self.encode.fits, rows)) for rows in load(self.folder, data))
            self._data[data] = train, test, stray
        return Seed(self, task(*self._data[data], self.scale.sizes, seed), seed, choices, pools)


class Seed:
    """Warm student, pools and test rows of one seed, and cached fits."""

    def __init__(self, bench: Bench, task: Task, seed: int, choices: Choices, pools: Sequence[str]) -> None:
        self.bench, self.task, self.number, self.choices = bench, task, seed, choices
        self.warm_rows, self.development = bench.placed(task.warm), bench.placed(task.development)
        self.test_rows = bench.placed(task.test)
        self.pools = {name: bench.placed(task.pools[name]) for name in pools}
        self.kinds = {name: [row.kind for row in task.pools[name]] for name in pools}
        self._signals: dict[str, Signals] = {}
        self._fits: dict[tuple[Any, ...], dict[str, float]] = {}
        self._start()

    def adopt(self, choices: Choices) -> None:
        """Adopts other choices: refits the warm student if its rate changes, and drops outdated signals."""
        known, self.choices = self.choices, choices
        if choices.rate != known.rate:
            self._start()
        elif choices != known:
            self._signals.clear()

    def _start(self) -> None:
        self.warm = self.bench.warmed(self.warm_rows, self.choices.rate, self.number)
        self._signals.clear()

    def signals(self, pool: str) -> Signals:
        """Signals of a pool. Restores the warm student first, since another seed may have replaced it."""
        bench, choices = self.bench, self.choices
        bench.fitter.restore(self.warm)
        if pool not in self._signals:
            messages, names = self.task.pools[pool], self.task.intents
            self._signals[pool] = Signals(
                bench.fitter, self.warm, self.pools[pool], self.development,
                torch.tensor([names.index(row.intent) for row in messages]), texts=[row.text for row in messages],
                epochs=choices.epochs, rate=choices.rate, stop=bench.encode.tokenizer.eos_token_id, seed=self.number,
                state=choices.state,
            )  # fmt: skip
        return self._signals[pool]

    def tested(self, pool: str, chosen: Sequence[int], *, development: bool = False) -> dict[str, float]:
        """Accuracy and loss after learning the chosen rows; identical sets are fitted once."""
        bench, choices = self.bench, self.choices
        key = (pool, development, choices.rate, choices.epochs, choices.start, tuple(sorted(chosen)))
        if key not in self._fits:
            bench.check_time()
            rows = self.pools[pool][torch.tensor(sorted(chosen), device=bench.fitter.device)]
            if development:
                rows = rows + self.development
            if choices.start == "anew":
                rows = rows + self.warm_rows
            self._fits[key] = bench.outcome(rows, self.test_rows, choices, self.warm, self.number)
        return self._fits[key]

    def chosen(self, pool: str, arm: str) -> list[int]:
        """Indices of the rows chosen by an arm."""
        k, kinds = self.bench.scale.chosen, self.kinds[pool]
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

    def reliability(self, pool: str, name: str) -> float:
        return self.signals(pool).reliability(name)

    def unit(self, stage: str, pool: str, arm: str, choose: Callable[[Seed], list[int]]) -> None:
        """Chooses, fits, tests and logs, unless already logged. An arm that fails is logged with its error."""
        bench = self.bench
        key = {"stage": stage, "seed": self.number, "pool": pool, "arm": arm}
        if bench.done(key):
            return
        begin = time.perf_counter()
        chosen = bench.attempt(key, self.warm, partial(choose, self))
        if chosen is None:
            return
        chose = time.perf_counter()
        outcome = self.tested(pool, chosen, development=arm == CONTROL)
        kinds = shares(self.kinds[pool], chosen)
        bench.log.add(
            **key, **outcome, junk=1 - kinds.get(CLEAN, 0.0), kinds=kinds, rows=_digest(chosen),
            choosing=round(chose - begin, 3), fitting=round(time.perf_counter() - chose, 3),
        )  # fmt: skip


def _digest(chosen: Sequence[int]) -> str:
    """A hash that identifies a set of rows."""
    return hashlib.blake2b(json.dumps(sorted(chosen)).encode(), digest_size=8).hexdigest()


def tune(bench: Bench, seeds: Sequence[int] = TUNING_SEEDS) -> Choices:
    """Makes the choices on pool B of the tuning data by accuracy alone.

    First it chooses the training (rate, epochs, start) with random rows, then the states with facility location, then
    the spreads and the recipe of ``default``.
    """
    scale, log = bench.scale, bench.log
    made: dict[int, Seed] = {}

    def run_all(stage: str, variants: dict[str, tuple[Choices, Callable[[Seed], list[int]]]]) -> None:
        for seed, (name, (choices, function)) in product(seeds, variants.items()):
            if log.get(stage=stage, seed=seed, pool="B", arm=name) is None:
                if seed not in made:
                    made[seed] = bench.seed(TUNED_ON, seed, choices, ("B",))
                made[seed].adopt(choices)
                made[seed].unit(stage, "B", name, function)

    def best(stage: str, names: Sequence[str]) -> str:
        return log.best(stage, "B", names, seeds)

    grid = {
        f"rate {rate:g}, {epochs:g} epochs, {start}": Choices(rate, epochs, start)
        for rate, epochs, start in product(scale.rates, scale.epochs, STARTS)
    }
    at_random = partial(Seed.chosen, pool="B", arm=RANDOM)
    run_all("training", {name: (choices, at_random) for name, choices in grid.items()})
    choices = grid[best("training", list(grid))]

    states = {f"facility location, {state}": replace(choices, state=state) for state in STATES}
    covering = partial(Seed.chosen, pool="B", arm="facility location")
    run_all("states", {name: (choices, covering) for name, choices in states.items()})
    choices = states[best("states", list(states))]

    recipes = {f"default: {recipe.gate}, {recipe.value}, {recipe.spread}": recipe for recipe in scale.recipes}
    ranking = {
        f"{arm}, {spread}": Recipe("none", arm, spread)
        for arm, spread in product(RANKING, SPREADS)
        if arm in scale.arms
    }
    run_all(
        "recipes", {name: (choices, partial(_following, recipe=recipe)) for name, recipe in (recipes | ranking).items()}
    )
    spreads = {
        arm: ranking[best("recipes", [f"{arm}, {spread}" for spread in SPREADS])].spread
        for arm in RANKING
        if arm in scale.arms
    }
    return replace(choices, spreads=spreads, default=recipes[best("recipes", list(recipes))])


def _following(seed: Seed, recipe: Recipe) -> list[int]:
    return seed.signals("B").follow(recipe, seed.bench.scale.chosen)


def run(bench: Bench, choices: Choices, data: str = REPORTED_ON, seeds: Sequence[int] = SEEDS) -> None:
    """Runs pool B, which gives the primary outcome, then pool A; all arms of a seed run before the next seed, so that
    an interrupted run has complete seeds."""
    for pool, seed in product(("B", "A"), seeds):
        asked = [("report", arm) for arm in bench.scale.arms]
        if pool == "B":
            asked += [("warm", ""), *(("reliability", name) for name in STOCHASTIC if name in bench.scale.arms)]
        keys = [{"stage": stage, "seed": seed, "pool": pool, "arm": arm} for stage, arm in asked]
        left = [key for key in keys if bench.log.get(**key) is None]
        if not left:
            continue
        made = bench.seed(data, seed, choices, (pool,))
        for key in left:
            stage, arm = str(key["stage"]), str(key["arm"])
            bench.check_time()
            if stage == "report":
                made.unit(stage, pool, arm, partial(Seed.chosen, pool=pool, arm=arm))
            elif stage == "warm":
                bench.fitter.restore(made.warm)
                bench.log.add(**key, **bench.tested(made.test_rows))
            else:
                value = bench.attempt(key, made.warm, partial(made.reliability, pool, arm))
                if value is not None:
                    bench.log.add(**key, reliability=value)


def main() -> None:
    parser = resumable.options(__doc__, "pool", len(SEEDS))
    parser.add_argument("--tuning-seeds", type=int, default=len(TUNING_SEEDS), help="default: %(default)s")
    parser.add_argument("--without", nargs="*", default=[], choices=OPTIONAL, help="arms to leave out")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="dtype of the student's weights (default: bfloat16 on a GPU)"
    )
    arguments = parser.parse_args()
    log = Log(arguments.out / "pool.jsonl")
    choices = arguments.out / "pool-choices.json"
    if arguments.stage != "table":
        bench = _bench(arguments, log)
        tuning = range(TUNING_SEEDS[0], TUNING_SEEDS[0] + arguments.tuning_seeds)
        resumable.run_stages(
            arguments, choices, bench, lambda: tune(bench, tuning),
            lambda: run(bench, Choices.read(choices), seeds=range(arguments.seeds)),
        )  # fmt: skip
    pool_report.write(log.rows, choices, arguments.out, small=arguments.small)


def _bench(arguments: argparse.Namespace, log: Log) -> Bench:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    deadline = time.monotonic() + arguments.seconds
    student = arguments.student or str(smollm2_path())
    scale = Scale()
    if arguments.small:
        sizes = Sizes(intents=10, warm=2, development=16, pool=120, test=40)
        scale = Scale(sizes, chosen=24, batch=8, rates=(5e-4,), epochs=(2.0,), recipes=RECIPES[:3])
    scale = replace(scale, arms=tuple(arm for arm in scale.arms if arm not in arguments.without))
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).to(arguments.device)
    fitter = Fitter(
        model, batch=scale.batch, length=LENGTH, label_length=LABEL_LENGTH,
        dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
    )  # fmt: skip
    encode = Encoder(AutoTokenizer.from_pretrained(student), LENGTH, LABEL_LENGTH)
    return Bench(fitter, encode, arguments.data, scale, log, deadline)


if __name__ == "__main__":
    main()
