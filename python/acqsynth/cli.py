"""The command line. ``acqsynth run recipe.yaml [key=value ...]`` runs a recipe from seed rows to report and resumes
where an earlier run of it stopped. ``acqsynth seeds``, ``train``, ``generate``, ``label``, ``fit``, ``evaluate`` and
``report`` run one stage, and before it what that stage needs. ``acqsynth serve`` scores over HTTP.

Imports nothing heavy by itself, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from acqsynth.recipes import recipes
from acqsynth.serve.options import add_arguments as add_serve_arguments

_DESCRIPTION = (
    "Writes training data that a model learns most from. 'acqsynth run' takes a recipe from seed rows to a report and "
    "resumes where an earlier run of it stopped; the other commands run one stage and what that stage needs first, and "
    "'acqsynth serve' scores over HTTP."
)
_HELP = {
    "run": "run all stages of a recipe",
    "seeds": "read the real rows",
    "train": "teach the generator",
    "generate": "write questions",
    "label": "decide their answers",
    "fit": "fine-tune the students",
    "evaluate": "measure accuracy and forgetting",
    "report": "write metrics.json and report.html",
}


class MissingExtraError(Exception):
    """A package that an extra brings is not installed; the text is for the user."""


def _load(module: str, what: str, extra: str) -> Any:
    """The module of a command.

    Raises:
        MissingExtraError: it imports a package that is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in ("", "acqcore", "acqsynth"):
            raise
        raise MissingExtraError(
            f"{what} needs {name}, which is not installed: run 'pip install acqcore[{extra}]'"
        ) from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """Prints one sentence, without the usage text."""
        self.exit(2, f"acqsynth: error: {message}\n")


class _HelpConfig(argparse.Action):
    """Prints every key of a recipe and exits."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        _load("acqsynth.commands", "--help-config", "train").print_help_config()
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 if a step failed, 2 for wrong usage, a wrong recipe or a
    missing package, 130 after an interrupt."""
    parser = _parser()
    try:
        options, rest = parser.parse_known_args(arguments)
        for text in rest:  # overrides after an option, which argparse does not collect
            if text.startswith("-") or "=" not in text or options.stage == "serve":
                parser.error(f"unrecognized argument: {text}")
        if options.stage == "serve":
            return int(_load("acqsynth.serve.server", "serving", "serve").main(options))
        commands = _load("acqsynth.commands", f"'acqsynth {options.stage}'", "train")
        overrides = [*options.overrides, *rest]
        return int(commands.main(options.recipe, overrides, options.stage, options.dry_run, options.traceback))
    except MissingExtraError as error:
        print(f"acqsynth: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="acqsynth", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"acqsynth {metadata.version('acqcore')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="stage")
    for name, purpose in _HELP.items():
        command = commands.add_parser(name, help=purpose)
        command.add_argument("recipe", help=f"path of a YAML file, or one of {', '.join(recipes())}")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="dotted key of the recipe and its value")
        command.add_argument("--dry-run", action="store_true", help="print what would run, and why")
        command.add_argument("--traceback", action="store_true", help="print the traceback of a failed step")
        command.add_argument("--help-config", action=_HelpConfig, help="list every key of a recipe")
    serve = commands.add_parser("serve", help="score over HTTP for other machines and trainers")
    add_serve_arguments(serve)
    return parser


if __name__ == "__main__":
    sys.exit(main())
