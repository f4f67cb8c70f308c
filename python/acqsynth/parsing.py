"""The format of a generated sample, and its parsers: text -> a sample for ``acqcore.score``, or None.

A sample is ``<question>...</question> <reasoning>...</reasoning> <answer>...</answer>``; the reasoning may be
missing. Text around the tags, which models like to add, is allowed and ignored. Anything ambiguous is rejected: a
generator in training finds every malformed output that a parser accepts.
"""

from __future__ import annotations

import re

from acqsynth.normal_form import visible

TAGS = ("question", "reasoning", "answer")

SURROGATE = re.compile("[\ud800-\udfff]")  #: half a character of UTF-16, which no file and no tokenizer accepts
_TAG = re.compile(r"<(/?)(question|reasoning|answer)>")


def fields(text: str) -> dict[str, str] | None:
    """The stripped contents of the tags by name, ``reasoning`` only if given; None if the format is broken.

    The format is broken if a tag is missing, empty, repeated, unclosed, nested in another or out of order, or contains
    text that is not valid Unicode.
    """
    tags = list(_TAG.finditer(text))
    found: dict[str, str] = {}
    for start, end in zip(tags[::2], tags[1::2], strict=False):
        opens, closes = start[1] == "", end[1] == "/"
        content = text[start.end() : end.start()].strip()
        if not opens or not closes or start[2] != end[2] or start[2] in found:
            return None
        if not visible(content).strip() or SURROGATE.search(content):
            return None
        found[start[2]] = content
    in_order = tuple(found) in (TAGS, ("question", "answer"))
    return found if in_order and len(tags) == 2 * len(found) else None


def parse_sample(text: str) -> dict[str, str] | None:
    """A sample whose reasoning and answer are scored, given its question.

    Returns:
        ``{"prompt": question, "completion": reasoning and answer}``, separated by newlines, or None if
        the format is broken (see :func:`fields`).
    """
    sample = fields(text)
    if sample is None:
        return None
    solution = "\n".join(sample[tag] for tag in ("reasoning", "answer") if tag in sample)
    return {"prompt": sample["question"] + "\n", "completion": solution}


def parse_chat_sample(text: str) -> dict[str, list[dict[str, str]]] | None:
    """Like :func:`parse_sample`, but returns a two-turn chat, for students that use a chat template.

    Returns:
        ``{"messages": [the question as user, reasoning and answer as assistant]}``, or None.
    """
    sample = parse_sample(text)
    if sample is None:
        return None
    user = {"role": "user", "content": sample["prompt"].removesuffix("\n")}
    return {"messages": [user, {"role": "assistant", "content": sample["completion"]}]}


def as_text(text: str) -> str | None:
    """The whole text, stripped, for generators that write no tags; None if nothing is left."""
    return text.strip() if visible(text).strip() else None
