"""A reward with a known signal that counts its calls, configured through the environment as a user would do it."""

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
    """The rewards built so far by the function named in the environment."""
    made = []

    def build():
        time.sleep(0.1)  # simulates loading; concurrent callers must not build a second reward
        gates = [Check("positive", lambda sample: not sample.answer.startswith("-"))]
        fusion = getattr(request, "param", "raw")
        made.append(ComposedReward(PlainDomain(), [number], gates=gates, fusion=fusion, length_normalised=False))
        return made[-1]

    name = f"rewards_of_test_{next(_count)}"  # rewards are cached by name for the life of the process
    module = types.ModuleType(name)
    module.build = build
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv(REWARD_VARIABLE, f"{name}:build")
    return made
