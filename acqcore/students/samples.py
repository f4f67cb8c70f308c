"""Turns samples into token ids and scored positions.

=====================================  ====================================================================
a sample                               scored tokens
=====================================  ====================================================================
``"text"``, ``{"text"}``               every token with a predecessor, special tokens included
``{"prompt", "completion"}`` strings   the tokens after the prompt
``{"question", "answer"}``             the same
``{"prompt", "completion"}`` messages  the tokens after the rendered prompt and the opening of the reply
``{"messages"}``                       the last assistant turn, its closing tokens included
tensors ``{"input_ids", ...}``         labels other than -100, else every real token with a predecessor, where
                                       ``completion_mask`` and ``assistant_masks`` are 1
=====================================  ====================================================================

The whole text is tokenized at once: tokens of joined pieces may differ from those the model sees. The completion begins
with the first token whose span ends after the prompt, so a token across the boundary is scored. A table with these
columns (``datasets.Dataset``, pandas, polars, Arrow, a mapping of lists) counts as a list of its rows. Numbers become
text. Other keys and columns are ignored, except images, which are rejected, and ``tools`` and ``chat_template_kwargs``
of conversations, which go to the chat template. Only a conversation's reply is scored, or only its tokens that the
template marks as generated. A conversation is rejected if its reply cannot be scored in full, for example if
the template omits its reasoning. Rows from :func:`encode` are samples too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any, TypeAlias, TypeGuard, TypeVar

import torch

from acqcore import checks
from acqcore.defaults import standard_defaults
from acqcore.students.messages import (
    common_length,
    generated,
    joined,
    messages_of,
    rendered,
    reply_start,
    shown,
    sound,
    template_options,
    text_of,
)  # fmt: skip
from acqcore.students.tables import BESIDE, EXPECTED, IMAGES, columns_of, kind_of, listed, plain

T = TypeVar("T")
Message: TypeAlias = Mapping[str, Any]
Sample: TypeAlias = str | Mapping[str, Any]
Samples: TypeAlias = Sequence["Sample | Row"] | Mapping[str, Any] | Any  # Any: a table


@dataclass(frozen=True, eq=False)
class Row:
    """One tokenized sample; its tensors are read-only.

    Attributes:
        ids: ``[T]`` int64.
        targets: ``[T]`` int64, aligned with ``ids``: the token at this position if it is scored, else -100. The first
            is always -100, as no token predicts it.
        prompt: ``[P]`` int64, the tokens before the completion, which truncation does not change; None if the sample
            has no prompt.

    Raises:
        TypeError, ValueError: ids or targets are not as above.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    prompt: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in (("ids", self.ids), ("targets", self.targets)):
            if not isinstance(value, torch.Tensor) or value.dtype != torch.int64:
                raise TypeError(f"{name}: expected an int64 tensor [T], got {checks.describe(value)}")
        if self.ids.dim() != 1 or self.targets.shape != self.ids.shape:
            shapes = f"{list(self.ids.shape)} and {list(self.targets.shape)}"
            raise ValueError(f"ids, targets: expected [T] each, got {shapes}")
        if len(self.targets) and self.targets[0] != checks.IGNORE_INDEX:
            raise ValueError(f"targets: expected {checks.IGNORE_INDEX} at the first token, which none predicts")

    @property
    def scored(self) -> torch.Tensor:
        """The scored tokens, ``[n_scored]`` int64."""
        return self.targets[self.targets != checks.IGNORE_INDEX]

    @cached_property
    def n_scored(self) -> int:
        return int((self.targets != checks.IGNORE_INDEX).sum())

    @property
    def first(self) -> int:
        """Position of the token that predicts the first scored one; requires a scored token."""
        return int((self.targets != checks.IGNORE_INDEX).int().argmax()) - 1


#: Keys of integer tensors that confine the scored tokens, as in TRL, and of all integer tensors that are read.
_CONFINING = ("completion_mask", "assistant_masks")
_READ = ("input_ids", "attention_mask", "labels", *_CONFINING)

#: Beginnings of the keys of tensors that change what a model sees, besides token ids.
_UNSEEN = ("pixel_values", "input_features", "input_values", "inputs_embeds", "cu_seq_lens", "seq_idx")
#: Likewise of tensors that weight tokens. verl aligns ``loss_mask`` with the tokens or with their predecessors.
_WEIGHTS = ("loss_mask", "loss_weight", "token_weight")

EMPTY = Row(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


@dataclass(frozen=True)
class _Text:
    """A sample as text, whose first ``boundary`` characters are the prompt; None for a text without one."""

    text: str
    boundary: int | None
    has_special_tokens: bool  # written by a chat template
    generated: list[int] | None = None  # per token, 1 if the template marks it as the assistant's


@standard_defaults()
def encode(
    samples: Samples,
    tokenizer: Any,
    *,
    vocab_size: int,
    limit: int | None,
    max_length: int | None = None,
    errors: dict[int, str] | None = None,
) -> list[Row]:
    """Tokenized samples, in order.

    Args:
        samples: as in :func:`acqcore.score`, or rows from an earlier call.
        tokenizer: a transformers tokenizer; not needed for tensors.
        vocab_size: exclusive upper bound of the token ids.
        limit: maximum number of tokens that the student accepts, or None.
        max_length: truncate to this many tokens, dropping first the oldest context, down to the token that predicts the
            first scored one, then the end.
        errors: if given, a bad sample becomes an empty row and an entry ``index -> message`` instead of raising.

    Raises:
        TypeError: samples of an unknown kind or of several kinds, a missing tokenizer.
        ValueError: a sample with nothing to score, or too long for the student; the message names its index.
    """
    max_length = checks.max_length(max_length, limit)
    check_errors(errors)
    found: dict[int, str] | None = None if errors is None else {}
    if _of_tensors(samples):
        rows = _tensor_rows(samples)
    else:
        given = listed(samples)
        encoded = [sample for sample in given if isinstance(sample, Row)]
        rows = encoded if len(encoded) == len(given) else _tokenize(_texts(given, tokenizer, found), tokenizer, found)

    # Check all rows at once, and one by one only to name a bad one.
    tokens = [ids for row in rows for ids in (row.ids, row.scored)]
    known = not bool(_outside(torch.cat([EMPTY.ids, *tokens]), vocab_size).any())

    def finish(index: int, row: Row) -> Row:
        if not known:
            for kind, ids, hint in (
                ("token id", row.ids, "does the tokenizer belong to the student?"),
                ("label", row.scored, f"expected {checks.IGNORE_INDEX} where not scored"),
            ):
                bad = ids[_outside(ids, vocab_size)]
                if len(bad):
                    raise ValueError(
                        f"samples[{index}]: {kind} {int(bad[0])} is outside the student's vocabulary of {vocab_size}; "
                        f"{hint}"
                    )
        if row.n_scored == 0:
            raise ValueError(
                f"samples[{index}]: nothing to score, expected at least one scored token with a token before it"
            )
        if max_length is not None and len(row.ids) > max_length:
            drop = min(len(row.ids) - max_length, row.first)
            kept = slice(drop, drop + max_length)
            return replace(row, ids=row.ids[kept], targets=row.targets[kept])
        if limit is not None and len(row.ids) > limit:
            raise ValueError(
                f"samples[{index}]: {len(row.ids)} tokens, the student takes at most {limit}; max_length= truncates"
            )
        return row

    done = found or {}
    rows = [EMPTY if i in done else _attempt(found, finish, i, row) or EMPTY for i, row in enumerate(rows)]
    if errors is not None:
        errors.update(found or {})
    return rows


def check_errors(errors: object) -> None:
    if errors is not None:
        checks.instance("errors", errors, MutableMapping, "a dict or None")


def in_chunks(samples: Any, size: int) -> Iterator[list[Any]]:
    """Lists of ``size`` samples, read one at a time; tables and tensors are cut by rows."""
    if isinstance(samples, Mapping):
        samples = _tensor_rows(samples) if _of_tensors(samples) else listed(samples)
    elif columns_of(samples) is not None:
        rows = getattr(samples, "iloc", samples)
        return (listed(rows[begin : begin + size]) for begin in range(0, len(samples), size))
    if isinstance(samples, (str, bytes)) or not any(hasattr(samples, name) for name in ("__iter__", "__getitem__")):
        raise TypeError(f"samples: expected an iterable of {EXPECTED}, got {checks.describe(samples)}")
    left = iter(samples)
    return iter(lambda: list(islice(left, size)), [])


def _of_tensors(samples: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(samples, Mapping) and (
        kind_of(samples) is None or isinstance(samples.get("input_ids"), torch.Tensor)
    )


def _outside(ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Where ``ids`` are not in the vocabulary, in their shape."""
    return (ids < 0) | (ids >= vocab_size)


def _attempt(errors: dict[int, str] | None, step: Callable[..., T], index: int, *arguments: Any) -> T | None:
    """``step(index, *arguments)``; a bad sample raises, or is recorded in ``errors`` if given."""
    try:
        return step(index, *arguments)
    except (ValueError, TypeError) as error:
        if errors is None:
            raise
        errors[index] = str(error).removeprefix(f"samples[{index}]: ")
        return None


def _kind(index: int, sample: object) -> tuple[str, ...]:
    """The keys that define a sample's kind; none for a string."""
    if isinstance(sample, str):
        return ()
    got = checks.describe(sample)
    if isinstance(sample, Mapping):
        if (kind := kind_of(sample)) is not None:
            return kind
        got = f"a mapping with keys {', '.join(map(repr, sample))}"
    raise TypeError(f"samples[{index}]: expected {EXPECTED}, got {got}")


def _texts(samples: list[Sample], tokenizer: Any, errors: dict[int, str] | None) -> list[_Text]:
    if not samples:
        return []
    if tokenizer is None:
        raise TypeError("tokenizer: text samples require one, got none; pass tokenizer= or load the student by path")
    if not callable(tokenizer) or not hasattr(tokenizer, "apply_chat_template"):
        raise TypeError(f"tokenizer: expected a transformers tokenizer, got {checks.describe(tokenizer)}")
    first, texts = None, []
    for i, sample in enumerate(samples):
        kind = _attempt(errors, _kind, i, sample)
        first = kind if first is None else first
        text = None if kind is None else _attempt(errors, _text, i, sample, kind, first, tokenizer)
        texts.append(text or _Text("", None, False))
    return texts


def _text(index: int, sample: Any, kind: tuple[str, ...], first: tuple[str, ...], tokenizer: Any) -> _Text:
    if kind != first:
        names = [" and ".join(keys) or "a string" for keys in (first, kind)]
        raise TypeError(f"samples[{index}]: expected {names[0]} as in the samples before it, got {names[1]}")
    for key, value in plain({key: sample[key] for key in IMAGES if kind and key in sample}).items():
        if value:
            raise ValueError(f"samples[{index}]: {key}: expected text, as only text is scored")
    if kind != () and kind != ("messages",) and not isinstance(plain(sample[kind[0]]), list):
        for key, value in plain({key: sample[key] for key in BESIDE if key in sample}).items():
            if value:
                raise ValueError(f"samples[{index}]: {key}: only conversations have a chat template that uses it")
    if kind == ():
        return _Text(sound(index, "text", sample), None, False)
    values = [plain(sample[key]) for key in kind]
    if kind == ("text",):
        return _Text(text_of(index, "text", values[0]), None, False)
    if kind == ("messages",):
        messages = messages_of(index, "messages", values[0])
        if not messages or messages[-1]["role"] != "assistant":
            role = repr(messages[-1]["role"]) if messages else "no message"
            raise ValueError(
                f"samples[{index}]: messages: expected the assistant's turn last (it is scored), got {role}"
            )
        return _conversation(index, messages[:-1], messages[-1:], tokenizer, template_options(index, sample))
    prompt, completion = values
    if not isinstance(prompt, list):
        if isinstance(prompt, (Mapping, bool)):
            raise TypeError(
                f"samples[{index}]: {kind[0]}: expected a string or a list of messages, got {checks.describe(prompt)}"
            )
        prompt, completion = text_of(index, kind[0], prompt), text_of(index, kind[1], completion)
        if not completion:
            raise ValueError(f"samples[{index}]: the {kind[1]} is empty, there is nothing to score")
        return _Text(prompt + completion, len(prompt), False)
    context, reply = messages_of(index, kind[0], prompt), messages_of(index, kind[1], completion)
    return _conversation(index, context, reply, tokenizer, template_options(index, sample))


def _conversation(
    index: int, context: Sequence[Message], reply: Sequence[Message], tokenizer: Any, options: Mapping[str, Any]
) -> _Text:
    """The rendered conversation and the start of its reply."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("tokenizer: messages require a chat template, this tokenizer has none")
    if not context:
        raise ValueError(f"samples[{index}]: expected a message before the scored one, got none")
    messages = joined(index, tokenizer, [*context, *reply])
    context, reply = messages[: len(context)], messages[len(context) :]
    text = sound(index, "messages", rendered(index, tokenizer, messages, False, **options))
    if not any(shown(message, message is reply[-1]) for message in reply):
        raise ValueError(f"samples[{index}]: the completion is empty, there is nothing to score")
    start = reply_start(index, tokenizer, text, context, reply, options)
    return _Text(text, start, True, generated(index, tokenizer, messages, options))


def _tokenize(texts: Sequence[_Text], tokenizer: Any, errors: dict[int, str] | None) -> list[Row]:
    """Tokenize ``texts`` all at once, or one by one if the tokenizer raises."""
    rows = [EMPTY] * len(texts)
    for has_special_tokens in (False, True):
        picked = [i for i, text in enumerate(texts) if text.has_special_tokens == has_special_tokens and text.text]
        if not picked:
            continue
        try:
            found = _tokenized([texts[i] for i in picked], tokenizer)
        except Exception:
            found = [_attempt(errors, _alone, i, texts[i], tokenizer) or EMPTY for i in picked]
        for i, row in zip(picked, found, strict=True):
            rows[i] = _attempt(errors, _marked, i, row, texts[i]) or EMPTY
    return rows


def _alone(index: int, text: _Text, tokenizer: Any) -> Row:
    try:
        return _tokenized([text], tokenizer)[0]
    except Exception as error:
        raise ValueError(f"samples[{index}]: the tokenizer rejects it: {type(error).__name__}: {error}") from error


def _tokenized(texts: Sequence[_Text], tokenizer: Any) -> list[Row]:
    """Tokenize ``texts``; either all of them or none have special tokens."""
    add = not texts[0].has_special_tokens
    options = {"add_special_tokens": add, "return_attention_mask": False, "verbose": False}
    whole = [text.text for text in texts]
    if getattr(tokenizer, "is_fast", False):
        batch = tokenizer(whole, return_offsets_mapping=True, **options)
        contexts = [text.boundary or 0 for text in texts]
        # The first token whose span ends after the context; for plain text, the first.
        starts: Iterable[int] = (
            next((i for i, (_, end) in enumerate(offsets) if end > context), len(offsets))
            for offsets, context in zip(batch["offset_mapping"], contexts, strict=True)
        )
    else:
        batch = tokenizer(whole, **options)
        # Without offsets: the completion starts after the ids that the whole text shares with its context.
        alone = tokenizer([text.text[: text.boundary or 0] for text in texts], **options)["input_ids"]
        starts = map(common_length, batch["input_ids"], alone)
    rows = []
    tensors = map(partial(torch.tensor, dtype=torch.int64), batch["input_ids"])
    for text, ids, start in zip(texts, tensors, starts, strict=True):
        targets = ids.clone()
        targets[: max(start, 1)] = checks.IGNORE_INDEX  # no token predicts the first one
        rows.append(Row(ids, targets, None if text.boundary is None else ids[:start]))
    if any(len(ids) > 1 and (ids[0] == ids[1] or ids[-1] == ids[-2]) for ids in batch["input_ids"]):
        added = tokenizer([""], **options)["input_ids"][0]
        rows = [_once(row, added, tokenizer) for row in rows]
    return rows


def _once(row: Row, added: Sequence[int], tokenizer: Any) -> Row:
    """The row without a special token that the tokenizer adds (``added``, to an empty text) to a text that already
    begins or ends with it."""
    if len(added) == 0 or len(row.ids) < 2:
        return row
    ids, names = row.ids, [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "cls", "eos", "sep")]
    first = int(added[0] in names[:2] and added[0] == int(ids[0]) == int(ids[1]))
    last = int(len(ids) - first > 1 and added[-1] in names[2:] and added[-1] == int(ids[-1]) == int(ids[-2]))
    if not first and not last:
        return row
    targets = row.targets[first : len(ids) - last].clone()
    targets[0] = checks.IGNORE_INDEX
    return Row(ids[first : len(ids) - last], targets, None if row.prompt is None else row.prompt[first:])


def _marked(index: int, row: Row, text: _Text) -> Row:
    """The row with only those tokens scored that the template marks."""
    if text.generated is None or row is EMPTY:  # as the tokenizer rejected it
        return row
    if len(text.generated) != len(row.ids):
        raise ValueError(
            f"samples[{index}]: the chat template marks generated text in {len(text.generated)} tokens, but the "
            f"conversation has {len(row.ids)}"
        )
    marks = torch.tensor(text.generated, dtype=torch.bool)
    return replace(row, targets=row.targets.masked_fill(~marks, checks.IGNORE_INDEX))


def _tensor_rows(samples: Mapping[str, Any]) -> list[Row]:
    """Rows of ``input_ids [B, T]``, ``attention_mask [B, T]`` and ``labels [B, T]``, padded on either side."""
    if "input_ids" not in samples:
        raise TypeError(
            'samples: expected a list, a mapping of tensors with "input_ids", or of columns such as "text", '
            f"got keys {', '.join(map(repr, samples))}"
        )
    for key, value in samples.items():
        if str(key).startswith(_UNSEEN) and value is not None:
            raise ValueError(f'samples["{key}"]: expected token ids alone, as nothing else is given to the student')
        if str(key).startswith(_WEIGHTS) and value is not None:
            raise ValueError(f'samples["{key}"]: expected labels, -100 at tokens that are not scored')
    for key in _READ:
        value = samples.get(key)
        if value is None and key != "input_ids":
            continue
        name = f'samples["{key}"]'
        if not isinstance(value, torch.Tensor) or (value.is_floating_point() and key != "attention_mask"):
            raise TypeError(f"{name}: expected an integer tensor [B, T], got {checks.describe(value)}")
        if key == "attention_mask" and not bool(((value == 0) | (value == 1)).all()):
            raise ValueError(
                f"{name}: expected 1 for real tokens and 0 for padding, got an additive mask or that of packed texts"
            )
        if value.dim() != 2:
            raise ValueError(f"{name}: expected shape [B, T], got {checks.describe(value)}")
        if value.shape != samples["input_ids"].shape:
            raise ValueError(
                f"{name}: expected {list(samples['input_ids'].shape)} as input_ids, got {checks.describe(value)}"
            )
    input_ids = samples["input_ids"].cpu().long()
    mask = samples.get("attention_mask")
    keep = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
    labels = samples.get("labels")
    targets = input_ids if labels is None else labels.cpu().long()
    for key in _CONFINING:
        if samples.get(key) is not None:
            targets = targets.masked_fill(samples[key].cpu() == 0, checks.IGNORE_INDEX)
    if (positions := samples.get("position_ids")) is not None:
        _check_positions(positions, keep)
    rows = []
    for ids, target, kept in zip(input_ids, targets, keep, strict=True):
        ids, target = ids[kept], target[kept].clone()
        before = int((target != checks.IGNORE_INDEX).int().cumsum(0).eq(0).sum())
        target[:1] = checks.IGNORE_INDEX
        rows.append(Row(ids, target, ids[:before] if before else None))
    return rows


def _check_positions(
    positions: Any,  # [B, T], or [1, T] or [T] for all rows
    keep: torch.Tensor,  # [B, T] bool
) -> None:
    """Reject positions that start over in a row, as those of packed texts do; they may begin anywhere."""
    shapes = (keep.shape, (1, keep.shape[1]), keep.shape[1:])
    if not isinstance(positions, torch.Tensor) or positions.shape[-2:] not in shapes:
        raise ValueError(
            f'samples["position_ids"]: expected {list(keep.shape)} as input_ids, got {checks.describe(positions)}'
        )
    if bool(((positions.cpu().diff() != 1) & keep[:, 1:] & keep[:, :-1]).any()):
        raise ValueError(
            'samples["position_ids"]: expected consecutive positions in each row, got others; put each packed text in '
            "its own row"
        )
