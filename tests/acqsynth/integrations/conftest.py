"""A reward whose signal is known and counts its calls, named by the environment as a user names his own."""

from __future__ import annotations

import itertools
import sys
import time
import types

import pytest
from fakes import PlainDomain

from acqsynth.integrations.scorer import REWARD_VARIABLE
from acqsynth.rewards import ComposedReward
from acqsynth.rewards.gates import Check


class Number:
    """The answer as a number; 13 cannot be scored, 99 raises."""

    name = "number"

    def __init__(self):
        self.sizes = []

    def __call__(self, samples):
        self.sizes.append(len(samples))
        if any(sample.answer == "99" for sample in samples):
            raise RuntimeError("out of memory")
        return [None if sample.answer == "13" else float(sample.answer) for sample in samples]


_count = itertools.count()


@pytest.fixture
def number():
    return Number()


@pytest.fixture
def built(number, monkeypatch, request):
    """The rewards made so far by the function that the environment names."""
    made = []

    def build():
        time.sleep(0.1)  # as loading takes: callers that come meanwhile must not make another
        gates = [Check("positive", lambda sample: not sample.answer.startswith("-"))]
        fusion = getattr(request, "param", "raw")
        made.append(ComposedReward(PlainDomain(), [number], gates=gates, fusion=fusion, length_normalised=False))
        return made[-1]

    name = f"rewards_of_test_{next(_count)}"  # what is made for a name is kept for the process
    module = types.ModuleType(name)
    module.build = build
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv(REWARD_VARIABLE, f"{name}:build")
    return made
