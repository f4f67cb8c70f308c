"""The batcher: contents and order of batches, and exactly one answer per item."""

from __future__ import annotations

import asyncio
import os
import pickle
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from acqsynth import batching
from acqsynth.batching import Batcher


def double(key, items):
    return [2 * item for item in items]


class Doubler:
    """Doubles items and raises on 13. Batches block while ``free`` is cleared and must not overlap."""

    def __init__(self):
        self.batches = []
        self.free = threading.Event()
        self.free.set()
        self.one_at_a_time = threading.Lock()

    def __call__(self, key, items):
        assert self.one_at_a_time.acquire(blocking=False)
        try:
            self.batches.append((key, items))
            assert self.free.wait(60)
            if 13 in items:
                raise RuntimeError("13")
            return double(key, items)
        finally:
            self.one_at_a_time.release()

    @property
    def items(self):
        return [items for _, items in self.batches]


@pytest.fixture
def doubler():
    return Doubler()


@pytest.fixture
def batcher(doubler):
    """``batcher(**options)`` builds a batcher that is closed after the test."""
    made = []

    def build(**options):
        made.append(Batcher(doubler, **{"limit": 8192, "wait": 0.0, **options}))
        return made[-1]

    yield build
    doubler.free.set()
    for each in made:
        each.close()


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def results(futures):
    return [future.result(60) for future in futures]


def held(doubler, batcher, key="a", items=(0,), sizes=None):
    """Starts a batch that runs until ``doubler.free`` is set."""
    doubler.free.clear()
    future = batcher.submit(key, list(items), sizes)
    until(lambda: len(doubler.batches) == 1)
    return future


def test_requests_that_come_together_are_one_batch(batcher, doubler):
    one = batcher(wait=0.3)
    assert results([one.submit("a", [i, i + 100]) for i in range(8)]) == [[2 * i, 2 * i + 200] for i in range(8)]
    assert len(doubler.batches) == 1


def test_batches_hold_the_limit_and_the_order(batcher, doubler):
    one = batcher(limit=10, wait=0.3)
    assert results([one.submit("a", [1, 2, 3], [4, 4, 9]), one.submit("a", [4, 5], [30, 1])]) == [[2, 4, 6], [8, 10]]
    assert doubler.items == [[1, 2], [3], [4], [5]]  # an item of size 30 gets its own batch


def test_a_full_batch_does_not_wait_and_a_lone_item_waits_as_set(batcher):
    assert batcher(limit=10, wait=1000.0).submit("a", [1, 2], [5, 5]).result(60) == [2, 4]
    begin = time.monotonic()
    assert batcher(wait=0.1).submit("a", [4]).result(60) == [8]
    assert time.monotonic() - begin > 0.09


def test_no_items_make_no_batch(batcher, doubler):
    assert batcher().submit("a", []).result() == []
    assert doubler.batches == []


def test_lanes_are_not_mixed_and_take_turns_by_age(batcher, doubler):
    one = batcher()
    first = held(doubler, one)
    rest = [one.submit(key, [item]) for key, item in (("b", 1), ("a", 2), ("b", 3))]
    assert one.waiting == 3
    doubler.free.set()
    assert results([first, *rest]) == [[0], [2], [4], [6]]
    assert doubler.batches == [("a", [0]), ("b", [1, 3]), ("a", [2])]


def test_one_requests_failure_is_not_anothers(batcher, doubler):
    one = batcher(wait=0.3)
    good, bad, last = (one.submit("a", items) for items in ([1, 2], [13, 3], [4]))
    assert good.result(60) == [2, 4]
    with pytest.raises(RuntimeError, match="13"):
        bad.result(60)
    assert last.result(60) == [8]
    assert doubler.items == [[1, 13, 4, 2, 3], [1, 2], [13, 3], [4]]
    assert one.submit("a", [5]).result(60) == [10]  # the worker survives


def test_a_failed_batch_frees_its_memory_before_the_retry():
    held = []

    def large(key, items):
        free, array = all(reference() is None for reference in held), np.zeros(len(items))
        held.append(weakref.ref(array))
        if len(items) > 1:
            raise MemoryError
        return [free]

    one = Batcher(large, limit=9, wait=0.3)
    assert results([one.submit("a", [i]) for i in range(3)]) == [[True]] * 3


def test_a_wrong_count_is_an_error():
    with pytest.raises(RuntimeError, match="function: expected 1 results, one per item, got 2"):
        Batcher(lambda key, items: [1, 2], limit=1, wait=0).submit(None, [0]).result(60)


def test_cancelled_items_do_not_run(batcher, doubler):
    one = batcher(limit=10)
    begun = held(doubler, one, items=[0, 5], sizes=[10, 10])  # 5 is left for a second batch
    cancelled, kept = one.submit("a", [1]), one.submit("a", [2])
    assert one.waiting == 12
    assert begun.cancel()
    assert cancelled.cancel()
    assert one.waiting == 1
    doubler.free.set()
    assert kept.result(60) == [4]
    assert doubler.items == [[0], [2]]


@pytest.mark.parametrize("cancelled", [False, True])
def test_the_worker_outlives_requests_that_fail_in_every_batch(cancelled):
    """Threads interleave freely: a second batch of a request may fail before its queued items are dropped."""

    def fail(key, items):
        if items != ["good"]:
            raise KeyError("bad")
        return items

    one, interval = Batcher(fail, limit=1, wait=0.0), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(500):
            futures = [one.submit("a", ["bad"] * 3) for _ in range(4)]
            for future in futures:
                if not (cancelled and future.cancel()):
                    assert isinstance(future.exception(60), KeyError)
    finally:
        sys.setswitchinterval(interval)
    assert one.submit("a", ["good"]).result(60) == ["good"]
    one.close()


def test_coroutines_share_batches_and_a_cancelled_task_drops_out(batcher, doubler):
    one = batcher(wait=0.3)

    async def ask(i):
        return (await asyncio.wrap_future(one.submit("a", [i])))[0]

    async def main():
        tasks = [asyncio.create_task(ask(i)) for i in range(9)]
        await asyncio.sleep(0)  # all requests are queued
        tasks.pop(4).cancel()
        return await asyncio.gather(*tasks)

    others = [i for i in range(9) if i != 4]
    assert asyncio.run(main()) == [2 * i for i in others]
    assert doubler.items == [others]


def test_close_finishes_queued_items_and_accepts_no_more(batcher, doubler):
    one = batcher()
    taken = [held(doubler, one), *(one.submit(key, [i]) for i, key in ((1, "a"), (2, "b")))]
    closing = threading.Thread(target=one.close)
    closing.start()
    until(lambda: one.closed)
    with pytest.raises(RuntimeError, match="the batcher is closed"):
        one.submit("a", [9])
    doubler.free.set()
    closing.join(60)
    assert [future.result(0) for future in taken] == [[0], [2], [4]]


def test_each_thread_gets_its_own_results_from_one_batch_at_a_time(batcher, doubler):
    one = batcher(limit=50, wait=0.001)

    def ask(i):
        return one.submit("ab"[i % 2], [1000 + i, 2000 + i], [1 + i % 5, 2]).result(60)

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, range(1000))) == [[2000 + 2 * i, 4000 + 2 * i] for i in range(1000)]
    done = [item for items in doubler.items for item in items]
    assert sorted(done) == sorted([*range(1000, 2000), *range(2000, 3000)])
    assert len(doubler.batches) < 900


@pytest.mark.parametrize("key", ["a", "b"])
def test_a_small_request_is_in_one_of_the_next_batches(key, batcher, doubler):
    """Holds in the lane of a large request and in another lane."""
    one = batcher(limit=100)
    large = held(doubler, one, items=range(100, 200), sizes=[10] * 100)
    small = one.submit(key, [1, 2], [10, 10])
    assert one.waiting == 920
    doubler.free.set()
    assert small.result(60) == [2, 4]
    assert large.result(60) == [2 * item for item in range(100, 200)]
    assert {1, 2} <= {item for items in doubler.items[1:4] for item in items}


def test_many_small_requests_do_not_starve_a_large_one():
    def slow(key, items):
        time.sleep(0.002)
        return items

    one = Batcher(slow, limit=40, wait=0.0)
    large = one.submit("a", list(range(100)), [10] * 100)
    small = 0
    while not large.done():
        one.submit("a", [1, 2], [10, 10]).result(60)
        small += 1
    assert 5 < small < 200


def test_a_batch_takes_its_seconds_and_no_more(monkeypatch):
    """Batches are limited in duration, so a small request runs in one of the next three."""
    now, batches, small = 0.0, [], []

    def slow(key, items):
        nonlocal now
        batches.append((key, len(items)))
        now += 0.01 * len(items)
        if key == "a" and len(small) < 5:  # a request arrives while another's batch runs
            small.append((len(batches), one.submit("b", [len(small)], [100])))
        return items

    monkeypatch.setattr(batching, "time", SimpleNamespace(monotonic=lambda: now))
    one = Batcher(slow, limit=8192, wait=0.0, seconds=0.1)
    results([one.submit("a", list(range(60)), [100] * 60) for _ in range(2)])
    results([future for _, future in small])
    ran = [number for number, (key, _) in enumerate(batches) if key == "b"]
    assert len(small) == 5
    assert all(any(came <= number < came + 3 for number in ran) for came, _ in small), (small, batches)
    assert max(count for _, count in batches) == 10, batches
    assert one.seconds_for(1000) == 1
    assert one.seconds_for(10**9) == 60


def test_pickles_and_starts_anew():
    one = Batcher(double, limit=3, wait=0.01)
    assert one.submit(None, [1]).result(60) == [2]
    copy = pickle.loads(pickle.dumps(one))
    assert (copy.limit, copy.wait, copy.submit(None, [2]).result(60)) == (3, 0.01, [4])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_works_in_a_forked_process(batcher, doubler):
    one = batcher()
    held(doubler, one)
    one.submit("a", [1])
    child = os.fork()
    if child == 0:  # the child inherits no queued or running work
        doubler.one_at_a_time.release()
        doubler.free.set()
        os._exit(one.submit("a", [21]).result(60)[0] + one.waiting)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42


def test_wrong_arguments():
    for limit in (0, 1.5):
        with pytest.raises(ValueError, match=f"limit: expected an int >= 1, got {limit}"):
            Batcher(double, limit=limit, wait=0.0)
    with pytest.raises(ValueError, match="wait: expected at least 0 seconds, got -1"):
        Batcher(double, limit=1, wait=-1)
    one = Batcher(double, limit=1, wait=0)
    with pytest.raises(ValueError, match="zip"):
        one.submit("a", [1, 2], [1])
    with pytest.raises(ValueError, match="zip"):
        one.submit("a", [1, 2], [])
    assert one.waiting == 0
