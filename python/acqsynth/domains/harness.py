"""Runs inside the sandbox: one process holds the program, another, in a separate sandbox, holds the tests.

A program that shares an interpreter with its tests can pass them without being right: it exits with status 0, returns
an object equal to everything, redefines ``abs``, or finds the grader in a frame. One that shares their process
namespace can read the expected values from ``/proc``, or write the verdict itself. So the program's process receives
only its source and the arguments of calls, and sends only results, as JSON through two pipes. Functions and objects of
the program are a :class:`Remote` to the tests.

``acqsynth.domains.sandbox`` starts this file as a script, with only the standard library:

- ``harness.py program LIMITS REQUESTS REPLIES`` serves the program;
- ``harness.py tests LIMITS REQUESTS REPLIES VERDICT`` reads the job from stdin as JSON, runs the tests, and writes the
  verdict to a pipe that only this process has.

LIMITS is a JSON object, the rest are file descriptors.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing costs 4 ms, in two processes per job
    from collections.abc import Callable, Mapping
    from typing import Any, BinaryIO

PLAIN_TYPES = (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, range)

# System calls that start processes or threads, hold memory that RLIMIT_AS does not count, reach into other processes,
# or undo these restrictions: name -> number on x86_64 and aarch64 (None: no such call), from the kernel's tables.
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
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
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


class Gone(Exception):  # noqa: N818 - a state of the program, not an error of the tests
    """The program ended, or wrote something that is not a reply."""


def prctl(option: int, *values: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = [*values, *[0] * (4 - len(values))]
    words = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    if libc.prctl(option, *words):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def deny_system_calls() -> None:
    """Installs a seccomp filter for this process and anything it executes: calls in ``DENIED`` fail with EPERM."""
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(errno.ENOSYS, f"machine {machine}: the sandbox supports {' and '.join(MACHINES)}")
    column, architecture = MACHINES[machine]
    numbers = [number for row in DENIED.values() if (number := row[column]) is not None]

    def statement(code: int, value: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, jump_true, jump_false, value)

    load, equal, at_least, leave = 0x20, 0x15, 0x35, 0x06  # classic BPF, 32-bit words
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
        # A program may ignore the signal at the soft limit of CPU seconds, but not the one at the hard limit.
        hard = value + 1 if name == "CPU" else value
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, hard))


def encode(value: Any, refer: Callable[[Any], Any]) -> Any:
    """A value as JSON; ``refer`` encodes objects that are not of ``PLAIN_TYPES``."""
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
    """Inverse of :func:`encode`; ``resolve`` receives what ``refer`` returned."""
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


# The process of the program.


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Executes the program of the first request, then the operations that the tests request."""
    objects: list[Any] = []
    operations: dict[str, Callable[..., Any]] = {
        "call": lambda function, /, *arguments, **named: function(*arguments, **named),
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
        # Return the arguments as the function left them: sorting in place is a result too.
        return {"value": encode(value, refer), "arguments": [encode(item, refer) for item in arguments]}

    def reasons(error: BaseException) -> Any:
        try:
            return encode(error.args, refer)
        except Exception:  # a reference cycle, or a hostile property
            return encode((), refer)

    for line in requests:
        request = json.loads(line)
        try:
            reply = answer(request)
        except BaseException as error:
            reply = {"error": [kind.__name__ for kind in type(error).__mro__], "arguments": reasons(error)}
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


# The process of the tests.


class Child:
    """The program's process as seen by the tests."""

    def __init__(self, requests: BinaryIO, replies: BinaryIO) -> None:
        self.requests, self.replies = requests, replies
        self.remotes: dict[int, Remote] = {}
        self.gone = False

    def ask(self, request: dict[str, Any]) -> Any:
        """The decoded ``names`` or ``[value, arguments]`` of the reply.

        Raises:
            Gone: no reply, or a malformed one. Otherwise the exception that the program raised.
        """
        try:
            self.requests.write(json.dumps(request).encode() + b"\n")
            self.requests.flush()
            reply = json.loads(self.replies.readline())
            if "error" in reply:
                names, arguments = [str(name) for name in reply["error"]], decode(reply["arguments"], self.resolve)
                error = _builtin_error(names, arguments, request.get("operation"))
            elif "program" in request:
                return {
                    name: decode(reply["names"][name], self.resolve)
                    for name in request["names"]
                    if name in reply["names"]
                }
            else:
                return decode(reply["value"], self.resolve), [decode(item, self.resolve) for item in reply["arguments"]]
        except (MemoryError, Gone):
            raise
        except Exception as fault:  # hostile replies fail in any of these steps
            self.gone = True
            raise Gone(str(fault)) from None
        raise error

    def operate(self, operation: str, remote: Remote, /, *arguments: Any, **named: Any) -> Any:
        def refer(value: Any) -> dict[str, int]:
            if type(value) is not Remote:
                raise TypeError(f"a test passes a {type(value).__name__}, which cannot be given to the program")
            return {"object": object.__getattribute__(value, "_harness_number")}

        value, left = self.ask(
            {
                "operation": operation,
                "object": refer(remote),
                "arguments": [encode(item, refer) for item in arguments],
                "named": {name: encode(item, refer) for name, item in named.items()},
            }
        )
        for mine, changed in zip(arguments, left, strict=False):
            _put_back(mine, changed)
        return value

    def resolve(self, data: dict[str, int]) -> Remote:
        number = int(data["object"])
        return self.remotes.setdefault(number, Remote(self, number))


class Remote:
    """An object of the program; equal only to itself, as the program's own ``__eq__`` would prove nothing. Its own
    attributes have names that no program's have."""

    def __init__(self, child: Child, number: int) -> None:
        object.__setattr__(self, "_harness_child", child)
        object.__setattr__(self, "_harness_number", number)

    def __bool__(self) -> bool:
        return True


def _operates(operation: str) -> Callable[..., Any]:
    """The special method of :class:`Remote` for an operation; only positional parameters, as a program may name its
    own the same."""
    return lambda remote, /, *arguments, **named: remote._harness_child.operate(operation, remote, *arguments, **named)


for _operation in ("call", "getattr", "setattr", "getitem", "len", "iter", "next"):
    setattr(Remote, f"__{_operation}__", _operates(_operation))


def _put_back(mine: Any, left: Any) -> None:
    """Updates a mutable argument to the contents that the function left in it."""
    if isinstance(mine, list) and isinstance(left, list):
        mine[:] = left
    elif isinstance(mine, (dict, set)) and isinstance(left, (dict, set)):
        mine.clear()
        mine.update(left)


#: Exceptions that control the tests' own loops: a call that raises one would end ``zip(map(f, xs), expected)`` early.
STEERING = ("StopIteration", "StopAsyncIteration", "GeneratorExit")


def _builtin_error(names: list[str], arguments: tuple[Any, ...], operation: str | None) -> Exception:
    """The program's exception as the nearest built-in one. One that is not an Exception (SystemExit) becomes a
    RuntimeError, as does StopIteration from anything but ``next``."""
    if operation != "next" and any(name in STEERING for name in names):
        return RuntimeError(names[0], *arguments)
    for name in names:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(*arguments)
            except TypeError:  # the subclass takes different arguments
                continue
    return RuntimeError(names[0], *arguments)


def _message(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except BaseException:  # raised by arguments from the program
        return ""


def judge(job: dict[str, Any], child: Child) -> tuple[str, str]:
    """Runs a job's tests against the program in the child; returns status and detail."""
    stage = "program"
    try:
        found = child.ask({"program": job["program"], "names": job["names"]})
        stage = "tests"
        scope: dict[str, Any] = {"__name__": "tests"}
        exec(compile(job["preamble"], "<preamble>", "exec"), scope)
        for name in job["names"]:
            scope.pop(name, None)
            if name in found:
                scope[name] = found[name]
        exec(compile(job["tests"], "<tests>", "exec"), scope)
        if child.gone:  # tests that expect an exception continue even so
            raise Gone
    except Gone:
        raise
    except MemoryError:
        return "memory", f"{stage}: MemoryError"
    except BaseException as error:
        import traceback  # costs 3 ms, which passing jobs avoid

        kind, message = type(error).__name__, _message(error)
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "<tests>"]
        if lines and lines[-1]:
            message = message or job["tests"].splitlines()[lines[-1] - 1].strip()
        return "failed", f"{stage}: {kind}: {message}"
    return "passed", ""


def hold_program(limits: dict[str, int], requests: int, replies: int) -> None:
    """Serves the program in a child; this process keeps the timer out of its reach and exits with its status."""
    cpu_seconds = limits.pop("CPU")
    set_limits(limits)
    parent = os.getpid()
    pid = os.fork()
    if pid:
        os.closerange(3, max(requests, replies) + 1)
        _, status = os.waitpid(pid, 0)
        os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
    prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)
    set_limits({"CPU": cpu_seconds})
    deny_system_calls()
    try:
        serve(os.fdopen(requests, "rb"), os.fdopen(replies, "wb"))
    finally:
        os._exit(0)


def hold_tests(limits: dict[str, int], requests: int, replies: int, verdict: int) -> None:
    """Runs the tests and writes ``[status, detail]``; status ``gone`` if the program ended before they did."""
    limits.pop("CPU")  # the tests' time is limited by wall clock only
    set_limits(limits)
    job = json.load(sys.stdin)
    os.ftruncate(0, 0)  # leave no copy for anyone who reopens this file
    try:
        status, detail = judge(job, Child(os.fdopen(requests, "wb"), os.fdopen(replies, "rb")))
    except Gone:
        status, detail = "gone", ""
    os.write(verdict, json.dumps([status, detail[:1000]]).encode())
    os._exit(0)


def main() -> None:
    sys.set_int_max_str_digits(0)
    role, options, *numbers = sys.argv[1:]
    limits = json.loads(options)
    # The kernel ends this process if nothing else does: bwrap may miss the death of its parent during startup.
    signal.setitimer(signal.ITIMER_REAL, limits.pop("seconds"))
    prctl(PR_SET_DUMPABLE, 0)  # no other process may trace this one or open its memory and files in /proc
    if role == "program":
        hold_program(limits, *map(int, numbers))
    else:
        hold_tests(limits, *map(int, numbers))


if __name__ == "__main__":
    main()
