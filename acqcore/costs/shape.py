"""Sizes of a model from its configuration alone, counted on the meta device."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from acqcore import checks
from acqcore.students.student import Student


@dataclass(frozen=True)
class Shape:
    """Sizes of a causal language model."""

    name: str  # class of the model
    dtype: str  # of the weights in memory
    stored_dtype: str  # of the stored weights, according to the configuration
    blocks: int
    kinds: int  # number of different blocks, by parameters and kind of attention
    hidden: int  # D
    vocabulary: int  # V
    widest: int  # longest side of a weight matrix in a block, usually the MLP's inner width
    heads: int  # attention heads of a block, 0 without attention
    attention: str  # transformers' implementation; "eager" holds the scores [B, heads, T, T]
    max_tokens: int | None  # per row
    parameters: int  # a tied head counted once
    block_parameters: int
    weight_bytes: int  # in ``dtype``
    stored_bytes: int  # in ``stored_dtype``
    head_bytes: int
    tied: bool  # the head's weight is the input embedding's


def read_config(source: str) -> Any:
    """The transformers configuration in a ``config.json``, a local directory or a hub repository."""
    checks.installed("transformers", f"reading the configuration of {source!r}", "train")
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source)


def stored_dtype(config: Any) -> torch.dtype:
    """The dtype that the configuration names, else float32."""
    dtype = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def with_blocks(config: Any, blocks: int) -> Any:
    """A copy of the configuration for a model of the first ``blocks`` blocks."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    whole = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == whole:
            setattr(text, name, value[:blocks])  # one entry per block, such as layer_types
    text.num_hidden_layers = blocks
    return config


def shape_of(config: Any, dtype: torch.dtype) -> Shape:
    """Sizes of the model that ``config`` describes, its weights in ``dtype``. Allocates nothing."""
    from transformers import AutoModelForCausalLM

    stored = stored_dtype(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)  # writes dtype into the copy
    model.tie_weights()  # transformers 5.0 leaves it out for tensors without data
    student = Student.from_model(model, verify=False)
    text = config.get_text_config()
    # A model without weights cannot run to find its blocks. ModernBERT calls its head the decoder.
    modules = chain(model.get_decoder().modules(), model.modules())
    lists = (module for module in modules if isinstance(module, torch.nn.ModuleList))
    blocks = list(next((modules for modules in lists if len(modules) == text.num_hidden_layers), []))
    checks.some_blocks(len(blocks))
    head = student.head.weight
    per_block = [sum(p.numel() for p in block.parameters()) for block in blocks]
    sorts = zip(per_block, getattr(text, "layer_types", None) or [""] * len(blocks), strict=True)
    parameters = list(model.parameters())
    return Shape(
        name=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        stored_dtype=str(stored).removeprefix("torch."),
        blocks=len(blocks),
        kinds=len(set(sorts)),
        hidden=head.shape[1],
        vocabulary=head.shape[0],
        widest=max(max(p.shape) for p in blocks[0].parameters() if p.dim() > 1),
        heads=getattr(text, "num_attention_heads", 0),  # a state space model has none
        attention=model.config._attn_implementation,
        max_tokens=student.max_length,
        parameters=sum(p.numel() for p in parameters),
        block_parameters=sum(per_block),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        stored_bytes=sum(p.numel() for p in parameters) * stored.itemsize,
        head_bytes=head.numel() * head.element_size(),
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
    )
