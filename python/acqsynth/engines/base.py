"""Text generation behind one small interface; ``transformers`` and ``vllm`` implement it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from acqsynth.domains.base import Messages


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        n: completions of each prompt.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: least probability of the tokens drawn from.
        max_tokens: most tokens of a completion.
        seed: equal seeds give equal completions on one engine, machine and batch.
        top2: keep the log-probabilities of the two most likely tokens at each position, and of the drawn one.

    Raises:
        ValueError: a number out of its range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int = 0
    top2: bool = False

    def __post_init__(self) -> None:
        ranges = (
            ("n", self.n >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("seed", self.seed >= 0, "at least 0"),
        )
        for name, holds, expected in ranges:
            if not holds:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Completion:
    """One drawn text, without the end-of-sequence token."""

    text: str
    token_ids: list[int]
    finished: bool  #: ended by itself, not by ``max_tokens``
    #: of the two most likely tokens at each position of ``token_ids``, larger first, before temperature; with ``top2``
    top2_logprobs: list[tuple[float, float]] | None = None
    #: of ``token_ids`` themselves, before temperature; with ``top2``
    token_logprobs: list[float] | None = None


class Engine(ABC):
    """A model that writes."""

    name: ClassVar[str]

    @abstractmethod
    def generate(self, prompts: Sequence[str | Messages], sampling: Sampling) -> list[list[Completion]]:
        """``sampling.n`` completions of each prompt, in order. A list of messages goes through the chat template
        with the assistant's turn opened; a string is taken as it is."""

    @abstractmethod
    def reload(self, weights: Any) -> None:
        """Takes new weights of the same architecture: a local path, or a state dict of name -> tensor."""
