"""A worker of ``acqsynth.domains.math_check``: reads pairs as JSON lines, writes ``true`` or ``false`` for each.

Started as a script; nothing here imports the package.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

# What normalization and parser drop: quotes, dollars, percent signs, the base of a number, dots.
DROPPED = re.compile(r"[\'\"$%]|[\d)}]\s*_|\\[lcd]?dots(?![A-Za-z])|\.\.")
SPACE = re.compile(r"(?:\s|\\[,;:! ]|\\q?quad|\\(?:left|right|displaystyle)|[{}&])*")
MEMORY = 4 << 30  # bytes of address space: an expression that needs more is not equal, and leaves the machine alone


def reader() -> Callable[[str], Any]:
    """A function that reads a whole LaTeX expression, or raises.

    ``math_verify.parse`` accepts any expression that a text begins with or contains: of ``4_{8}``, ``4+`` and ``4|7``
    it reads a 4. Here the grammar has to reach the end of the text, and no part is dropped before.
    """
    from antlr4 import Token
    from latex2sympy2_extended.antlr_parser import PSParser
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
    from math_verify.grader import should_treat_as_complex

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
            if not found or not SPACE.fullmatch(between):
                raise ValueError("the text has a part that is no token")
        return tree

    PSParser.math = math

    def read(text: str) -> Any:
        if DROPPED.search(text):
            raise ValueError("a part that is not read")
        plain = normalize_latex(text, config)
        real = not should_treat_as_complex(plain)
        return latex2sympy(plain, is_real=real, conversion_config=conversion, normalization_config=None)

    return read


def main() -> None:
    from math_verify import verify

    read = reader()
    seconds = float(sys.argv[1])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable()  # math-verify warns that its own timeouts are off
    # What is printed by the libraries (antlr does) must not come between the replies.
    replies = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    replies.write("ready\n")
    replies.flush()
    os.dup2(null, 2)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        # By the default action of SIGALRM, at the deadline the kernel ends the process, in whatever code it is.
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            equal = bool(verify([read(gold)], [read(answer)], timeout_seconds=None))
        except (Exception, MemoryError):
            equal = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write("true\n" if equal else "false\n")
        replies.flush()


if __name__ == "__main__":
    main()
