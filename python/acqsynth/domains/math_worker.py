"""A worker of ``acqsynth.domains.math_check``: reads pairs as JSON lines, writes ``true`` or ``false`` for each.

Started as a script; nothing here imports the package.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys

MEMORY = 4 << 30  # bytes of address space: an expression that needs more is not equal, and leaves the machine alone


def main() -> None:
    from math_verify import parse, verify

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
            parsed = [parse(f"${text}$", parsing_timeout=None) for text in (gold, answer)]
            equal = bool(verify(*parsed, timeout_seconds=None))
        except (Exception, MemoryError):
            equal = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write("true\n" if equal else "false\n")
        replies.flush()


if __name__ == "__main__":
    main()
