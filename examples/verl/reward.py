"""The reward named by ``run.sh``. verl calls ``acqsynth.integrations.verl``, which creates it once per worker."""

from __future__ import annotations

import os

from acqsynth.domains import domain
from acqsynth.rewards import ComposedReward, Diversity, NgramEmbedder, acquisition_signals, default_gates
from acqsynth.seeds import bundled


def build() -> ComposedReward:
    """Gates, the student's mutual information, and novelty.

    ``quantile`` compares across calls, as verl makes one call per sample.
    """
    maths = domain("math")
    student = os.environ.get("ACQSYNTH_STUDENT", "HuggingFaceTB/SmolLM2-135M-Instruct")
    signals = acquisition_signals(student, {"mutual_information": {"form": "linear", "probes": 2}}, maths)
    return ComposedReward(
        maths,
        [*signals, Diversity(NgramEmbedder())],
        gates=default_gates(maths, seeds=bundled("mathematics")),
        fusion="quantile",
        weights={"mutual_information": 1.0, "diversity": 0.1},
    )
