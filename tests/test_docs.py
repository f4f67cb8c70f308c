"""Every code block in the README and the documentation runs, or a comment before it says why it does not.

A page's Python blocks and commands run in order, with a small student instead of the hub's. YAML and JSON blocks must
parse, and recipes must be accepted.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
import runpy
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import yaml

import acqcore
from acqcore.acquisitions import REGISTRY
from acqcore.cli import main as acqcore_command
from acqsynth.serve.middleware import ERRORS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "generated" not in page.parts]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
#: Languages of blocks without code to run: output, formulas, directives.
SHOWN = {"text", "", "{toctree}", "{include}", "{eval-rst}"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, text, first line, and the reason if it is not run."""

    language: str
    text: str
    line: int
    reason: str | None


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    begin, language, before = None, "", ""
    for number, line in enumerate(lines):
        if begin is None and (opening := re.match(r"```(\S*)", line)):
            begin, language = number, opening[1]
            before = next((text for text in reversed(lines[:number]) if text.strip()), "")
        elif begin is not None and line.startswith("```"):
            marked = re.fullmatch(r"<!-- not run: (.+) -->", before)
            text = "\n".join(lines[begin + 1 : number]) + "\n"
            found.append(Block(language, text, begin + 1, marked[1] if marked else None))
            begin = None
    assert begin is None, f"{page}: a block is not closed"
    return found


@pytest.fixture
def place(tmp_path, tiny_model, tokenizer, monkeypatch, set_threads):
    """Changes to a folder with a student and rows.jsonl; restores the registry of acquisitions afterwards."""
    tiny_model("Llama", max_position_embeddings=4096).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    rows = [{"prompt": f"{a} * 3 =", "completion": f" {3 * a}."} for a in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACQCORE_BACKEND", "eager")
    set_threads(1)
    with mock.patch.dict(REGISTRY):
        yield tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_runs_or_says_why_not(page, place):
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if block.reason is not None or block.language in SHOWN:
            continue
        where = f"{page.relative_to(ROOT)}:{block.line}"
        text = block.text.replace(MODEL, str(place / "student"))
        if block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(text, where, "exec"), namespace)
        elif block.language == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                _run(line, where)
        elif block.language == "yaml":
            _read_yaml(yaml.safe_load(text), place)
        elif block.language == "json":
            json.loads(text)
        else:
            pytest.fail(f"{where}: a block in {block.language!r}, which nothing runs; mark it, or use text")


def _run(line: str, where: str) -> None:
    """Runs an acqcore or acqsynth command; checks that targets of make and extras of pip exist."""
    words = shlex.split(line, comments=True)
    if not words:
        return
    if words[0] == "acqcore":
        assert acqcore_command(words[1:]) == 0, f"{where}: {line}"
    elif words[0] == "acqsynth":
        from acqsynth.cli import main

        assert main(words[1:]) == 0, f"{where}: {line}"
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets, f"{where}: no target {words[1]}"
    elif words[:2] == ["pip", "install"]:
        _extras(words[2:], where)
    else:
        pytest.fail(f"{where}: {words[0]} is not run by this test; mark the block with its reason")


def _extras(packages: list[str], where: str) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package in packages:
        for extra in (re.search(r"\[(.*)\]", package) or ["", ""])[1].split(","):
            assert extra in known or not extra, f"{where}: no extra {extra!r}"


def _read_yaml(data: Any, place: Path) -> None:
    """Checks that ``acqsynth run`` accepts a recipe."""
    if "domain" in data:
        from acqsynth import config

        path = place / "recipe.yaml"
        path.write_text(yaml.safe_dump(data))
        config.load(str(path), [])


def test_reasons_are_given_only_to_blocks_that_need_them():
    """Only Bash and Python blocks are marked, each with a reason of more than ten characters."""
    for page in PAGES:
        for block in blocks(page):
            if block.reason is not None:
                assert block.language in ("bash", "python"), f"{page}:{block.line}"
                assert len(block.reason) > 10


def test_the_readme_says_what_the_quickstart_says():
    """Both pages show the same snippet and the same output."""
    readme, quickstart = blocks(ROOT / "README.md"), blocks(ROOT / "docs" / "start" / "quickstart.md")
    snippet = next(block.text for block in readme if block.language == "python")
    assert snippet.startswith(next(block.text for block in quickstart if block.language == "python"))
    output = next(block.text for block in readme if block.language == "text")
    assert output == "".join(block.text for block in quickstart if block.language == "text")


def test_the_printed_output_of_the_readme():
    """Holds with the packaged SmolLM2 weights to two digits; the last digits depend on the machine."""
    from acqsynth.models import smollm2_path

    try:
        model = str(smollm2_path())
    except FileNotFoundError as error:
        pytest.skip(str(error))
    snippet, output = (
        next(block.text for block in blocks(ROOT / "README.md") if block.language == language)
        for language in ("python", "text")
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(snippet.replace(MODEL, model), "README.md", "exec"), {"__name__": "page"})
    numbers = [[float(x) for x in re.findall(r"\d+\.?\d*", text)] for text in (printed.getvalue(), output)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.02)


def test_the_readme_is_short_and_its_links_are_absolute():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.startswith("https://"), target


def test_links_of_the_readme_lead_to_files_and_pages():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    here = re.compile(
        r"https://(?:github\.com/acqcore/acqcore/(?:blob|tree)/main|raw\.githubusercontent\.com/acqcore/acqcore/main)/([^)\s]+)"
    )
    for path in here.findall(text):
        assert (ROOT / path).exists(), path
    for page in re.findall(r"https://acqcore\.readthedocs\.io/en/latest/([^)#\s]+)\.html", text):
        assert page.startswith("generated/") or (ROOT / "docs" / f"{page}.md").exists(), page


def test_addresses_are_those_of_the_package():
    """Every page uses the same repository owner and documentation site."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    known = (urls["Source"], urls["Source"].replace("github.com", "raw.githubusercontent.com"), urls["Documentation"])
    address = re.compile(r"https://(?:[\w.-]*github[\w.-]*|[\w.-]*readthedocs\.io)[^\s)>\"'`]*")
    for page in [*PAGES, ROOT / "CITATION.cff", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"]:
        for found in address.findall(page.read_text(encoding="utf-8")):
            assert found.startswith(known) or "acqcore" not in found, f"{page}: {found}"


def test_generated_pages():
    """Every acquisition, command, recipe key and route is on its page."""
    generate = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "generate.py")))
    text = generate.acquisitions()
    for name in REGISTRY:
        assert f"\n### {name}\n" in text
    assert "``" not in text
    sections = {part.split("\n", 1)[0]: part for part in text.split("\n### ")[1:]}
    assert "Arguments" not in sections["loss"]
    assert all(f"`{name}`" in sections["mutual_information"] for name in ("probes", "posterior", "draws", "members"))
    for command in ("score", "select", "reference", "plan", "info"):
        assert f"\n## acqcore {command}\n" in generate.command_line("acqcore")
    for command in ("run", "report", "serve"):
        assert f"\n## acqsynth {command}\n" in generate.command_line("acqsynth")
    assert "`generator.options`" in generate.recipe()
    assert "| option |" not in generate.command_line("acqcore").split("\n## acqcore info\n")[1]
    for route in ("/score", "/get_reward", "/student", "/health", "/metrics"):
        assert f" {route}`" in generate.http()
    named = {int(status) for status in re.findall(r"\b[45]\d\d\b", generate.http())}
    assert named
    assert named <= {status for status, _ in ERRORS.values()}


def test_the_api_page_lists_every_public_name():
    listed = re.findall(r"auto(?:function|class):: (\w+)$", (ROOT / "docs/reference/api.md").read_text(), re.MULTILINE)
    for name in acqcore.__all__:
        public = getattr(acqcore, name)
        if inspect.isclass(public) or inspect.isfunction(public):
            assert name in listed, name
