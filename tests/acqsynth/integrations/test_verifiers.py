"""The contract of verifiers 0.4, exercised by an imitation of its caller; ``make test-trainers`` uses the package."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from fakes import written

from acqsynth.integrations import verifiers


@pytest.mark.parametrize("tasks", [[(0, "a"), (0, "b")], [(0, "a"), (1, "a")], [(None, "a"), (None, "b")]])
def test_a_masked_trace_gets_the_mean_of_its_group(built, tasks):
    """Equal prompts of one environment are told apart by ``idx``, and equal ``idx`` of two environments by prompts."""
    traces = [(tasks[0], 2), (tasks[0], 6), (tasks[0], 13), (tasks[1], 50), (tasks[1], 13)]

    async def score():
        return await asyncio.gather(
            *(
                verifiers.acquisition(
                    SimpleNamespace(idx=idx, prompt=[{"role": "user", "content": prompt}]),
                    SimpleNamespace(last_reply=written("What is it?", answer)),
                )
                for (idx, prompt), answer in traces
            )
        )

    assert asyncio.run(score()) == [2, 6, 4, 50, 50]
