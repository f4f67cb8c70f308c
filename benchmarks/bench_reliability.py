"""Does a signal agree with itself? Reliability of every stochastic signal on a real model, against its cost.

``--parts`` selects any of these parts:

``real``  SmolLM2-135M on rows of five data sets (``real_rows``). A signal is scored under several seeds; its
          *test-retest* reliability is the rank correlation of two seeds' values within a data set, averaged over all
          pairs of seeds, with a bootstrap interval over rows. *Split-half* reliability is that of the same signal with
          half the draws or probes, extrapolated by the Spearman-Brown formula. Cost is time relative to scoring
          entropy alone and to a bare forward of the trunk, in the same round of turns; CPU time on one thread.
``shared``  The same values for some rows at a time, without times; all seeds, and linear forms that differ only in
          their probes, share a graph.
``flops`` The same costs, counted from the shapes of every matrix product without running anything. torch's counter
          gave 3 % less for the trunk and for one probe.
``toy``   Students whose ignorance is known (``toy_student``), with seeds not used for tuning: AUROC of unknown above
          ambiguous questions, and rank correlation with 64 draws.
``world`` Base models of the arithmetic world, with seeds not used for tuning: the rank of the traps among the skills,
          and the same correlation over all samples and within a skill.
``skewed`` The same in the world ``arithmetic-skewed``, whose traps are not uniform.

Each unit of work, such as a data set, signal and seed, becomes one line of ``<out>/units.jsonl`` when it is done. A
later run with the same ``--out`` resumes where an earlier one stopped, for example because of ``--seconds``. The part
``report`` writes tables of the available results; ``--result`` names their JSON, ``--picture`` a plot of the frontier.
Wall times are meaningful only on an idle machine; counted costs do not depend on its load.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from acqsynth.models import smollm2_path
from benchmarks import harness, real_rows, toy_student
from benchmarks.reliability_report import report
from benchmarks.reliability_signals import SIGNALS, TOY_SKIPPED, graphs
from benchmarks.reliability_students import Real, Toy, World, counted
from benchmarks.reliability_units import Store

PARTS = ("real", "shared", "flops", "toy", "world", "skewed", "report")
TOY_SEEDS = (41, 42, 43, 44, 45)  # not used for tuning
WORLD_SEEDS = (12, 13, 14, 15, 16)  # bench_signals and tuning use seeds up to 11
SHARED_ROWS = 20  # at a time


def measure_real(store: Store, real: Real, names: Sequence[str], seeds: Sequence[int]) -> None:
    """Measures every signal in turn for each seed and data set."""
    for pass_, seed, of_set, name in itertools.product(range(3), seeds, real.rows, names):
        if SIGNALS[name].pass_ == pass_:
            store.run(("real", of_set, name, seed), partial(real.unit, SIGNALS[name], of_set, seed))


def measure_shared(store: Store, real: Real, names: Sequence[str], seeds: Sequence[int], count: int) -> None:
    """Measures the first rows of every data set before the next, so that a run that times out has equally many of each.
    Short completions are scored all at once: in small batches, overhead would exceed the cost of the products."""
    together = graphs([name for name in names if SIGNALS[name].stochastic])
    for begin, of_set, (called, of_graph) in itertools.product(
        range(0, count, SHARED_ROWS), real.rows, together.items()
    ):
        rows = count if of_set in real_rows.SHORT else SHARED_ROWS
        if begin % rows == 0:
            work = partial(real.shared, of_graph, of_set, slice(begin, begin + rows), seeds)
            store.run(("shared", of_set, begin, called), work)


def measure_flops(store: Store, real: Real, names: Sequence[str]) -> None:
    for of_set, name in itertools.product(real.rows, names):
        if counted(SIGNALS[name]):
            store.run(("flops", of_set, name), partial(real.flops, SIGNALS[name], of_set))


def measure_small(store: Store, place: tuple[Any, ...], make: Callable[[], Toy | World], names: Sequence[str]) -> bool:
    """Measures every signal on a small student, made only if one is missing; False once the time is up."""
    missing = [name for name in names if (*place, name) not in store.units and name not in TOY_SKIPPED]
    if not missing:
        return True
    small = make()
    return all(store.run((*place, name), partial(small.unit, SIGNALS[name])) for name in missing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["real", "report"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32, on a GPU bfloat16")
    parser.add_argument("--student", type=Path, help="folder of the model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--rows", type=int, default=100, help="rows per data set")
    parser.add_argument("--tokens", type=int, default=40, help="scored tokens per row; 0 keeps completions whole")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens per forward; 8192 in bfloat16 take 6 GB")
    parser.add_argument("--sets", nargs="+", choices=real_rows.SETS, default=list(real_rows.SETS))
    parser.add_argument("--signals", nargs="+", choices=SIGNALS, metavar="NAME", default=list(SIGNALS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--toy-seeds", type=int, nargs="+", default=list(TOY_SEEDS))
    parser.add_argument("--world-seeds", type=int, nargs="+", default=list(WORLD_SEEDS))
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no unit after this time")
    parser.add_argument("--out", type=Path, default=Path("runs/reliability"), help="folder for the units' results")
    parser.add_argument("--result", type=Path, help="JSON file for the tables")
    parser.add_argument("--picture", type=Path, help="PNG file for the plot of cost against reliability")
    arguments = parser.parse_args()
    dtype = arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")
    settings = {
        "machine": harness.machine(), "device": arguments.device, "dtype": dtype, "rows": arguments.rows,
        "scored_tokens": arguments.tokens or "whole",
    }  # fmt: skip
    measuring = set(arguments.parts) != {"report"}
    store = Store(arguments.out, settings if measuring else {}, arguments.seconds)
    if {"real", "shared", "flops"} & set(arguments.parts):
        student = arguments.student or smollm2_path()
        real = Real(
            student, arguments.device, getattr(torch, dtype), arguments.rows, arguments.tokens or None, arguments.sets,
            arguments.batch_tokens,
        )  # fmt: skip
        if "real" in arguments.parts:
            measure_real(store, real, arguments.signals, arguments.seeds)
        if "shared" in arguments.parts:
            measure_shared(store, real, arguments.signals, arguments.seeds, arguments.rows)
        if "flops" in arguments.parts:
            measure_flops(store, real, arguments.signals)
    small: list[tuple[tuple[Any, ...], Callable[[], Toy | World]]] = []
    if "toy" in arguments.parts:
        places = itertools.product(toy_student.STEPS, arguments.toy_seeds)
        small += [(("toy", blocks, seed), partial(Toy, blocks, seed)) for blocks, seed in places]
    for kind in ("world", "skewed"):
        if kind in arguments.parts:
            small += [((kind, seed), partial(World, seed, kind == "skewed")) for seed in arguments.world_seeds]
    for place, make in small:
        if not measure_small(store, place, make, arguments.signals):
            break
    if "report" in arguments.parts:
        report(store, arguments.result, arguments.picture)


if __name__ == "__main__":
    main()
