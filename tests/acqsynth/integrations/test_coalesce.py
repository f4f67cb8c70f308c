"""Single requests into batches, from threads and from event loops."""

from __future__ import annotations

import asyncio
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from acqsynth.integrations.coalesce import Coalescer


class Doubling:
    """Where ``free`` is cleared a batch waits for it; ``at_work`` tells that one has begun."""

    def __init__(self):
        self.batches: list[list[int]] = []
        self.at_work, self.free = threading.Event(), threading.Event()
        self.free.set()

    def __call__(self, items):
        self.batches.append(items)
        self.at_work.set()
        assert self.free.wait(60)
        return double(items)


def double(items):
    return [2 * item for item in items]


async def gather(coalescer, items):
    return await asyncio.gather(*(coalescer.ask(item) for item in items))


def test_coroutines_share_batches():
    function = Doubling()
    coalescer = Coalescer(function, limit=64, wait=3600)  # a full batch does not wait
    asked = asyncio.wait_for(gather(coalescer, range(64)), 60)
    assert asyncio.run(asked) == list(range(0, 128, 2))
    assert function.batches == [list(range(64))]


def test_limit():
    function = Doubling()
    assert asyncio.run(gather(Coalescer(function, limit=10, wait=0.2), range(25))) == list(range(0, 50, 2))
    assert [len(batch) for batch in function.batches] == [10, 10, 5]


def test_threads_share_batches():
    function = Doubling()
    coalescer = Coalescer(function, limit=16, wait=5)
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(coalescer, range(16))) == list(range(0, 32, 2))
    assert len(function.batches) == 1


def test_what_arrives_during_a_batch_makes_the_next():
    function = Doubling()
    function.free.clear()
    coalescer = Coalescer(function, wait=0)
    first = coalescer.submit(0)
    assert function.at_work.wait(60)
    rest = [coalescer.submit(i) for i in range(1, 9)]
    function.free.set()
    assert [future.result() for future in (first, *rest)] == list(range(0, 18, 2))
    assert [len(batch) for batch in function.batches] == [1, 8]


def test_a_lone_item_waits_no_longer_than_told():
    coalescer = Coalescer(Doubling(), wait=0.1)
    begin = time.monotonic()
    assert coalescer.submit(4).result(timeout=60) == 8
    assert time.monotonic() - begin > 0.09


def test_an_error_reaches_every_caller_and_the_next_batch_runs():
    def function(items):
        if 3 in items:
            raise KeyError("three")
        return items

    coalescer = Coalescer(function, limit=4, wait=1)
    futures = [coalescer.submit(i) for i in range(4)]
    for future in futures:
        with pytest.raises(KeyError, match="three"):
            future.result()
    assert [future.result() for future in [coalescer.submit(i) for i in (5, 6, 7, 8)]] == [5, 6, 7, 8]


def test_a_wrong_count_is_an_error():
    with pytest.raises(ValueError, match="function: expected 1 results, one an item, got 2"):
        Coalescer(lambda items: [1, 2], wait=0)(0)


def test_a_cancelled_task_is_not_answered():
    function = Doubling()
    coalescer = Coalescer(function, wait=1)

    async def cancel():
        task = asyncio.create_task(coalescer.ask(1))
        other = asyncio.create_task(coalescer.ask(2))
        await asyncio.sleep(0)  # both have asked
        task.cancel()
        return await other

    assert asyncio.run(cancel()) == 4
    assert function.batches == [[2]]


def test_pickles_and_starts_anew():
    coalescer = Coalescer(double, limit=3, wait=0.01)
    assert coalescer(1) == 2
    copy = pickle.loads(pickle.dumps(coalescer))
    assert (copy.limit, copy.wait, copy(2)) == (3, 0.01, 4)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_works_in_a_forked_process():
    coalescer = Coalescer(Doubling(), wait=0)
    coalescer(1)
    child = os.fork()
    if child == 0:
        os._exit(coalescer(21))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42


def test_one_batch_at_a_time():
    running, most = [], []

    def function(items):
        running.append(threading.get_ident())
        most.append(len(running))
        time.sleep(0.01)
        running.pop()
        return items

    coalescer = Coalescer(function, limit=2, wait=0)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(coalescer, range(20)))
    assert max(most) == 1


def test_wrong_arguments():
    with pytest.raises(ValueError, match="limit"):
        Coalescer(Doubling(), limit=0)
    with pytest.raises(ValueError, match="wait"):
        Coalescer(Doubling(), wait=-1)
