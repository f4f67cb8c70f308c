"""Text generation behind a small interface, implemented with ``transformers`` and ``vllm``."""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy
import torch

from acqsynth import checks
from acqsynth.domains import Messages

NAMES = ("transformers", "vllm")
logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "float64", "float16", "bfloat16")


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        n: completions per prompt.
        temperature: divides the logits; 0 decodes greedily.
        top_p: probability mass of nucleus sampling.
        max_tokens: maximum tokens per completion.
        seed: equal seeds give equal completions on the same engine, machine and batch.
        top2: keep the log-probabilities of the two most likely tokens and of the drawn token at each position.

    Raises:
        TypeError: not a number, or not an integer where one is needed.
        ValueError: a number is out of range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int = 0
    top2: bool = False

    def __post_init__(self) -> None:
        for name in ("n", "temperature", "top_p", "max_tokens", "seed"):
            given, whole = getattr(self, name), name not in ("temperature", "top_p")
            if isinstance(given, bool) or not isinstance(given, Integral if whole else Real):
                raise TypeError(f"{name}: expected {'an integer' if whole else 'a number'}, got {given!r}")
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
    """A generated text, without the end-of-sequence token."""

    text: str
    token_ids: list[int]
    finished: bool  #: ended by itself rather than at ``max_tokens``
    #: of the two most likely tokens at each position of ``token_ids``, larger first, before temperature; with ``top2``
    top2_logprobs: list[tuple[float, float]] | None = None
    #: log-probabilities of ``token_ids``, before temperature; with ``top2``
    token_logprobs: list[float] | None = None


class Engine(ABC):
    """A model that generates text."""

    name: ClassVar[str]

    @abstractmethod
    def generate(self, prompts: Sequence[str | Messages], sampling: Sampling) -> list[list[Completion]]:
        """``sampling.n`` completions of each prompt, in order. Lists of messages go through the chat template with a
        generation prompt; strings are used unchanged. A prompt as long as the model's limit gets empty, unfinished
        completions and is logged, since one long question must not end a run of hours; an empty prompt raises
        ValueError."""

    @abstractmethod
    def reload(self, weights: Any) -> None:
        """Loads new weights of the same architecture: a local path, or a state dict of name -> tensor."""


def load(name: str, model: Any, *, tokenizer: Any = None, **options: Any) -> Engine:
    """Creates the named engine for a model.

    Args:
        name: one of ``NAMES``.
        model: a local path or hub id; ``transformers`` also accepts a model object.
        tokenizer: by default the one at the path.
        options: engine options; see ``TransformersEngine`` and ``VllmEngine``.

    Raises:
        ValueError: an unknown name. RuntimeError: the package ``vllm`` is needed but cannot be imported.
    """
    if name == "transformers":
        from acqsynth.engines.transformers import TransformersEngine

        return TransformersEngine(model, tokenizer, **options)
    if name == "vllm":
        from acqsynth.engines.vllm import VllmEngine

        return VllmEngine(model, tokenizer, **options)
    raise ValueError(f"name: unknown engine {name!r}, expected one of {', '.join(NAMES)}")


def check(name: str, options: Mapping[str, Any]) -> None:
    """Rejects unknown options and invalid values; vLLM validates its own options.

    Raises:
        ValueError, TypeError: an invalid option, which the message names.
    """
    if name == "transformers":
        from acqsynth.engines.transformers import TransformersEngine

        known = [p.name for p in inspect.signature(TransformersEngine).parameters.values() if p.kind is p.KEYWORD_ONLY]
        for option in options:
            if option not in known:
                raise ValueError(f"options: unknown {option!r}, expected one of {', '.join(known)}")
        dtype, device = options.get("dtype", "auto"), options.get("device")
        checks.positive_int("options.batch_tokens", options.get("batch_tokens", 1))
        if not isinstance(dtype, torch.dtype | None) and dtype not in DTYPES:
            raise ValueError(f"options.dtype: unknown {dtype!r}, expected one of {', '.join(DTYPES)}")
        try:
            torch.device("cpu" if device is None else device)  # available here or not
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"options.device: expected cpu, cuda or cuda:1, got {device!r}") from error


def derived_seed(seed: int, number: int) -> int:
    """A 32-bit seed for part ``number`` of a run with ``seed``; neighbouring seeds share no parts."""
    return int(numpy.random.SeedSequence([seed, number]).generate_state(1)[0])


# --- tokens, shared by all engines ------------------------------------------------------------------------------------


def encode(tokenizer: Any, prompts: Sequence[str | Messages]) -> list[list[int]]:
    """Token ids of each prompt: messages go through the chat template, strings get the special tokens that the
    tokenizer adds to any text.

    Raises:
        ValueError: an empty prompt; messages for a tokenizer without a chat template.
        TypeError: a single prompt instead of a list.
    """
    encoded = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompts, str | Mapping) or isinstance(prompt, Mapping):
            raise TypeError("prompts: expected a list of prompts, got a single one; wrap it in a list")
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        else:
            if not tokenizer.chat_template:
                raise ValueError(f"prompts[{i}]: expected a string, as the tokenizer has no chat template")
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        if not ids:
            raise ValueError(f"prompts[{i}]: expected at least one token, got an empty prompt")
        encoded.append(ids)
    return encoded


def check_ids(name: str, rows: Iterable[Sequence[int]], tokenizer: Any, config: Any) -> None:
    """Raises ValueError if a token of the rows, or the one that pads them, has no embedding in the model."""
    largest, size = max([tokenizer.pad_token_id or 0, *map(max, rows)]), config.get_text_config().vocab_size
    if largest >= size:
        raise ValueError(
            f"{name}: token id {largest} is outside the model's vocabulary of {size}; is this the model's tokenizer?"
        )


def leave_room(ids: Sequence[Sequence[int]], needed: int, limit: int | None) -> list[bool]:
    """Whether each prompt leaves room for ``needed`` tokens within the model's limit; logs those that do not."""
    fits = [limit is None or len(row) + needed <= limit for row in ids]
    if not all(fits):
        logger.warning(
            "%d of %d prompts, first prompts[%d], are too long for a model of %s tokens and get no completion",
            fits.count(False), len(fits), fits.index(False), limit,
        )  # fmt: skip
    return fits


def where_room(
    ids: list[list[int]],
    limit: int | None,
    sampling: Sampling,
    draw: Callable[[list[list[int]], Sampling], list[list[Completion]]],
) -> list[list[Completion]]:
    """``draw``'s completions of the prompts that leave room for one; empty, unfinished ones of the others. Greedy ones
    are drawn once and repeated."""
    once = replace(sampling, n=1) if sampling.temperature == 0 else sampling
    fits = leave_room(ids, 1, limit)
    rows = [row for row, fit in zip(ids, fits, strict=True) if fit]
    drawn = iter(draw(rows, once) if rows else [])
    empty = [Completion("", [], False, *(([], []) if sampling.top2 else ()))] * once.n
    return [(next(drawn) if fit else empty) * (sampling.n // once.n) for fit in fits]


def eos_ids(tokenizer: Any, generation_config: Any) -> list[int]:
    """All tokens that end a completion, from the generation configuration and the tokenizer."""
    given = generation_config.eos_token_id if generation_config is not None else None
    ids = given if isinstance(given, list) else [given]
    return sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None})


def completion(
    tokenizer: Any,
    ids: Sequence[int],
    eos: Iterable[int],
    top2: Sequence[tuple[float, float]] | None = None,
    drawn: Sequence[float] | None = None,
) -> Completion:
    """The completion up to the first token in ``eos``. The ids, and for each the log-probabilities of the two most
    likely tokens and of the drawn one, may continue beyond it."""
    ends = set(eos)
    length = next((t for t, token in enumerate(ids) if token in ends), len(ids))
    kept = list(ids[:length])
    return Completion(
        text=tokenizer.decode(kept, skip_special_tokens=True),
        token_ids=kept,
        finished=length < len(ids),
        top2_logprobs=None if top2 is None else list(top2[:length]),
        token_logprobs=None if drawn is None else list(drawn[:length]),
    )
