"""Runs untrusted Python against its tests in bubblewrap sandboxes.

A program sees the shared libraries, the interpreter with its standard library (site-packages hidden) and a private
``/tmp`` of 16 MiB, but no ``/etc``, ``/proc``, home or project files, no network and no other process. It is one
process with one thread; a seccomp filter denies more, so the limit on its address space limits its memory. CPU seconds,
address space, file size and open files are limited from inside, wall-clock time and output from outside.

The tests run in a second sandbox (see ``acqsynth.domains.harness``), so that the program's never holds them or the
expected values. The verdict comes through a pipe that only the tests' process has; the exit status proves nothing.

Not contained: kernel bugs within reach of such a process; machine load within the limits; and a program that knows its
tests and hard-codes their answers.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import py_compile
import selectors
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["passed", "failed", "timeout", "memory", "output", "killed"]

HARNESS = Path(__file__).with_name("harness.py")
VERDICT = 16384  # maximum bytes of a verdict
GRACE = 1.0  # seconds for a program that stopped replying to end by itself, so that its exit status is known

#: The fixed hash seed keeps sets of strings in one order, so that verdicts are reproducible.
ENVIRONMENT = {"HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}

INSTALL = (
    "untrusted programs run in bubblewrap >= 0.7: install it ('apt install bubblewrap', 'dnf install bubblewrap'), "
    "and let it create user namespaces, or pass unsafe_without_sandbox=True on a machine that you can afford to lose"
)


@dataclass(frozen=True)
class Job:
    """A program and its tests.

    Args:
        program: Python source, untrusted.
        tests: Python source, trusted only for its own verdict: statements that raise if the program is wrong.
        names: names that the tests use from the program; all other names are their own.
        preamble: trusted Python source executed before the tests: their imports and helpers.
    """

    program: str
    tests: str
    names: tuple[str, ...] = ()
    preamble: str = ""


@dataclass(frozen=True)
class Limits:
    """Limits of one job.

    Args:
        seconds: wall-clock time from launch to verdict.
        cpu_seconds: CPU time of the program.
        memory: bytes of address space, for the program and its tests each.
        file_size: bytes per file; ``/tmp`` as a whole holds twice that.
        open_files: file descriptors per process.
        output: bytes of stdout and of stderr kept; a program that writes more is stopped.

    Raises:
        ValueError: a limit that is not above 0.
    """

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory: int = 1 << 30
    file_size: int = 8 << 20
    open_files: int = 64
    output: int = 1 << 18

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name}: expected more than 0, got {value}")


@dataclass(frozen=True)
class Result:
    """The outcome of a job.

    Attributes:
        status: ``passed``; ``failed`` (an exception in the program or its tests); ``timeout`` (wall clock or CPU);
            ``memory`` (a MemoryError reached the tests); ``output`` (too much output); ``killed`` (by a signal).
        detail: the failing test or the reason, one line; empty if passed.
        stdout, stderr: what the program and its tests wrote, cut at ``Limits.output`` bytes.
        seconds: wall-clock time.
    """

    status: Status
    detail: str
    stdout: str
    stderr: str
    seconds: float


def run(
    jobs: Sequence[Job],
    limits: Limits = Limits(),
    *,
    workers: int | None = None,
    unsafe_without_sandbox: bool = False,
) -> list[Result]:
    """Runs n jobs, several concurrently, and returns the result of each.

    Args:
        workers: concurrent jobs; by default one per CPU available to this process.
        unsafe_without_sandbox: run programs as this user: limits and the ban on further processes apply, but this
            machine's files and network are within reach. Never use it for programs that a model wrote.

    Raises:
        RuntimeError: bubblewrap is missing or may not create namespaces here; nothing was run.
    """
    command = _interpreter(_compiled()) if unsafe_without_sandbox else _contained(require(), limits)
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda job: _run(command, job, limits), jobs))


def require() -> str:
    """The path of a working bubblewrap.

    Raises:
        RuntimeError: it is missing or may not create namespaces; the message says which, and what to install.
    """
    bwrap = shutil.which("bwrap")
    fault = "bwrap is not on PATH" if bwrap is None else _fault(bwrap)
    if bwrap is None or fault:
        raise RuntimeError(f"{fault}; {INSTALL}")
    return bwrap


@functools.cache
def _fault(bwrap: str) -> str | None:
    """Why this bubblewrap does not work, found by running a job with a known result; None if it works."""
    limits = Limits(seconds=60)
    result = _run(_contained(bwrap, limits), Job("answer = 42", "assert answer == 42", ("answer",)), limits)
    if result.status == "passed":
        return None
    return f"{bwrap} fails here: {(result.stderr.strip() or result.detail).splitlines()[-1]}"


def _interpreter(harness: str) -> list[str]:
    # No site-packages or working directory on sys.path; unbuffered, so that prints are not lost with the process.
    return [_executable(), "-s", "-S", "-P", "-u", harness]


@functools.cache
def _compiled() -> str:
    """Path of the harness's byte code, which saves 5 ms per process; of its source if none can be written."""
    try:
        return str(py_compile.compile(str(HARNESS), doraise=True))
    except OSError:
        return str(HARNESS)


def _executable() -> str:
    return os.path.realpath(sys.executable)


def _contained(bwrap: str, limits: Limits) -> list[str]:
    """The command line up to the harness's own arguments."""
    line = [bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    for name, value in ENVIRONMENT.items():
        line += ["--setenv", name, value]
    for path in ("/usr/lib", "/usr/lib64", "/lib", "/lib64"):
        if os.path.islink(path):
            line += ["--symlink", os.readlink(path), path]
        else:
            line += ["--ro-bind-try", path, path]
    line += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    prefix = os.path.realpath(sys.base_prefix)
    for path in (f"{prefix}/lib", _executable()):
        line += ["--ro-bind", path, path]
    folders = {sysconfig.get_path("purelib", vars={"base": prefix}), *site.getsitepackages([prefix])}
    for path in sorted(filter(os.path.isdir, folders)):  # may contain this package, or a data set with solutions
        line += ["--tmpfs", path, "--remount-ro", path]
    line += ["--dev", "/dev", "--remount-ro", "/dev"]  # and no /proc
    line += ["--ro-bind", _compiled(), "/harness"]
    line += ["--size", str(2 * limits.file_size), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]
    return [*line, "--", *_interpreter("/harness")]


def _run(command: Sequence[str], job: Job, limits: Limits) -> Result:
    inside = json.dumps(
        {
            "seconds": limits.seconds + 1,
            "AS": limits.memory,
            "CPU": limits.cpu_seconds,
            "FSIZE": limits.file_size,
            "NOFILE": limits.open_files,
            "CORE": 0,
        }
    )
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        work = stack.enter_context(tempfile.TemporaryFile("w+"))
        json.dump(asdict(job), work)
        work.seek(0)
        pipes = contextlib.ExitStack()  # closed here once both processes have inherited their ends
        requests, replies, verdict = os.pipe(), os.pipe(), os.pipe()
        for end in (*requests, *replies, *verdict):
            pipes.callback(os.close, end)
        kept = stack.enter_context(os.fdopen(os.dup(verdict[0]), "rb"))

        def start(role: str, stdin: Any, *ends: int) -> subprocess.Popen[bytes]:
            return stack.enter_context(
                subprocess.Popen(
                    [*command, role, inside, *map(str, ends)],
                    stdin=stdin,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=ends,
                    cwd=folder,
                    env=ENVIRONMENT,
                    start_new_session=True,
                )
            )

        with pipes:
            program = start("program", subprocess.DEVNULL, requests[0], replies[1])
            stack.callback(_kill, program)
            tests = start("tests", work, requests[1], replies[0], verdict[1])
            stack.callback(_kill, tests)
        reader = _Reader([kept, program.stdout, program.stderr, tests.stdout, tests.stderr], limits.output)
        stopped = reader.read(begin + limits.seconds, until=0)
        if stopped:
            status, detail = stopped
        elif reader.kept[0]:
            status, detail = json.loads(reader.kept[0])
            if status == "gone":
                with contextlib.suppress(subprocess.TimeoutExpired):
                    program.wait(GRACE)
                status, detail = _death(program.poll())
        else:
            status, detail = "killed", "the tests were killed before their verdict"
        _kill(program)
        _kill(tests)
        late = reader.read(time.monotonic() + GRACE)
        if late and late[0] == "output":
            status, detail = late
    out, err = ((reader.kept[i] + reader.kept[i + 2])[: limits.output].decode(errors="replace") for i in (1, 2))
    return Result(status, detail, out, err, time.monotonic() - begin)


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:  # bwrap, and with it the sandbox
        os.killpg(process.pid, signal.SIGKILL)


def _death(code: int | None) -> tuple[Status, str]:
    """Status and detail of a program that ended before its tests did, from its exit code (None: still running)."""
    if code is None:
        return "killed", "program: was killed, or stopped replying"
    number = -code if code < 0 else code - 128  # the harness and bwrap report signals as 128 + number
    if number == signal.SIGXCPU:
        return "timeout", "program: exceeded its CPU time limit"
    if number == signal.SIGKILL:
        return "killed", "program: was killed, or stopped replying"
    if number in set(signal.Signals):
        return "killed", f"program: ended by {signal.Signals(number).name}"
    return "failed", f"program: ended with exit status {code} before its tests did"


class _Reader:
    """Reads several pipes concurrently; keeps ``limit`` bytes of each except the first, which is the verdict's."""

    def __init__(self, pipes: Sequence[Any], limit: int) -> None:
        self.pipes = pipes
        self.limit = limit
        self.kept = [b""] * len(pipes)
        self.open = set(range(len(pipes)))

    def read(self, deadline: float, until: int | None = None) -> tuple[Status, str] | None:
        """Reads until all pipes end, or the one at index ``until``; status and detail if a limit is hit first."""
        with selectors.DefaultSelector() as selector:
            for i in self.open:
                selector.register(self.pipes[i], selectors.EVENT_READ, i)
            while self.open and (until is None or until in self.open):
                left = deadline - time.monotonic()
                ready = selector.select(left) if left > 0 else []
                if not ready:
                    return "timeout", "exceeded the wall-clock limit"
                for key, _ in ready:
                    i = key.data
                    chunk = os.read(key.fd, 1 << 16)
                    most = VERDICT if i == 0 else self.limit
                    over = len(self.kept[i]) + len(chunk) > most
                    self.kept[i] = (self.kept[i] + chunk)[:most]
                    if not chunk:
                        selector.unregister(key.fileobj)
                        self.open.discard(i)
                    elif over:
                        return "output", f"more than {most} bytes of output"
        return None
