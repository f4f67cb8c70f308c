"""Does a generator trained on acquisition rewards make better data? The arithmetic world, several seeds, arm by arm.

``python -m benchmarks.bench_loop`` runs the recipe ``arithmetic`` once per seed and reward and writes
``results/loop.json``. A seed determines the base model's weights and every row drawn; each arm fits the base student on
equally many rows, answered by computation, and the student answers test questions of all skills. Arms:

===============  =====================================================================================================
``random_real``  random rows of the world
``no_rl``        the untrained generator
``best_of_n``    rejection sampling on the default reward, with as many completions as training ``rl: default`` drew
``rl: <name>``   GRPO on a reward of that signal alone, or on the default reward; the same gates, fusion and steps.
                 ``default, draws`` and ``mutual_information, draws`` estimate mutual information by eight draws of
                 dropout in all blocks, other rewards use its linear form
===============  =====================================================================================================

Forgetting is the change on skills that make up less than half an even share of the rows that an arm learnt. Intervals
are Student's t intervals over the seeds. Seeds 0 to 6 were used to tune the recipe and the default reward, so they are
not reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acqsynth import config
from acqsynth.artefacts import read_rows, read_table
from acqsynth.domains.arithmetic import SKILLS
from acqsynth.pipeline import Arm, plan as plan_of
from acqsynth.report.metrics import IN_DISTRIBUTION, STUDENT
from acqsynth.rewards.build import DEFAULT_SIGNALS
from acqsynth.rewards.reward import DEFAULT_WEIGHTS, INFORMATION
from acqsynth.steps import Store
from acqsynth.train import read_log
from acqsynth.world import Settings, base_model
from benchmarks import harness
from benchmarks.paired import with_interval

TEST = 1400  # questions
FITS = [0, 1]  # seeds of each arm's student fits
DEFAULT = "default"
RL_DEFAULT = f"rl: {DEFAULT}"
DRAWS = {"layers": "all", "draws": 8, "dropout": 0.05}
BASELINES = ["random_real", "no_rl", "best_of_n"]
#: Rewards -> their signals with options and, if there are several, weights; None is the recipe's own.
REWARDS: dict[str, tuple[dict[str, dict[str, Any]], dict[str, float]] | None] = {
    DEFAULT: None,
    "default, draws": (DEFAULT_SIGNALS | {"mutual_information": DRAWS}, DEFAULT_WEIGHTS),
    "entropy": ({"entropy": {}}, {}),
    "grad_norm": ({"grad_norm": {}}, {}),
    "mutual_information": ({"mutual_information": INFORMATION}, {}),
    "mutual_information, draws": ({"mutual_information": DRAWS}, {}),
    "varentropy": ({"varentropy": {}}, {}),
    "confidence": ({"confidence": {}}, {}),
}
#: Rewards with linear mutual information -> the same rewards with draws.
FORMS = {DEFAULT: "default, draws", "mutual_information": "mutual_information, draws"}
WORLDS = ("arithmetic", "arithmetic-skewed")
TRAPS = ("coin", "table")  #: kinds of skills
FEW = 0.5  #: skills with less than this fraction of an even share count as hardly trained


def recipe(seed: int, output: Path, overrides: Sequence[str], reward: str, world: str = WORLDS[0]) -> config.Config:
    """The recipe of a seed: the default reward with the baselines, or another reward without them."""
    base = base_model(Settings(seed=seed, skewed=world == WORLDS[1]))
    common = {
        "generator.model": base,
        "student.model": base,
        "student.seeds": FITS,
        "data.seeds.source": f"world:{10 * seed + 1}",
        "data.held_out.source": f"world:{10 * seed + 2}",
        "data.real.source": f"world:{10 * seed + 3}",
        "data.evaluation.limit": TEST,
        "evaluation.validity.batches": 0,
        "baselines": f"[{', '.join(BASELINES)}]" if reward == DEFAULT else [],
        "seed": seed,
        "output": output / f"seed-{seed}" / reward,
    }
    own: dict[str, Any] = {}
    if (asked := REWARDS[reward]) is not None:
        signals, weights = asked
        own = {f"reward.signals.{name}": json.dumps(options) for name, options in signals.items()}
        own |= {f"reward.weights.{name}": weight for name, weight in weights.items()}
    return config.load(world, [*(f"{key}={value}" for key, value in (common | own).items()), *overrides])


def one_seed(
    seed: int, output: Path, overrides: Sequence[str], rewards: Sequence[str], world: str = WORLDS[0]
) -> dict[str, Any]:
    """Base accuracy by skill, and the results of each arm."""
    found: dict[str, Any] = {"seed": seed, "arms": {}}
    for reward in rewards:
        plan = plan_of(recipe(seed, output, overrides, reward, world))
        store = Store(Path(plan.config.output))
        with store.locked():
            for step in plan.steps:
                if step.stage != "report":
                    store.run(step)
        for name, arm in plan.arms.items():
            called = name if name in BASELINES else f"rl: {reward}"
            found["arms"][called] = measured(store, arm)
        found["base"] = by_skill([store.path(plan.base[STUDENT] / f"answers-{IN_DISTRIBUTION}.parquet")])
        print(f"seed {seed}, {reward}: done", flush=True)
    return found


def measured(store: Store, arm: Arm) -> dict[str, Any]:
    """The rows an arm learnt, the resulting accuracy, and the cost of its reward."""
    written = [unit for units in arm.rows.values() for unit in units]
    learnt = [row for unit in written for row in read_rows(store.path(unit / "samples.parquet"))]
    counts = Counter(str(row.extra["skill"]) for row in learnt)
    answers = [store.path(unit / f"answers-{IN_DISTRIBUTION}.parquet") for unit in arm.answers.values()]
    fits = [json.loads(store.path(unit / "counts.json").read_text())["rows"] for unit in arm.fits.values()]
    steps = [
        entry
        for unit in arm.trained
        for entry in read_log(store.path(unit / "model"))
        if entry.get("reward_share") is not None
    ]
    return {
        "rows": min(fits),
        "mix": {name: counts[name] / len(learnt) for name in SKILLS},
        "skills": by_skill(answers),
        "steps": len(steps),
        "step_seconds": statistics.median(entry["seconds"] for entry in steps) if steps else None,
        "reward_share": statistics.median(entry["reward_share"] for entry in steps) if steps else None,
    }


def by_skill(files: Sequence[Path]) -> dict[str, float]:
    """Skill -> share of correct answers over all files."""
    right: dict[str, list[bool]] = {name: [] for name in SKILLS}
    for file in files:
        table = read_table(file)
        for skill, verdict in zip(table["skill"], table["right"], strict=True):
            right[skill].append(verdict)
    return {name: statistics.fmean(verdicts) for name, verdicts in right.items()}


def accuracy(skills: dict[str, float], kind: str | None = None) -> float:
    """Mean over all skills, or over those of a kind."""
    return statistics.fmean(right for name, right in skills.items() if kind in (None, SKILLS[name].kind))


def forgetting(arm: dict[str, Any], base: dict[str, float]) -> float | None:
    """Mean change on the hardly trained skills; None if there are none."""
    few = [name for name, part in arm["mix"].items() if part < FEW / len(SKILLS)]
    return statistics.fmean(arm["skills"][name] - base[name] for name in few) if few else None


def share(arm: dict[str, Any], *kinds: str) -> float:
    """Share of the rows an arm learnt that are of these kinds of skills."""
    return sum(part for skill, part in arm["mix"].items() if SKILLS[skill].kind in kinds)


def interval(values: Sequence[float]) -> str:
    """Mean and half-width, in percentage points."""
    return with_interval([100 * value for value in values])


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown, one line per arm, in percentage points."""
    headings = [
        "arm", "accuracy", f"{RL_DEFAULT} minus arm", "weak skills", "hardly trained skills, change",
        "weak, traps in rows", "reward share of step",
    ]  # fmt: skip
    base = [result["base"] for result in results]
    weak = interval([accuracy(skills, "weak") for skills in base])
    rows = [["base student", interval([accuracy(skills) for skills in base]), "", weak, "", "", ""]]
    best = [accuracy(result["arms"][RL_DEFAULT]["skills"]) for result in results]
    for name in results[0]["arms"]:
        arms = [result["arms"][name] for result in results]
        own = [accuracy(arm["skills"]) for arm in arms]
        changes = [forgetting(arm, before) for arm, before in zip(arms, base, strict=True)]
        known = [change for change in changes if change is not None]
        learnt = [statistics.fmean(share(arm, *kinds) for arm in arms) for kinds in (("weak",), TRAPS)]
        shares = [arm["reward_share"] for arm in arms if arm["reward_share"] is not None]
        rows.append(
            [
                name,
                interval(own),
                "" if name == RL_DEFAULT else interval([a - b for a, b in zip(best, own, strict=True)]),
                interval([accuracy(arm["skills"], "weak") for arm in arms]),
                interval(known) if known else "",
                f"{learnt[0]:.0%}, {learnt[1]:.0%}",
                f"{statistics.median(shares):.0%}" if shares else "",
            ]
        )
    return "\n".join(harness.markdown(headings, *rows))


def forms(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: the linear form minus draws, in percentage points, and each reward's seconds per step."""
    rows = []
    for linear, draws in FORMS.items():
        pairs = [[result["arms"].get(f"rl: {name}") for name in (linear, draws)] for result in results]
        if not all(arm for pair in pairs for arm in pair):
            continue
        gains = [accuracy(a["skills"]) - accuracy(b["skills"]) for a, b in pairs]
        more = [share(a, *TRAPS) - share(b, *TRAPS) for a, b in pairs]
        seconds = [[arm["reward_share"] * arm["step_seconds"] for arm in pair] for pair in pairs]
        taken = [f"{statistics.median(column):.2f}" for column in zip(*seconds, strict=True)]
        rows.append([linear, interval(gains), interval(more), " against ".join(taken)])
    return "\n".join(harness.markdown(["reward", "accuracy", "trap rows", "reward seconds per step"], *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9, 10, 11])
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=list(REWARDS), metavar="NAME")
    parser.add_argument("--output", type=Path, default=Path("runs/loop"), help="artifacts; an interrupted run resumes")
    parser.add_argument("--results", type=Path, default=harness.RESULTS / "loop.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides, for tuning")
    parser.add_argument("--world", choices=WORLDS, default=WORLDS[0])
    arguments = parser.parse_args()
    results = []
    for seed in arguments.seeds:
        output = arguments.output / arguments.world
        results.append(one_seed(seed, output, arguments.overrides, arguments.rewards, arguments.world))
        content = {
            "machine": harness.machine(),
            "settings": {"test": TEST, "fits": FITS, "world": arguments.world, "overrides": arguments.overrides},
            "seeds": results,
        }
        harness.write(arguments.results, content)
    if DEFAULT in arguments.rewards:
        print(table(results))
    print(forms(results))


if __name__ == "__main__":
    main()
