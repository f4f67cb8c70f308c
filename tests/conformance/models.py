"""A small random model of any causal language model type in transformers.

A configuration starts from the type's defaults. Entries named in ``SMALL`` are replaced, also in nested configurations;
``OWN`` has the entries that differ for a type.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch

VOCABULARY = 128

#: Entry of a configuration -> its value in a small model.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_ctx": 64,
    "max_seq_len": 64,
    "seq_length": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
    "initializer_range": 0.2,  # spreads the logits, so that caps and scales matter
    "init_std": 0.2,
    "is_decoder": True,
    "is_encoder_decoder": False,
    # width
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "dim_model": 32,
    "emb_dim": 32,
    "embedding_size": 32,
    "embedding_dim": 32,
    "word_embed_proj_dim": 32,
    # depth
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_layers": 2,
    "num_hidden_groups": 1,
    "depth": 2,
    # attention
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "d_head": 8,
    "d_kv": 8,
    "dim_head": 8,
    "attention_head_dim": 8,
    "rotary_dim": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "sliding_window": 16,
    "attention_window": 16,
    "global_head_dim": 8,
    "num_global_key_value_heads": 2,
    # feed forward
    "intermediate_size": 48,
    "ffn_hidden_size": 48,
    "n_inner": 48,
    "d_inner": 48,
    "ffn_dim": 48,
    "dim_ff": 48,
    "dff": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "mlp_hidden_size": 48,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "dense_intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "expert_ffn_hidden_size": 32,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    "index_n_heads": 4,
    "index_head_dim": 8,
    "index_topk": 64,
    # recurrent
    "state_size": 8,
    "conv_kernel": 4,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_expand": 2,
    "mamba_dt_rank": 4,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "mamba_headdim": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_chunk_size": 8,
    "n_mamba_heads": 2,
    "n_groups": 1,
    "chunk_size": 8,
    "time_step_rank": 4,
    "lru_width": 32,
    "attention_hidden_size": 32,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_conv_kernel_dim": 4,
    # other modalities
    "image_size": 16,
    "patch_size": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "type_vocab_size": 2,
    # no randomness
    "attention_dropout": 0.0,
}  # fmt: skip

#: Type -> entries that differ from ``SMALL``.
OWN: dict[str, dict[str, Any]] = {
    **{kind: {"num_key_value_heads": 4} for kind in (
        "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash",
        "minicpm3", "sarvam_mla", "youtu", "dots3_note", "dots3_note_text",
    )},
    **{kind: {"layer_types": ["linear_attention", "full_attention"]} for kind in (
        "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text",
    )},
    **{kind: {"layer_types": ["linear_attention", "full_attention"], "num_key_value_heads": 4} for kind in (
        "kimi_linear", "bailing_hybrid",
    )},
    **{kind: {"text_config": {"layer_types": ["linear_attention", "full_attention"]}} for kind in (
        "qwen3_5", "qwen3_5_moe", "qwen4_exp",
    )},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "zamba": {"layer_types": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {"layer_types": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "sliding_attention"]},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "zaya": {"num_experts_per_tok": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "attention_head_size": 8},
    "xlstm": {"num_heads": 4},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}  # fmt: skip


def kinds() -> dict[str, str]:
    """Model type -> class of its causal language model, for all types that transformers maps."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(kind: str, **own: Any) -> Any:
    """A random model of a type, in eval mode; deterministic. ``own`` has further entries of its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = small(type(AutoConfig.for_model(kind)), OWN.get(kind, {}) | own)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(torch.float32).eval()
    spread(model)
    return model


def small(kind: Any, own: dict[str, Any]) -> Any:
    """A configuration of class ``kind`` with small sizes, also in nested configurations."""
    known = set(inspect.signature(kind.__init__).parameters)
    if dataclasses.is_dataclass(kind):
        known |= {field.name for field in dataclasses.fields(kind)}
    entries = {key: value for key, value in SMALL.items() if key in known or key in kind.attribute_map}
    entries.update(
        {key: value for key, value in own.items() if not isinstance(value, dict) or key not in kind.sub_configs}
    )
    for key, nested in (kind.sub_configs or {}).items():
        if isinstance(nested, type) and nested.__name__ != "AutoConfig":
            entries[key] = small(nested, own.get(key, {})).to_dict()
    return kind(**entries)


def spread(model: Any) -> None:
    """Adds noise to parameters that are constant in a random model: biases, gains, learned scales."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() and float(parameter.std(unbiased=False)) == 0:
                noise = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.add_(noise.to(parameter))
