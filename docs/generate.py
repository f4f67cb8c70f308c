"""Pages written from the code itself: acquisitions, command lines, recipe keys, the HTTP interface, and the list of what was
measured. They go into ``docs/generated/`` and are not committed."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
#: Page -> what it measured.
EVIDENCE = {
    "reliability": "Do two seeds give the same ranks? How reliable each signal is on a real model.",
    "evidence-pool": "Choosing rows from a real pool, against random and the usual baselines.",
    "evidence-write": "A generator taught by the reward, in real language.",
    "students": "Students of other families and sizes.",
    "gpu": "Every operation on one H100: parity, times, memory.",
}
EVIDENCE_COMPLETE = all((DOCS / f"{name}.md").exists() for name in EVIDENCE)

_COST = {
    "RowNeed": "one forward",
    "BatchNeed": "one forward",
    "DrawOptions": "a forward for each draw",
    "ProbeNeed": "in linear form one forward, and a backward for each probe",
    "GradientNeed": "one forward; a backward unless `parameters` is `head`",
}


def write() -> None:
    """Write all generated pages."""
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
    """A table of all acquisitions, then each with source and options."""
    from acqcore.acquisitions import REGISTRY

    rows = [["acquisition", "formula", "value of", "reads the text", "cost"]]
    parts = []
    for name, entry in REGISTRY.items():
        over = "a token or a sample" if callable(entry.over) else f"a {entry.over}"
        rows.append([f"[`{name}`](#{name.replace('_', '-')})", _plain(entry.description), over,
                     "yes" if entry.needs_targets else "no", _cost(entry)])  # fmt: skip
        text = _plain(inspect.cleandoc(entry.value.__doc__ or ""))
        options = _options(entry.options)
        arguments = f"\n\nArguments: {', '.join(f'`{option}`' for option in options)}." if options else ""
        parts.append(f"### {name}\n\n{text}{arguments}\n")
    return _page(
        "Acquisition functions",
        "Larger means more worth acquiring. The list is written from the registry; each entry is one file with formula, "
        "source and a slow reference that the tests compare with. *Reads the text*: the value depends on the tokens that "
        "were written; otherwise only on the prediction, so no label is needed.",
        _table(rows),
        "\n".join(parts),
    )


def _options(kind: Any) -> list[str]:
    """Names of the arguments; of options that take several forms, those of each."""
    from acqcore.acquisitions import DrawOptions, LinearOptions

    if issubclass(DrawOptions, kind) and issubclass(LinearOptions, kind):
        return list(dict.fromkeys(field.name for form in (LinearOptions, DrawOptions) for field in fields(form)))
    return [field.name for field in fields(kind)]


def _cost(entry: Any) -> str:
    needs = entry.needs
    if callable(needs):
        found = inspect.signature(needs).return_annotation
        names = [name for name in _COST if name in str(found)]
    else:
        names = [type(need).__name__ for need in (needs if isinstance(needs, tuple) else (needs,))]
    return "; ".join(_COST[name] for name in names) or "one forward"


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
                rows = [["option", "meaning"]]
                for option in command._actions:
                    if option.dest != "help":
                        shown = ", ".join(option.option_strings) or str(option.metavar or option.dest)
                        value = f" {option.metavar or option.dest.upper()}" if option.nargs != 0 and option.option_strings else ""
                        rows.append([f"`{shown}{value}`", _plain(_expand(option))])
                parts.append(f"## {program} {name}\n\n{(helps[name] or '').capitalize()}.\n\n{_table(rows)}")
    return _page(f"The command line of {program}", *parts)


def _expand(option: argparse.Action) -> str:
    text = (option.help or "").replace("%%", "%")
    choices = f" One of {', '.join(map(str, option.choices))}." if option.choices else ""
    return (text[:1].upper() + text[1:] + "." if text else "") + choices


def recipe() -> str:
    """Every key of a recipe."""
    from acqsynth.config import documented

    rows = [["key", "type", "default", "meaning"]]
    rows += [[f"`{key}`", _plain(kind), _plain(default), _plain(doc)] for key, kind, default, doc in documented()]
    return _page("Keys of a recipe", "As `acqsynth run --help-config` prints them.", _table(rows))


def http() -> str:
    """Routes of the service, from its OpenAPI description."""
    rows = [
        ["route", "does", "token"],
        ["`POST /score`", "scores samples: values, scored tokens, the student that scored them", "yes"],
        ["`POST /get_reward`", "answers OpenRLHF's reward requests", "yes, or in the URL"],
        ["`POST /student`", "loads another student below `--student-root`", "the admin's"],
        ["`GET /health`", "says whether the model is loaded", "no"],
        ["`GET /metrics`", "Prometheus", "yes"],
        ["`GET /openapi.json`", "this interface, described", "yes"],
    ]
    body = {"samples": [{"prompt": "What is 2 + 2?", "completion": " It is 4."}], "acquisitions": ["entropy", "loss"]}
    return _page(
        "HTTP",
        _table(rows),
        f"A body of `POST /score`:\n\n```json\n{json.dumps(body, indent=2)}\n```",
        "Errors are JSON with one sentence in `error`. Too much is 413, or 429 with `Retry-After`; too late is 504. On any "
        "address but loopback a token is required: `Authorization: Bearer ...`.",
    )


def evidence() -> str:
    """Links to what was measured; pages that are not there yet are named."""
    there = [name for name in EVIDENCE if (DOCS / f"{name}.md").exists()]
    lines = [f"- [{EVIDENCE[name]}](../{name}.md)" for name in there]
    lines += [f"- {text} *Not written yet.*" for name, text in EVIDENCE.items() if name not in there]
    hidden = "```{toctree}\n:hidden:\n\n" + "\n".join(f"../{name}" for name in there) + "\n```"
    return _page(
        "Evidence",
        "What was measured, by which command, on which machine, with how many seeds. A `no` stands here like a `yes`. The "
        "comparison in a made world, whose skills and traps are known, is in [What does not work]"
        "(../concepts/what-does-not-work.md).",
        "\n".join(lines),
        hidden,
    )


def _page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", *parts]) + "\n"


def _table(rows: list[list[str]]) -> str:
    head, *body = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Markdown of a text with reStructuredText's literals and roles."""
    import re

    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", str(text))
    text = text.replace("``", "`")
    outside: Iterable[str] = text.split("`")
    # Formulas hold signs that Markdown reads as emphasis, links or HTML.
    return "`".join(part if i % 2 else re.sub(r"([\\*_\[\]<>|$])", r"\\\1", part) for i, part in enumerate(outside))
