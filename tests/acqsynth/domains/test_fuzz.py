"""Fuzzed texts and data files raise only documented exceptions and are handled quickly."""

from __future__ import annotations

import json
import time

import pyarrow
import pyarrow.parquet
import pytest
from fuzzing import fuzzed
from hypothesis import strategies as st

from acqsynth.domains import DOMAINS, Sample, domain
from acqsynth.domains.math import Math
from acqsynth.domains.math_check import MathChecker
from acqsynth.normal_form import normal_form
from acqsynth.rewards.gates import Length, New, NoLeak, NoRepetition, NotInEvaluation, Sound

SLOW = 5.0  # maximum CPU seconds per example

FRAGMENTS = [
    *("<question>", "</question>", "<reasoning>", "</reasoning>", "<answer>", "</answer>", "```python\n", "```", "\n"),
    *("\\boxed{", "}", "{", "\\frac{1}{2}", "\\frac12", "\\sqrt(", "$", "\\(", "\\)", "#### ", "The answer is ", "%"),
    *("A) ", "B) ", "C) ", "D) ", "yes", "maybe", " km", " million", "dozen", "°C", "10:30 am", "=", "x", "_{8}", "**"),
    *(
        "def f(x): return ",
        "assert f(1) == ",
        "assert ",
        "lambda: ",
        "f(",
        ")",
        "[",
        "]",
        "'",
        '"',
        "\\",
        ";",
        ":",
        "#",
    ),
    *("1", "1,000", "0.5", "-3/4", "9" * 50, "\u0661", "\uff11", "\u200b", "\u0301", "\ud800", "\x00", "\r", "\u2028"),
    *("What is ", "?", "or", "and", "not ", " ", "\t", "  ", "&amp;", "&#0;", "<b>", "1. ", "(1)"),
    *("#", "1+" * 400, "(" * 300),
]
texts = st.one_of(
    st.text(max_size=200),
    st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join),
    st.builds(lambda part, size: part * (size // len(part)), st.sampled_from(FRAGMENTS), st.integers(1, 60_000)),
)


@pytest.fixture(scope="module")
def math():
    math = Math(MathChecker(workers=1, seconds=1.0))
    yield math
    math.checker.close()


@pytest.mark.parametrize("name", DOMAINS)
@fuzzed(60, text=texts, other=texts)
def test_a_domain_reads_any_text(name, text, other):
    own = domain(name)
    begin = time.process_time()
    wrapped = f"<question>{text}</question><answer>{other}</answer>"
    for sample in (own.parse(text), own.parse(wrapped), Sample(text or "?", other or "?", text)):
        if sample is not None:
            assert own.fault(sample) is None or isinstance(own.fault(sample), str)
            assert isinstance(own.solution(sample), str)
            assert own.generator_prompt([sample])
            assert own.student_prompt(sample.question)
    answer = own.answer_of(text)
    assert answer is None or isinstance(own.canonical(answer), str)
    assert isinstance(own.canonical(other), str)
    assert time.process_time() - begin < SLOW


@fuzzed(30, gold=texts, answer=texts)
def test_any_two_answers_compare(math, gold, answer):
    assert math.canonical(gold) == math.canonical(gold + " ")
    [forth] = math.equivalent([Sample("?", gold or "?")], [answer])
    assert isinstance(forth, bool)


@fuzzed(60, text=texts, other=texts)
def test_a_gate_takes_any_text(text, other):
    own = domain("math")
    begin = time.process_time()
    samples = [Sample(text, other, text), Sample(other, text)]
    gates = [Sound(own), Length(), NoRepetition(), NoLeak(own), New(samples[1:]), NotInEvaluation(samples[1:])]
    for gate in gates:
        assert all(isinstance(verdict, bool) for verdict in gate(samples))
    assert gates[4](samples[1:]) == [False]  # a copy of itself
    assert gates[5](samples[1:]) == [False]
    assert normal_form(text) == normal_form(text + "\u200b")
    assert time.process_time() - begin < SLOW


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
columns = st.sampled_from(
    [
        *("question", "answer", "reasoning", "problem", "solution", "text"),
        *("code", "test_list", "prompt", "test", "cop", "opa"),
    ]
)
rows = st.dictionaries(columns, values, max_size=6)


@pytest.mark.parametrize("name", DOMAINS)
@fuzzed(40, parts=st.lists(st.one_of(st.binary(max_size=40), rows), max_size=5), cut=st.integers(0, 400))
def test_a_file_gives_samples_or_names_itself(name, parts, cut, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"{name}.jsonl"
    lines = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in parts]
    path.write_bytes(b"\n".join(lines)[: cut * 10])
    check(name, path)


@fuzzed(
    20,
    found=st.lists(st.dictionaries(columns, texts, min_size=1, max_size=4), max_size=4),
    flips=st.lists(st.integers(0, 2000), max_size=4),
)
def test_a_parquet_file_gives_samples_or_names_itself(found, flips, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "rows.parquet"
    clean = [{key: value.encode(errors="replace").decode() for key, value in row.items()} for row in found]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(clean or [{"question": "?"}]), path)
    raw = bytearray(path.read_bytes())
    for place in flips:
        raw[place % len(raw)] ^= 0xFF
    path.write_bytes(raw)
    check("math", path)


def check(name, path):
    begin = time.process_time()
    try:
        found = domain(name).load(str(path))
    except ValueError as error:
        assert path.name in str(error)  # noqa: PT017 - the file may also be valid
    else:
        assert found
        assert all(isinstance(sample, Sample) for sample in found)
    assert time.process_time() - begin < SLOW
