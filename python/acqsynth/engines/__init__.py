"""Engines of text generation."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from acqsynth.engines.base import Completion as Completion, Engine as Engine, Sampling as Sampling

__all__ = ["NAMES", "Completion", "Engine", "Sampling", "load"]

NAMES = ("transformers", "vllm")


def check(name: str, options: Mapping[str, Any]) -> None:
    """Refuses options that the engine does not have; vLLM checks its own.

    Raises:
        ValueError: names the option.
    """
    if name == "transformers":
        from acqsynth.engines.transformers import TransformersEngine

        known = [p.name for p in inspect.signature(TransformersEngine).parameters.values() if p.kind is p.KEYWORD_ONLY]
        for option in options:
            if option not in known:
                raise ValueError(f"options: unknown {option!r}, expected one of {', '.join(known)}")


def load(name: str, model: Any, *, tokenizer: Any = None, **options: Any) -> Engine:
    """The engine of that name over a model.

    Args:
        name: one of ``NAMES``.
        model: a local path or hub id; ``transformers`` also takes a model.
        tokenizer: by default the one beside the path.
        options: of the engine: see ``TransformersEngine`` and ``VllmEngine``.

    Raises:
        ValueError: an unknown name. RuntimeError: the package ``vllm`` is needed and does not import.
    """
    if name == "transformers":
        from acqsynth.engines.transformers import TransformersEngine

        return TransformersEngine(model, tokenizer, **options)
    if name == "vllm":
        from acqsynth.engines.vllm import VllmEngine

        return VllmEngine(model, tokenizer, **options)
    raise ValueError(f"name: unknown engine {name!r}, expected one of {', '.join(NAMES)}")
