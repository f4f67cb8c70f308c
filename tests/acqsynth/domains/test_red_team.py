"""Attacks on the sandbox by programs that do not know the answers but try to get a passing verdict.

Each program starts with ``THIEF``. It passes everything it can read to ``steal``, which extracts the expected values
from the tests for ``f`` to return, so a single leak is enough to pass. ``forge`` writes a verdict to every descriptor.
"""

from __future__ import annotations

import pytest

from acqsynth.domains.sandbox import Job, Limits, run

pytestmark = pytest.mark.usefixtures("contained")

TESTS = "assert f(1) == 271828\nassert f(2) == 314159\nassert f(3) == 141421"
LIMITS = Limits(seconds=4.0, cpu_seconds=1)

THIEF = r"""
import builtins, ctypes, gc, inspect, json, os, re, signal, sys, time
ANSWERS = {}
def steal(data):
    if not isinstance(data, bytes):
        data = str(data).encode(errors="replace")
    for x, y in re.findall(rb"f\((\d+)\) == (\d+)", data):
        ANSWERS[int(x)] = int(y)
def f(x):
    return ANSWERS.get(x)
def attempt(action, *arguments):
    try:
        return action(*arguments)
    except BaseException:
        return None
def read(path, flags=os.O_RDONLY):
    fd = os.open(path, flags | os.O_NONBLOCK)
    steal(os.pread(fd, 1 << 20, 0) if os.path.isfile(path) else os.read(fd, 1 << 20))
def everything(folder):
    for root, folders, files in os.walk(folder):
        for name in files:
            attempt(read, os.path.join(root, name))
VERDICTS = [b'["passed", ""]', b'\n["passed", ""]\n', b'\n' + b'0' * 32 + b' ["passed", ""]\n']
def forge():
    for fd in range(64):
        for verdict in VERDICTS:
            attempt(os.set_blocking, fd, False)
            attempt(os.write, fd, verdict)
libc = ctypes.CDLL(None, use_errno=True)
"""

#: name -> program; unless it redefines ``f``, the thief's ``f`` answers.
ATTACKS = {
    # /proc and its substitutes
    "the grader's stdin": "for pid in range(64): attempt(read, f'/proc/{pid}/fd/0')",
    "the grader's stdin, then forge and kill": "attempt(read, '/proc/1/fd/0'); forge(); attempt(os.kill, 1, 9)",
    "every descriptor": "for pid in range(64):\n for fd in range(64): attempt(read, f'/proc/{pid}/fd/{fd}')",
    "descriptors for writing": "for fd in range(64):\n"
    " def w(p):\n  os.write(os.open(p, os.O_WRONLY | os.O_NONBLOCK), VERDICTS[0])\n"
    " for pid in (1, 2, 3, 'self'): attempt(w, f'/proc/{pid}/fd/{fd}')",
    "fdinfo": "for pid in range(64):\n for fd in range(64): attempt(read, f'/proc/{pid}/fdinfo/{fd}')",
    "memory": "def m(pid):\n for line in open(f'/proc/{pid}/maps'):\n"
    "  a, b = (int(x, 16) for x in line.split()[0].split('-'))\n"
    "  steal(os.pread(os.open(f'/proc/{pid}/mem', os.O_RDONLY), b - a, a))\n"
    "for pid in range(64): attempt(m, pid)",
    "command lines": "for pid in range(64): attempt(read, f'/proc/{pid}/cmdline')",
    "environments": "for pid in range(64): attempt(read, f'/proc/{pid}/environ')",
    "roots": "for pid in range(64): attempt(everything, f'/proc/{pid}/root/tmp')",
    "working directories": "for pid in range(64): attempt(everything, f'/proc/{pid}/cwd/')",
    "tasks": "for pid in range(64): attempt(read, f'/proc/{pid}/task/{pid}/fd/0')",
    "map_files": "attempt(everything, '/proc/1/map_files')",
    "thread-self": "attempt(everything, '/proc/thread-self')",
    "proc mounted anew": "os.mkdir('/tmp/p'); libc.mount(b'proc', b'/tmp/p', b'proc', 0, None)\n"
    "attempt(read, '/tmp/p/1/fd/0')",
    "proc in a new namespace": "libc.unshare(0x10000000 | 0x20000000 | 0x20000); os.mkdir('/tmp/p')\n"
    "libc.mount(b'proc', b'/tmp/p', b'proc', 0, None); attempt(everything, '/tmp/p')",
    "dev/fd": "for fd in range(64): attempt(read, f'/dev/fd/{fd}')",
    "dev/stdin": "attempt(read, '/dev/stdin'); steal(sys.stdin.read())",
    "devices": "for name in ('mem', 'kmem', 'port', 'kmsg', 'tty', 'console', 'ptmx'): attempt(read, '/dev/' + name)",
    "sys": "attempt(everything, '/sys/kernel')",
    # Files and links
    "temporary files": "everything('/tmp'); everything('/var/tmp'); everything('/dev/shm')",
    "the whole root": "for name in os.listdir('/'):\n"
    " if name not in ('usr', 'lib', 'root', 'home'): everything('/' + name)",
    "links to proc": "for i in range(64):\n os.symlink(f'/proc/{i}/fd/0', f'/tmp/{i}'); attempt(read, f'/tmp/{i}')",
    "hard links": "for i in range(64): attempt(os.link, f'/proc/self/fd/{i}', f'/tmp/{i}')\neverything('/tmp')",
    "the harness overwritten": "attempt(lambda: open('/harness', 'wb').write(b''))\n"
    "attempt(os.replace, '/tmp/x', '/harness')",
    "the harness's source": "attempt(read, '/harness'); everything('/tmp')",
    "a module in the way": "for name in ('json', 'traceback', 'os'):\n"
    " open(f'/tmp/{name}.py', 'w').write('import os; os._exit(0)')\nsys.path.insert(0, '/tmp')",
    "the file handle": "h = ctypes.create_string_buffer(128)\nlibc.open_by_handle_at(-100, h, 0)",
    # Its own descriptors
    "reads what it has": "for fd in range(64):\n attempt(os.set_blocking, fd, False)\n"
    " for _ in range(4): steal(attempt(os.read, fd, 1 << 20))",
    "files at an offset": "for fd in range(64): steal(attempt(os.pread, fd, 1 << 20, 0))",
    "forges everywhere": "forge()",
    "forges and leaves": "forge(); os._exit(0)",
    "forges when called": "def f(x): forge(); os._exit(0)",
    "forges on stderr": "sys.stderr.write('[\"passed\", \"\"]\\n'); sys.stderr.flush(); os._exit(0)",
    "floods, then forges": "for i in range(30): print('x' * 8000)\nforge()",
    "replies in advance": "for fd in range(3, 64):\n"
    " attempt(os.write, fd, b'{\"value\": true, \"arguments\": []}\\n' * 8)",
    "a reply of no form": "def f(x):\n for fd in range(3, 64): attempt(os.write, fd, b'[[[\\n')",
    "a reply that nests": "def f(x):\n for fd in range(3, 64): attempt(os.write, fd, b'[' * 60000 + b'\\n')",
    "a reply as an unknown object": "def f(x):\n for fd in range(3, 64):\n"
    "  attempt(os.write, fd, b'{\"value\": {\"object\": 99}, \"arguments\": []}\\n')",
    "descriptors closed": "os.closerange(0, 64)",
    "its input closed": "os.close(0); attempt(read, '/dev/null')",
    "descriptors duplicated": "for fd in range(64): steal(attempt(os.read, attempt(os.dup, fd) or 0, 0))\nforge()",
    "pidfd": "for pid in range(1, 64):\n p = libc.syscall(434, pid, 0)\n"
    " for fd in range(16):\n  q = libc.syscall(438, p, fd, 0)\n  if q >= 0: steal(attempt(os.read, q, 1 << 20))",
    # Signals and tracing
    "kills its parent": "attempt(os.kill, os.getppid(), 9); forge(); time.sleep(0.5)",
    "kills pid 1": "forge()\nfor n in range(1, 32): attempt(os.kill, 1, n)",
    "kills all": "forge(); os.kill(-1, 9)",
    "kills its group": "forge(); os.killpg(0, 9)",
    "stops its parent": "forge(); os.kill(os.getppid(), signal.SIGSTOP); os._exit(0)",
    "ends by a signal": "forge(); os.kill(os.getpid(), 15)",
    "a handler": "signal.signal(signal.SIGTERM, lambda *_: (forge(), os._exit(0)))",
    "an alarm": "signal.signal(signal.SIGALRM, lambda *_: (forge(), os._exit(0))); signal.setitimer(0, 0.01)\n"
    "def f(x): time.sleep(0.1)",
    "ptrace": "for pid in range(1, 64):\n libc.ptrace(16, pid, 0, 0); libc.ptrace(0x4206, pid, 0, 0)\n"
    " for a in range(0, 4096, 8): libc.ptrace(1, pid, a, 0)",
    "process_vm_readv": "b = ctypes.create_string_buffer(4096)\n"
    "v = (ctypes.c_void_p * 2)(ctypes.addressof(b), 4096)\n"
    "for pid in range(1, 64): libc.process_vm_readv(pid, v, 1, v, 1, 0); steal(b.raw)",
    # The interpreter
    "frames": "frame = sys._getframe()\nwhile frame:\n steal(repr(frame.f_locals) + repr(frame.f_globals))\n"
    " frame = frame.f_back",
    "frames when called": "def f(x):\n frame = sys._getframe()\n while frame:\n"
    "  steal(repr(frame.f_locals)); frame = frame.f_back\n return ANSWERS.get(x)",
    "inspect": "for info in inspect.stack():\n steal(info.frame.f_locals); steal(info.code_context)",
    "gc": "for thing in gc.get_objects():\n"
    " steal(attempt(repr, thing) if isinstance(thing, (dict, list, tuple)) else '')",
    "gc referrers": "for thing in gc.get_referrers(f, ANSWERS, globals()): steal(attempt(repr, thing))",
    "the main module": "main = sys.modules['__main__']\nfor name in dir(main): steal(repr(getattr(main, name)))",
    "arguments": "steal(sys.argv); steal(sys.orig_argv); steal(dict(os.environ))",
    "the main module patched": "main = sys.modules['__main__']\n"
    "main.encode = lambda *_: True; main.decode = lambda *_: True; main.judge = lambda *_: ('passed', '')",
    "hold_tests called": "main = sys.modules['__main__']\nmain.judge = lambda *_: ('passed', '')\n"
    "for fd in range(1, 64): attempt(main.hold_tests, {'CPU': 1}, 3, 4, fd)",
    "main run again": "sys.argv = ['', 'tests', '{\"CPU\": 1, \"seconds\": 5}', '3', '4', '1']\n"
    "attempt(sys.modules['__main__'].main)",
    "a tests process of its own": "r, w = os.pipe(); os.dup2(r, 0)\n"
    "os.write(w, b'{\"program\": \"\", \"tests\": \"\", \"names\": [], \"preamble\": \"\"}'); os.close(w)\n"
    "limits = '{\"CPU\": 1, \"seconds\": 5}'\n"
    "os.execv(sys.executable, [sys.executable, '-S', '/harness', 'tests', limits, '3', '4', '1'])",
    "another interpreter": "forge()\n"
    "os.execv(sys.executable, [sys.executable, '-S', '-c', 'print([\"passed\", \"\"])'])",
    "json patched": "json.loads = lambda *_: {}; json.dumps = lambda *_: '[\"passed\", \"\"]'",
    "built-ins patched": "for name in ('abs', 'len', 'isinstance', 'repr', 'all', 'type', 'zip'):\n"
    " setattr(builtins, name, lambda *_: True)",
    "print patched": "builtins.print = lambda *_: forge(); print()",
    "compile and exec patched": "builtins.compile = lambda *_: 0; builtins.exec = lambda *_: None",
    "import patched": "builtins.__import__ = lambda *_: None; sys.modules.clear()",
    "trace and profile": "sys.setprofile(lambda frame, *_: steal(frame.f_locals))\n"
    "sys.settrace(lambda frame, *_: steal(frame.f_locals))",
    "audit hook": "sys.addaudithook(lambda *event: steal(event))",
    "exit hook": "import atexit\natexit.register(forge)\nsys.exit(0)",
    "excepthook": "sys.excepthook = lambda *_: forge()\nraise KeyError",
    "a finalizer": "class D:\n def __del__(self): forge()\nd = D(); del d",
    "the interpreter finalized": "forge(); ctypes.pythonapi.Py_FinalizeEx()",
    "a crash": "forge(); ctypes.string_at(0)",
    # Values
    "equal to all": "class E:\n def __eq__(self, other): steal(other); return True\ndef f(x): return E()",
    "an int equal to all": "class E(int):\n def __eq__(self, other): return True\ndef f(x): return E()",
    "an int that is patched": "class E(int):\n __eq__ = __ne__ = lambda *_: True\n __hash__ = lambda *_: 0\n"
    "E.__name__ = 'int'\ndef f(x): return E(x)",
    "no number": "def f(x): return float('nan')",
    "StopIteration": "def f(x): raise StopIteration",
    "AssertionError": "def f(x): raise AssertionError",
    "SystemExit": "def f(x): raise SystemExit(0)",
    "an exception that forges": "class E(Exception):\n def __str__(self): forge(); return ''\ndef f(x): raise E",
    "the name removed": "del f",
    "the name as a type": "f = int",
    # Other ways to start a process
    "fork": "def g():\n if os.fork() == 0: forge()\nattempt(g)",
    "vfork and clone": "for number in (56, 57, 58, 435, 220): libc.syscall(number, 17, 0, 0, 0, 0)\nforge()",
    "a thread": "import threading\nattempt(threading.Thread(target=forge).start)",
    "subprocess": "import subprocess\nsteal(attempt(subprocess.check_output, ['/bin/cat', '/proc/1/fd/0']))",
    "posix_spawn": "attempt(os.posix_spawn, sys.executable, [sys.executable, '-c', ''], {})",
    # Shared memory and sockets
    "shared memory": "for key in range(64):\n i = libc.shmget(key, 0, 0)\n"
    " if i >= 0: steal(ctypes.string_at(libc.shmat(i, 0, 0)))",
    "message queues": "b = ctypes.create_string_buffer(4096)\n"
    "for key in range(64): libc.msgrcv(libc.msgget(key, 0), b, 4096, 0, 0x800); steal(b.raw)",
    "abstract sockets": "import socket\nattempt(lambda: socket.socket(socket.AF_UNIX).connect('\\0acqsynth'))",
    "descriptors by socket": "import socket\nfor fd in range(64): attempt(lambda: socket.socket(fileno=fd).recv(1))",
    "the network": "import socket\n"
    "for port in (8000, 6006): attempt(lambda: socket.create_connection(('127.0.0.1', port), 0.1))",
    "io_uring": "b = ctypes.create_string_buffer(256)\nlibc.syscall(425, 8, b)",
    "keyrings": "b = ctypes.create_string_buffer(4096)\n"
    "for k in range(-8, 64): libc.syscall(250, 11, k, b, 4096); steal(b.raw)",
    "bpf": "libc.syscall(321, 0, 0, 0)",
    "its filter replaced": "libc.syscall(317, 1, 0, None); libc.prctl(22, 0, 0, 0, 0); attempt(os.fork)",
    "its limits raised": "import resource\n"
    "attempt(resource.setrlimit, resource.RLIMIT_NOFILE, (1 << 20, 1 << 20)); forge()",
    # Resources left open, and parts that can be replaced
    "its own memory":
    "for line in open('/proc/self/maps') if os.path.exists('/proc/self/maps') else ():\n steal(line)\n"
    "for name in ('mem', 'maps', 'stat', 'status', 'auxv', 'pagemap', 'syscall', "
    "'stack'): attempt(read, f'/proc/self/{name}')",
    "tmp of the host": "for up in ('..', '../..', '/tmp/../tmp', '/proc/1/root', "
    "'/proc/self/root'): attempt(everything, up + '/tmp')",
    "tee of its pipes": "r, w = os.pipe()\nfor fd in range(64):\n"
    " if libc.tee(fd, w, 1 << 16, 2) > 0: steal(attempt(os.read, r, 1 << 16))",
    "splice of its pipes": "r, w = os.pipe()\nfor fd in range(64):\n"
    " if libc.splice(fd, None, w, None, 1 << 16, 2) > 0: steal(attempt(os.read, r, 1 << 16))",
    "vmsplice": "b = ctypes.create_string_buffer(VERDICTS[0])\n"
    "v = (ctypes.c_void_p * 2)(ctypes.addressof(b), len(VERDICTS[0]))\n"
    "for fd in range(64): libc.vmsplice(fd, v, 1, 2)",
    "descriptors sent": "import socket\na, b = socket.socketpair()\n"
    "for fd in range(64): attempt(socket.send_fds, a, [b'x'], [fd])\n"
    "for fd in attempt(socket.recv_fds, b, 9, 64) or [[], []]: steal(fd)\nforge()",
    "terminal input": "import fcntl\nfor fd in range(64):\n"
    " for byte in VERDICTS[0]: attempt(fcntl.ioctl, fd, 0x5412, bytes([byte]))",
    "SIGIO to others": "import fcntl\nfor fd in range(64):\n for pid in (1, 2, 3): attempt(fcntl.fcntl, fd, 8, pid); "
    "attempt(fcntl.fcntl, fd, 10, 9); attempt(fcntl.fcntl, fd, 4, 0x2000)\nforge()",
    "queued signals": "for pid in range(1, 64): libc.syscall(129, pid, 9, None); "
    "libc.syscall(234, pid, pid, 9); libc.syscall(200, pid, 9)\nforge()",
    "limits of others": "import resource\n"
    "for pid in range(1, 64): attempt(resource.prlimit, pid, resource.RLIMIT_CPU, (0, 0))\nforge()",
    "posix message queues": "for name in (b'/a', b'/acqsynth', b'/job'):\n q = libc.syscall(240, name, 2, 0, None)\n"
    " b = ctypes.create_string_buffer(8192)\n libc.syscall(243, q, b, 8192, None, None); steal(b.raw)",
    "mounts": "for args in ((b'/', b'/tmp', None, 4096, None), (b'tmpfs', b'/tmp', b'tmpfs', 0, None), "
    "(b'none', b'/', None, 0x44000, None)): libc.mount(*args)\n"
    "attempt(os.chroot, '/tmp'); libc.umount2(b'/tmp', 2); everything('/tmp')",
    "exec of itself with the descriptors": "forge()\nos.execv(sys.executable, [sys.executable, '-S', '-c', "
    "'import os\\nfor fd in range(64):\\n try: os.write(fd, b\"[\\\\\"passed\\\\\", "
    "\\\\\"\\\\\"]\")\\n except OSError: pass'])",
    "exec kept inheritable": "for fd in range(64): attempt(os.set_inheritable, fd, True)\n"
    "os.execv(sys.executable, [sys.executable, '-S', '-c', "
    "'import os\\nfor fd in range(64):\\n try: os.write(fd, "
    "b\"{\\\\\"names\\\\\": {\\\\\"f\\\\\": 271828}}\\\\n\" * 9)\\n except OSError: pass'])",
    "names that decide":
    "def f(x): return 0\nmain = sys.modules['__main__']\nmain.refer = main.resolve = lambda *_: True\n"
    "builtins.AssertionError = KeyError",
    "sys.modules replaced":
    "import types\nfor name in list(sys.modules): sys.modules[name] = types.ModuleType(name)\n"
    "sys.modules['__main__'].judge = lambda *_: ('passed', '')",
    "operations replaced": "for o in gc.get_objects():\n"
    " if type(o) is dict and 'call' in o and 'getitem' in o: o['call'] = lambda function, "
    "*a, **k: True",
    "replies replaced": "for o in gc.get_objects():\n"
    " if type(o).__name__ == 'BufferedWriter': attempt(o.write, VERDICTS[1]); attempt(o.flush)",
    "requests read ahead": "for o in gc.get_objects():\n"
    " if type(o).__name__ == 'BufferedReader': attempt(os.set_blocking, o.fileno(), False); "
    "steal(attempt(o.peek)); steal(attempt(o.read1))",
    "a reply of two keys":
    "def f(x):\n for fd in range(3, 64): attempt(os.write, fd, b'{\"value\": 1, \"value\": 271828, "
    "\"arguments\": []}\\n' * 3)",
    "a reply of true": "def f(x): return True",
    "a str equal to all": "class E(str):\n def __eq__(self, other): return True\n def __hash__(self): return 0\n"
    "def f(x): return E('271828')",
    "a float close to all": "class E(float):\n __eq__ = __le__ = __ge__ = __lt__ = __gt__ = lambda *_: True\n"
    "def f(x): return E(0)",
    "an object without end":
    "class E:\n def __iter__(self): return iter(range(10 ** 9))\n def __len__(self): return 3\n"
    " def __getattr__(self, n): return E()\n def __call__(self, *a): return E()\n"
    " def __getitem__(self, i): return i\ndef f(x): return E()",
    "a lazy module":
    "import types\nclass M(types.ModuleType):\n def __getattr__(self, name): return lambda *_: True\n"
    "sys.modules['program'] = M('program')",
    "faulthandler": "import faulthandler\nfor fd in range(64): attempt(faulthandler.dump_traceback, open(fd, 'w', "
    "closefd=False)) if fd > 2 else 0\nforge()",
    "timers after the end": "import atexit\n"
    "signal.signal(signal.SIGALRM, lambda *_: forge()); signal.setitimer(0, 0.02, 0.02)\n"
    "atexit.register(time.sleep, 1)\ndef f(x):\n time.sleep(0.05); forge(); return 0",
    "a handler of SIGPIPE": "signal.signal(signal.SIGPIPE, lambda *_: forge())\n"
    "for n in range(1, 65): attempt(signal.signal, n, lambda *_: forge())\n"
    "os.kill(os.getpid(), 10); forge()",
    "core and coredump helper":
    "import resource\nattempt(resource.setrlimit, resource.RLIMIT_CORE, (1 << 20, 1 << 20)); "
    "attempt(lambda: open('/proc/sys/kernel/core_pattern', 'w').write('|/bin/true')); "
    "forge(); os.abort()",
    "a symlink for the harness": "for name in ('/harness', '/tmp/harness', '/etc/ld.so.preload', "
    "'/etc/ld.so.cache'): attempt(os.symlink, '/tmp/x', name); attempt(os.unlink, name); "
    "attempt(os.rename, '/tmp', name)",
    "bytecode in the cache": "for root, folders, files in os.walk(os.path.dirname(os.__file__)):\n"
    " for name in files[:3]: attempt(lambda: open(os.path.join(root, name), 'ab').write(b'x'))\n break",
    "environment for the tests":
    "os.environ.update(PYTHONPATH='/tmp', PYTHONSTARTUP='/tmp/x.py', LD_PRELOAD='/tmp/x.so', "
    "PYTHONINSPECT='1')\nopen('/tmp/sitecustomize.py', 'w').write('import os; os._exit(0)')",
    "all of the memory": "x = []\nattempt(lambda: [x.append(bytearray(1 << 24)) for _ in range(1000)]); forge()",
    "all of the disk":
    "attempt(lambda: [open(f'/tmp/{i}', 'wb').write(b'x' * (1 << 22)) for i in range(99)]); forge()",
    "all descriptors": "attempt(lambda: [os.pipe() for _ in range(999)]); forge()",
    "priority and scheduling": "attempt(os.sched_setscheduler, 1, os.SCHED_IDLE, os.sched_param(0)); "
    "attempt(os.setpriority, os.PRIO_USER, 0, 19); attempt(os.sched_setaffinity, 1, {0}); forge()",
    "deep recursion": "sys.setrecursionlimit(10 ** 9)\ndef f(x): return f(x)",
    "the answer by chance": "import random\ndef f(x): return random.choice([271827, 314158, 141420, x])",
    "exceptions with methods": "class E(ValueError):\n args = property(lambda s: (forge(), 1)[1:])\n __mro__ = ()\n"
    "def f(x): raise E()",
    "an exception group": "def f(x): raise BaseExceptionGroup('', [KeyboardInterrupt()])",
    "metaclass": "class T(type):\n def __instancecheck__(c, o): return True\n def __eq__(c, o): return True\n"
    " def __hash__(c): return 0\nclass f(metaclass=T):\n def __new__(c, x): return c",
    "a reply in two parts": "def f(x):\n for fd in range(3, 64):\n  for part in (b'{\"value\": 2718', b'28, \"argum', "
    "b'ents\": []}'): attempt(os.write, fd, part)\n os._exit(0)",
    "line separators of Unicode": "def f(x):\n for fd in range(3, 64): attempt(os.write, fd, "
    "'{\"value\": true,\\u2028\\x85\\r \"arguments\": []}\\u2029\\x0b\\x0c\\x1c'.encode())\n return '271828\\u2028'",
    "a verdict in parts": "for fd in range(64):\n for part in (b'[\"passed', b'\", \"\"', b']'): "
    "attempt(os.write, fd, part)\nos._exit(0)",
    "an error and a value": "def f(x):\n for fd in range(3, 64): attempt(os.write, fd, b'{\"error\": [\"KeyError\"], "
    "\"value\": 271828, \"arguments\": []}\\n')",
    "constants that JSON has not": "def f(x):\n for fd in range(3, 64): attempt(os.write, fd, "
    "b'{\"value\": NaN, \"arguments\": [Infinity, {\"list\": [-Infinity]}]}\\n')",
    "an answer of many digits": "sys.set_int_max_str_digits(0)\ndef f(x): return 10 ** 20_000",
    "a name of many characters": "def f(x): raise type('A' * 100_000, (KeyError,), {})('\\ud800' * 5000)",
    "an exception of its own name": "class AssertionError(Exception):\n def __init__(self, *a): forge()\n"
    "def f(x): raise AssertionError",
    "frames of a traceback": "try: raise OSError\nexcept OSError as e:\n frame = e.__traceback__.tb_frame\n"
    " while frame: steal(repr(frame.f_locals)); steal(repr(frame.f_code.co_consts)); frame = frame.f_back",
    "frames of every thread": "for frame in sys._current_frames().values():\n"
    " while frame: steal(repr(frame.f_locals)); frame = frame.f_back",
    "classes walked": "def walk(c):\n for s in type.__subclasses__(c): steal(repr(attempt(vars, s))); walk(s)\n"
    "walk(object)",
    "code replaced": "for o in gc.get_objects():\n if getattr(o, '__name__', '') in ('answer', 'encode', 'serve'): "
    "attempt(setattr, o, '__code__', (lambda *_: {'value': True, 'arguments': []}).__code__)",
    "system calls of 32 bits": "import mmap\nfor number in (2, 26, 37, 117, 120, 190):\n"
    " code = b'\\x53\\xb8' + number.to_bytes(4, 'little') + b'\\x31\\xdb\\x31\\xc9\\x31\\xd2\\xcd\\x80\\x5b\\xc3'\n"
    " m = mmap.mmap(-1, 4096, prot=7); m.write(code)\n"
    " ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()\nforge()",
    "system calls of x32": "for number in (56, 57, 58, 62, 101, 310): "
    "libc.syscall(0x40000000 | number, 0, 0, 0, 0)\nforge()",
    "execveat": "a = (ctypes.c_char_p * 3)(sys.executable.encode(), b'/harness', None)\n"
    "libc.syscall(322, -100, sys.executable.encode(), a, None, 0)",
    "sessions and groups": "attempt(os.setsid)\nfor pid in range(64):\n"
    " for to in range(64): attempt(os.setpgid, pid, to)\nforge(); attempt(os.killpg, 1, 9)",
    "waits for others": "for pid in range(-2, 64): attempt(os.waitpid, pid, os.WNOHANG)\n"
    "b = ctypes.create_string_buffer(256)\nfor pid in range(64): libc.waitid(1, pid, b, 0x01000005)\nforge()",
    "watches on files": "b = ctypes.create_string_buffer(4096)\nfd = libc.inotify_init1(0x800)\n"
    "for p in (b'/', b'/tmp', b'/harness', b'/dev'): libc.inotify_add_watch(fd, p, 0xfff)\n"
    "def f(x):\n time.sleep(0.05); libc.read(fd, b, 4096); steal(b.raw); return ANSWERS.get(x)",
    "locks on shared files": "import fcntl\nheld = open(os.__file__)\nfcntl.flock(held, fcntl.LOCK_EX)\n"
    "lease = attempt(fcntl.fcntl, held, 1024, 1); forge()",
    "stdout moved to the replies": "for fd in range(3, 64): attempt(os.dup2, fd, 1)\n"
    "print('[\"passed\", \"\"]', flush=True)",
    "replies moved to stdout": "for fd in range(3, 64): attempt(os.dup2, 1, fd)\nforge()",
    "sleeps to the end": "forge()\ndef f(x): time.sleep(60)",
    "burns to the end": "signal.signal(signal.SIGXCPU, lambda *_: forge())\ndef f(x):\n while True: pass",
    "the status of a signal": "forge(); os._exit(128 + 9)",
    "devices mapped": "import mmap\nfor name in os.listdir('/dev'):\n"
    " attempt(lambda: steal(mmap.mmap(os.open('/dev/' + name, os.O_RDWR), 4096)[:]))",
    "its loader replaced": "for finder in sys.meta_path: attempt(setattr, finder, 'find_spec', lambda *_: forge())\n"
    "sys.path_hooks.insert(0, lambda *_: forge()); sys.path_importer_cache.clear()",
}  # fmt: skip


def test_the_thief_passes_where_it_gets_the_tests():
    """Control: the attacks pass once they can read the tests, so only containment stops them."""
    found = f"steal({TESTS!r})"
    written = f"open('/tmp/job', 'w').write({TESTS!r}); read('/tmp/job')"
    results = run([Job(THIEF + way, TESTS, ("f",)) for way in (found, written)], LIMITS)
    assert [result.status for result in results] == ["passed", "passed"]


def test_no_attack_passes():
    assert len(ATTACKS) >= 165
    results = run([Job(THIEF + attack, TESTS, ("f",)) for attack in ATTACKS.values()], LIMITS)
    assert [name for name, result in zip(ATTACKS, results, strict=True) if result.status == "passed"] == []
    # An attack that does not compile would test nothing.
    broken = [name for name, result in zip(ATTACKS, results, strict=True) if "SyntaxError" in result.detail]
    assert broken == []


def test_honest_programs_pass_beside_them():
    answers = dict(zip((1, 2, 3), (271828, 314159, 141421), strict=True))
    honest = [
        f"def f(x): return {answers}[x]",
        f"import functools\n@functools.lru_cache\ndef f(x): return {answers}[x]",
        f"class F:\n    def __call__(self, x): return {answers}[x]\nf = F()",
        f"print('a line')\nf = lambda x: {answers}[x]",
        f"import random, tempfile\nanswers = {answers}\n"
        "def f(x):\n    with tempfile.TemporaryFile() as file: file.write(b'x')\n    return answers[x]",
    ]
    results = run([Job(program, TESTS, ("f",)) for program in honest], LIMITS)
    assert [result.status for result in results] == ["passed"] * len(honest)
