"""Blocks and branches are found from a forward pass, and heads from the model's output for known logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import acqcore
from acqcore.students.heads import KNOWN_LOGITS, LogitMap


def named_branches(model: Any) -> list[list[str]]:
    """Names of each block's branches, relative to the block."""
    student = acqcore.Student.from_model(model)
    found = []
    for block, branches in zip(student.blocks, student.branches, strict=True):
        names = {module: name for name, module in block.named_modules()}
        found.append([names[branch] for branch in branches])
    return found


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Attention and MLP add the residual stream to their own output.
        ("bloom", ["self_attention.dense", "mlp.dense_4h_to_h"]),
        ("mpt", ["attn", "ffn.down_proj"]),
        # The block owns both matrices of the MLP; the first comes before the activation.
        ("xglm", ["self_attn", "fc2"]),
        ("opt", ["self_attn", "fc2"]),
        ("biogpt", ["self_attn", "fc2"]),
        # Each sum is followed by a norm, in a separate module.
        ("bert", ["attention.output.dense", "output.dense"]),
        ("gpt2", ["attn", "mlp"]),
        ("falcon", ["self_attention", "mlp"]),
        ("jetmoe", ["self_attention", "mlp"]),  # which it creates in the other order
    ],
)
def test_branches_are_what_a_block_adds_to_the_stream(kind, expected, small_model):
    model = small_model(kind)
    assert named_branches(model) == [expected, expected]
    # With all branches at zero, a pre-norm block returns its input.
    student, seen = acqcore.Student.from_model(model), []

    def zero(_, args, output):
        return torch.zeros_like(output) if torch.is_tensor(output) else (torch.zeros_like(output[0]), *output[1:])

    for branches in student.branches:
        for branch in branches:
            branch.register_forward_hook(zero)
    student.blocks[0].register_forward_hook(lambda _, args, output: seen.extend([args, output]))
    with torch.no_grad():
        model(input_ids=torch.arange(8)[None])
    given, output = seen[0][0], seen[1] if torch.is_tensor(seen[1]) else seen[1][0]
    assert torch.equal(given, output) == (kind != "bert")


def test_branches_beside_a_massive_entry_in_half_precision(small_model):
    """One channel of the stream is ten thousand times as large as a branch's contribution to the others."""
    model = small_model("gpt2")
    model.transformer.wte.weight.data[:, 3] = 3e3
    assert named_branches(model.bfloat16()) == [["attn", "mlp"]] * 2


def test_a_module_without_outputs_is_no_branch():
    """As the projection of Gemma 3n's per-layer embeddings if their width is 0."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(16, 16)
            self.none = nn.Linear(16, 16)
            self.none.weight, self.none.bias = nn.Parameter(torch.zeros(0, 16)), nn.Parameter(torch.zeros(0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.cat([self.none(x), self.proj(x)], -1)

    trunk = nn.Sequential(nn.Embedding(32, 16), nn.ModuleList([Block(), Block()]))
    trunk.forward = lambda ids: trunk[1][1](trunk[1][0](trunk[0](ids)))
    student = acqcore.Student(trunk, acqcore.Head(torch.randn(32, 16)))
    assert student.branches == [[block.proj] for block in trunk[1]]


def test_a_sum_that_is_no_modules_output_is_refused():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.mixing = nn.Linear(16, 16), nn.Parameter(torch.ones(8, 8).tril() / 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.proj(x) + self.mixing[: x.shape[1], : x.shape[1]] @ x

    trunk = nn.Sequential(nn.Embedding(320, 16), nn.Sequential(Block(), Block()))
    student = acqcore.Student(trunk, acqcore.Head(torch.randn(320, 16)))
    with pytest.raises(ValueError, match=r"layers: .* adds something to the residual stream that is no"):
        acqcore.score(student, {"input_ids": torch.arange(6)[None]}, "mutual_information")


@pytest.mark.parametrize("kind", ["llava", "gemma3", "qwen2_vl"])
def test_blocks_of_a_vision_language_student_are_those_that_text_visits(kind, exact):
    t = pytest.importorskip("transformers")
    text = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    clip = vision | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    if kind == "llava":
        config = t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(**clip), text_config=t.LlamaConfig(**text), image_token_index=319
        )
        model = t.LlavaForConditionalGeneration(config).eval()
    elif kind == "gemma3":
        config = t.Gemma3Config(
            text_config={**text, "head_dim": 8}, vision_config=clip, mm_tokens_per_image=4, image_token_index=319
        )
        model = t.Gemma3ForConditionalGeneration(config).eval()
    else:
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        vision = {"depth": 4, "embed_dim": 32, "hidden_size": 32, "num_heads": 4}
        special = {"image_token_id": 316, "video_token_id": 317, "vision_start_token_id": 318}
        config = t.Qwen2VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision, **special)
        model = t.Qwen2VLForConditionalGeneration(config).eval()
    blocks = list(model.model.language_model.layers)
    assert acqcore.Student.from_model(model).blocks == blocks
    ids = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(0))
    samples = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = exact(model, samples, list(blocks[-1].parameters())).norm(dim=1)
    torch.testing.assert_close(acqcore.grad_norm(model, samples, 1).double(), expected, rtol=1e-3, atol=0)
    assert float(acqcore.score(model, samples, "mutual_information")["mutual_information"].min()) > 0


def test_blocks_are_no_longer_list_of_something_else():
    """A longer list of norms, experts inside a block and a tower that never runs are not taken for blocks."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(5)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + sum(expert(x) for expert in self.experts)

    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(320, 16)
            self.tower = nn.ModuleList([Block() for _ in range(6)])
            self.norms = nn.ModuleList([nn.LayerNorm(16) for _ in range(7)])
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embedding(input_ids)
            for block, norm in zip(self.blocks, self.norms, strict=False):
                x = norm(block(x))
            return x

    trunk = Trunk()
    assert acqcore.Student(trunk, acqcore.Head(torch.randn(320, 16))).blocks == list(trunk.blocks)


class TestLogitMap:
    @pytest.mark.parametrize("scale", [1.0, 1 / 3, 0.0625, 4.5])
    @pytest.mark.parametrize("softcap", [None, 30.0, 2.0, 0.7])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_is_read_off_known_logits(self, scale, softcap, dtype):
        z = torch.tensor(KNOWN_LOGITS, dtype=dtype) * scale
        found = LogitMap.fitted(z if softcap is None else softcap * torch.tanh(z / softcap))
        assert found.scale == pytest.approx(scale, rel=1e-6)
        assert found.softcap == (softcap if softcap is None else pytest.approx(softcap, rel=1e-5))

    @pytest.mark.parametrize(
        "other",
        [lambda z: z + 1, lambda z: -z, lambda z: z.relu(), lambda z: z * 0, lambda z: z.sign() * z.abs().sqrt()],
    )
    def test_anything_else_is_none(self, other):
        assert LogitMap.fitted(other(torch.tensor(KNOWN_LOGITS))) is None

    def test_a_cap_that_half_precision_hides(self, small_model):
        model = small_model("recurrent_gemma", logits_soft_cap=3.0).bfloat16()
        assert acqcore.Student.from_model(model).head.softcap == 3.0

    @pytest.mark.parametrize("tied", [False, True])
    def test_padding_of_the_vocabulary_is_left_out(self, tied, tiny_model, exact):
        model = tiny_model("Llama", tie_word_embeddings=tied)
        model.register_forward_hook(lambda *args: setattr(args[-1], "logits", args[-1].logits[..., :300]))
        assert acqcore.Student.from_model(model).head.vocab_size == 300
        ids = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(0))
        samples = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        expected = exact(model, samples, list(model.parameters())).norm(dim=1)
        torch.testing.assert_close(acqcore.grad_norm(model, samples, "all").double(), expected, rtol=1e-4, atol=0)


class TestWhatEntersTheOutputEmbedding:
    @pytest.mark.parametrize(
        ("kind", "own"),
        [("bert", {}), ("llama4_text", {}), ("hyperclovax", {"logits_scaling": 0.25}), ("modernbert-decoder", {})],
    )
    def test_between_trunk_and_head(self, kind, own, small_model):
        """Hidden states are the head's input, after BERT's transform and HyperCLOVAX's scale."""
        model = small_model(kind, **own)
        ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[:, :-1].log_softmax(2)
        expected = -log_p.gather(2, ids[:, 1:, None]).mean((1, 2))
        for each in (model, model.bfloat16()):
            loss = acqcore.score(each, {"input_ids": ids}, "loss")["loss"]
            torch.testing.assert_close(loss, expected, rtol=1e-4 if each.dtype == torch.float32 else 0.05, atol=1e-4)

    @pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
    def test_in_another_precision_than_the_trunks(self, kind, small_model):
        student = acqcore.Student.from_model(small_model(kind).bfloat16())
        assert student.head.weight.dtype == torch.bfloat16

    def test_virtual_tokens_are_refused(self, tiny_model):
        peft = pytest.importorskip("peft")
        config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        with pytest.raises(ValueError, match=r"gets \[1, 7, 32\] for input_ids \[1, 4\]"):
            acqcore.Student.from_model(peft.get_peft_model(tiny_model("Llama"), config))

    def test_a_quantised_head_is_refused_by_name(self, tiny_model):
        model = tiny_model("Llama", tie_word_embeddings=False)
        model.lm_head.weight = nn.Parameter(torch.zeros(320, 32, dtype=torch.int8), requires_grad=False)
        with pytest.raises(ValueError, match=r"weight of its output embedding is int8 tensor of shape \[320, 32\]"):
            acqcore.Student.from_model(model)
        model.lm_head = torch.ao.nn.quantized.dynamic.Linear(32, 320)
        with pytest.raises(ValueError, match=r"expected its output embedding to be torch.nn.Linear, got torch\.ao\."):
            acqcore.Student.from_model(model)
