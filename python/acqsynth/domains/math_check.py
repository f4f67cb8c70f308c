"""Equality of mathematical answers by math-verify, in processes that can be killed.

math-verify needs unbounded time and memory on some inputs (``9^{9^{9^9}}``), and its own guard, ``signal.alarm``, fails
in a trainer's thread. So each check runs in the main thread of a worker process with a deadline enforced by the kernel.

Run as a script, this file is the worker: it reads pairs as JSON lines and writes ``true`` or ``false`` for each.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import queue
import re
import resource
import selectors
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from subprocess import PIPE, Popen
from typing import Any

from acqsynth import checks

START_SECONDS = 120.0  # sympy's import takes half a second on an idle machine
LONGEST = 2000  # maximum characters of an answer; longer ones are never equal here


class MathChecker:
    """Worker processes that compare answers; they start on the first check.

    Args:
        workers: concurrent checks, one process each.
        seconds: deadline of a check. A worker that exceeds it or dies is replaced, and its answer counts as not equal.

    Raises:
        ValueError: workers is not an int >= 1, or seconds is not a number > 0.
    """

    def __init__(self, workers: int = 2, seconds: float = 5.0) -> None:
        checks.positive_int("workers", workers)
        if not isinstance(seconds, int | float) or not seconds > 0:
            raise ValueError(f"seconds: expected more than 0, got {seconds!r}")
        self.workers = workers
        self.seconds = seconds
        #: Number of checks so far, and of those whose worker exceeded the deadline or died.
        self.checked = 0
        self.lost = 0
        self._lock = threading.Lock()
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(workers):
            self._idle.put(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return MathChecker, (self.workers, self.seconds)  # each process has its own workers

    def equal(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether the second of each pair equals the first, the true answer (order matters to math-verify).

        Args:
            pairs: n pairs of LaTeX or plain expressions, without dollar signs.

        Raises:
            RuntimeError: math-verify is not installed, or its process does not start.
        """
        if not pairs:
            return []
        self.require()
        with ThreadPoolExecutor(min(self.workers, len(pairs))) as pool:
            return list(pool.map(lambda pair: self._equal(*pair), pairs))

    def require(self) -> None:
        """Raises RuntimeError if math-verify is not installed."""
        if importlib.util.find_spec("math_verify") is None:
            raise RuntimeError('math-verify is not installed: run pip install "acqcore[train]"')

    def close(self) -> None:
        """Ends the idle workers; the next check starts new ones."""
        for _ in range(self._idle.qsize()):
            worker = self._idle.get()
            if worker is not None:
                worker.kill()
            self._idle.put_nowait(None)

    def _equal(self, gold: str, answer: str) -> bool:
        if max(len(gold), len(answer)) > LONGEST:
            return False
        worker = self._idle.get()
        try:
            if worker is None:
                worker = _Worker(self.seconds)
            result = worker.ask(gold, answer)
            if result is None:
                worker.kill()
                worker = None
        finally:
            self._idle.put(worker)
        with self._lock:
            self.checked += 1
            self.lost += result is None
        return bool(result)


class _Worker:
    """One process; it ends when its stdin closes, and so with its parent."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        # Run as a file, so that neither this package nor the caller's main module is imported again; -P because this
        # folder contains a math.py.
        self.process = Popen([sys.executable, "-P", __file__, str(seconds)], stdin=PIPE, stdout=PIPE, stderr=PIPE)
        if self._line(START_SECONDS) is None:
            self.process.kill()
            _, errors = self.process.communicate()
            raise RuntimeError(f"the process of math-verify did not start: {errors.decode(errors='replace').strip()}")

    def ask(self, gold: str, answer: str) -> bool | None:
        """Equal or not, or None if the worker was lost."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            return None
        # The kernel ends the worker at its deadline; the extra second is for processes that no timer ends (stopped).
        line = self._line(self.seconds + 1)
        return None if line is None else json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _line(self, seconds: float) -> bytes | None:
        """The worker's next line, or None if it ended or did not write one in time."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return None
        return self.process.stdout.readline() or None


# --- the worker -------------------------------------------------------------------------------------------------------

# Parts that normalization and parser drop: quotes, dollars, percent signs, the base of a number, dots.
_DROPPED = re.compile(r"[\'\"$%]|[\d)}]\s*_|\\[lcd]?dots(?![A-Za-z])|\.\.")
_SPACE = re.compile(r"(?:\s|\\[,;:! ]|\\q?quad|\\(?:left|right|displaystyle)|[{}&])*")
_MEMORY = 4 << 30  # bytes of address space; an expression that needs more counts as not equal


def _reader() -> Callable[[str], Any]:
    """Returns a function that parses a whole LaTeX expression, or raises.

    ``math_verify.parse`` accepts any expression that a text begins with or contains: it reads ``4_{8}``, ``4+`` and
    ``4|7`` as 4. Here the grammar must reach the end of the text, and no part is dropped beforehand.
    """
    from antlr4 import Token
    from latex2sympy2_extended.antlr_parser import PSParser
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
    from math_verify.grader import should_treat_as_complex
    from sympy import And, FiniteSet, Or
    from sympy.logic.boolalg import Boolean

    config = NormalizationConfig(units=False, boxed="none", equations=False)
    conversion = ConversionConfig(lowercase_symbols=False)  # N and n are two variables
    whole = PSParser.math

    def math(parser: Any) -> Any:
        tree = whole(parser)
        if parser.getCurrentToken().type != Token.EOF:
            raise ValueError("the text goes on after the expression")
        stream = parser.getTokenStream()
        left = str(stream.tokenSource.inputStream)
        for token in stream.tokens[:-1]:
            between, found, left = left.partition(token.text)
            if not found or not _SPACE.fullmatch(between):
                raise ValueError("the text has a part that is not a token")
        return tree

    PSParser.math = math

    def read(text: str) -> Any:
        if _DROPPED.search(text):
            raise ValueError("a part that is not read")
        plain = normalize_latex(text, config)
        real = not should_treat_as_complex(plain)
        found = latex2sympy(plain, is_real=real, conversion_config=conversion, normalization_config=None)
        word = re.search(r"\b(?:and|or)\b", text)
        if word and isinstance(found, FiniteSet) and all(isinstance(part, Boolean) for part in found):
            return (And if word[0] == "and" else Or)(*found)  # "x < 1 or x > 2"
        return found

    return read


def _solutions(side: Any) -> Any:
    """The numbers that satisfy an inequality; anything else unchanged."""
    from sympy import Equality
    from sympy.logic.boolalg import Boolean

    return side.as_set() if isinstance(side, Boolean) and not isinstance(side, Equality) else side


def _equal(gold: Any, answer: Any) -> bool:
    from math_verify import verify

    if not all(getattr(side, "rel_op", None) == "==" for side in (gold, answer)):
        if len(gold.free_symbols | answer.free_symbols) == 1:  # the solutions of x > 3 and y > 3 are not the same
            gold, answer = _solutions(gold), _solutions(answer)
        if gold == answer:
            return True
        if all(getattr(side, "is_number", False) for side in (gold, answer)) and abs(gold - answer) > 5e-5 * abs(gold):
            return False  # math-verify rounds to six decimals, however small the numbers
        return bool(verify([gold], [answer], timeout_seconds=None))
    # math-verify would compare the solutions, whatever the unknowns. Without denominators, two forms of one equation
    # differ by a constant factor.
    true, given = ((side.lhs - side.rhs).together().as_numer_denom()[0] for side in (gold, answer))
    factor = (true / given).simplify()
    return bool(true.free_symbols and factor.is_number and factor.is_finite and factor != 0)


def _work() -> None:
    read = _reader()
    seconds = float(sys.argv[1])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    logging.disable()  # math-verify warns that its own timeouts are off
    # Output of the libraries (antlr prints) must not mix with the replies.
    replies = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    replies.write("ready\n")
    replies.flush()
    os.dup2(null, 2)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        # SIGALRM's default action: at the deadline the kernel ends the process, whatever code it is in.
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            equal = _equal(read(gold), read(answer))
        except (Exception, MemoryError):
            equal = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write("true\n" if equal else "false\n")
        replies.flush()


if __name__ == "__main__":
    _work()
