"""Does a signal agree with itself? Reliability of every stochastic signal on a real model, against what it costs.

Four parts, each a subset of ``--parts``:

``real``  SmolLM2-135M on rows of five data sets (``real_rows``). A signal is scored under several seeds; its
          *test-retest* reliability is the rank correlation of two seeds' values within a data set, the mean over all
          pairs of seeds, with a bootstrap interval over rows. *Split-half* is that of the same signal with half the
          draws or probes, stepped up to the whole by Spearman and Brown. Cost is wall time over that of scoring entropy
          alone and over a bare forward of the trunk, in the same round of turns.
``flops`` The same costs counted: multiply-adds of every matrix product, by torch's counter.
``toy``   Students whose ignorance is known (``toy_student``), of seeds that nobody tuned on: AUROC of what they do not
          know above what is ambiguous, and rank correlation with 64 draws.
``world`` Base models of the arithmetic world, likewise: where the traps rank among the skills, and the same correlation
          over all samples and within a skill.

Each unit of work (data set, signal, seed) is one line of ``<out>/units.jsonl``, written when it is done. A later run
with the same ``--out`` goes on where it stopped, which ``--seconds`` makes it do by itself; ``--parts report`` writes
the tables of what there is. Times are of a machine with nothing else to do only if it had nothing else to do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch.utils.flop_counter import FlopCounterMode

import acqcore
from acqsynth.models import smollm2_path
from benchmarks import harness, real_rows, toy_student
from benchmarks.calibration import calibrate_dropout

TRUNK, ENTROPY = "trunk", "entropy"
MI = "mutual_information"
EPIG = "epig"
BOOTSTRAP = 1000  # resamples of the rows
LEVEL = 0.95
REFERENCE_ROWS = 16  # of influence and of expected predictive information gain
COUNTED_ROWS = 2  # whose products are counted
RISE = 0.02  #: share of the loss that draws at the calibrated rate add
TOY_SEEDS = (41, 42, 43, 44, 45)  # nobody tuned on them
TOY_STEPS = {3: 400, 6: 800}  # blocks -> training steps that bring a student to know the table
WORLD_SEEDS = (12, 13, 14, 15, 16)  # those of bench_signals and of tuning end at 11
WORLD_QUESTIONS = 32  # of each skill
TOY_QUESTIONS = 256  # of each kind


@dataclass(frozen=True, eq=False)
class Signal:
    """What is measured.

    Attributes:
        family: colours the picture.
        acquisition: name in acqcore.
        options: of it; the value ``"calibrated"`` of ``dropout`` stands for the student's own rate, and ``reference``
            names the kind of reference set.
        half: the signal with half the draws or probes.
        pass_: signals of a pass wait until those of the one before have all seeds; products are counted for pass 0.
        stochastic: values depend on the seed.
    """

    family: str
    acquisition: str
    options: Mapping[str, Any] = field(default_factory=dict)
    half: str | None = None
    pass_: int = 0
    stochastic: bool = True


def _draws(half: str | None = None, pass_: int = 0, acquisition: str = MI, **options: Any) -> Signal:
    return Signal("draws", acquisition, options, half, pass_)


def _linear(probes: int, posterior: str = "dropout", half: str | None = None, **options: Any) -> Signal:
    asked = {"form": "linear", "posterior": posterior, "probes": probes, **options}
    return Signal("linear" if posterior == "dropout" else "weights", MI, asked, half)


def _family(name: str, most: int, **options: Any) -> dict[str, Signal]:
    """1, 2, 4 ... ``most`` probes, each with half of its probes as its half."""
    counts = [2**i for i in range(most.bit_length())]
    named = {count: f"{name}, {count} probe{'s' * (count > 1)}" for count in counts}
    return {named[count]: _linear(count, half=named.get(count // 2), **options) for count in counts}


ALL_BLOCKS: dict[str, Any] = {"layers": "all", "dropout": 0.05}

#: Name -> signal. The name says all that is not a default of the form.
SIGNALS: dict[str, Signal] = {
    TRUNK: Signal("cost", "", stochastic=False),
    ENTROPY: Signal("cost", ENTROPY, stochastic=False),
    "draws, all blocks, 8, p=0.05": _draws("draws, all blocks, 4, p=0.05", draws=8, **ALL_BLOCKS),
    "draws, all blocks, 4, p=0.05": _draws(draws=4, **ALL_BLOCKS),
    "draws, all blocks, 8, p=0.01": _draws(draws=8, layers="all", dropout=0.01),
    "draws, all blocks, 8, calibrated p": _draws(draws=8, layers="all", dropout="calibrated"),
    **_family("linear, all blocks", 16),
    **_family("linear, completions", 16, positions="completion"),
    "linear, last 8 blocks, 4 probes": _linear(4, layers=8),
    "linear, last 4 blocks, 4 probes": _linear(4, layers=4),
    "linear, last hidden state, 4 probes": _linear(4, layers=0),
    **_family("isotropic weights, all blocks", 8, posterior="isotropic"),
    "isotropic weights, last 8 blocks, 4 probes": _linear(4, "isotropic", layers=8),
    "draws, last 4 blocks, 8, p=0.05": _draws(draws=8, layers=4, dropout=0.05),
    "draws, last hidden state, 8, p=0.1": _draws(draws=8, layers=0, dropout=0.1),
    "draws, last hidden state, 8, p=0.1, blocks of 64": _draws(draws=8, layers=0, dropout=0.1, form="block"),
    "expected entropy, all blocks, 8, p=0.05": _draws(pass_=1, acquisition="expected_entropy", draws=8, **ALL_BLOCKS),
    "predictive entropy, all blocks, 8, p=0.05": _draws(
        pass_=1, acquisition="predictive_entropy", draws=8, **ALL_BLOCKS
    ),
    "variation ratio, all blocks, 8, p=0.05": _draws(pass_=1, acquisition="variation_ratio", draws=8, **ALL_BLOCKS),
    "bald_quadratic, all blocks, 8, p=0.05": _draws(pass_=1, acquisition="bald_quadratic", draws=8, **ALL_BLOCKS),
    "influence, head": Signal("influence", "influence", {"reference": "head"}),
    "influence, all parameters": Signal("influence", "influence", {"reference": "all"}),
    "epig, 2 probes": Signal("epig", EPIG, {"reference": EPIG, "probes": 2}),
    "epig, 4 probes": Signal("epig", EPIG, {"reference": EPIG, "probes": 4}, half="epig, 2 probes"),
    "gradient_diversity, head": Signal("influence", "gradient_diversity", {"parameters": "head"}),
    "draws, all blocks, 64, calibrated p": _draws(pass_=2, draws=64, layers="all", dropout="calibrated"),
    "draws, all blocks, 64, p=0.05": _draws(pass_=2, draws=64, **ALL_BLOCKS),
}

#: Signals that stand for the value without noise, where they agree with themselves.
MANY_DRAWS = ("draws, all blocks, 64, calibrated p", "draws, all blocks, 64, p=0.05")
#: Of the toy students: those of real rows that mean something with a vocabulary of 200 tokens and 3 or 6 blocks.
TOY_SKIPPED = (
    TRUNK, "epig, 2 probes", "epig, 4 probes", "influence, head", "influence, all parameters",
    "gradient_diversity, head", "draws, last 4 blocks, 8, p=0.05", "linear, last 8 blocks, 4 probes",
    "linear, last 4 blocks, 4 probes", "isotropic weights, last 8 blocks, 4 probes",
)  # fmt: skip


class Store:
    """The finished units of a run; the first line holds its settings.

    Args:
        settings: of this run; empty to read a finished one, of whatever machine.
        seconds: no unit begins after so many.

    Raises:
        SystemExit: the folder holds a run of other settings (names them).
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], seconds: float = math.inf) -> None:
        self.path = folder / "units.jsonl"
        self._until = time.monotonic() + seconds
        wanted = json.loads(json.dumps(settings))
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        if not lines:
            harness.append(self.path, **wanted)
            lines = [json.dumps(wanted)]
        self.settings, *units = map(json.loads, lines)
        for key in wanted:
            if self.settings[key] != wanted[key]:
                raise SystemExit(
                    f"{folder}: holds a run with {key} {self.settings[key]!r}, here it is {wanted[key]!r}; "
                    "repeat that run's options, or name another folder (--out)"
                )
        done = [unit for unit in units if "failed" not in unit]
        self.units: dict[tuple[Any, ...], dict[str, Any]] = {tuple(unit.pop("key")): unit for unit in done}

    def run(self, key: tuple[Any, ...], work: Callable[[], dict[str, Any]]) -> bool:
        """Does a unit that is not done yet; False once the time is up."""
        if key in self.units:
            return True
        if time.monotonic() > self._until:
            return False
        begin = time.perf_counter()
        try:
            unit = work()
        except Exception as error:  # the other units are still measured, and a later run tries this one again
            unit = {"failed": harness.first_line(error)}
        harness.append(self.path, key=key, **unit)
        self.units[key] = unit
        outcome = unit.get("failed", f"{time.perf_counter() - begin:.2f} s")
        print(f"{', '.join(map(str, key))}: {outcome}", flush=True)
        return True

    def found(self, kind: str) -> dict[tuple[Any, ...], dict[str, Any]]:
        """Units of a kind that succeeded, by the rest of their key."""
        return {key[1:]: unit for key, unit in self.units.items() if key[0] == kind and "failed" not in unit}


# --- real rows --------------------------------------------------------------------------------------------------------


class Real:
    """SmolLM2 and the rows of each data set.

    Args:
        student: folder of the model.
        rows: of each data set.
        scored: tokens of a completion; None keeps it whole.
    """

    def __init__(
        self, student: Path, device: str, dtype: torch.dtype, rows: int, scored: int | None, sets: Sequence[str]
    ):
        self.student = acqcore.Student.load(student, dtype=dtype, device=device)
        self.device = device
        self.batch_tokens = 32768 if device == "cuda" else 8192
        self.rows = {name: real_rows.encode(self.student, real_rows.load(name, rows), scored) for name in sets}
        asked = real_rows.load("GSM8K", REFERENCE_ROWS, seed=1)
        self.reference = real_rows.encode(self.student, asked, scored)
        self._made: dict[Any, Any] = {}

    def score(self, signal: Signal, rows: Sequence[acqcore.Row], seed: int, backend: str | None = None) -> Any:
        """Values and standard errors ``[n]``, the latter None where there are none; None of the bare trunk."""
        if not signal.acquisition:
            return self._trunk(rows)
        options = self.resolved(signal, seed)
        passes: dict[str, Any] = {"batch_tokens": self.batch_tokens, "backend": backend}
        if signal.acquisition == EPIG:
            return acqcore.epig(self.student, rows, **options, **passes), None
        arguments = {signal.acquisition: options} if options else None
        scores = acqcore.score(
            self.student, rows, signal.acquisition, acquisition_args=arguments, progress=False, **passes
        )
        return scores[signal.acquisition], scores.stderr.get(signal.acquisition)

    def resolved(self, signal: Signal, seed: int) -> dict[str, Any]:
        """The arguments of a signal under a seed, placeholders filled in."""
        options = dict(signal.options)
        if options.get("dropout") == "calibrated":
            options["dropout"] = self.rate
        if "reference" in options:
            options["reference"] = self._reference(options["reference"], seed)
        elif signal.stochastic:
            options["seed"] = seed
        return options

    @property
    def rate(self) -> float:
        """The dropout that raises the loss of the reference rows by ``RISE``."""
        if "rate" not in self._made:
            self._made["rate"] = calibrate_dropout(
                self.student, self.reference, rise=RISE, batch_tokens=self.batch_tokens
            )
        return float(self._made["rate"])

    def prepare(self, signal: Signal, seed: int) -> None:
        """Makes what many calls share, so that no time counts it; and warms the signal's kernels up."""
        self.resolved(signal, seed)
        if signal not in self._made:
            self._made[signal] = True
            self.score(signal, self.rows[next(iter(self.rows))][:2], seed)

    def seconds(self, signal: Signal, name: str, seed: int) -> tuple[float, Any]:
        self.prepare(signal, seed)
        self._settle()
        begin = time.perf_counter()
        found = self.score(signal, self.rows[name], seed)
        self._settle()
        return time.perf_counter() - begin, found

    def unit(self, signal: Signal, name: str, seed: int) -> dict[str, Any]:
        """Values, their standard errors where the estimator gives them, and seconds."""
        seconds, found = self.seconds(signal, name, seed)
        if found is None:
            return {"seconds": seconds}
        values, errors = found
        unit: dict[str, Any] = {"seconds": seconds, "values": _rounded(values)}
        return unit if errors is None else {**unit, "stderr": _rounded(errors)}

    def flops(self, signal: Signal, name: str) -> dict[str, Any]:
        """Floating-point operations of all matrix products for the first rows."""
        rows = self.rows[name][:COUNTED_ROWS]
        self.resolved(signal, 0)
        # The counter sees torch's products and acqcore's operators; gradients of the head are in torch on eager alone.
        backend = "eager" if signal.family == "influence" else "cpu"
        counter = FlopCounterMode(display=False, custom_mapping=HEAD_OPERATIONS)
        with counter:
            self.score(signal, rows, 0, backend)
        # The cotangents' kernel is out of sight: logits, their mean row of the weights, a product for each probe.
        unseen = 2 + signal.options["probes"] if "probes" in signal.options else 0
        scored = sum(row.n_scored for row in rows)
        return {"flops": counter.get_total_flops() + unseen * _product(scored, self.student.head.weight.shape)}

    def _trunk(self, rows: Sequence[acqcore.Row]) -> None:
        """The forwards that ``score`` makes, alone."""
        from acqcore.students.packing import OVERHEAD_TOKENS, collate, partition

        lengths = [len(row.ids) for row in rows]
        overhead = OVERHEAD_TOKENS.get(self.student.device.type, OVERHEAD_TOKENS["cuda"])
        with self.student.scoring():
            for picked in partition(lengths, self.batch_tokens, overhead):
                self.student.hidden(collate([rows[i] for i in picked])[0].to(self.student.device))

    def _reference(self, kind: Any, seed: int) -> Any:
        if (kind, seed) not in self._made:
            given: dict[str, Any] = {"seed": seed, "batch_tokens": self.batch_tokens}
            if kind == EPIG:
                made: Any = acqcore.epig_reference(self.student, self.reference, **given)
            else:
                made = acqcore.influence_reference(self.student, self.reference, parameters=kind, **given)
            self._made[kind, seed] = made
        return self._made[kind, seed]

    def _settle(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _product(rows: int, weight: torch.Size) -> int:
    return 2 * rows * weight[0] * weight[1]


def _row_stats_flops(hidden: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return _product(hidden[0], weight)


def _mixture_flops(hidden: torch.Size, weights: Sequence[torch.Size], *rest: Any, **__: Any) -> int:
    """Under dropout on hidden states ``[N, D]``, K products, or one where masks drop blocks; else of ``[K, N, D]``."""
    if len(hidden) == 3:
        return _product(hidden[0] * hidden[1], weights[0])
    draws, form = rest[6], rest[9]
    return _product(hidden[0], weights[0]) * (draws if form == "element" else 1)


#: The products inside acqcore's operators, which torch's counter does not see.
HEAD_OPERATIONS = {
    torch.ops.acqcore.row_stats: _row_stats_flops,
    torch.ops.acqcore.mixture_stats: _mixture_flops,
}


def _rounded(values: torch.Tensor) -> list[float]:
    """Seven digits, which float32 has, as JSON."""
    return [float(f"{value:.7g}") for value in values.tolist()]


# --- students whose ignorance is known --------------------------------------------------------------------------------


class Toy:
    """A student of ``blocks`` blocks, and questions of each kind."""

    def __init__(self, blocks: int, seed: int) -> None:
        self.student = acqcore.Student.from_model(toy_student.train(seed, blocks, TOY_STEPS[blocks]))
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.cat([toy_student.questions(kind, TOY_QUESTIONS, generator) for kind in toy_student.KINDS])
        # Of unseen keys the student is wrong and sure, so dropout lowers their loss.
        learnt = self.ids[: 2 * TOY_QUESTIONS]
        self.rate = calibrate_dropout(self.student, toy_student.samples(learnt), rise=RISE)

    def unit(self, signal: Signal) -> dict[str, Any]:
        """AUROC of unseen questions above the ambiguous and above all others, values, seconds."""
        options = dict(signal.options) | ({"seed": 0} if signal.stochastic else {})
        if options.get("dropout") == "calibrated":
            options["dropout"] = self.rate
        asked = {signal.acquisition: options} if options else None
        begin = time.perf_counter()
        scores = acqcore.score(
            self.student, toy_student.samples(self.ids), signal.acquisition, acquisition_args=asked, progress=False
        )
        seconds = time.perf_counter() - begin
        values = scores[signal.acquisition]
        easy, ambiguous, unseen = values.split(TOY_QUESTIONS)
        return {
            "ambiguous": toy_student.auroc(unseen, ambiguous),
            "both": toy_student.auroc(unseen, torch.cat([easy, ambiguous])),
            "rate": self.rate,
            "seconds": seconds,
            "values": _rounded(values),
        }


# --- the arithmetic world ---------------------------------------------------------------------------------------------


class World:
    """The base model of a seed, and questions of every skill."""

    def __init__(self, seed: int) -> None:
        # Here, as a machine that measures real rows alone need not have what the loop requires.
        from acqsynth.world import Settings, base_model
        from benchmarks.bench_signals import DOMAIN, SKILLS, messages

        self.student = acqcore.Student.load(base_model(Settings(seed=seed)))
        skills = [DOMAIN.rows(WORLD_QUESTIONS, seed, skills=[name]) for name in SKILLS]
        self.rows = [row for rows in skills for row in messages(rows)]
        self.rate = calibrate_dropout(self.student, self.rows[::8], rise=RISE)

    def unit(self, signal: Signal) -> dict[str, Any]:
        """Values of the skills one after another, seconds."""
        options = dict(signal.options) | ({"seed": 0} if signal.stochastic else {})
        if options.get("dropout") == "calibrated":
            options["dropout"] = self.rate
        asked = {signal.acquisition: options} if options else None
        begin = time.perf_counter()
        # The sum, as the recipe has it: what a row tells is the sum of what its tokens tell.
        scores = acqcore.score(
            self.student, self.rows, signal.acquisition, acquisition_args=asked, reduction="sum", progress=False
        )
        seconds = time.perf_counter() - begin
        return {"rate": self.rate, "seconds": seconds, "values": _rounded(scores[signal.acquisition])}


# --- what the units come to -------------------------------------------------------------------------------------------


def spearman(
    values: np.ndarray,  # [s, ..., n], of s seeds
) -> np.ndarray:  # [...]
    """Rank correlation of two seeds' values, the mean over all pairs of seeds; ties share their mean rank."""
    ranks = rankdata(values, axis=-1)
    ranks = ranks - ranks.mean(axis=-1, keepdims=True)
    norm = np.sqrt((ranks**2).sum(axis=-1))
    pairs = itertools.combinations(range(len(values)), 2)
    with np.errstate(invalid="ignore"):  # values that are all alike have no correlation
        found = [(ranks[a] * ranks[b]).sum(axis=-1) / (norm[a] * norm[b]) for a, b in pairs]
    return np.mean(found, axis=0)


def interval(
    values: np.ndarray,  # [s, n]
) -> list[float]:
    """Bounds of the central ``LEVEL`` of :func:`spearman` over resamples of the n rows."""
    picked = np.random.default_rng(0).integers(0, values.shape[1], (BOOTSTRAP, values.shape[1]))
    found = spearman(values[:, picked])
    return [round(float(bound), 3) for bound in np.nanquantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]


def stepped_up(half: float) -> float:
    """Reliability of a test from that of its halves. Source: Spearman 1910; Brown 1910."""
    return 2 * half / (1 + half)


def summary(store: Store) -> list[dict[str, Any]]:
    """A line for each signal: reliability and cost by data set, separation in the toy students."""
    real, flops, toy = store.found("real"), store.found("flops"), store.found("toy")
    sets = [name for name in real_rows.SETS if any(key[0] == name for key in real)]
    table = []
    for name, signal in SIGNALS.items():
        row: dict[str, Any] = {"signal": name, "family": signal.family, "sets": {}}
        for of_set in sets:
            units = {seed: real[key] for key in real if key[:2] == (of_set, name) for seed in [key[2]]}
            if units:
                row["sets"][of_set] = _of_set(of_set, name, signal, units, real, flops)
        row["toy"] = _of_toys(name, toy)
        row["world"] = _of_worlds(name, store.found("world"))
        table.append(row)
    return [row for row in table if row["sets"] or row["toy"] or row["world"]]


def _of_set(
    of_set: str,
    name: str,
    signal: Signal,
    units: Mapping[int, Mapping[str, Any]],
    real: Mapping[tuple[Any, ...], Mapping[str, Any]],
    flops: Mapping[tuple[Any, ...], Mapping[str, Any]],
) -> dict[str, Any]:
    cell: dict[str, Any] = {
        "seeds": len(units),
        "seconds": round(statistics.median(u["seconds"] for u in units.values()), 4),
    }
    for column, unit in (("entropy", ENTROPY), ("trunks", TRUNK)):
        ratios = [
            u["seconds"] / real[of_set, unit, s]["seconds"] for s, u in units.items() if (of_set, unit, s) in real
        ]
        if ratios:
            cell[column] = round(statistics.median(ratios), 2)
        if (of_set, name) in flops and (of_set, unit) in flops:
            cell[f"{column}_counted"] = round(flops[of_set, name]["flops"] / flops[of_set, unit]["flops"], 2)
    if signal.stochastic and len(units) > 1:
        values = _values(real, of_set, name)
        cell["test_retest"], cell["interval"] = _or_none(spearman(values)), interval(values)
        if signal.half is not None:
            halves = _values(real, of_set, signal.half)
            if len(halves) > 1:
                cell["split_half"] = _or_none(stepped_up(float(spearman(halves))))
        if all("stderr" in unit for unit in units.values()):
            errors = np.array([unit["stderr"] for unit in units.values()])
            if np.isfinite(errors).any():  # one probe has no standard error
                kept = 1 - np.nanmean(errors**2, axis=1) / np.nanvar(values, axis=1, ddof=1)
                cell["from_stderr"] = round(float(np.clip(kept, 0, 1).mean()), 3)
    for many in MANY_DRAWS:
        truth = _values(real, of_set, many)
        if many != name and len(truth) > 1 and len(units) > 0 and "values" in next(iter(units.values())):
            of_signal = _values(real, of_set, name).mean(axis=0)
            cell[f"to {many}"] = _or_none(spearman(np.stack([of_signal, truth.mean(axis=0)])))
    return cell


def _values(units: Mapping[tuple[Any, ...], Mapping[str, Any]], of_set: str, name: str) -> np.ndarray:
    """``[s, n]``, of each seed in turn."""
    found = [units[key]["values"] for key in sorted(units) if key[:2] == (of_set, name) and "values" in units[key]]
    return np.array(found, dtype=np.float64)


def _or_none(value: Any) -> float | None:
    return round(float(value), 3) if math.isfinite(value) else None


def _of_toys(name: str, toy: Mapping[tuple[Any, ...], Mapping[str, Any]]) -> dict[str, Any]:
    found = {}
    for blocks in TOY_STEPS:
        units = {key[1]: unit for key, unit in toy.items() if key[0] == blocks and key[2] == name}
        if not units:
            continue
        cell: dict[str, Any] = {"seeds": len(units)}
        for kind in ("ambiguous", "both"):
            values = [unit[kind] for unit in units.values()]
            cell[kind], cell[f"{kind}_least"] = round(statistics.fmean(values), 3), round(min(values), 3)
        cell["entropy"] = round(
            statistics.median(u["seconds"] / toy[blocks, s, ENTROPY]["seconds"] for s, u in units.items()), 2
        )
        for many in MANY_DRAWS:
            pairs = [
                (u["values"], toy[blocks, s, many]["values"]) for s, u in units.items() if (blocks, s, many) in toy
            ]
            if pairs and many != name:
                cell[f"to {many}"] = round(statistics.fmean(float(spearman(np.array(pair))) for pair in pairs), 3)
        found[str(blocks)] = cell
    return found


def _of_worlds(name: str, worlds: Mapping[tuple[Any, ...], Mapping[str, Any]]) -> dict[str, Any]:
    """Over seeds: the skill with the largest mean, the best rank of a trap, agreement with many draws."""
    units = {key[0]: unit for key, unit in worlds.items() if key[1] == name}
    if not units:
        return {}
    from benchmarks.bench_signals import SKILLS, TRAPS

    tops, ranks = [], []
    for unit in units.values():
        means = dict(zip(SKILLS, np.array(unit["values"]).reshape(len(SKILLS), -1).mean(axis=1), strict=True))
        order = sorted(means, key=means.__getitem__, reverse=True)
        tops.append(order[0])
        ranks.append(1 + min(order.index(trap) for trap in TRAPS))
    found: dict[str, Any] = {"seeds": sorted(units), "tops": tops, "best_trap": ranks}
    found["entropy"] = round(
        statistics.median(u["seconds"] / worlds[s, ENTROPY]["seconds"] for s, u in units.items()), 2
    )
    for many in MANY_DRAWS:
        pairs = [
            np.array([unit["values"], worlds[seed, many]["values"]])
            for seed, unit in units.items()
            if (seed, many) in worlds and many != name
        ]
        if pairs:
            found[f"to {many}"] = round(statistics.fmean(float(spearman(pair)) for pair in pairs), 3)
            within = [spearman(pair.reshape(2, len(SKILLS), -1)) for pair in pairs]
            found[f"within skills to {many}"] = _or_none(np.nanmean(within))
    return found


# --- report -----------------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Two tables: real rows, toy students."""
    sets = list(dict.fromkeys(name for row in rows for name in row["sets"]))
    lines: list[str] = []
    if sets:
        lines += [
            f"| signal | {' | '.join(sets)} | cost, entropy = 1 | counted | trunks |",
            "|---" * (len(sets) + 4) + "|",
        ]
        for row in rows:
            cells = [_reliability(row["sets"].get(name)) for name in sets]
            cells += [_median(row, column) for column in ("entropy", "entropy_counted", "trunks")]
            lines.append(f"| {row['signal']} | {' | '.join(cells)} |")
        lines.append("")
    worlds = [row for row in rows if row["world"]]
    if worlds:
        agreement = "as 64 draws: all samples | within a skill"
        lines += [
            f"| signal | skill on top | best rank of a trap | {agreement} | cost |",
            "|---" * 6 + "|",
        ]
        for row in worlds:
            cell = row["world"]
            agreements = [cell.get(f"{what}to {MANY_DRAWS[0]}") for what in ("", "within skills ")]
            cells = [", ".join(cell["tops"]), ", ".join(map(str, cell["best_trap"]))]
            cells += ["" if value is None else f"{value:.2f}" for value in agreements]
            lines.append(f"| {row['signal']} | {' | '.join(cells)} | {cell['entropy']:.1f} |")
        lines.append("")
    depths = list(dict.fromkeys(depth for row in rows for depth in row["toy"]))
    if depths:
        heads = [f"{depth} blocks: above ambiguous | above both | {'as 64 draws'} | cost" for depth in depths]
        lines += [f"| signal | {' | '.join(heads)} |", "|---" * (4 * len(depths) + 1) + "|"]
        for row in rows:
            if row["toy"]:
                lines.append(f"| {row['signal']} | {' | '.join(_toy(row['toy'].get(depth)) for depth in depths)} |")
    return "\n".join(lines)


def _reliability(cell: Mapping[str, Any] | None) -> str:
    if not cell or cell.get("test_retest") is None:
        return ""
    low, high = cell["interval"]
    return f"{cell['test_retest']:.2f} ({low:.2f} to {high:.2f})"


def _median(row: Mapping[str, Any], column: str) -> str:
    """Over the data sets."""
    values = [cell[column] for cell in row["sets"].values() if column in cell]
    return f"{statistics.median(values):.1f}" if values else ""


def _toy(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return " | | | "
    agreement = cell.get(f"to {MANY_DRAWS[0]}")
    texts = [f"{cell[kind]:.3f} ({cell[f'{kind}_least']:.3f})" for kind in ("ambiguous", "both")]
    return " | ".join([*texts, "" if agreement is None else f"{agreement:.2f}", f"{cell['entropy']:.1f}"])


def picture(rows: Sequence[Mapping[str, Any]], path: Path, machine: str) -> None:
    """Cost against reliability, a panel each for data sets with long and with short completions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "GSM8K, PubMedQA, MBPP (mean)": [name for name in real_rows.SETS if name not in real_rows.SHORT],
        "BANKING77, CLINC150 (mean)": list(real_rows.SHORT),
    }
    colours = {"draws": "#8c9bb0", "linear": "#c44e52", "weights": "#55a868", "epig": "#8172b3", "influence": "#ccb974"}
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5.5), sharey=True)
    for axis, (title, sets) in zip(axes, panels.items(), strict=True):
        for row in rows:
            cells = [row["sets"][name] for name in sets if row["sets"].get(name, {}).get("test_retest") is not None]
            if not cells or "trunks" not in cells[0]:
                continue
            x = statistics.fmean(cell["trunks"] for cell in cells)
            y = statistics.fmean(cell["test_retest"] for cell in cells)
            axis.scatter(x, y, color=colours[row["family"]], s=28)
            axis.annotate(row["signal"], (x, y), xytext=(4, 3), textcoords="offset points", fontsize=6)
        axis.set_xscale("log")
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel(f"cost in forwards of the trunk ({machine})", fontsize=8)
        axis.axhline(0.9 if "GSM8K" in title else 0.7, color="#bbbbbb", linewidth=0.8, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test-retest rank correlation within a data set", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def report(store: Store, result: Path | None, image: Path | None) -> None:
    """Prints the tables; writes JSON and picture where a path is given."""
    rows = summary(store)
    print(markdown(rows))
    if result is not None:
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps({**store.settings, "signals": rows}, indent=1) + "\n")
    if image is not None:
        machine = store.settings["machine"]
        picture(rows, image, machine.get("gpu", machine["cpu"]))


# --- the run ----------------------------------------------------------------------------------------------------------


def measure_real(store: Store, real: Real, names: Sequence[str], seeds: Sequence[int]) -> bool:
    """Rounds of a seed and a data set in which every signal takes its turn; False if the time was up."""
    for pass_, seed, of_set in itertools.product(range(3), seeds, real.rows):
        for name in names:
            signal = SIGNALS[name]
            key = ("real", of_set, name, seed)
            if signal.pass_ == pass_ and not store.run(key, partial(real.unit, signal, of_set, seed)):
                return False
    return True


def measure_flops(store: Store, real: Real, names: Sequence[str]) -> bool:
    for of_set, name in itertools.product(real.rows, names):
        signal = SIGNALS[name]
        if signal.pass_ == 0 and not store.run(("flops", of_set, name), partial(real.flops, signal, of_set)):
            return False
    return True


def measure_toys(store: Store, names: Sequence[str], seeds: Sequence[int]) -> bool:
    for blocks, seed in itertools.product(TOY_STEPS, seeds):
        missing = [name for name in names if ("toy", blocks, seed, name) not in store.units and name not in TOY_SKIPPED]
        if not missing:
            continue
        toy = Toy(blocks, seed)
        for name in missing:
            if not store.run(("toy", blocks, seed, name), partial(toy.unit, SIGNALS[name])):
                return False
    return True


def measure_worlds(store: Store, names: Sequence[str], seeds: Sequence[int]) -> bool:
    for seed in seeds:
        missing = [name for name in names if ("world", seed, name) not in store.units and name not in TOY_SKIPPED]
        if not missing:
            continue
        world = World(seed)
        for name in missing:
            if not store.run(("world", seed, name), partial(world.unit, SIGNALS[name])):
                return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=("real", "flops", "toy", "world", "report"), default=["real", "report"]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="by default float32, on a GPU bfloat16")
    parser.add_argument("--student", type=Path, help="folder of the model; by default SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=int, default=100, help="of each data set")
    parser.add_argument("--tokens", type=int, default=40, help="scored tokens of a row; 0 keeps completions whole")
    parser.add_argument("--sets", nargs="+", choices=real_rows.SETS, default=list(real_rows.SETS))
    parser.add_argument("--signals", nargs="+", choices=SIGNALS, metavar="NAME", default=list(SIGNALS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--toy-seeds", type=int, nargs="+", default=list(TOY_SEEDS))
    parser.add_argument("--world-seeds", type=int, nargs="+", default=list(WORLD_SEEDS))
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no unit after so many")
    parser.add_argument("--out", type=Path, default=Path("runs/reliability"), help="folder of the units")
    parser.add_argument("--result", type=Path, help="JSON of the tables")
    parser.add_argument("--picture", type=Path, help="PNG of cost against reliability")
    arguments = parser.parse_args()
    dtype = arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")
    settings = {
        "machine": harness.machine(), "device": arguments.device, "dtype": dtype, "rows": arguments.rows,
        "scored_tokens": arguments.tokens or "whole",
    }  # fmt: skip
    measuring = set(arguments.parts) != {"report"}
    store = Store(arguments.out, settings if measuring else {}, arguments.seconds)
    if {"real", "flops"} & set(arguments.parts):
        student = arguments.student or smollm2_path()
        tokens = arguments.tokens or None
        real = Real(student, arguments.device, getattr(torch, dtype), arguments.rows, tokens, arguments.sets)
        if "real" in arguments.parts:
            measure_real(store, real, arguments.signals, arguments.seeds)
        if "flops" in arguments.parts:
            measure_flops(store, real, arguments.signals)
    if "toy" in arguments.parts:
        measure_toys(store, arguments.signals, arguments.toy_seeds)
    if "world" in arguments.parts:
        measure_worlds(store, arguments.signals, arguments.world_seeds)
    if "report" in arguments.parts:
        report(store, arguments.result, arguments.picture)


if __name__ == "__main__":
    main()
