"""Untrusted Python with its tests, in a sandbox of bubblewrap: what a model writes is never run as the user.

A program sees the shared libraries, the interpreter with its standard library (site-packages hidden) and 16 MiB of
its own ``/tmp``; nothing of ``/etc``, of homes or of this project, no network, no process but its own. It is one
process of one thread: a seccomp filter refuses more, so the limit of its address space is the limit of its memory.
CPU seconds, address space, file size and open files are limited inside, wall-clock time and output from outside.

The tests run in another process than the program (see ``acqsynth.domains.harness``), and pass when that process
says so with a nonce the program has no access to; exit status proves nothing.

What this does not contain: a fault of the kernel that such a process can reach; load on the machine below the limits;
and a program that knows its tests and writes their answers down.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
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
from typing import Literal

Status = Literal["passed", "failed", "timeout", "memory", "output", "killed"]

HARNESS = Path(__file__).with_name("harness.py")
VERDICT = 8192  # bytes that a verdict may take beside the output

#: Sets of strings keep one order, so that a program is right or wrong each time.
ENVIRONMENT = {"HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}

INSTALL = (
    "untrusted programs run in bubblewrap >= 0.7: install it ('apt install bubblewrap', 'dnf install bubblewrap'), "
    "and let it create user namespaces, or pass unsafe_without_sandbox=True where the machine itself may be lost"
)


@dataclass(frozen=True)
class Job:
    """A program and the tests it is held to.

    Args:
        program: Python source, untrusted.
        tests: Python source, trusted as far as its own verdict goes: statements that raise where the program is wrong.
        names: what the tests take from the program; every other name is theirs.
        preamble: trusted Python source executed before the tests: imports and helpers of theirs.
    """

    program: str
    tests: str
    names: tuple[str, ...] = ()
    preamble: str = ""


@dataclass(frozen=True)
class Limits:
    """Of one job.

    Args:
        seconds: wall-clock time from launch to verdict.
        cpu_seconds: CPU time of the program.
        memory: bytes of address space of the program, and of its tests.
        file_size: bytes of one file; all of ``/tmp`` holds twice that.
        open_files: file descriptors of a process.
        output: bytes kept of stdout and of stderr; a program that writes more is stopped.

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
    """What came of a job.

    Attributes:
        status: ``passed``; ``failed`` (an exception of the program or its tests); ``timeout`` (wall clock or CPU);
            ``memory`` (a MemoryError reached the tests); ``output`` (too much of it); ``killed`` (by a signal).
        detail: the failing test or the reason, one line; empty where passed.
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
    """The result of each of n jobs, several at a time.

    Args:
        workers: jobs at a time; by default one for each CPU of this process.
        unsafe_without_sandbox: run programs as this user, with the limits and the refusal of further processes but
            with this machine's files and network in reach. Never for programs that a model wrote.

    Raises:
        RuntimeError: bubblewrap is missing or may not create namespaces here; nothing was run.
    """
    command = _interpreter(str(HARNESS)) if unsafe_without_sandbox else _contained(require(), limits)
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda job: _run(command, job, limits), jobs))


def require() -> str:
    """The path of a bubblewrap that works here.

    Raises:
        RuntimeError: it is missing, or may not create namespaces; the message says which, and what to install.
    """
    bwrap = shutil.which("bwrap")
    fault = "bwrap is not on PATH" if bwrap is None else _fault(bwrap)
    if bwrap is None or fault:
        raise RuntimeError(f"{fault}; {INSTALL}")
    return bwrap


@functools.cache
def _fault(bwrap: str) -> str | None:
    """Why this bubblewrap does not work, found by a job whose result is known; None where it does."""
    limits = Limits(seconds=60)
    result = _run(_contained(bwrap, limits), Job("answer = 42", "assert answer == 42", ("answer",)), limits)
    return None if result.status == "passed" else f"{bwrap} fails here: {result.stderr.strip() or result.detail}"


def _interpreter(harness: str) -> list[str]:
    # Neither site-packages nor a working directory on sys.path; prints are not lost with the process.
    return [_executable(), "-s", "-S", "-P", "-u", harness]


def _executable() -> str:
    """The interpreter beneath a virtual environment."""
    return os.path.realpath(sys.executable)


def _contained(bwrap: str, limits: Limits) -> list[str]:
    """The command line up to the limits, which the harness takes."""
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
    for path in _site_packages(prefix):  # may hold this package, or a data set with its solutions
        line += ["--tmpfs", path, "--remount-ro", path]
    # Run as root, the files of /proc/sys are its own to write, with no capability left.
    line += ["--proc", "/proc", "--remount-ro", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    line += ["--ro-bind", str(HARNESS), "/harness.py"]
    line += ["--size", str(2 * limits.file_size), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]
    return [*line, "--", *_interpreter("/harness.py")]


def _site_packages(prefix: str) -> list[str]:
    folders = {sysconfig.get_path("purelib", vars={"base": prefix}), *site.getsitepackages([prefix])}
    return sorted(folder for folder in folders if os.path.isdir(folder))


def _run(command: Sequence[str], job: Job, limits: Limits) -> Result:
    nonce = secrets.token_hex(16)
    inside = {
        "seconds": limits.seconds + 1,
        "AS": limits.memory,
        "CPU": limits.cpu_seconds,
        "FSIZE": limits.file_size,
        "NOFILE": limits.open_files,
        "CORE": 0,
    }
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as work, tempfile.TemporaryDirectory() as folder:
        json.dump({**asdict(job), "nonce": nonce}, work)
        work.seek(0)
        with subprocess.Popen(
            [*command, json.dumps(inside)],
            stdin=work,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=ENVIRONMENT,
            start_new_session=True,
        ) as process:
            stdout, stderr, stopped = _read(process, begin + limits.seconds, limits.output)
            if stopped:
                os.killpg(process.pid, signal.SIGKILL)  # the sandbox dies with bwrap
    written, mark, verdict = stdout.rpartition(f"\n{nonce} ".encode())
    if stopped:
        status, detail = stopped
    elif mark:
        status, detail = json.loads(verdict)
    else:
        status, detail = "killed", "the tests were ended before their verdict"
    out, err = (text[: limits.output].decode(errors="replace") for text in (written if mark else stdout, stderr))
    return Result(status, detail, out, err, time.monotonic() - begin)


def _read(
    process: subprocess.Popen[bytes], deadline: float, limit: int
) -> tuple[bytes, bytes, tuple[Status, str] | None]:
    """Stdout and stderr until both end; status and detail where a limit comes first. Never holds more than it keeps."""
    pipes = [pipe for pipe in (process.stdout, process.stderr) if pipe is not None]
    kept = {pipe.fileno(): bytearray() for pipe in pipes}
    stopped: tuple[Status, str] | None = None
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map() and stopped is None:
            left = deadline - time.monotonic()
            ready = selector.select(left) if left > 0 else []
            if not ready:
                stopped = "timeout", "the wall-clock limit passed"
            for key, _ in ready:
                chunk = os.read(key.fd, 1 << 16)
                kept[key.fd] += chunk
                if not chunk:
                    selector.unregister(key.fileobj)
                elif len(kept[key.fd]) > limit + VERDICT:
                    stopped = "output", f"more than {limit} bytes of output"
    stdout, stderr = (bytes(kept[pipe.fileno()]) for pipe in pipes)
    return stdout, stderr, stopped
