"""Students: trunk, head and model."""

from __future__ import annotations

from typing import Any

import torch

from acqcore.checks.basic import describe, positive_int


def trunk(value: object) -> None:
    if not callable(value):
        raise TypeError(f"trunk: expected a callable input_ids [B, T] -> [B, T, D], got {describe(value)}")


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
