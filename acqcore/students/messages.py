"""Chat messages and texts as a tokenizer gets them: one rule, wherever a row comes from."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from acqcore import checks
from acqcore.students.tables import plain

_PROBE = "acqcore"


def text_of(index: int, key: str, value: object) -> str:
    """A string; of a number what is written. A csv file cannot tell 5 from "5", so no other source does.

    Raises:
        TypeError: anything else.
        ValueError: a string with a lone surrogate, which is no text.
    """
    if isinstance(value, numbers.Number) and not isinstance(value, bool) and _is_finite(value):
        value = str(value)
    if not isinstance(value, str):
        raise TypeError(f"samples[{index}]: {key}: expected a string, got {_missing(value)}")
    return sound(index, key, value)


def sound(index: int, key: str, text: str) -> str:
    """The text.

    Raises:
        ValueError: it has a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"samples[{index}]: {key}: character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}, "
            "which is no text"
        ) from None
    return text


def messages_of(index: int, key: str, value: object) -> list[dict[str, Any]]:
    """Messages with roles, each with content or tool calls.

    A key whose value is null counts as absent: a table has nulls where one row of a column lacks a key of another.

    Raises:
        TypeError: anything else.
    """
    found = plain(value)
    if not isinstance(found, list):
        raise TypeError(f"samples[{index}]: {key}: expected a list of messages, got {checks.describe(value)}")
    messages = []
    for message in found:
        given = {k: v for k, v in message.items() if v is not None} if isinstance(message, Mapping) else {}
        if not isinstance(given.get("role"), str) or not ("content" in given or given.get("tool_calls")):
            raise TypeError(
                f'samples[{index}]: {key}: expected messages with "role" and "content" (or "tool_calls"), '
                f"got {checks.describe(message)}"
            )
        if isinstance(given.get("content"), numbers.Number):
            given["content"] = text_of(index, key, given["content"])
        messages.append(given)
    return messages


def rendered(
    index: int, tokenizer: Any, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, **options: Any
) -> str:
    """The conversation by the tokenizer's chat template.

    Content that is a list of texts is joined for a template that takes strings alone.

    Raises:
        ValueError: the template refuses the conversation, or would write content as Python does.
    """
    if any(isinstance(message.get("content"), list) for message in messages) and not _takes_lists(tokenizer):
        messages = [_joined(index, message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
    except Exception as error:  # templates raise anything: of Jinja, and what operations on the messages raise
        raise ValueError(f"samples[{index}]: the chat template refuses it: {error}") from error
    return str(text)


def _takes_lists(tokenizer: Any) -> bool:
    """Whether the chat template reads content as a list of parts."""
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": _PROBE}]}], tokenize=False
        )
    except Exception:
        return False
    return _PROBE in text and "'text'" not in text and '"text"' not in text


def _joined(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    if not all(isinstance(text, str) for text in texts):
        kinds = [part.get("type") if isinstance(part, Mapping) else checks.describe(part) for part in content]
        raise ValueError(
            f"samples[{index}]: content: expected text, which is all that the chat template takes, got parts {kinds}"
        )
    return {**message, "content": "".join(map(str, texts))}


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):  # complex numbers; integers beyond floats
        return isinstance(value, int)


def _missing(value: object) -> str:
    empty = value is None or (isinstance(value, float) and math.isnan(value))
    return "no value" if empty else checks.describe(value)
