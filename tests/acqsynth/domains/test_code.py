from __future__ import annotations

import ast
import json
import re
from typing import Any

import pytest

from acqsynth.domains import Sample, sandbox
from acqsynth.domains.base import written
from acqsynth.domains.code import Code, fenced, split_asserts

MBPP: dict[str, Any] = {
    "text": "Write a function to add two numbers.",
    "code": "import math\r\ndef add(a, b):\r\n\treturn a + b",
    "test_list": ["assert add(1, 2) == 3", "assert math.isclose(add(0.5, 2), 2.5)"],
    "test_setup_code": "",
}
HUMANEVAL: dict[str, Any] = {
    "prompt": "def half(x):\n    return x / 2\n\ndef twice(x):\n    '''Twice x.'''\n",
    "canonical_solution": "    return x * 2\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert half(candidate(3)) == 3",
    "entry_point": "twice",
}

code = Code(limits=sandbox.Limits(seconds=10.0, cpu_seconds=5), workers=2)
needs_sandbox = pytest.mark.usefixtures("contained")


def load(path, row):
    path.write_text(json.dumps(row))
    [sample] = code.load(str(path))
    return sample


def generated(answer, question="Write add, which adds two numbers."):
    sample = code.parse(f"<question>{question}</question><answer>{answer}</answer>")
    assert sample is not None
    return sample


def test_answer_of_is_the_last_whole_block():
    assert code.answer_of("First:\n```python\nx = 1\n```\nBetter:\n```py\ny = 2\n\n```\nDone.") == fenced("y = 2")
    assert code.answer_of("```\nx = 1\n```\n```python\nx = 2") == fenced("x = 1")
    assert code.answer_of("def f(x):\n    return x\n") == fenced("def f(x):\n    return x")
    assert code.answer_of("```python\n    x = 1\n```") == "```python\n    x = 1\n```"
    for nothing in ("", "I cannot.", "```python\n\n```", "```python\nx = 1"):
        assert code.answer_of(nothing) is None


def test_canonical_forgets_layout_comments_docstrings_and_asserts():
    forms = [
        "def f(x): return x+1",
        "# Adds.\ndef f( x ):\n\n    '''Adds one.'''\n    return (x + 1)  # one\nassert f(1) == 2",
        '"""A module."""\ndef f(x):\n\treturn x + 1',
    ]
    assert {code.canonical(form) for form in forms} | {code.canonical(fenced(form)) for form in forms} == {
        "def f(x):\n    return x + 1"
    }
    assert code.canonical("class A:\n    '''Empty.'''") == "class A:\n    pass"
    assert code.canonical("def f(x): return x + 2") != code.canonical(forms[0])
    assert code.canonical("def f(: ") == "def f(:"
    for hostile in ("(" * 10_000, "x\0", "-" * 100_000 + "1", "1+" * 50_000 + "1"):
        assert isinstance(code.canonical(hostile), str)


@pytest.mark.parametrize(
    "deep",
    ["+".join(["1"] * n) for n in (330, 900, 3000)]
    + ["not " * 150 + "1", "-" * 500 + "1", "f" + "(1)" * 400, "x" + ".y" * 400, "[" * 150 + "]" * 150, "9" * 4000],
)
def test_programs_that_nest_too_deep_are_handled(deep):
    """``ast.unparse`` raises on some deeply nested programs that ``ast.parse`` accepts."""
    for source in (f"def f(x): return {deep}\nassert f(1) == 1", f"def f(x): return x\nassert f(1) == {deep}", deep):
        assert isinstance(code.canonical(source), str)
        for text in (source, source.replace("\n", "; ")):
            parts = split_asserts(text)
            assert parts is None or isinstance(parts[0], str)
            sample = code.parse(f"<question>Write f, please: it is simple.</question><answer>{fenced(text)}</answer>")
            assert sample is not None
            assert code.fault(sample) is None or isinstance(code.fault(sample), str)
            assert code.generator_prompt([sample])


@pytest.mark.parametrize("end", ["\f", "\x0b", "\x1c", "\u2028", "\x85", "\r", "\r\n"])
def test_lines_are_those_that_python_counts(end):
    parts = split_asserts(
        f"s = 'a'  # one{end if end.startswith(chr(13)) else end + chr(10)}def f(x): return x\nassert f(1) == 1\ny = 2"
    )
    assert parts is not None
    assert "def f(x): return x" in parts[0]
    assert "y = 2" in parts[0]
    assert "assert" not in parts[0]


def test_asserts_are_split_from_the_program():
    source = (
        "# Adds.\ndef f(x):\n    assert x\n    return x\n\nassert f(\n    1\n) == 1\nx = 2\nassert f(x) == 2  # two"
    )
    parts = split_asserts(source)
    assert parts is not None
    program, asserts = parts
    assert program == "# Adds.\ndef f(x):\n    assert x\n    return x\n\nx = 2"
    assert [ast.unparse(node) for node in asserts] == ["assert f(1) == 1", "assert f(x) == 2"]
    shared = split_asserts("x = 1; assert x; y = 2")
    assert shared is not None
    assert shared[0] == "x = 1\ny = 2"
    assert split_asserts("def") is None


def test_mbpp_rows(tmp_path):
    sample = load(tmp_path / "a.jsonl", MBPP)
    assert sample.question.endswith("It satisfies, for example:\n```python\nassert add(1, 2) == 3\n```")
    assert "isclose" not in sample.question
    assert sample.answer == fenced("import math\ndef add(a, b):\n\treturn a + b")
    assert sample.extra == {
        "tests": "\n".join(MBPP["test_list"]),
        "names": ["add"],
        "context": "",
        "preamble": "import math",
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (MBPP | {"test_list": []}, r"row 1: test_list: expected a list of asserts, got \[\]"),
        (MBPP | {"test_list": "assert add(1, 2) == 3"}, "row 1: test_list: expected a list of asserts"),
        (MBPP | {"test_list": ["assert"]}, "row 1: test_list: not a Python program"),
        (MBPP | {"test_list": ["assert 1 == 1"]}, "row 1: test_list: no assert calls what the code defines"),
        (MBPP | {"test_setup_code": ["import math"]}, r"row 1: test_setup_code: expected text, got \['import math'\]"),
        (MBPP | {"code": "def add("}, "row 1: code: not a Python program"),
        (MBPP | {"code": ""}, "row 1: code: expected text"),
        (HUMANEVAL | {"test": None}, "row 1: test: expected text, got None"),
    ],
)
def test_a_broken_row_is_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.jsonl", row)


@needs_sandbox
def test_humaneval_rows(tmp_path):
    sample = load(tmp_path / "a.jsonl", HUMANEVAL)
    assert sample.answer == fenced(HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"])
    assert sample.extra["names"] == ["twice"]
    answers = [
        sample.answer,
        "def twice(x): return half(x) * 4",  # uses a function that the prompt defines
        "def twice(x): return x",
        "def other(x): return x * 2",  # the prompt's stub returns None
        "def half(x): return {7: 3}[x]\ndef twice(x): return 4 if x == 2 else 7",  # the tests use their own half
        "twice = lambda x: x * 2",
    ]
    assert code.equivalent([sample] * 6, answers) == [True, True, False, False, False, True]


@needs_sandbox
def test_equivalent_runs_the_tests_of_each_sample(tmp_path):
    sample = load(tmp_path / "a.jsonl", MBPP)
    answers = [
        fenced("def add(a, b):\n    return sum([a, b])"),
        fenced("def add(a, b):\n    return a + b\n\nassert add(1, 1) == 3"),  # its own wrong assert is ignored
        fenced("def add(a, b):\n    return a - b"),
        fenced("def add(a, b): return"),
        fenced("def add(a, b) return"),
        None,
        fenced("import sys\nsys.exit(0)"),
    ]
    assert code.equivalent([sample] * 7, answers) == [True, True, False, False, False, False, False]
    assert code.equivalent([], []) == []


def test_a_sample_without_tests_can_not_be_compared():
    with pytest.raises(ValueError, match="gold: sample 0 has no tests"):
        code.equivalent([Sample("?", "x = 1")], ["x = 1"])


def test_without_a_sandbox_nothing_is_judged(monkeypatch, tmp_path):
    sample = load(tmp_path / "a.jsonl", MBPP)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    for judge in (lambda: code.equivalent([sample], [sample.answer]), lambda: code.verify([sample])):
        with pytest.raises(RuntimeError, match=r"bwrap is not on PATH; .*install it"):
            judge()
    unsafe = Code(unsafe_without_sandbox=True)
    assert unsafe.equivalent([sample] * 2, [sample.answer, "add = max"]) == [True, False]


def test_a_generated_sample_carries_its_asserts_as_tests():
    answer = fenced("def add(a, b):\n    return a + b\n\nassert add(1, 2) == 3\nassert math.isclose(add(.5, 1), 1.5)")
    sample = generated(answer)
    assert sample.answer == fenced("def add(a, b):\n    return a + b")
    assert sample.extra["tests"] == "assert add(1, 2) == 3\nassert math.isclose(add(0.5, 1), 1.5)"
    assert sample.extra["names"] == ["add"]
    assert code.fault(sample) is None
    assert code.solution(sample) == sample.answer
    assert code.answer_of(code.solution(sample)) == sample.answer
    assert code.parse("<question>Why?</question>") is None


FUNCTION = "def add(a, b):\n    return a + b\n"


@pytest.mark.parametrize(
    ("answer", "question", "fault"),
    [
        ("It adds.", "Write add, which adds.", "the answer is not a Python program"),
        (fenced("def add("), "Write add, which adds.", "the answer is not a Python program"),
        (fenced(FUNCTION), "Write add, which adds.", "the answer has no assert that calls"),
        (fenced(FUNCTION + "assert add(1, 2) == 3"), "Write add.", "the question is too short"),
        (fenced(FUNCTION + "assert add(1, 2) == 3"), "Write what adds two addends.", "the question does not name"),
        *(
            (fenced(f"{FUNCTION}assert add(1, 2) == 3\nassert {test}"), "Write add, which adds.", "an assert is more")
            for test in (
                "open('/etc/passwd')",
                "eval('1')",
                "__import__('os')",
                "add.__class__",
                "(x for x in [1]).gi_frame.f_back",
                "[].append(add(1, 2)) is None",
                "(abs := add)(1, 2)",
                "[isinstance for isinstance in [add]]",
                "(lambda: add(1, 2))()",
                "unknown",
                "math.__loader__",
                "[math for math in [add]]",
                "breakpoint()",
                "add(1, 2), print('x')",
            )
        ),
        (fenced(FUNCTION + "assert 1 == 1"), "Write add, which adds.", "the answer has no assert that calls"),
    ],
)
def test_fault(answer, question, fault):
    sample = generated(answer, question)
    found = code.fault(sample)
    assert found is not None
    assert found.startswith(fault)
    if not fault.startswith("the question"):
        assert "tests" not in sample.extra


@pytest.mark.parametrize(
    "test",
    [
        "add(1, 2) == 3 and add(-1, 1) != 1",
        "sorted([add(i, i) for i in range(3)]) == [0, 2, 4]",
        "abs(add(0.1, 0.2) - 0.3) < 1e-9",
        "math.sqrt(add(8, 8)) == 4",
        "isinstance(add(1, 2), int), 'a message'",
        "{k: v for k, v in zip('ab', (1, 2))} == {'a': add(1, 0), 'b': 2}",
    ],
)
def test_plain_asserts(test):
    sample = generated(fenced(f"{FUNCTION}assert {test}"))
    assert code.fault(sample) is None
    assert sample.extra["names"] == ["add"]


@needs_sandbox
def test_verify():
    tests = {
        "assert add(1, 2) == 3": True,
        "assert add(1, 2) == 4": False,
        "assert add(1, 2) == 3\nassert add(2, 2) == 5": False,
        "assert add(1, 2) == add(1, 2)": False,  # holds for any function
        "assert add(1, 2) or True": False,
        "assert 1 == 1 or add(1, 2)": False,
        "assert add(1, 2)": False,
        "assert isinstance(add(1, 2), int)": False,  # holds for any integer
        "assert abs(add(1, 2)) == abs(add(1, 2))": False,
        "assert int(add(1, 2)) == add(1, 2)": False,
        "assert add(1, 2) + 0 == add(1, 2)": False,
        "assert len([add(1, 2)]) == 1": False,
        "assert add(1, 2) - add(2, 1) == 0": False,
        "assert sorted([add(1, 2)]) == [add(1, 2)]": False,
        "assert add('a', 'b').__len__() == 2": False,  # no plain assert
        "assert len(add('a', 'b')) == 2": True,
        "assert add([], []) == []": True,
        "assert add('', '') == ''": True,
        "assert add(0, 0) == 0": True,
        "assert add(1, 0) == True": True,
        "assert add(1, 2) > 2": False,  # holds for 7 and 2.5
        "assert add(1, 2) == 3\nassert add(1, 2) == add(1, 2)": True,
        "assert add('a', 2)": False,
        "assert open('/tmp/x', 'w') and add(1, 2) == 3": False,  # not executed
        "": False,
    }
    samples = [generated(fenced(FUNCTION + test)) for test in tests]
    assert dict(zip(tests, code.verify(samples), strict=True)) == tests
    assert code.verify([generated(fenced("def f(x): return 0\nE = 0\nassert f(1) == E"))]) == [False]
    assert code.verify([Sample("?", "no program")]) == [False]
    assert code.verify([]) == []


@needs_sandbox
def test_slow_tests_prove_no_more_than_fast_ones():
    tests = {
        "time.sleep(0.1)\nassert f(1) == 13": True,
        "time.sleep(1.1)\nassert f(1) == f(1)": False,
        "time.sleep(1.1)\nassert isinstance(f(1), int)": False,  # exceeds even the limit of the tests with constants
    }
    samples = [
        Sample("?", fenced("def f(x): return 13"), extra={"tests": test, "names": ["f"], "preamble": "import time"})
        for test in tests
    ]
    brief = Code(limits=sandbox.Limits(seconds=1.5), workers=2)
    assert dict(zip(tests, brief.verify(samples), strict=True)) == tests


@needs_sandbox
def test_a_program_does_not_decide_on_its_own_tests():
    """Redefining other names that the asserts use, such as ``math`` or ``abs``, has no effect on the tests."""
    fake = "class math:\n    isclose = staticmethod(lambda *_: True)\n"
    sample = generated(fenced(f"{fake}{FUNCTION}assert math.isclose(add(1, 2), 99)"))
    assert sample.extra["names"] == ["add"]
    assert code.verify([sample]) == [False]
    sample = generated(fenced(f"def abs(x): return 0\n{FUNCTION}assert abs(add(1, 2) - 9) < 1"))
    assert code.verify([sample]) == [False]


def test_examples_show_asserts_as_a_generator_is_to_write_them(tmp_path):
    for row in (MBPP, HUMANEVAL):
        sample = load(tmp_path / "a.jsonl", row)
        [turn] = code.generator_prompt([sample])
        shown = turn["content"].split("difficulty:\n\n")[1].split("\n\nYours")[0]
        parsed = code.parse(shown)
        assert parsed is not None
        assert code.fault(parsed) is None
        assert parsed.answer == sample.answer
        assert parsed.question == sample.question
    [turn] = code.generator_prompt([Sample("Q?", fenced("x = 1"))])
    assert written(Sample("Q?", fenced("x = 1"))) in turn["content"]


def broken(program, names):
    """The program with the tested functions changed to return a wrong value."""
    tree = ast.parse(program)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.body = [ast.Return(ast.Constant("wrong"))]
    return ast.unparse(tree)


@needs_sandbox
@pytest.mark.filterwarnings("ignore:invalid escape")
@pytest.mark.parametrize(("name", "step"), [("humaneval", 1), ("mbpp", 8)])
def test_real_programs_pass_and_mutated_ones_fail(shared_data, name, step):
    samples = code.load(shared_data(f"code/{name}.jsonl"))[::step]
    assert len(samples) > 120
    right = code.equivalent(samples, [sample.answer for sample in samples])
    assert [s.question for s, passed in zip(samples, right, strict=True) if not passed] == []
    sources = [re.sub(r"^```python\n|\n```$", "", sample.answer) for sample in samples]
    mutated = [broken(source, s.extra["names"]) for source, s in zip(sources, samples, strict=True)][::4]
    assert not any(code.equivalent(samples[::4], mutated))
    assert set(code.verify(samples[::8])) == {True}
