"""The report of a run: its numbers and a self-contained HTML file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from acqsynth.artefacts import read_json, read_table
from acqsynth.report import metrics
from acqsynth.report.page import render as render
from acqsynth.steps import StepContext, seconds_of

Fit = tuple[str, int, int, int]  #: student, rows, the generator's seed, the fit's seed

DESCRIPTIONS = {
    "grpo": "generator trained with GRPO on the reward",
    "dpo": "generator trained with DPO on pairs ranked by the reward",
    "no_rl": "generator untrained",
    "best_of_n": "generator untrained, best of several by the reward",
    "random_real": "real rows at random",
    "filtered_real": "real rows the signals rank first",
    "error_driven": "generator untrained, shown the student's errors",
}


@dataclass
class Arm:
    """One way to obtain training rows: its steps, one per generator seed and round; in a report, the folders they
    filled."""

    name: str
    rows: dict[int, list[Any]] = field(default_factory=dict)  #: generator's seed -> steps that write the training rows
    trained: list[Any] = field(default_factory=list)
    written: list[Any] = field(default_factory=list)
    labelled: list[Any] = field(default_factory=list)
    fits: dict[Fit, Any] = field(default_factory=dict)
    answers: dict[Fit, Any] = field(default_factory=dict)


def write_report(
    context: StepContext,
    *,
    recipe: dict[str, Any],
    sets: Mapping[str, str],
    main: str,
    base: Mapping[str, Path],
    arms: Mapping[str, Arm],
    validity: Path | None,
) -> None:
    """Writes ``metrics.json`` and ``report.html``."""
    from acqsynth.train import read_log

    level = recipe["evaluation"]["level"]
    fits: defaultdict[tuple[str, str, int], metrics.Fits] = defaultdict(metrics.Fits)
    for arm in arms.values():
        for (student, n, generator, seed), folder in arm.answers.items():
            each = fits[arm.name, student, n]
            each.generators.append(generator)
            each.seeds.append(seed)
            each.learnt.append(read_json(arm.fits[student, n, generator, seed] / "counts.json")["rows"])
            for name in sets:
                each.right.setdefault(name, []).append(_answers(folder, name).right)
    descriptions = {name: DESCRIPTIONS[name] for name in arms}
    before = {(student, name): _answers(folder, name) for student, folder in base.items() for name in sets}
    found = metrics.collect(sets=sets, main=main, descriptions=descriptions, base=before, fits=fits, level=level)
    found["recipe"] = recipe
    found["machine"] = metrics.machine()
    for name, arm in arms.items():
        for kind, folders in (("written", arm.written), ("labelled", arm.labelled)):
            counts = [read_json(folder / "counts.json") for folder in folders]
            found["arms"][name][kind] = metrics.sum_counts(counts) if counts else None
        found["arms"][name]["seconds"] = {
            "train": sum(map(seconds_of, arm.trained)),
            "write": sum(map(seconds_of, arm.written or chain(*arm.rows.values()))),
            "label": sum(map(seconds_of, arm.labelled)),
            "fit": sum(map(seconds_of, arm.fits.values())),
        }
    trained = [folder / "model" for folder in arms[main].trained]
    first = trained[: recipe["rounds"]]  # of the generator's first seed
    found["training"] = metrics.training([read_log(model) for model in first]) if first else None
    tables = [read_table(path) for model in trained for path in sorted(model.glob("completions/*.parquet"))]
    found["samples"] = metrics.samples(tables or [read_table(each / "samples.parquet") for each in arms[main].written])
    notes = []
    for name, arm in arms.items():
        drawn = metrics.sum_counts([read_json(folder / "counts.json") for folder in arm.trained or arm.written])
        if (share := metrics.unscored(drawn)) > metrics.MANY:
            notes.append(
                f"{name}: {metrics.percent(share)} of the completions could not be scored and counted for nothing."
            )
    if constant := metrics.constant_signals(tables):
        notes.append(f"{', '.join(constant)} gave every completion the same value and did not affect the reward.")
    for name in sets:
        asked = read_table(base[metrics.STUDENT] / f"answers-{name}.parquet")["question"]
        if repeated := len(asked) - len(set(asked)):
            rows = f"{repeated} of the {len(asked)} rows of {name}"
            notes.append(f"{rows} repeat a question, so its intervals are too narrow.")
    found["verdict"] += [{"kind": "note", "text": text} for text in notes]
    bootstrap = {"resamples": recipe["evaluation"]["resamples"], "level": level, "seed": recipe["seed"]}
    found["validity"] = metrics.validity(read_json(validity / "batches.json"), **bootstrap) if validity else None
    context.write("metrics.json", found)
    (context.folder / "report.html").write_text(render(found), encoding="utf-8")


def _answers(folder: Path, name: str) -> metrics.Answers:
    table = read_table(folder / f"answers-{name}.parquet")
    return metrics.Answers([float(right) for right in table["right"]], table["skill"])
