"""The command line. Heavy imports are deferred, so that help and usage errors appear at once."""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from acqsynth.recipes import recipes
from acqsynth.serve.options import add_arguments as add_serve_arguments

_DESCRIPTION = (
    "Writes training data that a model may still learn from, and measures whether it did. "
    "'acqsynth run' takes a recipe from seed rows to a report and resumes where an earlier run stopped; "
    "each stage command runs that stage and its prerequisites. "
    "'acqsynth push' publishes a run's rows and student, and 'acqsynth serve' scores over HTTP."
)
_HELP = {
    "run": "run all stages of a recipe",
    "seeds": "read the real rows",
    "train": "train the generator",
    "generate": "write questions",
    "label": "label the questions",
    "fit": "fine-tune the students",
    "evaluate": "measure accuracy and forgetting",
    "report": "write metrics.json and report.html",
}


class MissingExtraError(Exception):
    """A package of an optional extra is not installed; the message is shown to the user."""


def _load(module: str, what: str, extra: str) -> Any:
    """Imports the module of a command."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in ("", "acqcore", "acqsynth"):
            raise
        raise MissingExtraError(
            f'{what} needs {name}, which is not installed: run pip install "acqcore[{extra}]"'
        ) from error


class _Help(argparse.HelpFormatter):
    """Formats each help text as a sentence."""

    def _expand_help(self, action: argparse.Action) -> str:
        text = super()._expand_help(action)
        return text[:1].upper() + text[1:] + "." * (not text.endswith("."))


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        # An abbreviation such as --tok for --token-file could publish or read the wrong thing.
        super().__init__(**options, formatter_class=_Help, allow_abbrev=False)

    def error(self, message: str) -> Any:
        """Prints one sentence, without the usage text."""
        self.exit(2, f"acqsynth: error: {message}\n")


class _HelpConfig(argparse.Action):
    """Prints every key of a recipe and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        _load("acqsynth.commands", "--help-config", "train").print_help_config()
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 if a step failed, 2 for wrong usage, a wrong recipe or a
    missing package, 130 after an interrupt."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # rows and paths may hold what its encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = _parser()
    try:
        options, rest = parser.parse_known_args(arguments)
        for text in rest:  # overrides after an option, which argparse does not collect
            if text.startswith("-") or "=" not in text or options.stage in ("serve", "push"):
                parser.error(f"unrecognized argument: {text}")
        if options.stage == "serve":
            return int(_load("acqsynth.serve.server", "serving", "serve").main(options))
        if options.stage == "push":
            push = _load("acqsynth.push", "'acqsynth push'", "train").main
            return int(push(options.run, options.to, options.license, options.only, options.public))
        commands = _load("acqsynth.commands", f"'acqsynth {options.stage}'", "train")
        overrides = [*options.overrides, *rest]
        return int(commands.main(options.recipe, overrides, options.stage, options.dry_run, options.traceback))
    except MissingExtraError as error:
        print(f"acqsynth: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumes = options.stage not in ("serve", "push")
        how = "; run the same command to resume, finished steps are kept" if resumes else ""
        print(f"acqsynth: interrupted{how}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="acqsynth", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"acqsynth {metadata.version('acqcore')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="stage")
    for name, purpose in _HELP.items():
        command = commands.add_parser(name, help=purpose)
        add = command.add_argument
        add("recipe", help=f"path of a YAML file, or one of {', '.join(recipes())}")
        add("overrides", nargs="*", default=[], metavar="key=value", help="dotted recipe key and its value")
        add("--dry-run", action="store_true", help="print what would run, and why")
        add("--traceback", action="store_true", help="print the traceback of a failed step")
        add("--help-config", action=_HelpConfig, nargs=0, help="list every key of a recipe")
    push = commands.add_parser("push", help="publish the rows and the student of a finished run, each with a card")
    add = push.add_argument
    add("run", type=Path, help="output folder of the run")
    add("--to", required=True, metavar="TO", help="a folder, or hub:owner/name to upload")
    add("--license", required=True, metavar="ID", help="SPDX identifier for the cards, such as apache-2.0")
    add("--only", choices=["dataset", "model"], help="publish only the data set or only the model")
    add("--public", action="store_true", help="make new repositories public; they are private otherwise")
    serve = commands.add_parser("serve", help="score over HTTP for other machines and trainers")
    add_serve_arguments(serve)
    return parser


if __name__ == "__main__":
    sys.exit(main())
