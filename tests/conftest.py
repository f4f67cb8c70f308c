"""Fixtures shared by the tests.

With TRITON_INTERPRET=1 (Triton decides that once for a process) the backend ``triton`` runs on the CPU, and only the
tests that involve it run: those that name it, as those of every ``implementation`` do, and those in ``tests/kernels``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import acqcore
from acqcore.acquisitions import REGISTRY
from acqcore.backends.triton import INTERPRETED


def _implementations() -> list[str]:
    """Every backend present; the cpu backend once for each instruction set this processor has."""
    from acqcore import _core

    names = [f"cpu/{isa}" for isa, missing in _core.isas() if not missing]
    return names + [row.name for row in acqcore.backends() if row.available and row.name != "cpu"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not INTERPRETED:
        return
    others = [item for item in items if "triton" not in item.nodeid and "tests/kernels/" not in item.nodeid]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


@pytest.fixture(params=_implementations())
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend's name, its instruction set forced."""
    name, _, isa = request.param.partition("/")
    if isa:
        monkeypatch.setenv("ACQCORE_ISA", isa)
    return name


SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "What is 2 + 3? The answer is 5.",
    "A patient has fever and a cough; which drug helps?",
    "def add(a, b): return a + b",
    "Ünïcode — naïve café, 日本語, 🙂!",
]

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE tokenizer of at most 320 tokens with a chat template; it adds no special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES * 5, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|eos|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """``tiny_model(kind, **config)``: a random language model, 320 tokens, 64 positions, in eval mode."""
    import transformers

    sizes = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,  # logits with a spread, so that caps and scales show
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    own: dict[str, dict[str, Any]] = {
        "Llama": {"tie_word_embeddings": False},
        "Qwen2": {"tie_word_embeddings": True},
        "Qwen3": {},
        "Gemma2": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0, "sliding_window": 8},
        "Gemma3": {"sliding_window": 8, "final_logit_softcapping": 1.5},
        "GPT2": {key: sizes[key] for key in ("vocab_size", "initializer_range")} | gpt2,
        "Cohere": {"logit_scale": 0.25},
        "Granite": {"logits_scaling": 3.0},
        "Phi": {"partial_rotary_factor": 0.5},  # its head has a bias
    }

    def build(kind: str, **config: Any) -> Any:
        suffix = "Text" if kind == "Gemma3" else ""
        settings = own[kind] if kind == "GPT2" else sizes | own[kind]
        if kind in ("Gemma2", "Gemma3"):
            settings = settings | {"num_hidden_layers": 7 if kind == "Gemma3" else 2}  # both kinds of layer
        torch.manual_seed(0)
        name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
        model = getattr(transformers, name)(getattr(transformers, f"{kind}{suffix}Config")(**(settings | config)))
        bias = getattr(model.get_output_embeddings(), "bias", None)
        if bias is not None:
            torch.nn.init.normal_(bias)
        return model.eval()

    return build


@pytest.fixture
def brute_force() -> Callable[..., dict[str, torch.Tensor]]:
    """``brute_force(model, ids, scored)``: per-token references of each acquisition, from the model's logits.

    One sample, full logits, no padding; ``ids [T]``, ``scored [T]`` bool. Name -> ``[scored tokens]``.
    """

    def run(model: Any, ids: torch.Tensor, scored: torch.Tensor) -> dict[str, torch.Tensor]:
        seen: list[torch.Tensor] = []
        hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].float()
        hook.remove()
        before = scored.nonzero()[:, 0] - 1
        z, hidden, targets = logits[before], seen[0][0, before].float(), ids[scored]
        names = [name for name, entry in REGISTRY.items() if entry.per_token is not None]
        modules = {name: importlib.import_module(f"acqcore.acquisitions.{name}") for name in names}
        return {name: module.reference(z, targets, hidden) for name, module in modules.items()}

    return run
