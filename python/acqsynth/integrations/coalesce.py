"""Concurrent requests of one item each, answered in batches."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Coalescer(Generic[Item, Result]):
    """Collects items from threads and event loops and passes them to ``function`` in batches.

    A batch runs when ``limit`` items are queued, or ``wait`` seconds after its first item. One batch runs at a time, in
    a dedicated thread; items that arrive meanwhile form the next one.

    Args:
        function: n items -> n results, in order; its exceptions are raised for each item of the batch.
        limit: most items of a batch.
        wait: seconds that the first item of a batch waits for others.

    Raises:
        ValueError: limit below 1, a negative wait.
    """

    def __init__(
        self, function: Callable[[list[Item]], Sequence[Result]], *, limit: int = 64, wait: float = 0.05
    ) -> None:
        if limit < 1:
            raise ValueError(f"limit: expected at least 1 item, got {limit}")
        if wait < 0:
            raise ValueError(f"wait: expected seconds, 0 or more, got {wait}")
        self.function = function
        self.limit = limit
        self.wait = wait
        self._queue: queue.SimpleQueue[tuple[Item, Future[Result]]] = queue.SimpleQueue()
        self._start = threading.Lock()
        self._worker: threading.Thread | None = None

    def submit(self, item: Item) -> Future[Result]:
        """The future result of an item."""
        future: Future[Result] = Future()
        self._queue.put((item, future))
        with self._start:  # started at the first item, and again after a fork
            if self._worker is None or not self._worker.is_alive():
                self._worker = threading.Thread(target=self._work, name="acqsynth-coalescer", daemon=True)
                self._worker.start()
        return future

    def __call__(self, item: Item) -> Result:
        """The result of an item; blocks until its batch is done."""
        return self.submit(item).result()

    async def ask(self, item: Item) -> Result:
        """The result of an item, awaited."""
        return await asyncio.wrap_future(self.submit(item))

    def __getstate__(self) -> dict[str, Any]:
        return {"function": self.function, "limit": self.limit, "wait": self.wait}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["function"], limit=state["limit"], wait=state["wait"])  # type: ignore[misc]

    def _work(self) -> None:
        while True:
            batch = [self._queue.get()]
            deadline = time.monotonic() + self.wait
            while len(batch) < self.limit:
                try:
                    batch.append(self._queue.get(timeout=max(0.0, deadline - time.monotonic())))
                except queue.Empty:
                    break
            # Cancelled callers are not answered.
            self._run([(item, future) for item, future in batch if future.set_running_or_notify_cancel()])

    def _run(self, batch: Sequence[tuple[Item, Future[Result]]]) -> None:
        if not batch:
            return
        try:
            results = self.function([item for item, _ in batch])
            if len(results) != len(batch):
                raise ValueError(f"function: expected {len(batch)} results, one an item, got {len(results)}")
        except BaseException as error:  # a dead worker would leave its callers waiting forever
            for _, future in batch:
                future.set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)
