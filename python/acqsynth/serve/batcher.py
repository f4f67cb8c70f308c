"""Samples of many requests, scored together.

One event loop owns the queue, one thread scores: there is no lock. Samples wait in lanes, one for each student and
question asked of it; a batch is of one lane.

No request holds up another for longer than about three batches. Each sample is due when its request would have got that
far, had all requests shared the model equally, and what is due first is scored first: self-clocked fair queueing
(Golestani 1994). A batch takes ``batch_seconds`` at most, as far as the speed of its lane is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from acqsynth.serve.errors import BusyError, StoppingError, TooLargeError
from acqsynth.serve.options import Limits

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")

_FIRST_TOKENS = 1024  # of a lane's first batch, whose speed is not known
_RATES = 256  # lanes whose speed is remembered
_RESERVE = 8  # one part in so many of the queue is kept for small requests, beside a queue that is full


@dataclass(eq=False)
class _Job:
    """A request whose samples are waited for."""

    future: asyncio.Future[list[Any]]
    results: list[Any]
    left: int


@dataclass(order=True)
class _Entry:
    """A sample that waits."""

    due: float  # tokens of virtual time
    number: int  # of arrival
    job: _Job = field(compare=False)
    index: int = field(compare=False)  # in its job
    item: Any = field(compare=False)
    tokens: int = field(compare=False)
    arrived: float = field(compare=False)


@dataclass(eq=False)
class _Lane:
    entries: list[_Entry] = field(default_factory=list)  # a heap
    tokens: int = 0


class Batcher(Generic[Key, Item, Result]):
    """Collects samples and scores them in batches, in a thread of its own.

    A batch is taken when ``batch_tokens`` wait in its lane, or ``wait`` seconds after its first sample came; what comes
    while the model is at work makes the next ones. A request longer than a batch is scored in several, with others
    among them. Where a batch of several requests fails, each is scored apart: none fails for another.

    Args:
        score: the key of a lane and n items -> n results, in order; called in the thread.
        limits: ``batch_tokens``, ``batch_seconds``, ``wait``, ``queue_tokens``.
        observe: called with samples, tokens and seconds of each batch scored.
    """

    def __init__(
        self,
        score: Callable[[Key, list[Item]], Sequence[Result]],
        limits: Limits,
        observe: Callable[[int, int, float], None] = lambda samples, tokens, seconds: None,
    ) -> None:
        self._score = score
        self._limits = limits
        self._observe = observe
        self._lanes: dict[Key, _Lane] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="acqsynth-score")
        self._changed = asyncio.Event()
        self._closing = False
        self._rates: OrderedDict[int, float] = OrderedDict()  # hash of a lane's key -> tokens a second
        self._clock = 0.0  # virtual time: when the sample scored last was due
        self._number = 0
        self._running: asyncio.Task[None] | None = None

    @property
    def tokens(self) -> int:
        """Tokens that wait."""
        return sum(lane.tokens for lane in self._lanes.values())

    def start(self) -> None:
        """Begin to work, in the event loop that runs now."""
        self._running = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Take nothing more, and return when nothing waits any more."""
        self._closing = True
        self._changed.set()
        if self._running is not None:
            await self._running
        self._thread.shutdown()

    async def submit(self, key: Key, items: Sequence[Item], tokens: Sequence[int]) -> list[Result]:
        """Results of n items in order. Where the caller is cancelled, what still waits is not scored.

        Args:
            tokens: n sizes.

        Raises:
            BusyError: too many tokens wait. TooLargeError: more than may ever wait. StoppingError: the server stops.
                What ``score`` raises.
        """
        if self._closing:
            raise StoppingError("the server is stopping")
        total, most = sum(tokens), self._limits.queue_tokens
        if total > most:
            raise TooLargeError(f"the request has {total} tokens, at most {most} may wait: send fewer samples")
        # A small request finds room in a queue that others have filled.
        if self.tokens + total > most + (most // _RESERVE if total <= most // _RESERVE else 0):
            raise BusyError(f"{self.tokens} tokens wait, and at most {most} may", self._seconds_of(self.tokens))
        if not items:
            return []
        loop = asyncio.get_running_loop()
        job = _Job(loop.create_future(), [None] * len(items), len(items))
        lane = self._lanes.setdefault(key, _Lane())
        now, due = loop.time(), self._clock
        for i, (item, size) in enumerate(zip(items, tokens, strict=True)):
            due += size
            self._number += 1
            heapq.heappush(lane.entries, _Entry(due, self._number, job, i, item, size, now))
        lane.tokens += total
        self._changed.set()
        try:
            return await job.future
        finally:
            self._forget(job, key)

    def _seconds_of(self, tokens: int) -> int:
        """In which so many tokens are scored, as far as is known."""
        if not self._rates:
            return 1
        return min(60, max(1, math.ceil(tokens / min(self._rates.values()))))

    def _forget(self, job: _Job, key: Key) -> None:
        """What still waits of a request that failed or was given up."""
        lane = self._lanes.get(key)
        if job.left and lane is not None:
            lane.entries = [entry for entry in lane.entries if entry.job is not job]
            heapq.heapify(lane.entries)
            lane.tokens = sum(entry.tokens for entry in lane.entries)
            if not lane.entries:
                del self._lanes[key]

    async def _run(self) -> None:
        while self._lanes or not self._closing:
            if not self._lanes:
                self._changed.clear()
                await self._changed.wait()
                continue
            key = min(self._lanes, key=lambda key: self._lanes[key].entries[0])
            await self._fill(key)
            batch = self._take(key)
            if batch:  # not where its requests were given up meanwhile
                await self._work(key, batch)

    async def _fill(self, key: Key) -> None:
        """Wait for more of a lane, as far as its first sample may."""
        clock = asyncio.get_running_loop().time
        until = min(entry.arrived for entry in self._lanes[key].entries) + self._limits.wait
        while key in self._lanes and self._lanes[key].tokens < self._limits.batch_tokens and not self._closing:
            left = until - clock()
            if left <= 0:
                return
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)

    def _take(self, key: Key) -> list[_Entry]:
        lane = self._lanes.get(key)
        if lane is None:
            return []
        rate = self._rates.get(hash(key))
        most = _FIRST_TOKENS if rate is None else int(rate * self._limits.batch_seconds)
        most = min(most, self._limits.batch_tokens)
        batch: list[_Entry] = []
        tokens = 0
        while lane.entries and (not batch or tokens + lane.entries[0].tokens <= most):
            batch.append(heapq.heappop(lane.entries))
            tokens += batch[-1].tokens
        lane.tokens -= tokens
        self._clock = max(self._clock, batch[-1].due)
        if not lane.entries:
            del self._lanes[key]
        return batch

    async def _work(self, key: Key, batch: list[_Entry]) -> None:
        try:
            results = await self._call(key, batch)
        except Exception as error:
            jobs = dict.fromkeys(entry.job for entry in batch)
            if len(jobs) == 1:
                self._fail(next(iter(jobs)), error)
                return
            for job in jobs:
                await self._work(key, [entry for entry in batch if entry.job is job])
            return
        for entry, result in zip(batch, results, strict=True):
            job = entry.job
            job.results[entry.index] = result
            job.left -= 1
            if not job.left and not job.future.done():
                job.future.set_result(job.results)

    async def _call(self, key: Key, batch: list[_Entry]) -> Sequence[Result]:
        begin = time.monotonic()
        items = [entry.item for entry in batch]
        results = await asyncio.get_running_loop().run_in_executor(self._thread, self._score, key, items)
        if len(results) != len(batch):
            raise RuntimeError(f"score: expected {len(batch)} results, one an item, got {len(results)}")
        seconds, tokens = time.monotonic() - begin, sum(entry.tokens for entry in batch)
        rate, known = tokens / max(seconds, 1e-6), self._rates.pop(hash(key), None)
        self._rates[hash(key)] = rate if known is None else 0.5 * (known + rate)
        if len(self._rates) > _RATES:
            self._rates.popitem(last=False)
        self._observe(len(batch), tokens, seconds)
        return results

    @staticmethod
    def _fail(job: _Job, error: Exception) -> None:
        if not job.future.done():
            job.future.set_exception(error)
