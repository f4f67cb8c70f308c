"""The commands that run stages of a recipe, and their output."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from acqsynth import config, pipeline, preflight
from acqsynth.artefacts import read_json
from acqsynth.config import ConfigError
from acqsynth.pipeline import Plan
from acqsynth.steps import Step, StepError, Store


def main(recipe: str, overrides: Sequence[str], stage: str, dry: bool, traceback: bool) -> int:
    """Runs ``stage`` of a recipe, or all stages (``run``); with ``dry`` prints what would run. Returns the exit code:
    0, 1 if a step failed, 2 for a wrong recipe."""
    try:
        plan = pipeline.plan(config.load(recipe, overrides))
        preflight.on_this_machine(plan.config)
    except ConfigError as error:
        print(f"acqsynth: error: {error}", file=sys.stderr)
        return 2
    steps = plan.steps if stage == "run" else plan.of(stage)
    try:
        if dry:
            dry_run(plan, steps)
        else:
            run(plan, steps)
    except StepError as error:
        if traceback:
            raise
        print(f"acqsynth: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # outside any step: the log, if the disk is full
        print(f"acqsynth: error: output: {error}", file=sys.stderr)
        return 1
    return 0


def run(plan: Plan, steps: Sequence[Step]) -> None:
    """Brings the steps up to date, reports each, and prints the path of the report."""
    # Bound to the terminal now: stdout is redirected to the log below.
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    output = Path(plan.config.output)
    with console.status("") if console.is_terminal else contextlib.nullcontext() as spinner:

        def status(line: str) -> None:
            if spinner is not None:
                spinner.update(Text(line))

        def say(line: str) -> None:
            status(line)
            console.print(Text(line))

        store = Store(output, say, status)
        with store.locked(), _quiet(output / "run.log"):
            ran = sum(store.run(step) for step in steps)
    done = len(steps) - ran
    console.print(f"{ran} of {len(steps)} steps ran{f', {done} were already done' if done else ''}.")
    if plan.report in steps:
        folder = store.path(plan.report)
        for said in read_json(folder / "metrics.json")["verdict"]:
            console.print(Text(said["text"]))
        console.print(Text(f"Report: {(folder / 'report.html').resolve()}"))


def dry_run(plan: Plan, steps: Sequence[Step]) -> None:
    """Prints what would run, and why."""
    store = Store(Path(plan.config.output))
    needed = set(steps)
    for step in reversed(plan.steps):  # a step comes after those it reads
        if step in needed:
            needed.update(artefact.step for artefact in step.inputs)
    reasons = {step: store.reason(step) for step in plan.steps if step in needed}
    width = max((len(str(step)) for step in reasons), default=0)
    for step, reason in reasons.items():
        state = f"runs: {reason}" if reason else "is done; nothing it reads has changed"
        print(f"{step!s:{width}}  {state}")
    count = sum(reason is not None for reason in reasons.values())
    print(f"{count} of {len(reasons)} steps would run in {store.output}.")


def print_help_config() -> None:
    """Prints every key of a recipe with its type, default and meaning."""
    console = Console(highlight=False, soft_wrap=True)
    for key, expected, default, doc in config.documented():
        given = {"": "", "required": ", required"}.get(default, f", {default} by default")
        console.print(Text.assemble((key, "bold"), f"  {expected}{given}\n    {doc}"))
    console.print(f"\nRecipes in the package: {', '.join(config.recipes())}.")


@contextlib.contextmanager
def _quiet(log: Path) -> Iterator[None]:
    """Redirects the output, warnings and logs of libraries to a file."""
    from transformers.utils import logging as transformers_logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with log.open("a", encoding="utf-8", buffering=1) as file:
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        root.addHandler(handler)
        transformers_logging.disable_default_handler()  # it holds the stderr of import time
        transformers_logging.enable_propagation()
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            transformers_logging.disable_propagation()
            transformers_logging.enable_default_handler()
            root.removeHandler(handler)
