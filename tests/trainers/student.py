"""A tiny student for checks with real trainers, and the reward that ``ACQSYNTH_REWARD`` names."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from acqsynth.domains.arithmetic import Arithmetic
from acqsynth.rewards import ComposedReward, acquisition_signals

TEXTS = [
    "<question>add 47 5</question><answer>52</answer>",
    "<question>double 321</question><answer>642</answer>",
    "<question>add 47 5</question>",
    "<question>copy 123</question><answer>123</answer>",
]


def make(folder: Path) -> None:
    """Saves a random Llama of two blocks with a byte-level tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|pad|>", "<|eos|>", *alphabet]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|eos|>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes))
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def build() -> ComposedReward:
    """The entropy of the student named in the environment, gated by the domain's format."""
    domain = Arithmetic()
    return ComposedReward(domain, acquisition_signals(os.environ["ACQSYNTH_STUDENT"], ("entropy",), domain))
