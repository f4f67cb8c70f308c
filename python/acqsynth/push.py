"""Publishes a finished run (``acqsynth push``): the rows of its main arm and the student that learnt them, each with a
card that gives the recipe, the gate counts, the result and the licence."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard, DatasetCardData, HfApi, ModelCard, ModelCardData

from acqsynth import config, pipeline
from acqsynth.artefacts import read_json, read_table, write_table
from acqsynth.pipeline import Plan
from acqsynth.report import render
from acqsynth.report.metrics import STUDENT, largest, percent, points, span
from acqsynth.steps import StepError, Store

HUB = "hub:"  #: prefix of repository targets
# Files of a model folder that are not the model's: a pickle of this machine's paths, and counts that the card states.
_OF_TRAINING = ("training_args.bin", "rows.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
#: Options of trainers and engines that hold credentials, unlike ``eos_token`` and similar names.
_SECRET = re.compile(r"(.*_)?(hub|hf|auth|access|api)_(token|key)|token|password|secret", re.IGNORECASE)


class PushError(Exception):
    """A run that cannot be published; the message is one sentence for the user."""


def main(run: Path, to: str, license: str, only: str | None, public: bool) -> int:
    """Runs the command; returns the exit code: 0, or 2 if the run or the target is unusable."""
    try:
        for place in push(run, to, license, only=only, public=public):
            print(place)
    except (PushError, StepError, OSError, ValueError) as error:  # hub errors are OSErrors
        print(f"acqsynth: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def push(run: Path, to: str, license: str, *, only: str | None = None, public: bool = False) -> list[str]:
    """Writes or uploads the data set and the model of a run.

    Args:
        run: output folder of a finished recipe.
        to: a folder, which gets ``dataset/`` and ``model/``; ``hub:owner/name`` uploads to the data set and the model
            repository of that name.
        license: SPDX identifier for both cards. It depends on the seeds and the generator and cannot be inferred.
        only: ``dataset`` or ``model``; by default both.
        public: whether newly created repositories are public.

    Returns:
        The folders or addresses written.

    Raises:
        PushError: ``run`` is not a finished run or has changed since its report, or the target is not empty or not a
            repository name. StepError: another run is using the folder.
    """
    repository = to.removeprefix(HUB) if to.startswith(HUB) else None
    if repository is not None and not _HUB_ID.fullmatch(repository):
        raise PushError(f"--to: expected hub:owner/name or a folder, got {to}")
    try:
        folder = Path(to).expanduser()
    except RuntimeError as error:
        raise PushError(f"--to: {to}: {error}") from error
    report = run / "06-report" / "report" / "metrics.json"
    if not report.is_file():
        raise PushError(f"{run}: not a finished run, {report.relative_to(run)} is missing")
    kinds = {"dataset": _write_dataset, "model": _write_model}
    with tempfile.TemporaryDirectory() as temporary:
        targets = {kind: (Path(temporary) if repository else folder) / kind for kind in kinds}
        chosen = [only] if only else list(kinds)
        for kind in chosen:
            if targets[kind].exists() and any(targets[kind].iterdir()):
                raise PushError(f"--to: {targets[kind]} is not empty")
        with Store(run).locked():
            metrics, plan = _finished(run, report)
            for kind in chosen:
                targets[kind].mkdir(parents=True, exist_ok=True)
                kinds[kind](targets[kind], run, metrics, plan, license, repository)
        if repository is None:
            return [str(targets[kind]) for kind in chosen]
        return [_upload(targets[kind], repository, kind, public) for kind in chosen]


def _finished(run: Path, report: Path) -> tuple[dict[str, Any], Plan]:
    """The metrics, fit to publish, and the plan of a run."""
    metrics = read_json(report)
    plan = pipeline.plan(config.from_mapping({**metrics["recipe"], "output": str(run)}))
    if (reason := Store(run).reason(plan.report)) is not None:
        raise PushError(f"{run}: the report is out of date ({reason}): run its recipe again")
    metrics["recipe"] = _shown(metrics["recipe"])
    return metrics, plan


def _write_dataset(
    target: Path, run: Path, metrics: Mapping[str, Any], plan: Plan, license: str, repository: str | None
) -> None:
    store, arm = Store(run), plan.arms[plan.main]
    tables = [read_table(store.path(step) / "samples.parquet") for steps in arm.rows.values() for step in steps]
    columns = {name: [value for table in tables for value in table[name]] for name in tables[0]}
    (target / "data").mkdir()
    write_table(target / "data" / "train.parquet", columns)
    (target / "report.html").write_text(render(metrics), encoding="utf-8")
    rows = len(next(iter(columns.values())))
    data = DatasetCardData(
        license=license,
        tags=["synthetic", "acqcore"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train.parquet"}]}],
    )
    seeds, generator = metrics["recipe"]["data"]["seeds"]["source"], metrics["recipe"]["generator"]["model"]
    found = metrics["arms"][plan.main]
    lead = [
        f"# {repository or 'Training rows written under acqcore'}",
        f"{rows} rows in the domain `{metrics['recipe']['domain']}`, written by a model and not checked by hand. "
        f"Generator: `{generator}` ({found['description']}). Seeds: `{seeds}`.",
        "`report.html` holds the whole evaluation.",
    ]
    licence = _licence(license, "rows", f"the seeds `{seeds}` and the generator `{generator}`")
    DatasetCard(_card(data, lead, metrics, plan.main, licence)).save(target / "README.md")


def _write_model(
    target: Path, run: Path, metrics: Mapping[str, Any], plan: Plan, license: str, repository: str | None
) -> None:
    recipe = metrics["recipe"]
    n, generator, seed = max(recipe["student"]["rows"]), recipe["generator"]["seeds"][0], recipe["student"]["seeds"][0]
    fitted = Store(run).path(plan.arms[plan.main].fits[STUDENT, n, generator, seed]) / "model"
    for path in fitted.iterdir():
        if path.is_file() and path.name not in _OF_TRAINING:
            shutil.copy(path, target)
    base = recipe["student"]["model"]
    data = ModelCardData(
        license=license,
        tags=["acqcore"],
        library_name="transformers",
        base_model=base if _HUB_ID.fullmatch(base) else None,
        datasets=[repository] if repository else None,
    )
    lead = [
        f"# {repository or 'A student fine-tuned under acqcore'}",
        f"`{base}` fine-tuned on {largest(metrics, plan.main)['rows']} rows of the arm `{plan.main}`, seed {seed}.",
    ]
    licence = _licence(license, "weights", f"the base model `{base}`, the seeds and the generator")
    ModelCard(_card(data, lead, metrics, plan.main, licence)).save(target / "README.md")


def _upload(folder: Path, repository: str, kind: str, public: bool) -> str:
    api = HfApi()
    address = api.create_repo(repository, repo_type=kind, private=not public, exist_ok=True)
    api.upload_folder(repo_id=repository, repo_type=kind, folder_path=folder, commit_message="Add the run's results")
    return str(address)


# --- parts of a card --------------------------------------------------------------------------------------------------


def _card(data: Any, lead: Sequence[str], metrics: Mapping[str, Any], main: str, licence: str) -> str:
    text = yaml.safe_dump(metrics["recipe"], sort_keys=False, allow_unicode=True)
    recipe = f"## Recipe\n\n```yaml\n{text}```"
    counts = _counts(metrics["arms"][main], metrics["samples"])
    parts = [f"---\n{data.to_yaml()}\n---", *lead, counts, *_result(metrics, main), licence, recipe]
    return "\n\n".join(filter(None, parts)) + "\n"


def _counts(arm: Mapping[str, Any], samples: Mapping[str, Any] | None) -> str:
    """Numbers of rows written, rejected and labelled; empty for an arm of real rows."""
    lines = []
    if written := arm["written"]:
        lines += [("completions sampled", written["completions"]), ("rows kept", written["kept"])]
        lines += [(f"rejected: {reason}", n) for reason, n in written["dropped"].items()]
    if labelled := arm["labelled"]:
        lines.append(("rows with a label", labelled["labelled"]))
        if labelled["refuted"]:  # 0 may mean that none could be checked
            lines.append(("labels refuted", labelled["refuted"]))
        if labelled["truth_known"]:
            lines += [("labels that could be checked", labelled["truth_known"]), ("of these, right", labelled["right"])]
        lines += [(f"labels rejected: {reason}", n) for reason, n in labelled["dropped"].items()]
    if samples:
        lines += [(f"in training, rejected by gate `{gate}`", n) for gate, n in samples["gates"].items()]
    rows = [f"| {name} | {n} |" for name, n in lines]
    return "\n".join(["## Counts", "", "| | |", "|---|---|", *rows]) if rows else ""


def _result(metrics: Mapping[str, Any], main: str) -> list[str]:
    """The report's verdict and the accuracies of the main arm's student."""
    result = largest(metrics, main)
    rows = [
        f"| {name} | {percent(metrics['base'][STUDENT][name]['accuracy']['mean'])} | "
        f"{percent(found['accuracy']['mean'])} | {points(found['change']['mean'])} | "
        f"{span(found['change'])} |"
        for name, found in result["sets"].items()
    ]
    table = ["| evaluation set | before | after | points | interval |", "|---|---|---|---|---|", *rows]
    made_by = [f"- {name}: {value}" for name, value in metrics["machine"].items()]
    return [
        "## Result",
        "\n".join(f"- {said['text']}" for said in metrics["verdict"]),
        f"{len(result['seeds'])} students with {_seeds(result['seeds'])}, on rows written with generator "
        f"{_seeds(result['generators'])}, with {100 * metrics['level']:g} % intervals:",
        "\n".join(table),
        "\n".join(made_by),
    ]


def _seeds(seeds: Sequence[int]) -> str:
    different = list(dict.fromkeys(seeds))
    return f"seed{'s' * (len(different) > 1)} {', '.join(map(str, different))}"


def _licence(license: str, what: str, depends: str) -> str:
    return f"## Licence\n\nThe {what} are published under `{license}`. The terms of {depends} also apply."


def _shown(value: Any) -> Any:
    """The value in a form fit to publish: without credentials, and with paths cut to their last component."""
    if isinstance(value, Mapping):
        return {key: _shown(part) for key, part in value.items() if not _SECRET.fullmatch(str(key))}
    if isinstance(value, list | tuple):
        return [_shown(part) for part in value]
    if isinstance(value, str) and value.startswith(("/", "~")):
        return Path(value).name
    return value
