"""Every validation of public arguments. Each function raises ValueError or TypeError that names the argument,
what was given and what was expected; code below the public edge trusts its input. A leaf: imports torch only."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

IGNORE_INDEX = -100

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(value: object) -> str:
    """Short text for an error message: dtype and shape of a tensor, else the type's name."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return type(value).__name__


def float_tensor(name: str, value: object, shape: str, dims: int) -> None:
    """``value`` is a floating-point tensor with ``dims`` dimensions; ``shape`` is how the message writes them."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {describe(value)}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64 {shape}, got {describe(value)}")
    if value.dim() != dims:
        raise ValueError(f"{name}: expected shape {shape}, got {describe(value)}")


def head(weight: object, bias: object, softcap: object, scale: object) -> None:
    """Arguments of :class:`acqcore.Head`."""
    float_tensor("weight", weight, "[V, D]", 2)
    assert isinstance(weight, torch.Tensor)
    if weight.shape[0] < 1:
        raise ValueError(f"weight: expected [V, D] with V >= 1, got {describe(weight)}")
    if bias is not None:
        float_tensor("bias", bias, "[V]", 1)
        assert isinstance(bias, torch.Tensor)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias: expected [V] with V = {weight.shape[0]} as in weight, got {describe(bias)}")
        same_device("bias", bias, "weight", weight)
    if softcap is not None:
        positive("softcap", softcap)
    finite("scale", scale)


def vocabulary(start: int, end: int, size: int | None) -> None:
    """A head covering rows ``start:end`` of a vocabulary of ``size``."""
    if start < 0:
        raise ValueError(f"vocab_start: expected an index >= 0, got {start}")
    if size is not None and size < end:
        raise ValueError(f"vocab_size: expected at least vocab_start + V = {end}, got {size}")


def hidden(value: object, weight: torch.Tensor) -> None:
    """Hidden states that fit a head."""
    float_tensor("hidden", value, "[N, D]", 2)
    assert isinstance(value, torch.Tensor)
    if value.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden: expected [N, D] with D = {weight.shape[1]} as in head.weight "
            f"{list(weight.shape)}, got {describe(value)}"
        )
    same_device("hidden", value, "head.weight", weight)


def logits(value: object) -> None:
    """Logits ``[N, V]`` with at least one column."""
    float_tensor("logits", value, "[N, V]", 2)
    assert isinstance(value, torch.Tensor)
    if value.shape[1] < 1:
        raise ValueError(f"logits: expected [N, V] with V >= 1, got {describe(value)}")


def targets(value: object, like: torch.Tensor, name: str) -> None:
    """Shape, dtype and device of targets for the rows of ``like`` (an argument called ``name``)."""
    if value is None:
        return
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int64:
        raise TypeError(f"targets: expected an int64 tensor [N], got {describe(value)}")
    if value.shape != like.shape[:1]:
        raise ValueError(f"targets: expected [N] with N = {like.shape[0]} as in {name}, got {describe(value)}")
    same_device("targets", value, name, like)


def target_range(value: torch.Tensor, vocab_size: int) -> None:
    """Every target is an index into the vocabulary or −100. Reads values, so it runs inside the op."""
    bad = ((value < 0) | (value >= vocab_size)) & (value != IGNORE_INDEX)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"targets: expected values in [0, {vocab_size}) or {IGNORE_INDEX} (ignored), "
            f"got {int(value[row])} at row {row}"
        )


def same_device(name: str, value: torch.Tensor, other: str, tensor: torch.Tensor) -> None:
    if value.device != tensor.device:
        raise ValueError(f"{name}: is on {value.device} but {other} is on {tensor.device}")


def finite(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def positive(name: str, value: object) -> None:
    finite(name, value)
    if value <= 0:  # type: ignore[operator]
        raise ValueError(f"{name}: expected a number > 0, got {value}")


def positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {describe(value)}")
    if value < 1:
        raise ValueError(f"{name}: expected an int >= 1, got {value}")


def one_of(name: str, value: object, known: Collection[str]) -> None:
    """``value`` is one of the ``known`` names; the message lists them and the nearest."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {', '.join(known)}, got {describe(value)}")
    if value not in known:
        near = difflib.get_close_matches(value, list(known), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: unknown {value!r}, expected one of {', '.join(known)}{hint}")


def names(name: str, values: object, known: Collection[str]) -> tuple[str, ...]:
    """A non-empty sequence of known names, or one of them as a plain string."""
    if isinstance(values, str):
        values = (values,)
    if not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected a sequence of names, got {describe(values)}")
    result = tuple(values)
    if not result:
        raise ValueError(f"{name}: expected at least one of {', '.join(known)}, got none")
    for value in result:
        one_of(name, value, known)
    if len(set(result)) != len(result):
        raise ValueError(f"{name}: a name is given twice in {result}")
    return result


def module(name: str, value: object) -> None:
    if not isinstance(value, torch.nn.Module):
        raise TypeError(
            f"{name}: expected acqcore.Student, a transformers or PEFT causal language model, or the path or "
            f"hub id of one, got {describe(value)}"
        )


def trunk(value: object) -> None:
    if not callable(value):
        raise TypeError(f"trunk: expected a callable input_ids [B, T] -> [B, T, D], got {describe(value)}")


def instance(name: str, value: object, kind: type, expected: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")


def trunk_output(hidden: object, output: object, input_ids: torch.Tensor) -> None:
    """What a trunk gave for ``input_ids [B, T]`` holds hidden states ``[B, T, D]``."""
    if not isinstance(hidden, torch.Tensor):
        raise TypeError(
            f"trunk: expected it to give a tensor [B, T, D] or an object with last_hidden_state, got {describe(output)}"
        )
    if hidden.dim() != 3 or hidden.shape[:2] != input_ids.shape:
        raise ValueError(
            f"trunk: expected hidden states [B, T, D] for input_ids {list(input_ids.shape)}, got {describe(hidden)}"
        )


def causal_lm(model: torch.nn.Module) -> None:
    """``model`` has a configuration and an output embedding, and is no encoder-decoder."""
    name = type(model).__name__
    embeddings = getattr(model, "get_output_embeddings", None)
    if not hasattr(model, "config") or embeddings is None or embeddings() is None:
        raise TypeError(
            f"model: expected a transformers causal language model with an output embedding, got {name}; "
            "acqcore.Student(trunk, head) takes any other"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model: expected a decoder-only language model, {name} is an encoder-decoder")


def found_trunk(trunk: object, model: torch.nn.Module) -> None:
    if not isinstance(trunk, torch.nn.Module) or trunk is model:
        raise ValueError(
            f"model: {type(model).__name__} has no base model that gives hidden states; "
            "use acqcore.Student(trunk, head)"
        )


def linear_head(layer: object) -> None:
    if not isinstance(layer, torch.nn.Linear):
        raise ValueError(
            f"model: expected its output embedding to be torch.nn.Linear, got {describe(layer)}; "
            "use acqcore.Student(trunk, head)"
        )


def adapted_head(layer: Any, is_lora: bool) -> None:
    """A PEFT layer on the head is plain LoRA in a state that can be read without changing it."""
    if not is_lora:
        raise ValueError(
            f"model: the adapter on the output embedding is {describe(layer)}; expected LoRA or "
            "modules_to_save, merge it first"
        )
    variants = [name for name in layer.active_adapters if name in layer.lora_variant]
    if variants:
        kind = type(layer.lora_variant[variants[0]]).__name__
        raise ValueError(
            f"model: the adapter on the output embedding is a LoRA variant ({kind}); expected plain LoRA, "
            "merge it first"
        )
    if layer.merged and layer.disable_adapters:
        raise ValueError(
            "model: the adapter on the output embedding is both merged and disabled; call model.unmerge_adapter() first"
        )


def probe(
    name: str,
    own: torch.Tensor,  # [2, T, V] the model's logits
    ours: torch.Tensor,  # [2, T, V] of trunk and head
    hidden: torch.Tensor,  # [2, T, D]; the two rows' inputs differ in the last token only
    tolerance: float,  # relative to the largest value
) -> None:
    """The model's own logits are those of trunk and head, and its hidden states depend on no later token."""
    if own.shape != ours.shape:
        raise ValueError(
            f"model: {name} gives logits {list(own.shape)} where its trunk and head give {list(ours.shape)}: "
            "it changes them in a way that acqcore does not know; use acqcore.Student(trunk, head)"
        )
    own = own.to(ours)
    error = float((own - ours).abs().max())
    if not error <= tolerance * float(own.abs().max()):
        raise ValueError(
            f"model: the logits of {name} differ from those of its trunk and head by {error:.3g} (largest "
            f"logit {float(own.abs().max()):.3g}): it changes them in a way that acqcore does not know; use "
            "acqcore.Student(trunk, head)"
        )
    before = hidden[:, :-1].double()
    if not float((before[0] - before[1]).abs().max()) <= tolerance * float(before.abs().max()):
        raise ValueError(f"model: expected a causal language model, in {name} a token sees those after it")


def max_length(value: object, limit: int | None) -> None:
    """Room for one scored token and its predecessor, and within what the student takes."""
    if value is None:
        return
    positive_int("max_length", value)
    assert isinstance(value, int)
    if value < 2:
        raise ValueError(f"max_length: expected at least 2 (a scored token and its predecessor), got {value}")
    if limit is not None and value > limit:
        raise ValueError(f"max_length: the student takes at most {limit} tokens, got {value}")


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


def token_values(name: str, values: object, n: int) -> None:
    """What an acquisition function gave for ``n`` tokens."""
    if not isinstance(values, torch.Tensor) or values.shape != (n,):
        raise ValueError(f"acquisition {name!r}: expected it to give a tensor [{n}], got {describe(values)}")


def tokens_kept(tokens: object) -> None:
    if tokens is None:
        raise ValueError("tokens: per-token values were not kept, expected score(..., keep_tokens=True)")


def column_options(prompt: str | None, completion: str | None, text: str | None) -> None:
    if (prompt is None) != (completion is None):
        raise ValueError("--prompt-column and --completion-column: expected both or neither")
    if text is not None and prompt is not None:
        raise ValueError("--text-column: expected it without --prompt-column and --completion-column")


def known_columns(found: Sequence[object], present: Iterable[str]) -> None:
    if not found:
        raise ValueError(
            "data: expected columns prompt and completion, messages, question and answer, or text, got "
            f"{', '.join(present) or 'none'}; name them with --prompt-column and --completion-column, or "
            "--text-column"
        )


def columns_present(chosen: Iterable[str], present: Collection[str]) -> None:
    for column in chosen:
        if column not in present:
            raise ValueError(f"data: no column {column!r}, expected one of {', '.join(present) or 'none'}")


def output_columns(columns: Iterable[str], written: Collection[str]) -> None:
    for column in columns:
        if column in written:
            raise ValueError(f"data: the column {column!r} has the name of an output column; rename it")


def parent_folder(name: str, path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{name}: the folder {path.parent} does not exist")


def same_manifest(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """A folder of finished batches belongs to this very run."""
    for key in (*wanted, *found):
        if found.get(key) != wanted.get(key):
            raise ValueError(
                f"out: {folder} holds a cut-off run with another {key} "
                f"({_short(found.get(key))} there, {_short(wanted.get(key))} here); repeat that run's "
                "command to finish it, or remove the folder"
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def given(name: str, value: object) -> None:
    """An argument that may be None elsewhere is not here."""
    if value is None:
        raise TypeError(f"{name}: expected a tensor, got None")


def offsets(value: object, targets: torch.Tensor) -> None:
    """Sample boundaries ``[B + 1]`` of packed rows: int64, from 0, increasing, ending at N. Reads values."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int64:
        raise TypeError(f"offsets: expected an int64 tensor [B + 1], got {describe(value)}")
    if value.dim() != 1 or len(value) < 1:
        raise ValueError(f"offsets: expected [B + 1] with B >= 0, got {describe(value)}")
    same_device("offsets", value, "targets", targets)
    n = len(targets)
    if int(value[0]) != 0 or int(value[-1]) != n:
        raise ValueError(f"offsets: expected to run from 0 to N = {n}, got {int(value[0])} to {int(value[-1])}")
    steps = value.diff()
    if bool((steps <= 0).any()):
        i = int((steps <= 0).nonzero()[0])
        raise ValueError(f"offsets: expected increasing, got {int(value[i])} then {int(value[i + 1])} (sample {i})")


def scored_tokens(counts: torch.Tensor) -> None:
    """``counts [B]``: every sample has a token that is scored."""
    if bool((counts == 0).any()):
        i = int((counts == 0).nonzero()[0])
        raise ValueError(f"targets: sample {i} has no scored token: all of its targets are {IGNORE_INDEX}")


def token_weights(value: object, targets: torch.Tensor) -> None:
    """Weights ``[N]`` of the tokens' losses."""
    float_tensor("token_weights", value, "[N]", 1)
    assert isinstance(value, torch.Tensor)
    if value.shape != targets.shape:
        raise ValueError(f"token_weights: expected [N] with N = {len(targets)}, got {describe(value)}")
    same_device("token_weights", value, "targets", targets)


def vectors(name: str, value: object, like: torch.Tensor | None = None, like_name: str = "") -> None:
    """Finite vectors ``[n, d]``, with the columns and on the device of ``like``. Reads values."""
    float_tensor(name, value, "[n, d]", 2)
    assert isinstance(value, torch.Tensor)
    if like is not None:
        like_vector(name, value, like, like_name)
    bad = ~value.isfinite().all(dim=1)
    if bool(bad.any()):
        raise ValueError(f"{name}: expected finite vectors, row {int(bad.nonzero()[0])} has NaN or infinity")


def not_empty(name: str, value: torch.Tensor) -> None:
    if len(value) == 0:
        raise ValueError(f"{name}: expected at least one row, got {describe(value)}")


def nonzero_rows(name: str, value: torch.Tensor) -> None:
    zero = ~value.any(dim=1)
    if bool(zero.any()):
        raise ValueError(f"{name}: row {int(zero.nonzero()[0])} is zero, expected vectors with a direction")


def at_most(name: str, value: int, limit: int, what: str) -> None:
    if value > limit:
        raise ValueError(f"{name}: expected at most {limit} ({what}), got {value}")


def ridge(value: object) -> None:
    """Noise on a kernel with ones on its diagonal; below 1e-9 its factorisation in float64 may fail."""
    finite("ridge", value)
    if value < 1e-9:  # type: ignore[operator]
        raise ValueError(f"ridge: expected a number >= 1e-9, got {value}")


def one_column(name: str, values: Mapping[str, torch.Tensor], column: str | None) -> torch.Tensor:
    """The entry called ``column``; the only one where that is None."""
    if column is not None:
        one_of("acquisition", column, values)
        return values[column]
    if len(values) != 1:
        raise ValueError(
            f"{name}: expected scores of one acquisition, got {', '.join(values) or 'none'}; acquisition= names one"
        )
    return next(iter(values.values()))


def archive_state(state: object) -> None:
    """What ``Archive.state_dict`` gives."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected a mapping, got {describe(state)}")
    for key in ("capacity", "ridge", "vectors"):
        if key not in state:
            raise ValueError(f"state: no entry {key!r}, expected what Archive.state_dict() gives")
    positive_int("state: capacity", state["capacity"])
    ridge(state["ridge"])
    if state["vectors"] is not None:
        vectors("state: vectors", state["vectors"])
        at_most("state: vectors", len(state["vectors"]), state["capacity"], "the capacity")


def gradient_parameters(value: object, known: Collection[str]) -> None:
    """``parameters`` of a gradient: one of the known names, or a number of blocks."""
    if isinstance(value, str):
        one_of("parameters", value, known)
    elif isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"parameters: expected {', '.join(known)} or a number of transformer blocks, got {describe(value)}"
        )
    elif value < 1:
        raise ValueError(f"parameters: expected at least 1 transformer block, got {value}")


def trunk_parameters(parameters: object, module: object) -> None:
    if module is None:
        raise ValueError(
            f"parameters: {parameters!r} needs a student whose trunk is a torch.nn.Module; of any other "
            "callable only 'head' is known"
        )


def block_count(asked: int, present: int) -> None:
    if asked > present:
        raise ValueError(f"parameters: expected at most {present} transformer blocks, got {asked}")


def some_parameters(parameters: object, count: int) -> None:
    if not count:
        raise ValueError(f"parameters: {parameters!r}: no parameter of the student has requires_grad=True")


def differentiable(names: Mapping[torch.Tensor, str]) -> None:
    """Every parameter is floating point: a quantised one has no gradient."""
    for parameter, name in names.items():
        if not parameter.is_floating_point():
            raise ValueError(
                f"parameters: {name} is {describe(parameter)}, which has no gradient; 'trainable' leaves out "
                "what is quantised"
            )


def whole_head(weight: str | None, bias: str | None, has_bias: bool) -> None:
    """Weight and bias of the head are asked for together, by name, or not at all."""
    if has_bias and (weight is None) != (bias is None):
        alone, other = (weight, "bias") if bias is None else (bias, "weight")
        raise ValueError(f"parameters: no rule covers {alone} without the head's {other}")


def covered(used: Sequence[str]) -> None:
    """``used``: parameters that change the logits, but not through a call of the module that owns them."""
    if used:
        more = f" and {len(used) - 1} more" if len(used) > 1 else ""
        raise ValueError(
            f"parameters: no rule covers {used[0]}{more}: it is used without a call of the module that owns it"
        )


def _first(names: Mapping[str, str]) -> str:
    return next(iter(names.values()))


def tensor_by_sample(names: Mapping[str, str], kind: str, value: object, batch: int, length: int) -> None:
    """Input or output of a module that owns the parameters ``names`` tells the samples of a batch apart."""
    if not isinstance(value, torch.Tensor) or value.dim() < 1:
        raise ValueError(
            f"parameters: no rule covers {_first(names)}: its {kind} takes or gives {describe(value)} "
            "where one tensor was expected"
        )
    if value.shape[0] not in (1, batch, batch * length):
        raise ValueError(
            f"parameters: no rule covers {_first(names)}: its {kind} takes or gives a {describe(value)}, in "
            f"which the {batch} samples of {length} tokens can not be told apart"
        )


def small_module(names: Mapping[str, str], kind: str, size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(
            f"parameters: no rule covers {_first(names)}: {kind} is neither a linear layer nor an embedding, "
            f"and its {size} parameters are more than the {limit} that are differentiated sample by sample"
        )


def no_derivative(names: Mapping[str, str], kind: str, error: Exception) -> NoReturn:
    raise ValueError(
        f"parameters: no rule covers {_first(names)}: {kind} could not be differentiated sample by sample: {error}"
    ) from error


def embedding_input(names: Mapping[str, str], ids: torch.Tensor) -> None:
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"parameters: no rule covers {_first(names)}: its embedding takes {describe(ids)}, not token ids"
        )


def embedding_output(names: Mapping[str, str], fits: bool) -> None:
    if not fits:
        raise ValueError(
            f"parameters: no rule covers {_first(names)}: its embedding does not give a multiple of the rows of "
            "its weight"
        )


def unchanged_input(names: Mapping[str, str], unchanged: bool) -> None:
    if not unchanged:
        raise ValueError(f"parameters: no rule covers {_first(names)}: the input of its module is changed in place")


def one_kind_of_use(name: str, piece: object) -> None:
    if piece is None:
        raise ValueError(f"parameters: no rule covers {name}: layers of different kinds share it")


def embedding_use(name: str, is_embedding: bool) -> None:
    if not is_embedding:
        raise ValueError(f"parameters: no rule covers {name}: the head shares it with a layer that is no embedding")


def like_vector(name: str, value: object, like: torch.Tensor, like_name: str) -> None:
    """Vectors ``[n, d]`` with the columns and on the device of ``like [..., d]``."""
    float_tensor(name, value, "[n, d]", 2)
    assert isinstance(value, torch.Tensor)
    if value.shape[1] != like.shape[-1]:
        raise ValueError(f"{name}: expected [n, d] with d = {like.shape[-1]} as in {like_name}, got {describe(value)}")
    same_device(name, value, like_name, like)


def preconditioner(value: object, dim: int) -> None:
    """``"reference"`` or second moments ``[dim]``. Reads values."""
    if not isinstance(value, torch.Tensor):
        one_of("precondition", value, ("reference",))
        return
    float_tensor("precondition", value, "[dim]", 1)
    if len(value) != dim:
        raise ValueError(f"precondition: expected [dim] with dim = {dim}, got {describe(value)}")
    if not bool((value.isfinite() & (value >= 0)).all()) or not bool(value.any()):
        raise ValueError("precondition: expected finite second moments >= 0, not all of them 0")


def reference_sketches(sketches: torch.Tensor) -> None:
    """Sketches ``[n, dim]`` of a reference set."""
    if len(sketches) == 0:
        raise ValueError("samples: expected at least one reference sample, got none")
    bad = ~sketches.isfinite().all(dim=1)
    if bool(bad.any()):
        raise ValueError(f"samples[{int(bad.nonzero()[0])}]: expected a finite gradient, got NaN or infinity")
    if not bool(sketches.any()):
        raise ValueError("samples: expected a reference set with a gradient, all of its gradients are zero")


def same_student(made: Mapping[str, Sequence[int]], now: Mapping[str, Sequence[int]]) -> None:
    """Names and shapes of the parameters of a reference's student are those of this one."""
    for name in (*made, *now):
        there, here = made.get(name), now.get(name)
        if there != here:
            shapes = ["no such parameter" if shape is None else str(list(shape)) for shape in (there, here)]
            raise ValueError(f"reference: made with another student: {name} is {shapes[0]} there, {shapes[1]} here")


def acquisition_args(
    value: object, acquisitions: object, known: Mapping[str, Collection[str]]
) -> dict[str, Mapping[str, Any]]:
    """Arguments of acquisitions that are asked for and take them, by names they know."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"acquisition_args: expected a mapping name -> arguments, got {describe(value)}")
    asked = (acquisitions,) if isinstance(acquisitions, str) else acquisitions
    for name, arguments in value.items():
        if not isinstance(asked, Collection) or name not in asked:
            raise ValueError(f"acquisition_args: {name!r} is not among the acquisitions asked for")
        one_of("acquisition_args", name, known)
        if not isinstance(arguments, Mapping):
            raise TypeError(f"acquisition_args[{name!r}]: expected a mapping, got {describe(arguments)}")
        for argument in arguments:
            one_of(f"acquisition_args[{name!r}]", argument, known[name])
    return dict(value)
