"""Acquisition functions as rewards: single TRL reward functions, or gated and fused with other signals."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import acqcore
from acqcore.acquisitions import REGISTRY
from acqsynth.rewards.acquisition import AcquisitionReward as AcquisitionReward
from acqsynth.rewards.answers import (
    AnswerVariance as AnswerVariance,
    Confidence as Confidence,
    Learnability as Learnability,
    SampledAnswers as SampledAnswers,
    SemanticEntropy as SemanticEntropy,
)
from acqsynth.rewards.batch import Rewards as Rewards
from acqsynth.rewards.gates import Gate as Gate, default_gates as default_gates
from acqsynth.rewards.paper import PaperReward as PaperReward
from acqsynth.rewards.reward import ComposedReward as ComposedReward
from acqsynth.rewards.scoring import STUDENT_VARIABLE as STUDENT_VARIABLE, Scorer as Scorer
from acqsynth.rewards.signals import (
    AcquisitionSignal as AcquisitionSignal,
    Diversity as Diversity,
    Gradient as Gradient,
    Proximity as Proximity,
    Signal as Signal,
    acquisition_signals as acquisition_signals,
)
from acqsynth.rewards.texts import NgramEmbedder as NgramEmbedder, SentenceEmbedder as SentenceEmbedder
from acqsynth.rewards.trl import combined as combined, completion_text as completion_text

if not TYPE_CHECKING:  # a type checker should flag misspelt names

    @functools.cache
    def __getattr__(name: str) -> AcquisitionReward:
        """A ready-made reward for any acquisition without required arguments, including user-defined ones; the
        environment names its student."""
        if name in acqcore.acquisitions():
            try:
                return AcquisitionReward(None, name)
            except ValueError as error:  # it has required arguments
                raise AttributeError(f"{name} is not ready-made: {error}") from error
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    ready = (name for name in acqcore.acquisitions() if not REGISTRY[name].options.required())
    return sorted({*globals(), *ready})
