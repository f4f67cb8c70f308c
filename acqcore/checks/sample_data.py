"""Samples as a user gives them, and what is scored of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from acqcore.checks.basic import describe

SAMPLE_KINDS = (
    'strings, mappings with "prompt" and "completion", "messages" or "text", a datasets.Dataset with such '
    'columns, or tensors {"input_ids", "attention_mask", "labels"}'
)


def sample_sequence(samples: object) -> None:
    if isinstance(samples, (str, bytes)) or not isinstance(samples, Sequence):
        raise TypeError(f"samples: expected a list of {SAMPLE_KINDS}, got {describe(samples)}")


def sample_columns(columns: Sequence[str], kinds: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The first of ``kinds`` whose columns a data set has."""
    for kind in kinds:
        if all(key in columns for key in kind):
            return kind
    expected = ", or ".join(" and ".join(kind) for kind in kinds)
    raise TypeError(f"samples: expected columns {expected}, got {', '.join(columns)}")


def sample_kind(index: int, sample: object, kinds: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The keys that make a sample's kind; none for a string."""
    if isinstance(sample, str):
        return ()
    if isinstance(sample, Mapping):
        for kind in kinds:
            if all(key in sample for key in kind):
                return kind
        keys = ", ".join(repr(key) for key in sample)
        raise TypeError(f"samples[{index}]: expected {SAMPLE_KINDS}, got a mapping with keys {keys}")
    raise TypeError(f"samples[{index}]: expected {SAMPLE_KINDS}, got {describe(sample)}")


def same_kind(index: int, kind: tuple[str, ...], first: tuple[str, ...]) -> None:
    if kind != first:
        names = [" and ".join(keys) or "a string" for keys in (first, kind)]
        raise TypeError(f"samples[{index}]: expected {names[0]} as in the samples before it, got {names[1]}")


def text(index: int, key: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"samples[{index}]: {key}: expected a string, got {describe(value)}")


def completion(index: int, value: str) -> None:
    if not value:
        raise ValueError(f"samples[{index}]: the completion is empty, there is nothing to score")


def messages(index: int, key: str, value: object) -> None:
    """A list of chat messages with roles."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"samples[{index}]: {key}: expected a list of messages, got {describe(value)}")
    for message in value:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise TypeError(
                f'samples[{index}]: {key}: expected messages with "role" and "content", got {describe(message)}'
            )


def prompt(index: int, value: object) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"samples[{index}]: prompt: expected a string or a list of messages, got {describe(value)}")
    messages(index, "prompt", value)


def last_turn(index: int, value: Sequence[Mapping[str, Any]]) -> None:
    if not value or value[-1]["role"] != "assistant":
        role = repr(value[-1]["role"]) if value else "no message"
        raise ValueError(f"samples[{index}]: messages: expected the assistant's turn last (it is scored), got {role}")


def context(index: int, value: Sequence[Mapping[str, Any]]) -> None:
    if not value:
        raise ValueError(f"samples[{index}]: expected a message before the one that is scored, got none")


def reply(index: int, value: Sequence[Mapping[str, Any]]) -> None:
    if not any(message["content"] or message.get("tool_calls") for message in value):
        raise ValueError(f"samples[{index}]: the completion is empty, there is nothing to score")


def tokenizer(value: object) -> None:
    if value is None:
        raise TypeError("tokenizer: samples of text need one, got none; pass tokenizer= or a student loaded by path")
    if not callable(value) or not hasattr(value, "apply_chat_template"):
        raise TypeError(f"tokenizer: expected a transformers tokenizer, got {describe(value)}")


def chat_template(tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("tokenizer: messages need a chat template, this tokenizer has none")


def tensor_samples(samples: Mapping[str, Any]) -> None:
    """``input_ids [B, T]`` with an optional mask and labels of the same shape."""
    if "input_ids" not in samples:
        keys = ", ".join(repr(key) for key in samples)
        raise TypeError(f'samples: expected a list, or a mapping of tensors with "input_ids", got keys {keys}')
    for key in ("input_ids", "attention_mask", "labels"):
        value = samples.get(key)
        if value is None and key != "input_ids":
            continue
        name = f'samples["{key}"]'
        if not isinstance(value, torch.Tensor) or (value.is_floating_point() and key != "attention_mask"):
            raise TypeError(f"{name}: expected an integer tensor [B, T], got {describe(value)}")
        if value.dim() != 2:
            raise ValueError(f"{name}: expected shape [B, T], got {describe(value)}")
        if value.shape != samples["input_ids"].shape:
            raise ValueError(f"{name}: expected {list(samples['input_ids'].shape)} as input_ids, got {describe(value)}")


def token_ids(index: int, ids: torch.Tensor, vocab_size: int) -> None:
    """Ids ``[T]`` lie in the vocabulary."""
    bad = (ids < 0) | (ids >= vocab_size)
    if bool(bad.any()):
        raise ValueError(
            f"samples[{index}]: token id {int(ids[bad][0])} is outside the student's vocabulary of "
            f"{vocab_size}; does the tokenizer belong to the student?"
        )


def scored(index: int, n_scored: int) -> None:
    if n_scored == 0:
        raise ValueError(
            f"samples[{index}]: nothing to score, expected at least one scored token with a token before it"
        )


def sample_length(index: int, length: int, limit: int | None) -> None:
    if limit is not None and length > limit:
        raise ValueError(f"samples[{index}]: {length} tokens, the student takes at most {limit}; max_length= truncates")


def acquisition_values(name: str, values: object, n: int) -> None:
    """The values of an acquisition for ``n`` tokens or samples."""
    if not isinstance(values, torch.Tensor) or values.shape != (n,):
        raise ValueError(f"acquisition {name!r}: expected it to give a tensor [{n}], got {describe(values)}")


def tokens_kept(tokens: object) -> None:
    if tokens is None:
        raise ValueError("tokens: per-token values were not kept, expected score(..., keep_tokens=True)")
