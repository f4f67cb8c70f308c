"""Chat messages and texts as a tokenizer gets them: one rule, wherever a row comes from."""

from __future__ import annotations

import json
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

from acqcore import checks
from acqcore.students.tables import plain

_PROBE = "acqcore"

#: Begins with a character that no reply begins with.
_OTHER = "\ue0f1acqcore"

#: Of templates that say what the assistant generates.
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

#: Keys of messages under which reasoning is kept apart from content.
_REASONING = ("reasoning_content", "reasoning", "thinking")

#: In the types of content parts that a student of text does not see.
_UNSEEN = ("image", "video", "audio")

#: Keys of messages and tool calls whose values are no text of theirs.
_STRUCTURE = frozenset({"role", "type", "id", "tool_call_id"})

#: Arguments of ``apply_chat_template`` that are no template variables.
_TAKEN = frozenset(
    {
        *("conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
        *("return_assistant_tokens_mask", "sanitize_control_tokens", "messages"),
    }
)


def text_of(index: int, key: str, value: object) -> str:
    """A string; of a number what is written. A csv file cannot tell 5 from "5", so no other source does.

    Raises:
        TypeError: anything else. ValueError: as :func:`sound`.
    """
    if isinstance(value, numbers.Number) and not isinstance(value, bool) and _is_finite(value):
        try:
            value = str(value)
        except ValueError as error:  # Python writes integers of 4,300 digits at most
            raise ValueError(f"samples[{index}]: {key}: {error}") from None
    if not isinstance(value, str):
        empty = value is None or (isinstance(value, float) and math.isnan(value))
        got = "no value" if empty else checks.describe(value)
        raise TypeError(f"samples[{index}]: {key}: expected a string, got {got}")
    return sound(index, key, value)


def sound(index: int, key: str, text: str) -> str:
    """The text; raises ValueError for a lone surrogate, which is no text."""
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
        ValueError: the template refuses the conversation, or would write content as Python does; images and the like.
    """
    for message in messages:
        _text_alone(index, message.get("content"))
    if any(isinstance(message.get("content"), list) for message in messages) and not _takes_lists(tokenizer):
        messages = [_joined(index, message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
    except Exception as error:  # templates raise anything: of Jinja, and what operations on the messages raise
        raise ValueError(f"samples[{index}]: the chat template refuses it: {error}") from error
    for message in messages:
        content = message.get("content")
        if not isinstance(content, str) and content and str(content) in text:
            raise ValueError(
                f"samples[{index}]: content: expected text, the chat template writes a {checks.describe(content)} as "
                "Python does"
            )
    return str(text)


def _text_alone(index: int, content: object) -> None:
    """A template may write a placeholder for an image that the student never gets."""
    parts = content if isinstance(content, list) else []
    for part in parts:
        kind = str(part.get("type") or next(iter(part), "")) if isinstance(part, Mapping) else ""
        if any(word in kind for word in _UNSEEN):
            raise ValueError(
                f"samples[{index}]: content: expected text, which is all that is scored, got parts {_kinds(parts)}"
            )


def _kinds(parts: Sequence[Any]) -> list[Any]:
    return [part.get("type") if isinstance(part, Mapping) else checks.describe(part) for part in parts]


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
        raise ValueError(
            f"samples[{index}]: content: expected text, which is all that the chat template takes, got parts "
            f"{_kinds(content)}"
        )
    return {**message, "content": "".join(map(str, texts))}


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError, ValueError):  # complex numbers; integers beyond floats; a signaling NaN
        return isinstance(value, int)


def template_options(index: int, sample: Mapping[str, Any]) -> dict[str, Any]:
    """What a sample asks of the chat template besides its messages: ``tools`` and ``chat_template_kwargs``, as in TRL.

    Raises:
        TypeError: tools that are no list, or no JSON text of one; template variables that are no mapping.
        ValueError: template variables that change what a sample is.
    """
    tools = plain(sample.get("tools"))
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "null")
        except ValueError as error:
            raise TypeError(f"samples[{index}]: tools: expected a list of tools or its JSON text: {error}") from None
    if tools is not None and not isinstance(tools, list):
        raise TypeError(f"samples[{index}]: tools: expected a list of tools, got {checks.describe(tools)}")
    variables = plain(sample.get("chat_template_kwargs")) or {}
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"samples[{index}]: chat_template_kwargs: expected a mapping of template variables, "
            f"got {checks.describe(variables)}"
        )
    taken = sorted(_TAKEN.intersection(variables))
    if taken:
        raise ValueError(f"samples[{index}]: chat_template_kwargs: {taken[0]!r} is set by acqcore")
    return {**({"tools": tools} if tools else {}), **variables}  # some templates write a heading for an empty list


def reply_start(
    index: int,
    tokenizer: Any,
    text: str,
    context: Sequence[Mapping[str, Any]],
    reply: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> int:
    """Where the reply begins in the rendered conversation.

    That is after the rendered context and generation prompt where the template only appends. Where it renders the
    context in another way when a reply follows, it is where a rendering of another reply begins to differ.

    Raises:
        ValueError: the template refuses the conversation, or what would be scored lacks the reply's text.
    """
    prompt = rendered(index, tokenizer, context, True, **options)
    start = len(prompt) if text.startswith(prompt) else None
    if start is None or prompt == rendered(index, tokenizer, context, False, **options):
        try:
            other = rendered(index, tokenizer, [*context, _other(reply[0]), *reply[1:]], False, **options)
            start = common_length(text, other)
            # Nor may any of the context come after the reply.
            other = rendered(index, tokenizer, [*map(_other, context), *reply], False, **options)
            start = start if other.endswith(text[start:]) else None
        except ValueError:  # a template may refuse what it cannot parse
            pass
    scored = "" if start is None else text[start:]
    for message in reply:
        for expected in _shown(message, message is reply[-1]):
            if not any(text in scored for text in expected):
                raise ValueError(
                    f"samples[{index}]: the chat template does not write the reply where it is scored: expected "
                    f"{expected[0][:80]!r} in {scored[:80]!r}"
                )
    assert start is not None
    return start


def generated(
    index: int, tokenizer: Any, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
) -> list[int] | None:
    """Of each token of the rendered conversation 1 if the template marks it as generated by the assistant; None for a
    template without such marks, or a tokenizer without offsets."""
    template = tokenizer.get_chat_template(tools=options.get("tools")) if getattr(tokenizer, "is_fast", False) else ""
    if not _MARK.search(template):
        return None
    try:
        found = tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
        )
    except Exception as error:
        raise ValueError(f"samples[{index}]: the chat template refuses it: {error}") from error
    return list(found["assistant_masks"])


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


def _other(value: Any, key: str = "") -> Any:
    """A message, every text of which is another one."""
    if isinstance(value, Mapping):
        return {k: v if k in _STRUCTURE else _other(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_other(part, key) for part in value]
    # Arguments may be JSON text, which a template parses.
    return _OTHER if isinstance(value, str) and key != "arguments" else value


def _shown(message: Mapping[str, Any], last: bool) -> list[list[str]]:
    """What a rendering of a message must show, in one of several ways each: templates strip, take reasoning out of the
    content, or write JSON. Of messages before the last one they leave out reasoning."""
    content = message.get("content")
    if isinstance(content, list):
        content = next((part["text"] for part in content if isinstance(part, Mapping) and part.get("text")), None)
    if not content:
        calls = [call.get("function", call) for call in message.get("tool_calls") or () if isinstance(call, Mapping)]
        content = next((call["name"] for call in calls if isinstance(call, Mapping) and call.get("name")), "")
    apart = [message[key] for key in _REASONING if last and isinstance(message.get(key), str)]
    return [_ways(text) for text in dict.fromkeys([str(content), *apart]) if text] or [[""]]


def _ways(text: str) -> list[str]:
    ways = [text.strip(), text.rpartition("</think>")[2].strip(), json.dumps(text)[1:-1]]
    return [way for way in ways if way] or [text]
