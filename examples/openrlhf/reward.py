"""The reward file for OpenRLHF's ``--reward.remote_url``; ``ACQSYNTH_REWARD`` names ``build``."""

from __future__ import annotations

import os

from acqsynth.domains import domain
from acqsynth.integrations.openrlhf import reward_func as reward_func
from acqsynth.rewards import ComposedReward, acquisition_signals, default_gates
from acqsynth.seeds import bundled


def build() -> ComposedReward:
    """Gates and the student's mutual information; ``quantile`` compares across calls."""
    maths = domain("math")
    student = os.environ.get("ACQSYNTH_STUDENT", "HuggingFaceTB/SmolLM2-135M-Instruct")
    signals = acquisition_signals(student, {"mutual_information": {"form": "linear", "probes": 2}}, maths)
    gates = default_gates(maths, seeds=bundled("mathematics"))
    return ComposedReward(maths, signals, gates=gates, fusion="quantile")
