"""Which signal finds the questions that a student gains from? The arithmetic world, its base model, several seeds.

``python -m benchmarks.bench_signals`` writes ``results/signals.json``. A seed determines the base model's weights, its
data and everything drawn here. For each skill the base model is fine-tuned on rows of that skill alone (labelled by
computation, or by a coin toss). The gain of a skill is the change in greedy accuracy on test questions: on that skill
(*own*), and averaged over all skills, which accounts for forgetting. It is compared with each signal's mean over other
questions of the skill, scored with the base model. The reference of influence is 96 rows of every skill, traps included
(with 16, the coin tosses that it happens to contain dominate, and influence ranks the coin first).

Seeds 0 to 6 were used to tune the world, this file and the default reward's weights, so they are not reported.

Signals are reduced and fused as in the recipe ``arithmetic``: a sum over tokens, and ``z`` within groups, here of one
question per skill. ``p(1-p), verified`` is 0 if nothing proves the answer, so its ranking includes the coin.

A rank correlation over nine skills says little by itself: between independent rankings it is within +-0.67 in 95 % of
cases. All seeds share the same skills, so the mean over five seeds still varies within +-0.6. The table gives this
range (``null``), from permutations of the skills that are the same for all seeds, and ``p``, the share of permutations
with a correlation at least as large.

Times are the minimum of three runs and cover everything a signal needs, including the sampling of answers.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy
import torch
from scipy.stats import rankdata, spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer

import acqcore
from acqsynth.domains.arithmetic import SKILLS, Arithmetic
from acqsynth.domains.base import Sample
from acqsynth.engines import Engine, Sampling, load
from acqsynth.evaluate import evaluate
from acqsynth.rewards.fusion import fuse
from acqsynth.rewards.reward import DEFAULT_WEIGHTS
from acqsynth.world import Row, Settings, base_model, chat, loss_of, row
from benchmarks import harness
from benchmarks.paired import with_interval

DOMAIN = Arithmetic()
TRAPS = [name for name, skill in SKILLS.items() if skill.kind in ("coin", "table")]

ROWS, EPOCHS, BATCH, LEARNING_RATE = 400, 3, 16, 5e-4  # for fine-tuning
SCORED, REFERENCE, TEST = 64, 96, 300  # per skill; all test questions if there are fewer
ANSWERS, REPEATS = 8, 3
SETTINGS = {
    "rows": ROWS, "epochs": EPOCHS, "batch": BATCH, "learning_rate": LEARNING_RATE, "scored": SCORED,
    "reference": REFERENCE, "test": TEST, "answers": ANSWERS, "repeats": REPEATS, "reduction": "sum",
}  # fmt: skip

#: Acquisitions requested with arguments below, or defined on a set rather than a sample.
ASKED_APART = ("influence", "epig", "mutual_information", "gradient_diversity", "archive_novelty")

#: Names here of the default reward's signals -> weights; ``diversity`` is omitted: it describes a run, not a skill.
FUSED = {
    "mutual_information, linear, 4 probes": DEFAULT_WEIGHTS["mutual_information"],
    "influence, all, cosine": DEFAULT_WEIGHTS["influence"],
    "p(1-p), verified": DEFAULT_WEIGHTS["learnability"],
}

Values = list[float | None]
Signal = Callable[[Sequence[Sample]], Values]


def fine_tuned(model: Any, tokenizer: Any, samples: Sequence[Sample], seed: int) -> Any:
    """A copy of the model trained for ``EPOCHS`` on the samples with AdamW and a cosine learning-rate schedule."""
    model = copy.deepcopy(model).train()
    rows: list[Row] = [row(tokenizer, chat(sample.question, DOMAIN.solution(sample))) for sample in samples]
    steps = EPOCHS * math.ceil(len(rows) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = random.Random(seed)
    for _ in range(EPOCHS):
        rng.shuffle(rows)
        for begin in range(0, len(rows), BATCH):
            loss_of(model, rows[begin : begin + BATCH]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval()


def messages(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": DOMAIN.student_prompt(sample.question),
            "completion": [{"role": "assistant", "content": DOMAIN.solution(sample)}],
        }
        for sample in samples
    ]


def signals(student: acqcore.Student, engine: Engine, reference: Sequence[Sample]) -> dict[str, Signal]:
    """Name -> function of samples: acqcore's registered acquisitions, and p(1-p) over sampled answers."""
    found: dict[str, Signal] = {}
    for name in acqcore.acquisitions():
        if name not in ASKED_APART:
            found[name] = partial(scored, student, name, {})
    found["grad_norm, all layers"] = partial(scored, student, "grad_norm", {"parameters": "all"})
    for parameters in ("head", "all"):
        made = acqcore.influence_reference(student, messages(reference), parameters=parameters)
        for similarity in ("cosine", "dot"):
            asked: dict[str, Any] = {"reference": made, "similarity": similarity}
            found[f"influence, {parameters}, {similarity}"] = partial(scored, student, "influence", asked)
    for layers in (0, "all"):
        asked = {"layers": layers, "draws": 8}
        found[f"mutual_information, layers={layers}"] = partial(scored, student, "mutual_information", asked)
    for probes in (1, 2, 4):
        asked = {"form": "linear", "probes": probes}
        found[f"mutual_information, linear, {probes} probes"] = partial(scored, student, "mutual_information", asked)
        asked = {**asked, "posterior": "isotropic"}
        found[f"mutual_information, isotropic, {probes} probes"] = partial(scored, student, "mutual_information", asked)
    found["p(1-p)"] = partial(learnability, engine, verified=False)
    found["p(1-p), verified"] = partial(learnability, engine, verified=True)
    return found


def scored(student: acqcore.Student, name: str, arguments: dict[str, Any], samples: Sequence[Sample]) -> Values:
    scores = acqcore.score(
        student, messages(samples), name,
        acquisition_args={name: arguments} if arguments else None, reduction="sum", progress=False,
    )  # fmt: skip
    return list(scores[name].tolist())


def learnability(engine: Engine, samples: Sequence[Sample], *, verified: bool) -> Values:
    """Unbiased variance of correctness over k = ``ANSWERS`` sampled answers: k/(k-1) p(1-p). An answer is correct if it
    equals the sample's own; ``verified`` gives 0 to samples whose answer the domain cannot prove."""
    sampling = Sampling(n=ANSWERS, max_tokens=DOMAIN.answer_tokens)
    groups = engine.generate([DOMAIN.student_prompt(sample.question) for sample in samples], sampling)
    values: Values = []
    for sample, group, right in zip(samples, groups, DOMAIN.verify(samples), strict=True):
        answers = [DOMAIN.answer_of(completion.text) for completion in group]
        p = statistics.fmean(DOMAIN.equivalent([sample] * ANSWERS, answers))
        values.append(p * (1 - p) * ANSWERS / (ANSWERS - 1) if right or not verified else 0.0)
    return values


def accuracy(engine: Engine, seed: int) -> dict[str, float]:
    """Skill -> share of correct greedy answers to ``TEST`` questions of its test split, or to all if it has fewer."""
    found = {}
    for name, skill in SKILLS.items():
        rows = DOMAIN.rows(min(TEST, len(skill.questions["test"])), seed, skills=[name], split="test")
        found[name] = evaluate(engine, DOMAIN, rows).accuracy
    return found


def one_seed(seed: int) -> dict[str, Any]:
    """Gains by skill, and for each signal its mean by skill, rank correlations and seconds per sample."""
    path = base_model(Settings(seed=seed))
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    engine = load("transformers", model, tokenizer=tokenizer)
    base = accuracy(engine, seed)
    gains, own = {}, {}
    pools = {name: DOMAIN.rows(ROWS + SCORED + REFERENCE, seed, skills=[name]) for name in SKILLS}
    for name, pool in pools.items():
        student = fine_tuned(model, tokenizer, pool[:ROWS], seed)
        after = accuracy(load("transformers", student, tokenizer=tokenizer), seed)
        own[name] = after[name] - base[name]
        gains[name] = statistics.fmean(after[skill] - base[skill] for skill in SKILLS)
    reference = [sample for pool in pools.values() for sample in pool[ROWS + SCORED :]]
    rows = [sample for pool in pools.values() for sample in pool[ROWS : ROWS + SCORED]]
    measured = {}
    kept: dict[str, list[float]] = {}
    student = acqcore.Student.from_model(model, tokenizer=tokenizer)
    for signal, function in signals(student, engine, reference).items():
        times = []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            values = function(rows)
            times.append((time.perf_counter() - begin) / len(rows))
        measured[signal] = against_gains(values, gains, own, min(times))
        if signal in FUSED:
            kept[signal] = [0.0 if value is None else value for value in values]
    seconds = sum(measured[signal]["seconds_per_sample"] for signal in FUSED)
    fused = fuse(kept, [i % SCORED for i in range(len(rows))], "z", FUSED)
    measured["the three of the default reward, fused"] = against_gains(fused, gains, own, seconds)
    return {"seed": seed, "base": base, "own_gain": own, "mean_gain": gains, "signals": measured}


def against_gains(values: Values, gains: dict[str, float], own: dict[str, float], seconds: float) -> dict[str, Any]:
    """Compares a signal's means by skill with the gains; ``values`` holds ``SCORED`` values per skill, in order."""
    means = {}
    for i, name in enumerate(SKILLS):
        known = [value for value in values[i * SCORED : (i + 1) * SCORED] if value is not None]
        if known:
            means[name] = statistics.fmean(known)
    return {
        "means": means,
        "top": max(means, key=means.__getitem__),
        "spearman": float(spearmanr(list(means.values()), [gains[name] for name in means]).statistic),
        "spearman_own": float(spearmanr(list(means.values()), [own[name] for name in means]).statistic),
        "seconds_per_sample": seconds,
    }


def joint_permutations(results: Sequence[dict[str, Any]], signal: str, n: int = 5000) -> tuple[float, float, float]:
    """Null distribution of the mean rank correlation with the mean gain, from permutations of the skills that all seeds
    share: its 2.5 % and 97.5 % quantiles, and the share at least as large as observed."""
    means, gains = [], []
    for result in results:
        found = result["signals"][signal]["means"]
        means.append(rankdata([found[name] for name in SKILLS if name in found]))
        gains.append(rankdata([result["mean_gain"][name] for name in SKILLS if name in found]))

    def correlation(order: Any) -> float:
        return statistics.fmean(
            float(numpy.corrcoef(mean, gain[order])[0, 1]) if mean.std() and gain.std() else 0.0
            for mean, gain in zip(means, gains, strict=True)
        )

    rng, skills = numpy.random.default_rng(0), len(means[0])
    observed = correlation(numpy.arange(skills))
    null = numpy.array([correlation(rng.permutation(skills)) for _ in range(n)])
    low, high = numpy.quantile(null, [0.025, 0.975])
    return float(low), float(high), float((1 + (null >= observed - 1e-12).sum()) / (1 + n))


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: accuracy and gains by skill, in percentage points, then one line per signal."""
    skills = [
        [name, skill.kind]
        + [with_interval([100 * result[key][name] for result in results]) for key in ("base", "own_gain", "mean_gain")]
        for name, skill in SKILLS.items()
    ]
    signals = []
    for signal in results[0]["signals"]:
        rows = [result["signals"][signal] for result in results]
        tops = Counter(row["top"] for row in rows)
        low, high, p = joint_permutations(results, signal)
        signals.append(
            [
                signal, ", ".join(f"{name} {n}" for name, n in tops.most_common()),
                f"{sum(tops[name] for name in TRAPS)} of {len(rows)}",
                with_interval([row["spearman"] for row in rows], 2), f"{low:+.2f} to {high:+.2f}", f"{p:.3f}",
                with_interval([row["spearman_own"] for row in rows], 2),
                f"{statistics.median(row['seconds_per_sample'] for row in rows) * 1e3:.2f}",
            ]
        )  # fmt: skip
    of_skills = harness.markdown(["skill", "kind", "base accuracy", "own gain", "mean gain"], *skills)
    headings = ["signal", "top-ranked skill", "trap on top", "Spearman, mean gain", "null", "p", "own gain"]
    return "\n".join([*of_skills, "", *harness.markdown([*headings, "ms per sample"], *signals)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9, 10, 11])
    parser.add_argument("--table", action="store_true", help="print the table of earlier results")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads((harness.RESULTS / "signals.json").read_text())["seeds"]))
        return
    results = []
    for seed in arguments.seeds:
        begin = time.perf_counter()
        results.append(one_seed(seed))
        print(f"seed {seed}: {time.perf_counter() - begin:.0f} s", flush=True)
        content = {"machine": harness.machine(), "settings": SETTINGS, "seeds": results}
        harness.write(harness.RESULTS / "signals.json", content)
    print(table(results))


if __name__ == "__main__":
    main()
