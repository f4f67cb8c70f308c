"""Waiting in a route: the result, the deadline, a disconnecting client and cancellation from outside."""

from __future__ import annotations

import asyncio

import pytest

from acqsynth.serve.middleware import ServiceError, answered


class Client:
    """A client whose ``receive`` returns when it disconnects."""

    def __init__(self):
        self.gone = asyncio.Event()

    async def receive(self):
        await self.gone.wait()
        return {"type": "http.disconnect"}


async def waited(client, seconds=3600, result=None, error=None):
    async def work():
        if result is None and error is None:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        if error is not None:
            raise error
        assert result is not None
        return result

    return await answered(client, work(), seconds)


def test_the_answer():
    async def main():
        found = await waited(Client(), result=7)
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1  # the watcher has ended
        return found

    assert asyncio.run(main()) == 7


def test_the_deadline():
    async def main():
        return await waited(Client(), seconds=0.01)

    with pytest.raises(ServiceError, match=r"no answer within 0.01 seconds"):
        asyncio.run(main())


def test_an_error_of_the_work_is_its_own():
    async def main(error):
        return await waited(Client(), error=error)

    for error in (TimeoutError("of a socket"), ValueError("no")):
        with pytest.raises(type(error), match=str(error)):
            asyncio.run(main(error))


def test_a_client_that_goes():
    async def main():
        client = Client()
        task = asyncio.ensure_future(waited(client))
        await asyncio.sleep(0)
        client.gone.set()
        with pytest.raises(ServiceError, match="closed the connection"):
            await task
        assert not task.cancelled()
        assert task.cancelling() == 0

    asyncio.run(main())


@pytest.mark.parametrize("goes", [False, True])
def test_what_cancels_from_outside_is_not_taken_for_the_client(goes):
    async def main():
        client = Client()
        task = asyncio.ensure_future(waited(client))
        await asyncio.sleep(0)
        if goes:
            client.gone.set()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
