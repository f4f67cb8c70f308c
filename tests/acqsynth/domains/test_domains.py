from __future__ import annotations

import inspect
import pickle
import subprocess
import sys

import pytest

from acqsynth.domains import DOMAINS, Domain, Sample, domain
from acqsynth.domains.base import ask_for_sample, written


@pytest.mark.parametrize("name", DOMAINS)
def test_each_domain_is_found_by_its_name(name):
    found = domain(name)
    assert isinstance(found, Domain)
    assert found.name == name
    assert not inspect.isabstract(type(found))
    assert type(pickle.loads(pickle.dumps(found))) is type(found)  # rewards that hold it are pickled


def test_options_reach_the_domain():
    assert domain("code", workers=3).workers == 3


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(ValueError, match="domain: unknown 'physics', expected one of math, medical, code"):
        domain("physics")


def test_domains_are_imported_when_asked_for():
    code = "import sys, acqsynth.domains; sys.exit('acqsynth.domains.math' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", ["math", "medical", "code"])
def test_a_prompt_shows_its_examples_in_the_format_that_is_parsed(name):
    found = domain(name)
    shown = [Sample("First question?", "1", "Because."), Sample("Second question?", "2")]
    [turn] = found.generator_prompt(shown)
    assert turn["role"] == "user"
    for sample in shown:
        assert f"<question>\n{sample.question}\n</question>" in turn["content"]
    assert found.generator_prompt([])[0]["content"].count("<question>") == 1
    [turn] = found.student_prompt("What is it?")
    assert turn["role"] == "user"
    assert turn["content"].startswith("What is it?\n\n")


def test_what_is_written_is_parsed():
    for sample in (Sample("Why?", "So.", "As."), Sample("Why?", "So.")):
        assert domain("math").parse(written(sample)) == sample
    assert domain("math").parse("<question>Why?</question>") is None


@pytest.mark.parametrize(("name", "value"), [("question", None), ("answer", 4), ("reasoning", ["a"])])
def test_a_sample_is_made_of_strings(name, value):
    with pytest.raises(TypeError, match=f"{name}: expected a string, got"):
        Sample(**({"question": "2 + 2?", "answer": "4"} | {name: value}))


def test_one_example_is_not_many():
    [turn] = ask_for_sample("a riddle", "a word", [Sample("Q?", "A")])
    assert "Write a riddle" in turn["content"]
    assert "This is an example" in turn["content"]
    [turn] = ask_for_sample("a riddle", "a word", [Sample("Q?", "A")] * 3)
    assert "These are 3 examples" in turn["content"]
