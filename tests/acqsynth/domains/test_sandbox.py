"""Containment tests run a hostile program and read what it found from one of its variables."""

from __future__ import annotations

import errno
import os
import platform
import signal
import site
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from acqsynth.domains import harness, sandbox
from acqsynth.domains.sandbox import Job, Limits, run

SHORT = Limits(seconds=8.0, cpu_seconds=2)

needs_sandbox = pytest.mark.usefixtures("contained")


def outcome(program, expected, limits=SHORT):
    """Runs a program and asserts an expression about its variable ``outcome``."""
    [result] = run([Job(program, f"assert {expected}, outcome", ("outcome",))], limits)
    assert result.status == "passed", result


def attempt(statements):
    """A program that sets ``outcome`` to "done" or to the name of the exception that the statements raise."""
    body = "\n".join("    " + line for line in statements.splitlines())
    return f"outcome = 'done'\ntry:\n{body}\nexcept BaseException as error:\n    outcome = type(error).__name__\n"


def one(program, tests="", names=(), limits=SHORT):
    [result] = run([Job(program, tests, names)], limits)
    return result


def running(mark):
    """Process id -> command line, for all processes on this machine with ``mark`` in their command line."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if mark in line:
            found[int(path.parent.name)] = line
    return found


@needs_sandbox
class TestContainment:
    def test_an_attempt_that_is_allowed_is_seen_to_be_done(self):
        """Control: ``attempt`` reports success when an action is allowed."""
        outcome(attempt("open('/tmp/a', 'w').write('b')\nassert open('/tmp/a').read() == 'b'"), "outcome == 'done'")
        outcome(attempt("open('/nowhere/a')"), "outcome == 'FileNotFoundError'")

    @pytest.mark.parametrize(
        "statements",
        [
            "import os\nwhile True:\n    os.fork()",
            "import os\nos.posix_spawn('/harness.py', ['x'], {})",
            "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'while True: pass'])",
            "import multiprocessing\nmultiprocessing.Process(target=print).start()",
            "import ctypes\nif ctypes.CDLL(None, use_errno=True).fork() < 0:\n    raise PermissionError",
            "import ctypes\nif ctypes.CDLL(None, use_errno=True).syscall(57) < 0:\n    raise PermissionError",
        ],
    )
    def test_no_process_is_started(self, statements):
        outcome(attempt(statements), "outcome == 'PermissionError'")

    def test_the_denied_system_calls_are_denied(self):
        column, _ = harness.MACHINES[platform.machine()]
        numbers = [row[column] for row in harness.DENIED.values() if row[column] is not None]
        assert len(numbers) > 15
        call = "libc.syscall(number, 0, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno()"
        program = (
            f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\noutcome = {{{call} for number in {numbers}}}"
        )
        outcome(program, f"outcome == {{{errno.EPERM}}}")

    def test_no_thread_is_started(self):
        outcome(attempt("import threading\nthreading.Thread(target=print).start()"), "outcome == 'RuntimeError'")

    @pytest.mark.parametrize(
        "program",
        [
            "while True: pass",
            "import os, signal\nos.setsid()\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n"
            "    except (OSError, ValueError): pass\nwhile True: pass",
            f"import os\nos.execv({os.path.realpath(sys.executable)!r}, ['python', '-S', '-c', 'while True: pass'])",
        ],
    )
    def test_nothing_burns_on_after_the_end(self, program):
        size = 8_000_000 + os.getpid() % 100_000  # appears in the command line of every process of this sandbox
        assert one(program, limits=Limits(seconds=0.7, cpu_seconds=60, file_size=size)).status in ("timeout", "killed")
        deadline = time.monotonic() + 5
        while running(str(size)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert running(str(size)) == {}

    @pytest.mark.parametrize(("processes", "seconds"), [(1, 3.0), (7, 60.0)], ids=["starting", "started"])
    def test_no_program_outlives_the_process_that_started_it(self, processes, seconds):
        """Once both sandboxes run (two bwrap processes in each, the tests, the program and its keeper), all end
        at once; during startup, at the time limit."""
        size = 8_100_000 + os.getpid() % 100_000 + processes
        code = "from acqsynth.domains.sandbox import *\nfrom acqsynth.domains.sandbox import _contained, _run\n"
        code += f"limits = Limits(seconds={seconds}, cpu_seconds=60, file_size={size})\n"
        code += "_run(_contained('bwrap', limits), Job('import time; time.sleep(1000)', ''), limits)"
        with subprocess.Popen([sys.executable, "-c", code]) as starter:
            deadline = time.monotonic() + 30
            while len(running(str(size))) < 1 + processes and time.monotonic() < deadline:
                time.sleep(0.01)
            starter.kill()
        time.sleep(0.5)  # a sandbox interrupted during startup may still start the program
        deadline = time.monotonic() + 15
        while (left := running(str(size))) and time.monotonic() < deadline:
            if all("bwrap" in line for line in left.values()):
                for process in left:  # interrupted here, bwrap runs nothing and may wait forever
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)
        assert left == {}

    @pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(100)"])
    def test_an_endless_loop_meets_the_time_limit(self, program):
        result = one(program, limits=Limits(seconds=0.7, cpu_seconds=60))
        assert (result.status, result.detail) == ("timeout", "exceeded the wall-clock limit")
        assert 0.7 <= result.seconds < 60

    def test_cpu_seconds_are_limited_although_the_signal_is_ignored(self):
        limits = Limits(seconds=30.0, cpu_seconds=1)
        result = one("while True: pass", limits=limits)
        assert (result.status, result.detail) == ("timeout", "program: exceeded its CPU time limit")
        result = one("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", limits=limits)
        assert result.status == "killed"

    def test_an_endless_loop_of_the_tests_meets_the_time_limit(self):
        assert one("", "while True: pass", limits=Limits(seconds=0.7)).status == "timeout"

    @pytest.mark.parametrize("stream", ["stdout", "stderr"])
    def test_gigabytes_of_output_are_neither_kept_nor_waited_for(self, stream):
        limits = Limits(seconds=30.0, cpu_seconds=30, output=10_000)
        result = one(f"import sys\nwhile True: sys.{stream}.write('x' * 65536)", limits=limits)
        assert (result.status, result.detail) == ("output", "more than 10000 bytes of output")
        assert {"stdout": len(result.stdout), "stderr": len(result.stderr)}[stream] == 10_000

    def test_memory_is_limited(self):
        result = one("x = bytearray(3 << 30)")
        assert (result.status, result.detail) == ("memory", "program: MemoryError")
        result = one("def f():\n    return [bytes(1 << 26) for _ in range(10 ** 4)]", "f()", ("f",))
        assert (result.status, result.detail) == ("memory", "tests: MemoryError")

    def test_memory_outside_the_address_space_is_refused(self):
        outcome(attempt("import os\nos.memfd_create('x')"), "outcome == 'PermissionError'")
        shmget = "import ctypes\nif ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) < 0:\n    raise MemoryError"
        outcome(attempt(shmget), "outcome == 'MemoryError'")

    def test_temporary_files_are_limited_one_by_one_and_in_all(self):
        limits = Limits(seconds=8.0, cpu_seconds=2, file_size=1 << 20)
        one_file = "with open('/tmp/a', 'wb', buffering=0) as f:\n    while True: f.write(bytes(1 << 16))"
        outcome(attempt(one_file), "outcome == 'OSError'", limits)
        many = "for i in range(50):\n    with open(f'/tmp/{i}', 'wb') as f: f.write(bytes(1 << 19))"
        outcome(
            f"import os\n{attempt(many)}\nsize = sum(os.stat(e).st_size for e in os.scandir('/tmp'))\n"
            "outcome = outcome, size <= 2 << 20",
            "outcome == ('OSError', True)",
            limits,
        )

    def test_no_file_is_written_outside(self):
        name = f"written-{os.getpid()}"
        places = ("/", "/etc", "/usr/lib", "/home", "/root", "/dev", "/dev/shm", "/proc", "/var/tmp")
        files = [Path(place) / name for place in (*places, Path.home(), os.getcwd())]
        jobs = [
            Job(attempt(f"open({str(file)!r}, 'w').write('x')"), "assert outcome != 'done'", ("outcome",))
            for file in files
        ]
        for file, result in zip(files, run(jobs, SHORT), strict=True):
            assert result.status == "passed", (file, result)
            assert not file.exists()

    def test_the_interpreter_is_not_written_to(self):
        for folder in (*site.getsitepackages(), *site.getsitepackages([sys.base_prefix]), os.path.dirname(os.__file__)):
            outcome(attempt(f"open({folder + '/x.pth'!r}, 'w')"), "outcome in ('OSError', 'FileNotFoundError')")
            assert not os.path.exists(folder + "/x.pth")
        outcome(attempt("open('/harness.py', 'a')"), "outcome == 'OSError'")

    def test_what_one_program_writes_the_next_does_not_see(self):
        assert one("open('/tmp/left', 'w').write('x')").status == "passed"
        outcome("import os\noutcome = os.listdir('/tmp')", "outcome == []")

    def test_homes_this_project_and_etc_are_out_of_sight(self, tmp_path):
        secret = tmp_path / "secret"
        secret.write_text("x")
        for path in (secret, Path(__file__), Path(sandbox.__file__), Path("/etc/passwd"), Path("/etc/hostname")):
            assert path.is_file()
            outcome(attempt(f"open({str(path)!r}).read()"), "outcome == 'FileNotFoundError'")
        # Of the home folder, only the path to an interpreter installed there is visible.
        seen = f"import os\nfound = os.listdir({str(Path.home())!r}) if os.path.isdir({str(Path.home())!r}) else []"
        way = os.path.realpath(sys.base_prefix).removeprefix(f"{Path.home()}/").split("/")[0]
        outcome(f"{seen}\noutcome = set(found) <= {{{way!r}}}", "outcome")
        outcome("import sys\noutcome = [p for p in sys.path if 'site-packages' in p]", "outcome == []")

    def test_site_packages_are_empty(self):
        folder = site.getsitepackages([sys.base_prefix])[0]
        outcome(f"import os\noutcome = os.listdir({folder!r}) if os.path.isdir({folder!r}) else []", "outcome == []")

    def test_the_environment_is_cleared(self, monkeypatch):
        monkeypatch.setenv("TOKEN_OF_A_HUB", "secret")
        outcome("import os\noutcome = sorted(os.environ)", "'TOKEN_OF_A_HUB' not in outcome and 'HOME' in outcome")
        assert sandbox.ENVIRONMENT.keys() == {"HOME", "LANG", "PYTHONHASHSEED"}

    def test_there_is_no_network(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(0.1)
            port = server.getsockname()[1]
            outcome(
                attempt(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"),
                "outcome == 'ConnectionRefusedError'",
            )
            with pytest.raises(TimeoutError):
                server.accept()
        outcome(attempt("import socket\nsocket.create_connection(('1.1.1.1', 53), 2)"), "outcome == 'OSError'")
        outcome("import socket\noutcome = [name for _, name in socket.if_nameindex()]", "outcome == ['lo']")

    def test_other_processes_are_out_of_reach(self):
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as bystander:
            outcome(attempt(f"import os\nos.kill({bystander.pid}, 9)"), "outcome == 'ProcessLookupError'")
            outcome(attempt(f"import os\nos.kill({os.getpid()}, 9)"), "outcome == 'ProcessLookupError'")
            assert bystander.poll() is None
            bystander.kill()

    def test_killing_everything_in_reach_only_fails_the_program(self):
        for target in ("os.getppid()", "-1"):
            result = one(f"import os\nos.kill({target}, 9)\nimport time; time.sleep(5)")
            assert (result.status, result.detail) == ("killed", "program: was killed, or stopped replying")

    def test_the_kernel_is_not_configured(self):
        for path in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger"):
            outcome(attempt(f"import os\nos.open({path!r}, os.O_WRONLY)"), "outcome != 'done'")
        outcome(
            "import ctypes\nlibc = ctypes.CDLL(None)\n"
            "outcome = libc.unshare(0x10000000), libc.mount(b'x', b'/tmp', b'tmpfs', 0, 0)",
            "outcome == (-1, -1)",
        )

    def test_a_crash_is_reported(self):
        result = one("import ctypes\nctypes.string_at(0)")
        assert (result.status, result.detail) == ("killed", "program: ended by SIGSEGV")


@needs_sandbox
class TestGrading:
    """Wrong programs that claim to be right do not pass."""

    def test_a_wrong_program_does_not_pass(self):
        wrong = [
            "import os\nos._exit(0)",
            "import sys\nsys.exit(0)",
            "raise SystemExit",
            "def f(x):\n    import os\n    os._exit(0)",
            "def f(x):\n    raise SystemExit(0)",
            "class Equal:\n    def __eq__(self, other): return True\ndef f(x): return Equal()",
            "class Equal(int):\n    def __eq__(self, other): return True\ndef f(x): return Equal()",
            "def f(x): return f",
            "import builtins\nbuiltins.abs = lambda x: 0\nabs = lambda x: 0\nf = abs\ndef f(x): return 0",
            "import sys\nprint('passed'); print('[\"passed\", \"\"]')\nsys.stdout.flush()\nimport os\nos._exit(0)",
            'import os\nfor fd in range(3, 64):\n    try: os.write(fd, b\'{"value": 2, "arguments": []}\\n\' * 3)\n'
            "    except OSError: pass",
            "import gc, sys\nfor o in gc.get_objects():\n"
            "    if isinstance(o, dict) and 'nonce' in o: print(o['nonce'])\n"
            "def f(x): return sys._getframe(1).f_locals",
            "import signal, os\nos.kill(os.getppid(), signal.SIGTERM)",
            "import os\nos.close(1); os.close(2)\nos.closerange(3, 64)",
            "",
            "f = 2",
            "f = None",
            "def f(x): return x",
            "def f(x):\n    while True: x = [x]",
            "def f(:",
            "x" * 100_000,
            "(" * 100_000,
        ]
        tests = "assert abs(f(1) - 2) < 1e-6\nassert f(2) == 3\nassert f(3) == 4"
        assert one("def f(x): return x + 1", tests, ("f",)).status == "passed"
        results = run([Job(program, tests, ("f",)) for program in wrong], Limits(seconds=5, cpu_seconds=1))
        for program, result in zip(wrong, results, strict=True):
            assert result.status != "passed", program
            assert result.detail, program

    def test_the_program_sees_no_process_but_its_own(self):
        outcome(attempt("import os\nos.listdir('/proc')"), "outcome == 'FileNotFoundError'")
        outcome(attempt("open('/dev/fd/0')"), "outcome == 'FileNotFoundError'")
        ptrace = "import ctypes, os\nif ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0):\n    raise PermissionError"
        outcome(attempt(ptrace), "outcome == 'PermissionError'")

    def test_a_name_of_the_tests_is_theirs(self):
        program = "def helper(x): return True\ndef isinstance(*_): return True\ndef f(x): return 'no'"
        [result] = run([Job(program, "assert helper(f(1))", ("f",), "def helper(x): return x == 2")], SHORT)
        assert result.detail == "tests: AssertionError: assert helper(f(1))"
        assert one(program, "assert isinstance(f(1), int)", ("f",)).status == "failed"

    @pytest.mark.parametrize("kind", ["StopIteration", "StopAsyncIteration", "GeneratorExit"])
    def test_no_exception_ends_the_loops_of_the_tests(self, kind):
        tests = "for got, true in zip(map(f, [1, 2]), [2, 3]):\n    assert got == true"
        assert one("def f(x): return x + 1", tests, ("f",)).status == "passed"
        result = one(f"def f(x): raise {kind}('no more')", tests, ("f",))
        assert (result.status, result.detail) == ("failed", f"tests: RuntimeError: ('{kind}', 'no more')")

    def test_leaving_is_no_exception_that_tests_expect(self):
        tests = "try:\n    f(1)\nexcept:\n    pass\nelse:\n    assert False"
        assert one("def f(x): raise ValueError", tests, ("f",)).status == "passed"
        result = one("def f(x):\n    import os\n    os._exit(0)", tests, ("f",))
        assert result.detail == "program: ended with exit status 0 before its tests did"

    def test_the_detail_names_what_failed(self):
        result = one("def f(x): return x", "assert f(1) == 1\nassert f(2) == 3", ("f",))
        assert (result.status, result.detail) == ("failed", "tests: AssertionError: assert f(2) == 3")
        result = one("def f(x): return x['a']", "f({})", ("f",))
        assert result.detail == "tests: KeyError: 'a'"
        assert one("import nothing").detail == "program: ModuleNotFoundError: No module named 'nothing'"
        result = one("def f(x):\n    import os\n    os._exit(7)", "f(1)", ("f",))
        assert result.detail == "program: ended with exit status 7 before its tests did"

    def test_output_is_kept_and_is_no_verdict(self):
        result = one("print('before')\ndef f(): print('during')", "f()", ("f",))
        assert (result.status, result.stdout) == ("passed", "before\nduring\n")


@needs_sandbox
class TestValues:
    """Calls across the two processes behave like calls within one interpreter."""

    def test_plain_values_pass_unchanged(self):
        values = [
            "None", "True", "-3", "10 ** 5000", "1.5", "float('inf')", "2j", "'é\\ud800\\n'", "b'\\x00\\xff'",
            "[1, [2], ()]", "(1, (2,), {})", "{1: 'a', (1, 2): [3]}", "{1, 2}", "frozenset({(1,)})", "range(0, 9, 2)",
            "int", "__import__('collections').Counter('aab')", "__import__('collections').OrderedDict(a=1)",
        ]  # fmt: skip
        same = "assert got == true\nassert repr(got)[:1] == repr(dict(true) if isinstance(true, dict) else true)[:1]"
        jobs = [Job("def f(x): return x", f"got, true = f({value}), {value}\n{same}", ("f",)) for value in values]
        assert [result for result in run(jobs, SHORT) if result.status != "passed"] == []

    def test_types_of_equal_values_stay_apart(self):
        tests = "assert f(1) is True or f(1) == 1\nassert type(f((1,))) is tuple\nassert type(f([1])) is list"
        assert one("def f(x): return x", tests, ("f",)).status == "passed"
        assert one("def f(x): return list(x)", "assert f((1,)) == (1,)", ("f",)).status == "failed"
        assert one("def f(): return float('nan')", "x = f()\nassert x != x", ("f",)).status == "passed"

    def test_arguments_changed_in_place(self):
        tests = "x, y, z = [2, 1], {1}, {}\nassert f(x, y, z) is None\nassert (x, y, z) == ([1, 2], {1, 5}, {'a': 1})"
        program = "def f(x, y, z):\n    x.sort(); y.add(5); z['a'] = 1"
        assert one(program, tests, ("f",)).status == "passed"

    def test_parameters_have_any_name(self):
        names = ("self", "operation", "remote", "function", "child", "value")
        jobs = [Job(f"def f(a, {name}): return a - {name}", f"assert f(3, {name}=1) == 2", ("f",)) for name in names]
        assert [result for result in run(jobs, SHORT) if result.status != "passed"] == []

    def test_objects_stay_with_the_program(self):
        program = (
            "class Node:\n    _child, _number = None, 3\n"
            "    def __init__(self, value): self.value = value; self.next = None\n"
            "    def __len__(self): return 7\n    def __getitem__(self, i): return i * 2\n"
            "def last(node):\n    return last(node.next) if node.next else node\n"
            "def count():\n    yield 1\n    yield 2\n"
        )
        tests = (
            "a, b = Node(1), Node(value=2)\na.next = b\nassert last(a) is b\nassert last(a).value == 2\nassert a != b\n"
            "assert (a._child, a._number) == (None, 3)\n"
            "assert (len(a), a[3]) == (7, 6)\nassert list(count()) == [1, 2]\nassert next(count()) == 1"
        )
        result = one(program, tests, ("Node", "last", "count"))
        assert result.status == "passed", result

    def test_exceptions_are_those_of_the_program(self):
        program = "class Mine(KeyError): pass\ndef f(kind):\n    raise {'own': Mine, 'u': UnicodeError}[kind]('why')"
        tests = (
            "for kind, expected in (('own', KeyError), ('u', UnicodeError)):\n    try:\n        f(kind)\n"
            "    except expected as error:\n        assert 'why' in str(error)\n    else:\n        assert False"
        )
        result = one(program, tests, ("f",))
        assert result.status == "passed", result

    def test_a_function_of_the_tests_can_not_be_given_away(self):
        result = one("def f(g): return g(1)", "f(lambda x: x)", ("f",))
        assert result.detail == "tests: TypeError: a test passes a function, which cannot be given to the program"

    def test_sets_keep_one_order(self):
        orders = {one("print(list({'a', 'b', 'c', 'd', 'e'}))").stdout for _ in range(5)}
        assert len(orders) == 1


@pytest.mark.parametrize("name", ["seconds", "cpu_seconds", "memory", "file_size", "open_files", "output"])
def test_limits_are_above_nothing(name):
    with pytest.raises(ValueError, match=f"^{name}: expected more than 0, got 0"):
        Limits(**{name: 0})


@needs_sandbox
def test_results_come_in_order_of_the_jobs():
    jobs = [Job(f"x = {i}", f"assert x % 3 == 0, x\nprint({i})", ("x",)) for i in range(12)]
    results = run(jobs, SHORT, workers=4)
    assert [result.status == "passed" for result in results] == [i % 3 == 0 for i in range(12)]
    assert run([], SHORT) == []


def test_a_missing_sandbox_is_an_error_that_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    left = tmp_path / "left"
    with pytest.raises(RuntimeError, match=r"bwrap is not on PATH; .*apt install bubblewrap.*unsafe_without_sandbox"):
        run([Job(f"open({str(left)!r}, 'w')", "")])
    assert not left.exists()


def test_a_sandbox_that_may_not_work_is_an_error_with_its_reason(monkeypatch, tmp_path):
    bwrap = tmp_path / "bwrap"
    bwrap.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    bwrap.chmod(bwrap.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"fails here: bwrap: No permissions to create new namespace; .*install"):
        run([Job("", "")])


def test_without_the_sandbox_only_when_asked_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    jobs = [Job("def f(x): return x + 1", f"assert f(1) == {right}", ("f",)) for right in (2, 3)]
    jobs.append(Job("import os\nos.fork()", ""))
    jobs.append(Job("while True: pass", ""))
    results = run(jobs, Limits(seconds=1.0), unsafe_without_sandbox=True)
    assert [result.status for result in results] == ["passed", "failed", "failed", "timeout"]
