from __future__ import annotations

import importlib.util
import os
import pickle
import signal
import threading
import time

import pytest

from acqsynth.domains import math_check
from acqsynth.domains.math_check import MathChecker

#: math-verify does not finish on this expression.
ENDLESS = "9^{9^{9^{9}}}"


@pytest.fixture
def checker():
    checker = MathChecker(workers=2, seconds=2.0)
    yield checker
    checker.close()


@pytest.fixture(scope="module")
def shared():
    """For tests that leave the processes as they are; each process imports SymPy."""
    checker = MathChecker(workers=2, seconds=30.0)
    yield checker
    checker.close()


def test_expressions_are_compared(shared):
    pairs = {
        ("2x + 1", "1 + 2x"): True,
        ("\\frac{1}{2}", "0.5"): True,
        ("3", "4"): False,
        ("(x+1)^2", "x^2 + 2x + 1"): True,
        ("3", "\\frac{"): False,
        ("1 < x < 2", "(1, 2)"): True,
        ("(1, 2)", "1 < x < 2"): True,
        ("1 < x < 2", "1 < y < 2"): False,
    }
    checked = shared.checked
    assert shared.equal(list(pairs)) == list(pairs.values())
    assert (shared.checked - checked, shared.lost) == (len(pairs), 0)


def test_what_takes_too_long_is_not_equal_and_is_counted(checker):
    begin = time.monotonic()
    pairs = [("9", ENDLESS), ("x + 1", "1 + x"), ("9", ENDLESS), ("x + 2", "2 + x")]
    assert checker.equal(pairs) == [False, True, False, True]
    assert (checker.checked, checker.lost) == (4, 2)
    assert time.monotonic() - begin < 30
    assert checker.equal([("x + 3", "3 + x")] * 3) == [True] * 3  # by replacement workers
    assert checker.lost == 2


def test_the_kernel_ends_a_worker_at_its_deadline_by_itself():
    """The worker has its own alarm, so it ends even if its parent is gone."""
    worker = math_check._Worker(0.5)
    stdin = worker.process.stdin
    assert stdin is not None
    stdin.write(b'["9", "9^{9^{9^{9}}}"]\n')
    stdin.flush()
    assert worker.process.wait(20) == -signal.SIGALRM
    worker.kill()


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_stops_is_replaced(checker, sent):
    assert checker.equal([("x + 1", "1 + x")]) == [True]
    worker = checker._idle.get()
    assert worker is not None
    worker.seconds = 0.5
    os.kill(worker.process.pid, sent)
    checker._idle.put(worker)
    assert checker.equal([("x + 1", "1 + x")]) == [False]
    assert worker.process.returncode == -signal.SIGKILL
    assert checker.lost == 1
    assert checker.equal([("x + 1", "1 + x")]) == [True]


def test_threads_other_than_the_main_one_get_the_same_answers(shared):
    """math-verify itself raises outside the main thread because it sets an alarm."""
    results = {}
    pairs = [("x + 1", "1 + x"), ("x", "y")]
    threads = [threading.Thread(target=lambda i=i: results.update({i: shared.equal(pairs)})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(results.values()) == [[True, False]] * 4


def test_an_answer_of_any_length_is_taken(checker):
    assert checker.equal([("1", "1" * 10**6), ("1", "(" * 1999)]) == [False, False]


def test_nothing_starts_before_it_is_needed():
    checker = MathChecker()
    assert checker.equal([]) == []
    assert [checker._idle.get() for _ in range(checker._idle.qsize())] == [None, None]


def test_pickles_without_its_processes(shared):
    shared.equal([("x + 1", "1 + x")])
    copy = pickle.loads(pickle.dumps(shared))
    assert (copy.workers, copy.seconds, copy.checked) == (2, 30.0, 0)


def test_a_missing_math_verify_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r'math-verify is not installed: run pip install "acqcore\[train\]"'):
        MathChecker().equal([("1", "2")])


def test_a_worker_that_does_not_start_says_why(monkeypatch, tmp_path):
    (tmp_path / "worker.py").write_text("raise SystemExit('no such luck')")
    monkeypatch.setattr(math_check, "__file__", str(tmp_path / "worker.py"))
    checker = MathChecker(workers=1)
    for _ in range(2):  # the failed worker does not occupy its slot
        with pytest.raises(RuntimeError, match="the process of math-verify did not start: no such luck"):
            checker.equal([("1", "2")])


@pytest.mark.parametrize(("options", "name"), [({"workers": 0.5}, "workers"), ({"seconds": 0.0}, "seconds")])
def test_bad_options_name_the_argument(options, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        MathChecker(**options)
