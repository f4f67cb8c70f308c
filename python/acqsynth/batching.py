"""Dynamic batching of requests from many threads and event loops.

Items queue in lanes, one per key; a batch holds items of a single lane. One worker thread processes the batches.

No request delays another by more than about three batches. Items run in the order in which they would finish if all
requests shared the worker equally: self-clocked fair queueing (Golestani 1994).
"""

from __future__ import annotations

import heapq
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from weakref import WeakSet

from acqsynth import checks

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")

_FIRST = 1024  # maximum size of a lane's first batch, before its speed is known
_RATES = 256  # number of lanes whose speed is remembered


@dataclass(eq=False)
class _Job:
    """A request and its results so far."""

    future: Future[list[Any]]
    results: list[Any]
    left: int

    def finish(self, error: BaseException | None = None) -> None:
        """Resolves the future, unless it was cancelled or a batch of the request failed before: a second one may fail
        before its queued items are dropped."""
        with suppress(InvalidStateError):
            if error is None:
                self.future.set_result(self.results)
            else:
                self.future.set_exception(error)


@dataclass(order=True)
class _Entry:
    due: float  # virtual time, in units of size
    number: int  # order of arrival
    job: _Job = field(compare=False)
    index: int = field(compare=False)  # position in its job
    item: Any = field(compare=False)
    size: int = field(compare=False)
    arrived: float = field(compare=False)


@dataclass(eq=False)
class _Lane:
    entries: list[_Entry] = field(default_factory=list)  # a heap
    size: int = 0


class Batcher(Generic[Key, Item, Result]):
    """Collects items and passes them to ``function`` in batches, on a separate thread.

    A batch runs once its lane holds items of total size ``limit``, or ``wait`` seconds after its first item arrived.
    A larger request is split. If a batch of several requests fails, each is retried alone.

    Args:
        function: maps the key of a lane and n items to n results, in order.
        limit: maximum size of a batch; a larger item gets its own batch.
        wait: seconds that the first item of a batch waits for others.
        seconds: maximum duration of a batch, estimated from the measured speed of its lane.
        observe: called with the number of items, size and seconds of each batch.

    Raises:
        ValueError: limit is not an int >= 1, or wait is not a finite number >= 0.
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
        checks.positive_int("limit", limit)
        if not isinstance(wait, int | float) or not 0 <= wait < math.inf:
            raise ValueError(f"wait: expected at least 0 seconds, got {wait!r}")
        self.function = function
        self.limit = limit
        self.wait = wait
        self.seconds = seconds
        self.observe = observe
        self._start_empty()

    def _start_empty(self) -> None:
        self._changed = threading.Condition()
        self._lanes: dict[Key, _Lane] = {}
        self._rates: OrderedDict[int, float] = OrderedDict()  # hash of a lane's key -> size per second
        self._clock = 0.0  # virtual time: due time of the item taken last
        self._number = 0
        self.closed = False  #: no further requests are accepted
        self._worker: threading.Thread | None = None
        _batchers.add(self)

    @property
    def waiting(self) -> int:
        """Total size of the queued items."""
        with self._changed:
            return sum(lane.size for lane in self._lanes.values())

    def seconds_for(self, size: int) -> int:
        """Whole seconds, 1 to 60, needed for this size at the speed of the slowest known lane."""
        with self._changed:
            rate = min(self._rates.values(), default=math.inf)
        return min(60, max(1, math.ceil(size / rate)))

    def submit(self, key: Key, items: Sequence[Item], sizes: Sequence[int] | None = None) -> Future[list[Result]]:
        """Queues n items and returns a future of their results, in order. Cancelling it drops the queued items.

        Args:
            key: key of the lane.
            items: the n items.
            sizes: n sizes; 1 each by default.

        Raises:
            RuntimeError: the batcher is closed. ValueError: the number of sizes is not n.
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
        """Refuses further requests and returns once the queued items are processed."""
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
            del batch  # else it would hold a replaced student until the next request

    def _next(self) -> tuple[Key, list[_Entry]] | None:
        """Waits for the next batch; None once the batcher is closed and the queue is empty."""
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
                if key in self._lanes:  # false if its requests were cancelled during the wait
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
        jobs = dict.fromkeys(entry.job for entry in batch)
        try:
            results = self._call(key, batch)
        except BaseException as error:  # a dead worker would leave its callers waiting forever
            if len(jobs) == 1:
                batch[0].job.finish(error)
                return
            results = None
        if results is None:  # retries here, where the failed call's memory is free
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
            raise RuntimeError(f"function: expected {len(batch)} results, one per item, got {len(results)}")
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
    """Resets the batchers: a forked process has no worker and no callers, and the lock may be held forever."""
    for batcher in list(_batchers):
        batcher._start_empty()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
