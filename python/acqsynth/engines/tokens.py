"""Prompts as token ids and token ids as completions, the same for every engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from acqsynth.domains.base import Messages
from acqsynth.engines.base import Completion


def encode(tokenizer: Any, prompts: Sequence[str | Messages], limit: int | None) -> list[list[int]]:
    """Token ids of each prompt: messages through the chat template, a string with the special tokens that the
    tokenizer puts around any text.

    Args:
        limit: tokens the model can take; None where it names no limit.

    Raises:
        ValueError: a prompt is empty, or leaves no room for a completion; messages for a tokenizer without a
            chat template.
    """
    encoded = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        else:
            if not tokenizer.chat_template:
                raise ValueError(f"prompts[{i}]: expected a string, as the tokenizer has no chat template")
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        if not ids:
            raise ValueError(f"prompts[{i}]: expected at least one token, got an empty prompt")
        if limit is not None and len(ids) >= limit:
            raise ValueError(f"prompts[{i}]: expected fewer than {limit} tokens, all the model takes, got {len(ids)}")
        encoded.append(ids)
    return encoded


def eos_ids(tokenizer: Any, generation_config: Any) -> list[int]:
    """Every token that ends a completion: those of the generation configuration and the tokenizer's."""
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
    """The completion up to the first token of ``eos``; ids, and the log-probabilities of the two most likely tokens
    and of the drawn one at each of them, may go on behind it."""
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
