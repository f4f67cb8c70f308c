"""Requests of many threads and event loops, answered together.

Items wait in lanes, one for each key; a batch is of one lane. One worker thread takes the batches.

No request holds up another for longer than about three batches. Each item is due when its request would have got that
far, had all requests shared the worker equally, and the item due first runs first: self-clocked fair queueing
(Golestani 1994).
"""

from __future__ import annotations

import heapq
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from weakref import WeakSet

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")

_FIRST = 1024  # size of a lane's first batch, whose speed is not known
_RATES = 256  # lanes whose speed is remembered


@dataclass(eq=False)
class _Job:
    """A request and the results it has so far."""

    future: Future[list[Any]]
    results: list[Any]
    left: int
    finished: bool = False

    def finish(self, error: BaseException | None = None) -> None:
        """Answers the request, unless it was cancelled. The first call counts: a second batch of a request may fail
        before its queued items are dropped."""
        if self.finished:
            return
        self.finished = True
        if not self.future.set_running_or_notify_cancel():
            return
        if error is None:
            self.future.set_result(self.results)
        else:
            self.future.set_exception(error)


@dataclass(order=True)
class _Entry:
    """An item that waits."""

    due: float  # in units of size, of virtual time
    number: int  # of arrival
    job: _Job = field(compare=False)
    index: int = field(compare=False)  # in its job
    item: Any = field(compare=False)
    size: int = field(compare=False)
    arrived: float = field(compare=False)


@dataclass(eq=False)
class _Lane:
    entries: list[_Entry] = field(default_factory=list)  # a heap
    size: int = 0


class Batcher(Generic[Key, Item, Result]):
    """Collects items and passes them to ``function`` in batches, in a thread of its own.

    A batch runs when items of size ``limit`` wait in its lane, or ``wait`` seconds after its first item arrived; items
    that arrive meanwhile form the next batches. A request larger than a batch is split, and others run in between. If a
    batch of several requests fails, each request runs again by itself, so that none fails for another.

    Args:
        function: the key of a lane and n items -> n results, in order.
        limit: largest size of a batch; a larger item gets a batch of its own.
        wait: seconds that the first item of a batch waits for others.
        seconds: a batch takes at most this long, as far as the speed of its lane is known.
        observe: called with items, size and seconds of each batch.

    Raises:
        ValueError: limit below 1, a negative wait.
    """

    def __init__(
        self,
        function: Callable[[Key, list[Item]], Sequence[Result]],
        *,
        limit: int,
        wait: float,
        seconds: float = math.inf,
        observe: Callable[[int, int, float], None] | None = None,
    ) -> None:
        if limit < 1:
            raise ValueError(f"limit: expected at least 1, got {limit}")
        if wait < 0:
            raise ValueError(f"wait: expected seconds, 0 or more, got {wait}")
        self.function = function
        self.limit = limit
        self.wait = wait
        self.seconds = seconds
        self.observe = observe
        self._start_empty()

    def _start_empty(self) -> None:
        self._changed = threading.Condition()
        self._lanes: dict[Key, _Lane] = {}
        self._rates: OrderedDict[int, float] = OrderedDict()  # hash of a lane's key -> size a second
        self._clock = 0.0  # virtual time: when the item taken last was due
        self._number = 0
        self.closed = False  #: nothing more is taken
        self._worker: threading.Thread | None = None
        _batchers.add(self)

    @property
    def waiting(self) -> int:
        """Size of the items that wait."""
        with self._changed:
            return sum(lane.size for lane in self._lanes.values())

    def seconds_for(self, size: int) -> int:
        """Whole seconds, 1 to 60, in which so much is done at the speed of the slowest lane known."""
        with self._changed:
            rate = min(self._rates.values(), default=math.inf)
        return min(60, max(1, math.ceil(size / rate)))

    def submit(self, key: Key, items: Sequence[Item], sizes: Sequence[int] | None = None) -> Future[list[Result]]:
        """The future results of n items, in order. Cancelling it drops the items that still wait.

        Args:
            key: of the lane.
            items: the n items.
            sizes: n sizes; 1 each by default.

        Raises:
            RuntimeError: the batcher is closed. ValueError: not one size an item.
        """
        job = _Job(Future(), [None] * len(items), len(items))
        if not items:
            job.finish()
            return job.future
        sized = list(zip(items, [1] * len(items) if sizes is None else sizes, strict=True))
        now = time.monotonic()
        job.future.add_done_callback(lambda _: self._forget(job, key))
        with self._changed:
            if self.closed:
                raise RuntimeError("the batcher is closed")
            lane, due = self._lanes.setdefault(key, _Lane()), self._clock
            for i, (item, size) in enumerate(sized):
                due += size
                self._number += 1
                heapq.heappush(lane.entries, _Entry(due, self._number, job, i, item, size, now))
                lane.size += size
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="acqsynth-batches", daemon=True)
                self._worker.start()
            self._changed.notify_all()
        return job.future

    def close(self) -> None:
        """Takes nothing more, and returns when nothing waits any more."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
        if self._worker is not None:
            self._worker.join()

    def __getstate__(self) -> dict[str, Any]:
        names = ("function", "limit", "wait", "seconds", "observe")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_empty()

    def _forget(self, job: _Job, key: Key) -> None:
        """Drops queued items of a failed or cancelled request."""
        with self._changed:
            lane = self._lanes.get(key)
            if not job.left or lane is None:
                return
            lane.entries = [entry for entry in lane.entries if entry.job is not job]
            heapq.heapify(lane.entries)
            lane.size = sum(entry.size for entry in lane.entries)
            if not lane.entries:
                del self._lanes[key]

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            self._answer(*batch)

    def _next(self) -> tuple[Key, list[_Entry]] | None:
        """The next batch, when it is due; None once the batcher is closed and nothing waits."""
        with self._changed:
            while True:
                while not self._lanes:
                    if self.closed:
                        return None
                    self._changed.wait()
                key = min(self._lanes, key=lambda key: self._lanes[key].entries[0])
                until = min(entry.arrived for entry in self._lanes[key].entries) + self.wait
                while key in self._lanes and self._lanes[key].size < self.limit and not self.closed:
                    if (left := until - time.monotonic()) <= 0:
                        break
                    self._changed.wait(left)
                if key in self._lanes:  # unless its requests were cancelled meanwhile
                    return key, self._take(key)

    def _take(self, key: Key) -> list[_Entry]:
        lane, most = self._lanes[key], self.limit
        if self.seconds < math.inf:
            rate = self._rates.get(hash(key))
            most = min(most, _FIRST if rate is None else int(rate * self.seconds))
        batch: list[_Entry] = []
        size = 0
        while lane.entries and (not batch or size + lane.entries[0].size <= most):
            batch.append(heapq.heappop(lane.entries))
            size += batch[-1].size
        lane.size -= size
        self._clock = max(self._clock, batch[-1].due)
        if not lane.entries:
            del self._lanes[key]
        return batch

    def _answer(self, key: Key, batch: list[_Entry]) -> None:
        try:
            results = self._call(key, batch)
        except BaseException as error:  # a dead worker would leave its callers waiting forever
            jobs = dict.fromkeys(entry.job for entry in batch)
            if len(jobs) == 1:
                batch[0].job.finish(error)
                return
            for job in jobs:
                self._answer(key, [entry for entry in batch if entry.job is job])
            return
        for entry, result in zip(batch, results, strict=True):
            job = entry.job
            job.results[entry.index] = result
            job.left -= 1
            if not job.left:
                job.finish()

    def _call(self, key: Key, batch: list[_Entry]) -> Sequence[Result]:
        begin = time.monotonic()
        results = self.function(key, [entry.item for entry in batch])
        if len(results) != len(batch):
            raise RuntimeError(f"function: expected {len(batch)} results, one an item, got {len(results)}")
        seconds, size = time.monotonic() - begin, sum(entry.size for entry in batch)
        rate = size / max(seconds, 1e-6)
        with self._changed:
            known = self._rates.pop(hash(key), rate)
            self._rates[hash(key)] = 0.5 * (known + rate)
            if len(self._rates) > _RATES:
                self._rates.popitem(last=False)
        if self.observe is not None:
            self.observe(len(batch), size, seconds)
        return results


_batchers: WeakSet[Batcher[Any, Any, Any]] = WeakSet()


def _after_fork() -> None:
    """A forked process has neither the worker nor the callers of what waits, and the lock may be held for ever."""
    for batcher in list(_batchers):
        batcher._start_empty()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
