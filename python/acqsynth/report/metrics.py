"""Computes the numbers of a report, everything in ``metrics.json``, from answers and logs."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt

from acqsynth.evaluate import FEWEST, accuracy_by_skill, accuracy_interval, change, holm, signal_validity

IN_DISTRIBUTION = "in_distribution"
KNOWN = 0.8  #: base student's accuracy from which a skill counts as known and can be forgotten
STUDENT = "student"
MANY = 0.05  #: share of completions without a score from which the report says so


@dataclass(frozen=True)
class Answers:
    """One student's answers to a set."""

    right: Sequence[float] | npt.NDArray[np.float64]  #: [N], 1 if right
    skills: Sequence[str | None]  #: skill of each of the N rows


@dataclass(frozen=True)
class Fits:
    """The S fits of an arm's student on one number of rows."""

    generators: list[int] = field(default_factory=list)  #: [S], seeds of the generators that wrote the rows
    seeds: list[int] = field(default_factory=list)  #: [S]
    learnt: list[int] = field(default_factory=list)  #: [S], rows actually learnt
    right: dict[str, list[Any]] = field(default_factory=dict)  #: set -> [S, N], as in :class:`Answers`


def collect(
    *,
    sets: Mapping[str, str],
    main: str,
    descriptions: Mapping[str, str],
    base: Mapping[tuple[str, str], Answers],
    fits: Mapping[tuple[str, str, int], Fits],
    level: float,
) -> dict[str, Any]:
    """Accuracies, changes against the base student, comparisons of arms, and the verdict.

    Args:
        sets: name -> domain of the evaluation sets, the recipe's own first.
        main: the arm of the recipe's own method.
        descriptions: arm -> description, in order.
        base: (student, set) -> answers of the base student.
        fits: (arm, student, rows) -> its fits.
        level: confidence level of the intervals, and of the verdict as a whole.
    """
    found: dict[str, Any] = {"main": main, "level": level}
    found["sets"] = {
        name: {"domain": domain, "rows": len(base[STUDENT, name].right), "in_distribution": name == IN_DISTRIBUTION}
        for name, domain in sets.items()
    }
    found["base"] = {}
    for (student, name), before in base.items():
        accuracy = _accuracy(np.array([before.right]), None, before.skills, level)
        found["base"].setdefault(student, {})[name] = accuracy
    found["arms"] = {arm: {"description": description, "results": []} for arm, description in descriptions.items()}
    for (arm, student, n), each in fits.items():
        per_set = {}
        for name in sets:
            right, before = np.array(each.right[name]), base[student, name]
            others: dict[str, Any] = {"generators": each.generators, "learnt": False, "level": level}
            per_set[name] = _accuracy(right, each.generators, before.skills, level) | {
                "per_seed": right.mean(axis=1).tolist(),
                "change": asdict(change(right, np.array([before.right]), **others)),
                "known": _forgotten(right, before, **others),
            }
        result = {"student": student, "rows_wanted": n, "rows": min(each.learnt), "generators": each.generators}
        found["arms"][arm]["results"].append({**result, "seeds": each.seeds, "sets": per_set})
    found["comparisons"] = _comparisons(main, fits, level)
    found["verdict"] = verdict(found)
    return found


def machine() -> dict[str, str]:
    """Describes the hardware and the package versions of this process."""
    import torch

    import acqcore

    names = ("acqcore", "torch", "transformers", "trl", "peft", "datasets", "vllm")
    versions = []
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    backend = next(row for row in acqcore.backends() if row.available)
    found = {
        "report made by": f"Python {platform.python_version()}, {', '.join(versions)}",
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "backend": f"{backend.name} {backend.instruction_set or ''}".strip(),
    }
    if torch.cuda.is_available():
        found["GPUs"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return found


def largest(found: Mapping[str, Any], arm: str) -> Mapping[str, Any]:
    """The result of an arm's own student after the most rows."""
    own = (result for result in found["arms"][arm]["results"] if result["student"] == STUDENT)
    return max(own, key=lambda result: int(result["rows_wanted"]))


def verdict(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """Sentences on the recipe's own student at its largest size, each ``{"kind": gain | loss | none | note, "text"}``.

    A gain or loss requires at least ``FEWEST`` fits and significance by Holm's procedure over all comparisons here.
    """
    main = found["main"]
    result = largest(found, main)
    here = result["sets"][IN_DISTRIBUTION]
    before = found["base"][STUDENT][IN_DISTRIBUTION]["accuracy"]["mean"]
    learnt = f"{percent(before)} to {percent(here['accuracy']['mean'])} after {result['rows']} rows"
    judged = [(here["change"], f"{main} over the base student in distribution: {learnt}", _HERE)]
    for comparison in found["comparisons"]:
        if comparison["student"] == STUDENT and comparison["rows_wanted"] == result["rows_wanted"]:
            judged.append((comparison["difference"], f"{main} over {comparison['against']} at equal rows", _HERE))
    if here["known"] is not None:
        skills = ", ".join(
            f"{skill} {percent(was)} to {percent(now)}" for skill, (was, now) in here["known"]["skills"].items()
        )
        judged.append((here["known"]["change"], f"{main} on the skills the base student knew ({skills})", _ELSEWHERE))
    for name in found["sets"]:
        if name != IN_DISTRIBUTION:
            judged.append((result["sets"][name]["change"], f"{main} over the base student on {name}", _ELSEWHERE))
    sure = holm([difference["p"] for difference, _, _ in judged], 1 - found["level"])
    said = [_judged(*each, called, len(judged)) for each, called in zip(judged, sure, strict=True)]
    for arm, entry in found["arms"].items():
        for short in entry["results"]:
            if short["student"] == STUDENT and short["rows"] < short["rows_wanted"]:
                text = f"{arm} had {short['rows']} of {short['rows_wanted']} rows, so its fits are not at equal rows."
                said.append({"kind": "note", "text": text})
    return said


def training(logs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The steps of all rounds in sequence, as logged by TRL and the reward, and the cost of the reward. The trainer's
    closing totals are left out: those of a resumed run cover its last start only."""
    steps: list[dict[str, Any]] = []
    offset = 0
    for number, log in enumerate(logs, 1):
        logged = [dict(entry) for entry in log if "step" in entry and len(entry) > 1 and "train_runtime" not in entry]
        last = max((int(entry["step"]) for entry in logged), default=0)
        steps += [{**entry, "step": int(entry["step"]) + offset, "round": number} for entry in logged]
        offset += last
    timed = [s for s in steps if s.get("seconds") and s.get("reward_seconds") is not None]
    cost = None
    if timed:
        # An entry holds means over the steps since the one before.
        covered = [now - before for before, now in itertools.pairwise([0, *(s["step"] for s in timed)])]
        total, reward = (
            sum(s[key] * n for s, n in zip(timed, covered, strict=True)) for key in ("seconds", "reward_seconds")
        )
        cost = {
            "steps": sum(covered),
            "seconds_per_step": total / sum(covered),
            "reward_seconds_per_step": reward / sum(covered),
            "share": reward / total,
        }
    return {"log": steps, "cost": cost}


def validity(batches: Sequence[Mapping[str, Any]], **bootstrap: Any) -> dict[str, Any]:
    """How well each signal ranks small batches by the students' gains from them.

    Args:
        batches: each ``{"skill", "rows", "scores": signal -> mean or None, "gain"}``.
        bootstrap: resamples, level and seed.
    """
    names = list(batches[0]["scores"]) if batches else []
    signals = {}
    for name in names:
        scored = [(b["scores"][name], b["gain"], b["skill"]) for b in batches if b["scores"][name] is not None]
        interval = signal_validity([s for s, _, _ in scored], [g for _, g, _ in scored], **bootstrap)
        signals[name] = {
            "correlation": None if interval is None else asdict(interval),
            "batches": len(scored),
            "first": max(scored, key=lambda batch: batch[0], default=(None,))[-1],
        }
    return {"signals": signals, "batches": [dict(batch) for batch in batches]}


def samples(tables: Sequence[Mapping[str, Sequence[Any]]], n: int = 5) -> dict[str, Any] | None:
    """The n samples with the highest reward, the n with the lowest that passed the gates, and n rejected ones, each
    text once; None if no sample was scored, as for a generator that is only prompted. TRL logs a generation at each
    step that learns from it, so a table that repeats the completions of the one before does not count.

    Args:
        tables: columns ``reward``, ``reward_<part>``, and either ``completion`` or the fields of a sample.
        n: number of each.
    """
    scored = [
        _flat(dict(zip(table, row, strict=True)))
        for before, table in itertools.pairwise([{}, *tables])
        if "reward" in table and ("completion" not in table or table["completion"] != before.get("completion"))
        for row in zip(*table.values(), strict=True)
    ]
    if not scored:
        return None
    unique = {row["text"]: row for row in scored if row["reward"] is not None}
    passed = sorted((row for row in unique.values() if not row["gate"]), key=lambda row: -row["reward"])
    rejected = [row for row in unique.values() if row["gate"]]
    return {
        "best": passed[:n],
        "worst": passed[max(n, len(passed) - n) :],
        "rejected": rejected[:n],
        "scored": len(scored),
        "gates": dict(Counter(row["gate"] for row in scored if row["gate"]).most_common()),
    }


def constant_signals(tables: Sequence[Mapping[str, Sequence[Any]]]) -> list[str]:
    """Signals with the same value for all scored completions, at least two; ``tables`` as in :func:`samples`."""
    seen: dict[str, list[float]] = {}
    for table in tables:
        for key, column in table.items():
            if key.startswith("reward_"):
                numbers = (value for value in column if isinstance(value, float) and math.isfinite(value))
                seen.setdefault(key.removeprefix("reward_"), []).extend(numbers)
    return [name for name, values in seen.items() if len(values) > 1 and len(set(values)) == 1]


def unscored(counts: Mapping[str, Any]) -> float:
    """The share of a training's or a selection's completions on which a part of the reward failed."""
    failed = counts.get("masked", 0) + counts.get("dropped", {}).get("a scorer failed", 0)
    return float(failed / counts["completions"]) if failed else 0.0


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Step, text, reward, rejecting gate and parts of the reward."""
    text = row.get("completion")
    if text is None:
        text = "\n".join(row[part] for part in ("question", "reasoning", "answer") if row[part])
    elif not isinstance(text, str):
        text = text[-1]["content"]
    numbers = {  # trainers write NaN for missing values
        key: value for key, value in row.items() if isinstance(value, float) and math.isfinite(value)
    }
    return {
        "step": row.get("step"),
        "text": text,
        "reward": numbers.get("reward"),
        "gate": row.get("reward_gate") or "",
        "parts": {key.removeprefix("reward_"): v for key, v in numbers.items() if key.startswith("reward_")},
    }


def sum_counts(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Adds up the counts of several rounds, including nested mappings."""
    total: dict[str, Any] = {}
    for entry in counts:
        for key, value in entry.items():
            if isinstance(value, Mapping):
                total[key] = sum_counts([total.get(key, {}), value])
            else:
                total[key] = total.get(key, 0) + value
    return total


def percent(share: float) -> str:
    """Formats a share as a percentage."""
    return f"{100 * share:.1f} %"


def points(share: float) -> str:
    """Formats a difference of shares in percentage points, with its sign."""
    return f"{100 * share:+.1f}"


def span(interval: Mapping[str, float]) -> str:
    """Formats the interval of a difference of shares."""
    low, high = interval["low"], interval["high"]
    return "no interval" if low == high else f"{points(low)} to {points(high)}"


def _accuracy(
    right: npt.NDArray[np.float64], generators: Sequence[int] | None, skills: Sequence[str | None], level: float
) -> dict[str, Any]:
    by_skill = accuracy_by_skill(right, skills)
    return {
        "accuracy": asdict(accuracy_interval(right, generators=generators, level=level)),
        "skills": {skill: {"accuracy": share, "rows": n} for skill, (share, n) in by_skill.items()},
    }


def _forgotten(right: npt.NDArray[np.float64], base: Answers, **options: Any) -> dict[str, Any] | None:
    """Change in the skills that the base student knew; None if it knew none, or the rows name no skills."""
    before = np.array([base.right])  # [1, N]
    known = {name: share for name, (share, _) in accuracy_by_skill(before, base.skills).items() if share >= KNOWN}
    if not known:
        return None
    picked = [i for i, skill in enumerate(base.skills) if skill in known]
    after = accuracy_by_skill(right, base.skills)
    found = change(right[:, picked], before[:, picked], **options)
    return {"change": asdict(found), "skills": {name: (was, after[name][0]) for name, was in known.items()}}


def _comparisons(main: str, fits: Mapping[tuple[str, str, int], Fits], level: float) -> list[dict[str, Any]]:
    found = []
    for (arm, student, n), other in fits.items():
        if arm != main:
            own = fits[main, student, n]
            right, others = (np.array(each.right[IN_DISTRIBUTION]) for each in (own, other))
            drawn = other.generators
            difference = change(right, others, generators=own.generators, other_generators=drawn, level=level)
            found.append({"student": student, "rows_wanted": n, "against": arm, "difference": asdict(difference)})
    return found


_HERE = {"gain": "Gain", "loss": "Loss", "none": "No gain shown"}
_ELSEWHERE = {"gain": "Gain", "loss": "Forgetting", "none": "No change shown"}


def _judged(
    difference: Mapping[str, float], what: str, words: Mapping[str, str], sure: bool, comparisons: int
) -> dict[str, str]:
    """Words a comparison; a gain or loss must pass the joint test and have enough fits."""
    few = difference["fits"] < FEWEST
    kind = "none" if few or not sure else "gain" if difference["mean"] > 0 else "loss"
    low, high = difference["low"], difference["high"]
    interval = span(difference) if low == high else f"interval {span(difference)}"
    why = ""
    if few:
        why = f"; a gain or a loss needs {FEWEST} fits, but this run has {difference['fits']:.0f}"
    elif not sure and (0 < low < high or low < high < 0):
        why = f"; not significant after Holm's correction for {comparisons} comparisons"
    text = f"{words[kind]}: {what}, {points(difference['mean'])} points, {interval}{why}."
    return {"kind": kind, "text": text}
