"""What is scored together, what is refused, and that every sample is answered once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar

import pytest

from acqsynth.serve.batcher import Batcher
from acqsynth.serve.errors import BusyError, StoppingError, TooLargeError
from acqsynth.serve.options import Limits


class Doubler:
    """Twice each item; 13 raises. Waits where it is held."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[int]]] = []
        self.free = threading.Event()
        self.free.set()

    def __call__(self, key: str, items: list[int]) -> Sequence[int]:
        self.batches.append((key, items))
        assert self.free.wait(10)
        if 13 in items:
            raise RuntimeError("13")
        return [2 * item for item in items]


def run(
    use: Callable[[Batcher[str, int, int], Doubler], Awaitable[Any]], **limits: Any
) -> tuple[Any, list[tuple[str, list[int]]]]:
    """What ``use`` gives, and the batches that were scored."""
    doubler = Doubler()

    async def main() -> Any:
        batcher = Batcher(doubler, Limits(**limits))
        batcher.start()
        try:
            return await use(batcher, doubler)
        finally:
            doubler.free.set()
            await batcher.close()

    return asyncio.run(main()), doubler.batches


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def test_requests_that_come_together_are_one_batch() -> None:
    async def use(batcher: Batcher[str, int, int], doubler: Doubler) -> Any:
        return await asyncio.gather(*(batcher.submit("a", [i, i + 100], [1, 1]) for i in range(8)))

    results, batches = run(use, wait=0.05)
    assert results == [[2 * i, 2 * i + 200] for i in range(8)]
    assert len(batches) == 1


def test_batches_hold_the_budget_and_the_order() -> None:
    async def use(batcher: Batcher[str, int, int], doubler: Doubler) -> Any:
        return await asyncio.gather(batcher.submit("a", [1, 2, 3], [4, 4, 9]), batcher.submit("a", [4, 5], [30, 1]))

    results, batches = run(use, batch_tokens=10)
    assert results == [[2, 4, 6], [8, 10]]
    assert batches == [("a", [1, 2]), ("a", [3]), ("a", [4]), ("a", [5])]  # 30 tokens go alone


def test_a_full_batch_does_not_wait() -> None:
    async def use(batcher: Batcher[str, int, int], doubler: Doubler) -> Any:
        async with asyncio.timeout(10):
            return await batcher.submit("a", [1, 2], [5, 5])

    assert run(use, batch_tokens=10, wait=1000.0)[0] == [2, 4]


def test_lanes_are_not_mixed_and_take_turns_by_age() -> None:
    async def use(batcher: Batcher[str, int, int], doubler: Doubler) -> Any:
        doubler.free.clear()
        first = asyncio.ensure_future(batcher.submit("a", [0], [1]))
        await until(lambda: len(doubler.batches) == 1)
        rest = []
        for key, item in (("b", 1), ("a", 2), ("b", 3)):
            rest.append(asyncio.ensure_future(batcher.submit(key, [item], [1])))
            await asyncio.sleep(0.002)
        doubler.free.set()
        return await asyncio.gather(first, *rest)

    results, batches = run(use, wait=0.0)
    assert results == [[0], [2], [4], [6]]
    assert batches == [("a", [0]), ("b", [1, 3]), ("a", [2])]


def test_one_requests_failure_is_not_anothers() -> None:
    async def use(batcher: Batcher[str, int, int], doubler: Doubler) -> Any:
        return await asyncio.gather(
            *(batcher.submit("a", items, [1] * len(items)) for items in ([1, 2], [13, 3], [4])), return_exceptions=True
        )

    results, batches = run(use, wait=0.05)
    assert results[0] == [2, 4]
    assert isinstance(results[1], RuntimeError)
    assert results[2] == [8]
    assert [items for _, items in batches] == [[1, 13, 4, 2, 3], [1, 2], [13, 3], [4]]


def test_back_pressure() -> None:
    async def use(batcher: Batcher[str, int, int], doubler: Doubler) -> Any:
        with pytest.raises(TooLargeError, match="the request has 21 tokens, at most 20 may wait"):
            await batcher.submit("a", [1], [21])
        doubler.free.clear()
        first = asyncio.ensure_future(batcher.submit("a", [1], [20]))
        await until(lambda: len(doubler.batches) == 1)
        second = asyncio.ensure_future(batcher.submit("a", [2], [15]))
        await until(lambda: batcher.tokens == 15)
        with pytest.raises(BusyError, match="15 tokens wait, and at most 20 may") as caught:
            await batcher.submit("b", [3], [6])
        assert caught.value.retry_after is not None
        assert 1 <= caught.value.retry_after <= 60
        doubler.free.set()
        return await asyncio.gather(first, second, batcher.submit("b", [4], [5]))

    assert run(use, queue_tokens=20)[0] == [[2], [4], [8]]


def test_what_was_given_up_is_not_scored() -> None:
    async def use(batcher: Batcher[str, int, int], doubler: Doubler) -> Any:
        doubler.free.clear()
        held = asyncio.ensure_future(batcher.submit("a", [0, 5], [10, 10]))  # 5 is left for a second batch
        await until(lambda: len(doubler.batches) == 1)
        given_up = asyncio.ensure_future(batcher.submit("a", [1], [1]))
        kept = asyncio.ensure_future(batcher.submit("a", [2], [1]))
        await until(lambda: batcher.tokens == 12)
        for task in (held, given_up):
            task.cancel()
        await asyncio.gather(held, given_up, return_exceptions=True)
        assert batcher.tokens == 1
        doubler.free.set()
        return await kept

    result, batches = run(use, batch_tokens=10)
    assert result == [4]
    assert [items for _, items in batches] == [[0], [2]]


def test_a_close_finishes_what_was_taken_and_takes_no_more() -> None:
    async def use(batcher: Batcher[str, int, int], doubler: Doubler) -> Any:
        doubler.free.clear()
        taken = [asyncio.ensure_future(batcher.submit("a", [i], [1])) for i in range(3)]
        await until(lambda: len(doubler.batches) == 1)
        taken.append(asyncio.ensure_future(batcher.submit("b", [3], [1])))
        await until(lambda: batcher.tokens > 0)
        closing = asyncio.ensure_future(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(StoppingError):
            await batcher.submit("a", [9], [1])
        doubler.free.set()
        await closing
        return await asyncio.gather(*taken)

    assert run(use, wait=0.0)[0] == [[0], [2], [4], [6]]


def test_a_thousand_requests_are_each_answered_with_their_own() -> None:
    async def use(batcher: Batcher[str, int, int], doubler: Doubler) -> Any:
        async def one(i: int) -> list[int]:
            await asyncio.sleep((i * 7919 % 13) / 1000)
            return await batcher.submit("ab"[i % 2], [1000 + i, 2000 + i], [1 + i % 5, 2])

        return await asyncio.gather(*(one(i) for i in range(1000)))

    results, batches = run(use, batch_tokens=50, wait=0.001)
    assert results == [[2000 + 2 * i, 4000 + 2 * i] for i in range(1000)]
    scored = [item for _, items in batches for item in items]
    assert sorted(scored) == sorted([*range(1000, 2000), *range(2000, 3000)])
    assert len(batches) < 400


@pytest.mark.parametrize("key", ["a", "b"])
def test_a_small_request_is_in_one_of_the_next_batches(key: str) -> None:
    """Of its own lane or of another, whatever waits."""

    async def use(batcher: Batcher[str, int, int], doubler: Doubler) -> Any:
        doubler.free.clear()
        large = asyncio.ensure_future(batcher.submit("a", list(range(100, 200)), [10] * 100))
        await until(lambda: len(doubler.batches) == 1)
        small = asyncio.ensure_future(batcher.submit(key, [1, 2], [10, 10]))
        await until(lambda: batcher.tokens == 920)
        doubler.free.set()
        results = await small
        done = len(doubler.batches)
        return results, done, await large

    (results, done, large), batches = run(use, batch_tokens=100, wait=0.0)
    assert results == [2, 4]
    assert done <= 4
    assert {1, 2} <= set(batches[1][1] + batches[2][1] + batches[3][1])
    assert large == [2 * item for item in range(100, 200)]


def test_many_small_requests_do_not_starve_a_large_one() -> None:
    async def use(batcher: Batcher[str, int, int], doubler: Doubler) -> Any:
        large = asyncio.ensure_future(batcher.submit("a", list(range(100, 200)), [10] * 100))
        small = 0
        while not large.done():
            await batcher.submit("a", [small % 10, small % 10], [10, 10])
            small += 1
        return small

    small, _ = run(use, batch_tokens=40, wait=0.0)
    assert 5 < small < 200


def test_a_batch_takes_its_seconds_and_no_more() -> None:
    """So that nobody waits for the batch of another much longer than for two of them."""

    class Slow:
        sizes: ClassVar[list[int]] = []

        def __call__(self, key: str, items: list[int]) -> list[int]:
            self.sizes.append(len(items))
            time.sleep(len(items) * 0.01)
            return items

    async def main() -> list[float]:
        batcher: Batcher[str, int, int] = Batcher(Slow(), Limits(batch_seconds=0.1, wait=0.0))
        batcher.start()
        loop = asyncio.get_running_loop()
        large = [asyncio.ensure_future(batcher.submit("a", list(range(60)), [100] * 60)) for _ in range(2)]
        waits = []
        for _ in range(5):
            await asyncio.sleep(0.05)
            begin = loop.time()
            await batcher.submit("b", [1], [100])
            waits.append(loop.time() - begin)
        await asyncio.gather(*large)
        await batcher.close()
        return waits

    waits = asyncio.run(main())
    assert max(waits) < 0.35, waits
    assert max(Slow.sizes[1:]) <= 14, Slow.sizes


def test_a_full_queue_has_room_for_a_small_request() -> None:
    async def use(batcher: Batcher[str, int, int], doubler: Doubler) -> Any:
        doubler.free.clear()
        first = asyncio.ensure_future(batcher.submit("a", [1], [100]))
        await until(lambda: len(doubler.batches) == 1)
        large = asyncio.ensure_future(batcher.submit("a", [2], [100]))
        await until(lambda: batcher.tokens == 100)
        small = asyncio.ensure_future(batcher.submit("a", [3], [12]))
        await until(lambda: batcher.tokens == 112)
        for tokens in (1, 13):
            with pytest.raises(BusyError, match="112 tokens wait, and at most 100 may"):
                await batcher.submit("a", [4], [tokens])
        doubler.free.set()
        return await asyncio.gather(first, large, small)

    assert run(use, queue_tokens=100)[0] == [[2], [4], [6]]


def test_no_samples_are_no_batch() -> None:
    async def use(batcher: Batcher[str, int, int], doubler: Doubler) -> Any:
        return await batcher.submit("a", [], [])

    assert run(use) == ([], [])
