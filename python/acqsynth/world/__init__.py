"""The base model of the arithmetic world: made at first use by a script, generator and student of the demo."""

from __future__ import annotations

from acqsynth.world.pretrain import Settings as Settings, base_model as base_model
from acqsynth.world.tokenizer import build_tokenizer as build_tokenizer

__all__ = ["Settings", "base_model", "build_tokenizer"]
