"""The command line: ``acqsynth run recipe.yaml [key=value ...]`` runs a recipe from seed rows to report, and goes on
where an earlier run of it stopped. ``acqsynth seeds``, ``train``, ``generate``, ``label``, ``fit``, ``evaluate`` and
``report`` run one stage of it, and before it what that needs and lacks. ``acqsynth serve`` scores over HTTP."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from acqsynth import config as recipes
from acqsynth.config import ConfigError
from acqsynth.serve.options import add_arguments as add_serve_arguments
from acqsynth.stages.plan import Plan
from acqsynth.stages.unit import STAGES, StageError, Store, Unit

_HELP = {
    "run": "all stages of a recipe",
    "seeds": "read the real rows",
    "train": "teach the generator",
    "generate": "write questions",
    "label": "decide their answers",
    "fit": "fine-tune the students",
    "evaluate": "measure accuracy and forgetting",
    "report": "metrics.json and report.html, and all they need",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """One sentence without the usage text."""
        self.exit(2, f"acqsynth: error: {message}\n")


class _HelpConfig(argparse.Action):
    """Prints every key of a recipe and ends."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        print_help_config()
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 where a stage failed, 2 for wrong usage or recipe, 130 where
    it was interrupted."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    for text in rest:  # overrides after an option, which argparse leaves over
        if text.startswith("-") or "=" not in text:
            parser.error(f"unrecognized argument: {text}")
    if options.stage == "serve":
        if rest:
            parser.error(f"unrecognized argument: {rest[0]}")
        return _serve(options)
    try:
        config = recipes.load(options.recipe, [*options.overrides, *rest])
        plan = Plan(config)
    except ConfigError as error:
        print(f"acqsynth: error: {error}", file=sys.stderr)
        return 2
    units = plan.units if options.stage == "run" else plan.of(options.stage)
    try:
        if options.dry_run:
            dry_run(plan, units)
        else:
            run(plan, units)
    except StageError as error:
        if options.traceback:
            raise
        print(f"acqsynth: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # outside of any stage: the log, where a disk is full
        print(f"acqsynth: error: output: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("acqsynth: interrupted; the same command goes on, finished stages are kept", file=sys.stderr)
        return 130
    return 0


def run(plan: Plan, units: Sequence[Unit]) -> None:
    """Brings units up to date, telling of each, and says where the report is.

    Raises:
        StageError: a stage can not finish, or another run is at work in the folder.
    """
    # Bound to the stream of now: what libraries print while a stage runs goes to the log.
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    output = Path(plan.config.output)
    with console.status("") if console.is_terminal else contextlib.nullcontext() as status:

        def say(line: str) -> None:
            if status is not None:
                status.update(Text(line))
            console.print(Text(line))

        store = Store(output, say)
        with store.locked(), _quiet(output / "run.log"):
            ran = sum(store.run(unit) for unit in units)
    done = len(units) - ran
    console.print(f"{ran} of {len(units)} steps ran{f', {done} were done' if done else ''}.")
    if plan.report in units:
        _conclude(console, store.folder(plan.report))


def _serve(options: argparse.Namespace) -> int:
    try:
        from acqsynth.serve import server
    except ModuleNotFoundError as error:
        print(
            f"acqsynth: error: serving needs {error.name}, which is not installed: run 'pip install acqcore[serve]'",
            file=sys.stderr,
        )
        return 2
    return server.main(options)


def dry_run(plan: Plan, units: Sequence[Unit]) -> None:
    """What would run, and why."""
    store = Store(Path(plan.config.output))
    console = Console(highlight=False, soft_wrap=True)
    wanted = [unit for unit in plan.units if unit in _needed(units)]
    reasons = {unit: store.why(unit) for unit in wanted}
    width = max(len(str(unit)) for unit in wanted)
    for unit, reason in reasons.items():
        console.print(Text(f"{unit!s:{width}}  {f'runs: {reason}' if reason else 'is done, nothing it reads changed'}"))
    console.print(f"{sum(r is not None for r in reasons.values())} of {len(wanted)} steps would run in {store.output}.")


def print_help_config() -> None:
    """Every key of a recipe with its type, default and meaning."""
    console = Console(highlight=False)
    for key, expected, default, doc in recipes.documented():
        given = f", {default} by default" if default not in ("", "required") else f"{', required' * bool(default)}"
        console.print(Text.assemble((key, "bold"), f"  {expected}{given}\n    {doc}"))
    console.print(f"\nRecipes in the package: {', '.join(recipes.recipes())}.")


def _conclude(console: Console, folder: Path) -> None:
    """The verdict of the report, and its place."""
    import json

    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    for said in metrics["verdict"]:
        console.print(Text(said["text"]))
    console.print(Text(f"Report: {(folder / 'report.html').resolve()}"))


def _needed(units: Sequence[Unit]) -> set[Unit]:
    """The units and all they read from."""
    found: set[Unit] = set()
    rest = list(units)
    while rest:
        unit = rest.pop()
        if unit not in found:
            found.add(unit)
            rest += [artefact.unit for artefact in unit.inputs.values()]
    return found


@contextlib.contextmanager
def _quiet(log: Path) -> Iterator[None]:
    """What libraries print, warn and log goes to a file; the stages tell what matters."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with log.open("a", encoding="utf-8", buffering=1) as file:
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        root.addHandler(handler)
        shown: Callable[..., None] = warnings.showwarning
        warnings.showwarning = lambda message, category, filename, lineno, *rest: print(
            warnings.formatwarning(message, category, filename, lineno), file=file
        )
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            warnings.showwarning = shown
            root.removeHandler(handler)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="acqsynth", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="stage")
    for name in ("run", *STAGES):
        command = commands.add_parser(name, help=_HELP[name])
        command.add_argument("recipe", help=f"path of a YAML file, or one of {', '.join(recipes.recipes())}")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="dotted key of the recipe and its value")
        command.add_argument("--dry-run", action="store_true", help="tell what would run, and why")
        command.add_argument("--traceback", action="store_true", help="show where in the program a stage failed")
        command.add_argument("--help-config", action=_HelpConfig, help="list every key of a recipe")
    serve = commands.add_parser("serve", help="score over HTTP for other machines and trainers")
    add_serve_arguments(serve)
    return parser


if __name__ == "__main__":
    sys.exit(main())
