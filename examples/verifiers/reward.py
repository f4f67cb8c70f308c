"""A reward for verifiers 0.4, named in a task's configuration. Its parameters must be named task, trace and runtime."""

from __future__ import annotations

import functools
import os
from typing import Any

from acqsynth.domains import domain
from acqsynth.integrations.scorer import TextScorer
from acqsynth.rewards import ComposedReward, acquisition_signals, default_gates
from acqsynth.seeds import bundled


@functools.cache
def scorer() -> TextScorer:
    """One scorer per process; it scores concurrent traces in batches."""
    maths = domain("math")
    student = os.environ.get("ACQSYNTH_STUDENT", "HuggingFaceTB/SmolLM2-135M-Instruct")
    signals = acquisition_signals(student, {"mutual_information": {"form": "linear", "probes": 2}}, maths)
    return TextScorer(ComposedReward(maths, signals, gates=default_gates(maths, seeds=bundled("mathematics"))))


async def acquisition(task: Any, trace: Any, runtime: Any) -> float:
    """The composed reward of a trace's last reply; traces of one task form a group."""
    return (await scorer().ask(trace.last_reply, getattr(task, "idx", None))).score
