"""Runs inside the sandbox: a program in one process, its tests in another, data alone between them.

A program that shares an interpreter with its tests passes them in many ways without being right: it leaves with
exit status 0, returns an object equal to everything, redefines ``abs``, or finds the grader in a frame. So the tests
run here, and the program in a child without the means to start, trace or read another process. A function that the
tests call is a :class:`Remote`; arguments and results cross a pipe as JSON, rebuilt as plain values. What has no plain
form (an object of the program's own class) stays in the child and is a ``Remote`` too, equal to itself alone.

Started by ``acqsynth.domains.sandbox`` as a script, with the standard library alone; nothing here imports the package.
The job stands on stdin as JSON; the last line of stdout is its nonce and the verdict. The child is forked before the
nonce is read.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NoReturn

PLAIN_TYPES = (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, range)

# System calls that start processes or threads, hold memory which RLIMIT_AS does not count, reach into other processes,
# or undo what is set here: name -> number on x86_64 and on aarch64 (None: no such call), from the kernel's tables.
DENIED = {
    "clone": (56, 220),
    "fork": (57, None),
    "vfork": (58, None),
    "clone3": (435, 435),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
    "ptrace": (101, 117),
    "prctl": (157, 167),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "add_key": (248, 217),
    "keyctl": (250, 219),
}
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of DENIED, AUDIT_ARCH

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2


class Gone(Exception):  # noqa: N818 - a state of the child, not an error of the tests
    """The child ended, or wrote what is no reply."""


def prctl(option: int, *values: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = [*values, *[0] * (4 - len(values))]
    words = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    if libc.prctl(option, *words):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def deny_system_calls() -> None:
    """A seccomp filter for this process and what it may exec: the calls of ``DENIED`` fail with EPERM."""
    machine = platform.machine()
    if machine not in MACHINES:
        raise OSError(errno.ENOSYS, f"machine {machine}: the sandbox knows {' and '.join(MACHINES)}")
    column, architecture = MACHINES[machine]
    numbers = [number for row in DENIED.values() if (number := row[column]) is not None]

    def statement(code: int, value: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, jump_true, jump_false, value)

    load, equal, at_least, leave = 0x20, 0x15, 0x35, 0x06  # of classic BPF, words of 32 bits
    allow, deny, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
    lines = [
        statement(load, 4),  # seccomp_data.arch
        statement(equal, architecture, 1, 0),
        statement(leave, kill),
        statement(load, 0),  # seccomp_data.nr
        statement(at_least, 0x40000000, len(numbers) + 1, 0),  # x86_64 has a second table (x32) from here on
        *(statement(equal, number, len(numbers) - i, 0) for i, number in enumerate(numbers)),
        statement(leave, allow),
        statement(leave, deny),
    ]
    code = b"".join(lines)
    filter_ = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HP", len(lines), ctypes.addressof(filter_))  # struct sock_fprog
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_char_p(program))


def set_limits(limits: Mapping[str, int]) -> None:
    for name, value in limits.items():
        # A program may ignore the signal that comes at the soft limit of CPU seconds, not the one at the hard limit.
        hard = value + 1 if name == "CPU" else value
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, hard))


def encode(value: Any, refer: Callable[[Any], Any]) -> Any:
    """A value as JSON; ``refer`` gives the form of what is none of ``PLAIN_TYPES``."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):  # a member of an enumeration, say
            return kind(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        name = next(kind.__name__ for kind in (list, tuple, set, frozenset) if isinstance(value, kind))
        return {name: [encode(item, refer) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, refer), encode(item, refer)] for key, item in value.items()]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.decode("latin-1")}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if any(value is kind for kind in PLAIN_TYPES):
        return {"type": value.__name__}
    return refer(value)


def decode(data: Any, resolve: Callable[[Any], Any]) -> Any:
    """The value of :func:`encode`; ``resolve`` is given what ``refer`` returned."""
    if not isinstance(data, dict):
        return data
    [(tag, content)] = data.items()
    if tag in ("list", "tuple", "set", "frozenset"):
        return getattr(builtins, tag)(decode(item, resolve) for item in content)
    if tag == "dict":
        return {decode(key, resolve): decode(item, resolve) for key, item in content}
    if tag in ("complex", "range"):
        return getattr(builtins, tag)(*content)
    if tag == "bytes":
        return content.encode("latin-1")
    if tag == "type":
        return {kind.__name__: kind for kind in PLAIN_TYPES}[content]
    return resolve(data)


# The child: it holds the program.


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Executes the program of the first request, then the operations that the tests ask for."""
    objects: list[Any] = []
    operations: dict[str, Callable[..., Any]] = {
        "call": lambda function, *arguments, **named: function(*arguments, **named),
        "getattr": getattr,
        "setattr": setattr,
        "getitem": lambda container, key: container[key],
        "len": len,
        "iter": iter,
        "next": next,
    }

    def refer(value: Any) -> dict[str, int]:
        for i, known in enumerate(objects):
            if known is value:
                return {"object": i}
        objects.append(value)
        return {"object": len(objects) - 1}

    def resolve(data: dict[str, int]) -> Any:
        return objects[data["object"]]

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if "program" in request:
            names: dict[str, Any] = {"__name__": "program"}
            exec(compile(request["program"], "<program>", "exec"), names)
            found = {name: encode(names[name], refer) for name in request["names"] if name in names}
            return {"names": found}
        arguments = [decode(item, resolve) for item in request["arguments"]]
        named = {name: decode(item, resolve) for name, item in request["named"].items()}
        value = operations[request["operation"]](resolve(request["object"]), *arguments, **named)
        # With the arguments as the function left them: sorting in place is a result too.
        return {"value": encode(value, refer), "arguments": [encode(item, refer) for item in arguments]}

    def reasons(error: BaseException) -> Any:
        try:
            return encode(error.args, refer)
        except Exception:  # a loop, or a hostile property
            return encode((), refer)

    for line in requests:
        request = json.loads(line)
        try:
            reply = answer(request)
        except BaseException as error:
            reply = {"error": [kind.__name__ for kind in type(error).__mro__], "arguments": reasons(error)}
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


# The parent: it holds the tests.


class Child:
    """The program's process, seen from the tests."""

    def __init__(self, requests: BinaryIO, replies: BinaryIO) -> None:
        self.requests, self.replies = requests, replies
        self.remotes: dict[int, Remote] = {}
        self.gone = False

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            self.requests.write(json.dumps(request).encode() + b"\n")
            self.requests.flush()
            reply = json.loads(self.replies.readline())
        except (OSError, ValueError) as error:
            self.gone = True
            raise Gone(str(error)) from None
        if "error" in reply:
            raise _builtin_error(reply["error"], decode(reply["arguments"], self.resolve))
        return reply

    def operate(self, operation: str, remote: Remote, *arguments: Any, **named: Any) -> Any:
        def refer(value: Any) -> dict[str, int]:
            if type(value) is not Remote:
                raise TypeError(f"a test passes a {type(value).__name__}, which can not be given to the program")
            return {"object": object.__getattribute__(value, "_number")}

        reply = self.ask(
            {
                "operation": operation,
                "object": refer(remote),
                "arguments": [encode(item, refer) for item in arguments],
                "named": {name: encode(item, refer) for name, item in named.items()},
            }
        )
        for mine, left in zip(arguments, reply["arguments"], strict=True):
            _put_back(mine, decode(left, self.resolve))
        return decode(reply["value"], self.resolve)

    def resolve(self, data: dict[str, int]) -> Remote:
        number = int(data["object"])
        return self.remotes.setdefault(number, Remote(self, number))


class Remote:
    """An object of the program; equal to itself alone, as an equality of the program's own would prove nothing."""

    def __init__(self, child: Child, number: int) -> None:
        object.__setattr__(self, "_child", child)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._child.operate("call", self, *arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return self._child.operate("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._child.operate("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._child.operate("getitem", self, key)

    def __len__(self) -> int:
        return self._child.operate("len", self)

    def __iter__(self) -> Iterator[Any]:
        return self._child.operate("iter", self)

    def __next__(self) -> Any:
        return self._child.operate("next", self)

    def __bool__(self) -> bool:
        return True


def _put_back(mine: Any, left: Any) -> None:
    """Gives a mutable argument the contents that the function left in it."""
    if isinstance(mine, list) and isinstance(left, list):
        mine[:] = left
    elif isinstance(mine, (dict, set)) and isinstance(left, (dict, set)):
        mine.clear()
        mine.update(left)


def _builtin_error(names: list[str], arguments: tuple[Any, ...]) -> Exception:
    """The exception of the program as the nearest built-in one; what is none (SystemExit) is a RuntimeError."""
    for name in names:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(*arguments)
            except TypeError:  # a subclass takes other arguments than its base
                continue
    return RuntimeError(names[0], *arguments)


def _message(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except BaseException:  # of what the program gave it
        return ""


def judge(job: dict[str, Any], child: Child) -> tuple[str, str]:
    """Status and detail of a job's tests against the program in the child."""
    stage = "program"
    try:
        found = child.ask({"program": job["program"], "names": job["names"]})["names"]
        stage = "tests"
        scope: dict[str, Any] = {"__name__": "tests"}
        exec(compile(job["preamble"], "<preamble>", "exec"), scope)
        for name in job["names"]:
            scope.pop(name, None)
            if name in found:
                scope[name] = decode(found[name], child.resolve)
        exec(compile(job["tests"], "<tests>", "exec"), scope)
        if child.gone:  # and the tests went on, as those do that expect an exception
            raise Gone
    except Gone:
        raise
    except MemoryError:
        return "memory", f"{stage}: MemoryError"
    except BaseException as error:
        kind, message = type(error).__name__, _message(error)
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "<tests>"]
        if lines and lines[-1]:
            message = message or job["tests"].splitlines()[lines[-1] - 1].strip()
        return "failed", f"{stage}: {kind}: {message}"
    return "passed", ""


def death(pid: int) -> tuple[str, str]:
    """Status and detail of a child that ended before its tests did."""
    os.kill(pid, signal.SIGKILL)  # it may have closed the pipe only; a signal that ended it already stands
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status):
        return "failed", f"program: ended with exit status {os.WEXITSTATUS(status)} before its tests did"
    number = os.WTERMSIG(status)
    if number == signal.SIGXCPU:
        return "timeout", "program: used up its CPU seconds"
    if number == signal.SIGKILL:
        return "killed", "program: was killed, or broke off its replies"
    return "killed", f"program: ended by {signal.Signals(number).name}"


def main() -> NoReturn:
    sys.set_int_max_str_digits(0)
    limits = json.loads(sys.argv[1])
    # Ended by the kernel if no one else does: whoever started this may be gone, and bwrap's care for that has a gap
    # while it starts. The program ends with this process, and with both the sandbox.
    signal.setitimer(signal.ITIMER_REAL, limits.pop("seconds"))
    cpu_seconds = limits.pop("CPU")  # the tests are held to wall-clock time alone
    set_limits(limits)
    prctl(PR_SET_DUMPABLE, 0)  # the child may not trace this process, nor open its memory and files in /proc
    from_parent, to_child = os.pipe()
    from_child, to_parent = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:
            os._exit(0)
        os.close(to_child)
        os.close(from_child)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        set_limits({"CPU": cpu_seconds})
        deny_system_calls()
        try:
            serve(os.fdopen(from_parent, "rb"), os.fdopen(to_parent, "wb"))
        finally:
            os._exit(0)
    os.close(from_parent)
    os.close(to_parent)
    job = json.load(sys.stdin)
    child = Child(os.fdopen(to_child, "wb"), os.fdopen(from_child, "rb"))
    try:
        status, detail = judge(job, child)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except Gone:
        status, detail = death(pid)
    verdict = json.dumps([status, detail[:1000]])
    os.write(1, f"\n{job['nonce']} {verdict}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    main()
