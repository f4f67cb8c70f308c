"""Generates pages from the code: acquisitions, command lines, recipe keys, HTTP, and the list of evidence pages.

They are written to ``docs/generated/`` and not committed.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
#: Page -> its description.
EVIDENCE = {
    "reliability": "Reliability of each signal on a real model: do two seeds give the same ranks?",
    "evidence-pool": "Choosing rows from a real pool, compared with random and the usual baselines.",
    "evidence-write": "Rows of real language that a model wrote and a reward chose.",
    "students": "Supported model types.",
    "gpu": "Parity, time and memory of every operation on an H100 and an H200.",
}


_COST = {
    "RowNeed": "one forward",
    "BatchNeed": "one forward",
    "ProbeNeed": "one forward, and one backward per probe",
    "DrawOptions": "one forward per draw",
    "GradientNeed": "one forward, and one backward unless `parameters` is `head`",
}


def write() -> None:
    """Writes all generated pages."""
    pages = {
        "acquisitions": acquisitions(),
        "acqcore-cli": command_line("acqcore"),
        "acqsynth-cli": command_line("acqsynth"),
        "recipe": recipe(),
        "http": http(),
        "evidence": evidence(),
    }
    folder = DOCS / "generated"
    folder.mkdir(exist_ok=True)
    for name, text in pages.items():
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def acquisitions() -> str:
    """A table of all acquisitions, then each one with its source and options."""
    from acqcore.acquisitions import REGISTRY

    rows = [["acquisition", "formula", "value of", "reads the text", "cost"]]
    parts = []
    for name, entry in REGISTRY.items():
        over = "a token or a sample" if callable(entry.over) else "a token" if entry.over == "token" else "a sample"
        rows.append([f"[`{name}`](#{name.replace('_', '-')})", _plain(entry.description), over,
                     "yes" if entry.needs_targets else "no", _cost(entry)])  # fmt: skip
        text = _plain(inspect.cleandoc(entry.value.__doc__ or ""))
        options = _options(entry.options)
        arguments = f"\n\nArguments: {', '.join(f'`{option}`' for option in options)}." if options else ""
        parts.append(f"### {name}\n\n{text}{arguments}\n")
    return _page(
        "Acquisition functions",
        "Larger values mean more worth acquiring. This list is generated from the registry; each entry is one file "
        "with the formula, its source and a slow reference for the tests. *Reads the text*: the value depends on the "
        "actual tokens; otherwise it depends only on the prediction, so no label is needed.",
        _table(rows),
        "## Details\n\n" + "\n".join(parts),
    )


def _options(kind: Any) -> list[str]:
    """Names of the arguments, of all forms if there are several."""
    from acqcore.acquisitions.needs import DrawOptions, InformationOptions, LinearOptions

    if kind is InformationOptions:
        return list(dict.fromkeys(field.name for form in (LinearOptions, DrawOptions) for field in fields(form)))
    return [field.name for field in fields(kind)]


def _cost(entry: Any) -> str:
    needs = entry.needs
    if callable(needs):
        found = inspect.signature(needs).return_annotation
        names = [name for name in _COST if name in str(found)]
    else:
        names = [type(need).__name__ for need in (needs if isinstance(needs, tuple) else (needs,))]
    return "; or ".join(_COST[name] for name in names) or "one forward"


def command_line(program: str) -> str:
    """Every command with its options."""
    if program == "acqcore":
        from acqcore.cli import _parser
    else:
        from acqsynth.cli import _parser
    parser = _parser()
    parts = [parser.description or ""]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help for choice in action._choices_actions}
            for name, command in action.choices.items():
                rows = []
                for option in command._actions:
                    if option.dest != "help":
                        shown = ", ".join(option.option_strings) or str(option.metavar or option.dest)
                        value = (
                            f" {option.metavar or option.dest.upper()}"
                            if option.nargs != 0 and option.option_strings
                            else ""
                        )
                        rows.append([f"`{shown}{value}`", _plain(_expand(option))])
                options = f"\n\n{_table([['option', 'meaning'], *rows])}" if rows else ""
                parts.append(f"## {program} {name}\n\n{(helps[name] or '').capitalize()}.{options}")
    return _page(f"Command line of {program}", *parts)


def _expand(option: argparse.Action) -> str:
    text = (option.help or "").replace("%%", "%")
    choices = f" One of {', '.join(map(str, option.choices))}." if option.choices else ""
    return (text[:1].upper() + text[1:] + "." if text else "") + choices


def recipe() -> str:
    """Every key of a recipe."""
    from acqsynth.config import documented

    rows = [["key", "type", "default", "meaning"]]
    rows += [[f"`{key}`", _plain(kind), _plain(default), _plain(doc)] for key, kind, default, doc in documented()]
    return _page("Recipe keys", "The output of `acqsynth run --help-config`.", _table(rows))


def http() -> str:
    """Routes of the service."""
    rows = [
        ["route", "does", "token"],
        ["`POST /score`", "returns values, numbers of scored tokens and the student that scored them", "yes"],
        ["`POST /get_reward`", "answers OpenRLHF's reward requests", "yes, or in the URL"],
        ["`POST /student`", "loads another student below `--student-root`", "admin token"],
        ["`GET /health`", "reports whether the server accepts requests", "no"],
        ["`GET /metrics`", "returns Prometheus metrics", "yes"],
        ["`GET /openapi.json`", "returns the OpenAPI description", "yes"],
    ]
    body = {"samples": [{"prompt": "What is 2 + 2?", "completion": " It is 4."}], "acquisitions": ["entropy", "loss"]}
    return _page(
        "HTTP",
        _table(rows),
        f"A request body for `POST /score`:\n\n```json\n{json.dumps(body, indent=2)}\n```",
        'Errors are JSON, `{"error": {"type": ..., "message": ...}}`: 413 if a request is too large, 422 if it is '
        "invalid, 429 with `Retry-After` if there are too many, 504 after a timeout; the OpenAPI description lists all "
        "statuses. Except on loopback, a token is required: `Authorization: Bearer ...`.",
    )


def evidence() -> str:
    """Links to the evidence pages."""
    lines = [f"- [{text}](../{name}.md)" for name, text in EVIDENCE.items()]
    return _page(
        "Evidence",
        "Measurements, each with its command, machine and number of seeds. Negative results are included. For the "
        "comparison in a synthetic world, whose skills and traps are known, see [What does not work]"
        "(../concepts/what-does-not-work.md).",
        "\n".join(lines),
        "```{toctree}\n:hidden:\n\n" + "\n".join(f"../{name}" for name in EVIDENCE) + "\n```",
    )


def _page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", *parts]) + "\n"


def _table(rows: list[list[str]]) -> str:
    head, *body = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Converts reStructuredText literals and roles to Markdown."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", str(text))
    text = text.replace("``", "`")
    outside: Iterable[str] = text.split("`")
    # Formulas contain characters that Markdown reads as emphasis, links or HTML.
    return "`".join(part if i % 2 else re.sub(r"([\\*_\[\]<>|$])", r"\\\1", part) for i, part in enumerate(outside))
