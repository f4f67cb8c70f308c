"""Acquisition functions as rewards: alone, under TRL's contract, or gated and fused with other signals."""

from __future__ import annotations

import acqcore
from acqsynth.rewards.acquisition import (
    AcquisitionReward as AcquisitionReward,
    completion_text as completion_text,
    ready_made as _ready_made,
)
from acqsynth.rewards.answers import (
    AnswerVariance as AnswerVariance,
    Confidence as Confidence,
    Learnability as Learnability,
    SampledAnswers as SampledAnswers,
    SemanticEntropy as SemanticEntropy,
)
from acqsynth.rewards.composed import ComposedReward as ComposedReward, Rewards as Rewards
from acqsynth.rewards.diversity import Diversity as Diversity
from acqsynth.rewards.embeddings import NgramEmbedder as NgramEmbedder, SentenceEmbedder as SentenceEmbedder
from acqsynth.rewards.gates import Gate as Gate, default_gates as default_gates
from acqsynth.rewards.gradient import Gradient as Gradient
from acqsynth.rewards.paper import PaperReward as PaperReward
from acqsynth.rewards.proximity import Proximity as Proximity
from acqsynth.rewards.scoring import STUDENT_VARIABLE as STUDENT_VARIABLE, Scorer as Scorer
from acqsynth.rewards.signals import (
    AcquisitionSignal as AcquisitionSignal,
    Signal as Signal,
    acquisition_signals as acquisition_signals,
)


def __getattr__(name: str) -> AcquisitionReward:
    """A ready-made reward for any registered acquisition, the user's own included."""
    if name in acqcore.acquisitions():
        return _ready_made(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *acqcore.acquisitions()})
