"""Engines of text generation."""

from __future__ import annotations

from acqsynth.engines.base import Completion as Completion
from acqsynth.engines.base import Engine as Engine
from acqsynth.engines.base import Sampling as Sampling

__all__ = ["Completion", "Engine", "Sampling"]
