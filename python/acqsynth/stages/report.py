"""What came out: ``metrics.json`` and ``report.html`` from the artefacts of all arms."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from acqsynth.report import metrics as measures
from acqsynth.report import render
from acqsynth.stages import rows
from acqsynth.stages.unit import Work, seconds_of, write_json

_SAMPLES = 5  # best and worst each


def report(work: Work, *, recipe: dict[str, Any], sets: Mapping[str, str], main: str, arms: Mapping[str, str]) -> None:
    """Writes ``metrics.json`` and ``report.html``.

    Inputs, by role: ``base/<student>/<set>`` and ``answers/<arm>/<student>/<rows>/<seed>/<set>``, answers;
    ``fit/<arm>/<student>/<rows>/<seed>``, ``written/<arm>/<round>`` and ``labelled/<arm>/<round>``, counts;
    ``training/<arm>/<round>``, a model with its log; ``samples/<arm>/<round>``, what was written; ``validity``.
    """
    inputs = {tuple(role.split("/")): path for role, path in work.inputs.items()}
    bootstrap = {key: recipe["evaluation"][key] for key in ("resamples", "level")} | {"seed": recipe["seed"]}
    found = measures.collect(
        sets=sets,
        main=main,
        descriptions=arms,
        base={(student, name): _answers(path) for (_, student, name), path in _of("base", inputs, 3)},
        answers={
            (arm, student, int(n), int(seed), name): _answers(path)
            for (_, arm, student, n, seed, name), path in _of("answers", inputs, 6)
        },
        learnt={
            (arm, student, int(n), int(seed)): json.loads(path.read_text())["rows"]
            for (_, arm, student, n, seed), path in _of("fit", inputs, 5)
        },
        bootstrap=bootstrap,
    )
    found["recipe"] = recipe
    for name, arm in found["arms"].items():
        for kind in ("written", "labelled"):
            counts = [json.loads(path.read_text()) for key, path in inputs.items() if key[:2] == (kind, name)]
            arm[kind] = measures.added(counts) if counts else None
        arm["seconds"] = {
            word: sum(seconds_of(path) for key, path in inputs.items() if key[:2] == (kind, name))
            for word, kind in (("train", "training"), ("write", "samples"), ("label", "labelled"), ("fit", "fit"))
        }
    trained = {int(key[2]): path for key, path in inputs.items() if key[:2] == ("training", main)}
    logs = [_lines(trained[number] / "log.jsonl") for number in sorted(trained)]
    found["training"] = measures.training(logs) if logs else None
    found["samples"] = _samples([trained[number] for number in sorted(trained)], inputs, main)
    found["validity"] = None
    if ("validity",) in inputs:
        found["validity"] = measures.validity(json.loads(inputs["validity",].read_text()), **bootstrap)
    write_json(work.folder / "metrics.json", found)
    (work.folder / "report.html").write_text(render(found), encoding="utf-8")


def _of(kind: str, inputs: Mapping[tuple[str, ...], Path], parts: int) -> list[tuple[tuple[str, ...], Path]]:
    return [(key, path) for key, path in inputs.items() if key[0] == kind and len(key) == parts]


def _answers(path: Path) -> measures.Answers:
    table = rows.read_table(path)
    return measures.Answers(np.array(table["right"], dtype=np.float64), table["skill"])


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _samples(models: list[Path], inputs: Mapping[tuple[str, ...], Path], main: str) -> dict[str, Any] | None:
    """The samples the reward ranked first and last, with its parts: of training, else of what was selected.

    None where no sample was scored one by one, as with a generator that is only prompted.
    """
    scored: list[dict[str, Any]] = []
    for model in models:
        for path in sorted(model.glob("completions/*.parquet")):
            table = rows.read_table(path)
            scored += [_flat(dict(zip(table, values, strict=True))) for values in zip(*table.values(), strict=True)]
    if not scored:
        table = rows.read_table(inputs["samples", main, "1"])
        names = [name for name in table if name.startswith("reward")]
        texts = zip(table["question"], table["reasoning"], table["answer"], strict=True)
        for i, parts in enumerate(texts if names else ()):
            values = {name: table[name][i] for name in names}
            scored.append(_flat({"completion": "\n".join(part for part in parts if part), **values}))
    return measures.ends(scored, _SAMPLES) if scored else None


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a completions table: text, reward, the gate that rejected it, the reward's parts."""
    completion = row["completion"]
    if not isinstance(completion, str):
        completion = completion[-1]["content"]
    parts = {
        key.removeprefix("reward_"): value
        for key, value in row.items()
        if key.startswith("reward_") and key != "reward_gate" and _is_number(value)
    }
    return {
        "step": row.get("step"),
        "text": completion,
        "reward": row["reward"] if _is_number(row["reward"]) else None,
        "gate": row.get("reward_gate") or "",
        "parts": parts,
    }


def _is_number(value: Any) -> bool:
    """Trainers write NaN where a sample has no value."""
    return isinstance(value, float) and math.isfinite(value)
