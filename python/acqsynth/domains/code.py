"""Programming in Python: MBPP, HumanEval, and generated functions with asserts.

A sample's ``extra`` describes its tests: ``tests`` (source), ``names`` (the program's names that they use, the function
first), ``context`` (source before the program: HumanEval's prompt) and ``preamble`` (trusted source before the tests).
The answer is one fenced block. A generator writes asserts in the same block, after the function; they are moved from
the answer to the tests, so that a student learns only the function.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar

from acqsynth.domains import sandbox
from acqsynth.domains.base import Domain, Layout, Messages, Row, Sample, ask_for_sample, optional, text

_FENCED = re.compile(r"```[\w+-]*[ \t]*\r?\n(.*?)```", re.DOTALL)

_LINE_END = re.compile(r"\r\n?|\n")  # the line ends that ast counts; str.splitlines recognises more

LONGEST = 100_000  # maximum characters of a program; parsing takes a second per million

_DOCUMENTED = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

#: Built-ins that a generated assert may call besides the program's functions; none reaches files, code or frames.
PLAIN_NAMES = frozenset(
    {
        *("bool", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "set", "str", "tuple"),
        *("abs", "all", "any", "divmod", "len", "max", "min", "pow", "round", "sum"),
        *("enumerate", "filter", "isinstance", "map", "range", "reversed", "sorted", "zip"),
    }
)


def _mbpp(row: Row) -> Sample:
    program, tests = text(row, "code"), row["test_list"]
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise ValueError(f"test_list: expected a list of asserts, got {tests!r:.60}")
    source = "\n".join([optional(row, "test_setup_code"), *tests]).strip()
    gold, held = _parsed(program), _parsed(source)
    if gold is None or held is None:
        raise ValueError(f"{'code' if gold is None else 'test_list'}: not a Python program")
    defined = _defined(gold.body)
    # The asserts come last, so in reverse order their function comes first.
    used = [name for name in _used(reversed(held.body)) if name in defined]
    imported = {name for name in used if isinstance(defined[name], ast.Import | ast.ImportFrom)}
    imports = [ast.unparse(defined[name]) for name in used if name in imported]
    names = [name for name in used if name not in imported]
    if not names:
        raise ValueError("test_list: no assert calls what the code defines")
    return Sample(
        f"{text(row, 'text')}\n\nIt satisfies, for example:\n{fenced(tests[0])}",
        fenced(program),
        extra={"tests": source, "names": names, "context": "", "preamble": "\n".join(imports)},
    )


def _humaneval(row: Row) -> Sample:
    prompt, solution, name = row["prompt"], row["canonical_solution"], text(row, "entry_point")
    for column in ("prompt", "canonical_solution", "test"):
        text(row, column)  # only checked: indentation matters, so the text is not stripped
    return Sample(
        f"Complete this Python function:\n{fenced(prompt)}",
        fenced(prompt + solution),
        # Helpers that the tests use from the prompt belong to the tests: a program cannot replace them.
        extra={"tests": f"{row['test']}\n\ncheck({name})", "names": [name], "context": prompt, "preamble": prompt},
    )


#: Passes if the tests pass with each function replaced by a constant, for two different constants.
_IDLE = """
def passes(same):
    scope = {**globals(), **dict.fromkeys(%(names)r, same), **dict.fromkeys(%(called)r, lambda *_, **__: same)}
    try:
        exec(%(tests)r, scope)
    except BaseException:  # tests may also fail by sys.exit
        return False
    return True

def two_pass():
    first = []
    for same in (
        object(), None, True, False, 0, 1, 7, -0.5, 2.5, "", "a", [], [0], (), (0,), set(), {0}, {}, {0: 0},
    ):
        if passes(same):
            if any(same != other for other in first):
                return True
            first.append(same)
    return False

assert two_pass()
"""
_IDLE_RUNS = 4  # times a job's wall-clock limit, for the tests with constants


class Code(Domain):
    """Python functions, which are right if they pass their tests.

    Args:
        limits: limits of one program with its tests.
        workers: programs run concurrently; by default one per CPU.
        unsafe_without_sandbox: see :func:`acqsynth.domains.sandbox.run`.
    """

    name: ClassVar[str] = "code"
    layouts = (
        Layout(("text", "code", "test_list"), _mbpp, ("test_setup_code",)),
        Layout(("prompt", "canonical_solution", "test", "entry_point"), _humaneval),
    )

    def __init__(
        self,
        *,
        limits: sandbox.Limits | None = None,
        workers: int | None = None,
        unsafe_without_sandbox: bool = False,
    ) -> None:
        self.limits = limits or sandbox.Limits()
        self.workers = workers
        self.unsafe_without_sandbox = unsafe_without_sandbox

    def generator_prompt(self, shown: Sequence[Sample]) -> Messages:
        return ask_for_sample(
            "one new programming problem that a single Python function solves, and that names this function",
            "```python\nthe function, then three or more asserts, each comparing one call of it with a literal\n```",
            [replace(sample, answer=_with_tests(sample)) for sample in shown],
        )

    def student_prompt(self, question: str) -> Messages:
        return [{"role": "user", "content": f"{question}\n\nAnswer with the whole function in one ```python block."}]

    def answer_of(self, completion: str) -> str | None:
        """The last fenced block, including fences; without fences, the whole completion if it is a program."""
        blocks = _FENCED.findall(completion)
        source = blocks[-1] if blocks else completion
        if not source.strip() or (not blocks and _parsed(source) is None):
            return None
        return fenced(source)

    def canonical(self, answer: str) -> str:
        """The program without comments, docstrings, layout and top-level asserts; other text unchanged."""
        source = _source(answer)
        tree = _parsed(source)
        if tree is None:
            return source.strip()
        tree.body = [node for node in tree.body if not isinstance(node, ast.Assert)]
        for node in ast.walk(tree):
            if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        return _unparsed(tree) or source.strip()

    def equivalent(self, gold: Sequence[Sample], answers: Sequence[str | None]) -> list[bool]:
        """Whether each answer passes the tests of its sample; the answer's own top-level asserts are removed.

        Raises:
            ValueError: a sample has no tests. RuntimeError: no sandbox is available (see ``sandbox.run``).
        """
        programs = [None if answer is None else split_asserts(_source(answer)) for answer in answers]
        jobs = {
            i: _job(i, sample, program[0])
            for i, (sample, program) in enumerate(zip(gold, programs, strict=True))
            if program is not None
        }
        passed = set(self._passed(jobs))
        return [i in passed for i in range(len(answers))]

    def require(self) -> None:
        if not self.unsafe_without_sandbox:
            sandbox.require()

    def verify(self, samples: Sequence[Sample]) -> list[bool | None]:
        """Whether each sample's answer passes its tests and the tests depend on the answer. They do not if they also
        pass with each function replaced by a constant, for two different constants; ``assert isinstance(f(1), int)``
        does. Tests that fit a wrong answer are not detected."""
        checked = [i for i, sample in enumerate(samples) if sample.extra.get("tests")]
        real = {i: _job(i, samples[i], _source(samples[i].answer)) for i in checked}
        passed = self._passed(real)
        idle = [replace(real[i], program="", names=(), tests=_idle(real[i])) for i in passed]
        # The tests run once per constant. Only their failure proves anything: a timeout does not.
        results = self._run(idle, replace(self.limits, seconds=_IDLE_RUNS * self.limits.seconds))
        proved = {i for i, result in zip(passed, results, strict=True) if result.status == "failed"}
        return [i in proved for i in range(len(samples))]

    def parse(self, text: str) -> Sample | None:
        """As :meth:`Domain.parse`; the answer's asserts become its tests if they are plain (see :meth:`fault`)."""
        sample = super().parse(text)
        block = None if sample is None else self.answer_of(sample.answer)
        if sample is None or block is None:
            return sample
        parts = split_asserts(_source(block))
        if parts is None:
            return sample
        program, asserts = parts
        names = _tested(program, asserts)
        tests = _unparsed(ast.Module([*asserts], []))
        if not names or tests is None or not all(_plain(node, names) for node in asserts):
            return replace(sample, answer=block)
        extra = {"tests": tests, "names": names, "context": "", "preamble": "import math"}
        return replace(sample, answer=fenced(program), extra=extra)

    def fault(self, sample: Sample) -> str | None:
        parts = split_asserts(_source(sample.answer))
        if parts is None:
            return "the answer is not a Python program"
        if not sample.extra.get("tests"):
            if not _tested(*parts):
                return "the answer has no assert that calls its function"
            return "an assert is more than the function's calls, literals and simple built-ins"
        if len(sample.question) < 20:
            return "the question is too short"
        if not any(re.search(rf"\b{name}\b", sample.question) for name in sample.extra["names"]):
            return "the question does not name the function"
        return None

    def _passed(self, jobs: dict[int, sandbox.Job]) -> list[int]:
        """The keys of jobs that pass."""
        results = self._run(list(jobs.values()), self.limits)
        return [i for i, result in zip(jobs, results, strict=True) if result.status == "passed"]

    def _run(self, jobs: list[sandbox.Job], limits: sandbox.Limits) -> list[sandbox.Result]:
        return sandbox.run(jobs, limits, workers=self.workers, unsafe_without_sandbox=self.unsafe_without_sandbox)


def fenced(source: str) -> str:
    """The source as a fenced block, the form of a sample's answer."""
    return f"```python\n{source.strip(chr(10)).rstrip()}\n```"


def split_asserts(source: str) -> tuple[str, list[ast.Assert]] | None:
    """A program without its top-level asserts, and the asserts; None if it does not parse or nests too deeply."""
    tree = _parsed(source)
    if tree is None:
        return None
    asserts = [node for node in tree.body if isinstance(node, ast.Assert)]
    rest = [node for node in tree.body if not isinstance(node, ast.Assert)]
    removed = _lines(asserts)
    if removed & _lines(rest):  # "assert f(1) == 1; x = 2"
        text = _unparsed(ast.Module(rest, []))
        return None if text is None else (text, asserts)
    kept = [line for number, line in enumerate(_LINE_END.split(source), 1) if number not in removed]
    return "\n".join(kept).strip("\n"), asserts


def _lines(nodes: Iterable[ast.stmt]) -> set[int]:
    return {line for node in nodes for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}


def _source(answer: str) -> str:
    """The program of an answer, without its fences."""
    blocks = _FENCED.findall(answer)
    return blocks[-1] if blocks else answer


def _parsed(source: str) -> ast.Module | None:
    if len(source) > LONGEST:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for invalid escapes and the like
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _unparsed(tree: ast.Module) -> str | None:
    """The source of a tree; None if it nests too deeply: ``1 + 1 + ...`` with 330 terms exceeds Python's limit."""
    try:
        return ast.unparse(tree)
    except (RecursionError, ValueError):  # ValueError: an integer with too many digits
        return None


def _defined(body: Iterable[ast.stmt]) -> dict[str, ast.stmt]:
    """Names bound by top-level statements -> the statement."""
    names: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update({alias.asname or alias.name.partition(".")[0]: node for alias in node.names})
        elif isinstance(node, ast.Assign):
            names.update({target.id: node for target in node.targets if isinstance(target, ast.Name)})
    return names


def _used(nodes: Iterable[ast.AST]) -> list[str]:
    """Names used, in order, without duplicates."""
    walked = (part for node in nodes for part in ast.walk(node))
    return list(dict.fromkeys(part.id for part in walked if isinstance(part, ast.Name)))


def _tested(program: str, asserts: Sequence[ast.Assert]) -> list[str]:
    """Names that generated asserts use from a program that parses. Excludes ``math`` and built-ins, because a program
    that redefines them could decide the result of its own tests."""
    tree = _parsed(program)
    defined = _defined(tree.body if tree else [])
    return [name for name in _used(asserts) if name in defined and name not in {*PLAIN_NAMES, "math"}]


def _plain(node: ast.AST, names: Iterable[str]) -> bool:
    """Whether a generated assert is safe to run among trusted tests: no names except ``names``, ``PLAIN_NAMES``,
    ``math`` and its own loop variables, and no attributes except ``math``'s. Other attributes, such as those of a
    generator object, lead to the grader's frame.
    """
    bound = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    allowed = {*names, *PLAIN_NAMES, *bound, "math"}
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute):
            if not isinstance(part.value, ast.Name) or part.value.id != "math" or part.attr.startswith("_"):
                return False
        elif isinstance(part, ast.Name):
            if part.id not in allowed or part.id.startswith("__"):
                return False
        elif isinstance(part, ast.NamedExpr | ast.Lambda | ast.Await | ast.Yield | ast.YieldFrom):
            return False
    return not bound & {"math", *names, *PLAIN_NAMES}


def _idle(job: sandbox.Job) -> str:
    """Tests of a job's own tests, which pass if those do not depend on the program."""
    tree = _parsed(job.tests)
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call)) if tree else ()
    called = {function.id for function in calls if isinstance(function, ast.Name)}.intersection(job.names)
    return _IDLE % {"names": job.names, "called": called or job.names, "tests": job.tests}


def _with_tests(sample: Sample) -> str:
    """An example's answer followed by up to three asserts, as a generator should write it."""
    names = sample.extra.get("names", ())
    tree = _parsed(sample.extra.get("tests", ""))
    shown = []
    for node in ast.walk(tree) if tree and names else ():
        if isinstance(node, ast.Assert):
            for part in ast.walk(node):
                if isinstance(part, ast.Name) and part.id == "candidate":  # HumanEval's name for it
                    part.id = names[0]
            if _plain(node, names) and (source := _unparsed(ast.Module([node], []))):
                shown.append(source)
    return fenced("\n".join([_source(sample.answer).rstrip(), "", *shown[:3]]))


def _job(number: int, sample: Sample, program: str) -> sandbox.Job:
    extra = sample.extra
    if not extra.get("tests"):
        raise ValueError(f"gold: sample {number} has no tests")
    source = "\n\n".join(part for part in (extra.get("context"), program) if part)
    return sandbox.Job(source, extra["tests"], tuple(extra["names"]), extra.get("preamble", ""))
