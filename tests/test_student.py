"""The student found in a model gives the model's own logits and leaves the model unchanged."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch.nn.utils import prune

import acqcore
from acqcore.students.student import as_student

KINDS = ["Llama", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "GPT2", "Cohere", "Granite", "Phi"]
IDS = torch.arange(22).view(2, 11) * 13 % 320


def student_logits(student: acqcore.Student) -> torch.Tensor:
    with student.scoring():
        hidden = student.hidden(IDS)
        return student.head.logits(hidden.flatten(0, 1)).view(2, 11, -1)


def assert_own_logits(model: Any, student: acqcore.Student | None = None) -> None:
    student = student or acqcore.Student.from_model(model)
    with torch.no_grad():
        own = model(input_ids=IDS).logits
    assert own.std() > 0.1, "logits without a spread tell nothing"
    torch.testing.assert_close(student_logits(student), own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_trunk_and_head_give_the_models_own_logits(kind, tiny_model):
    model = tiny_model(kind)
    student = acqcore.Student.from_model(model)
    assert_own_logits(model, student)
    assert student.max_length == 64
    assert student.device == torch.device("cpu")


DECODER = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "is_decoder": True}


@pytest.mark.parametrize(
    ("kind", "limit", "config"),
    [
        ("Roberta", 22, DECODER | {"max_position_embeddings": 24, "pad_token_id": 1}),
        ("Data2VecText", 19, DECODER | {"max_position_embeddings": 24, "pad_token_id": 4}),
        ("OPT", 24, {"num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 8, "max_position_embeddings": 24}),
        ("Bart", 24, {"decoder_layers": 1, "decoder_attention_heads": 2, "max_position_embeddings": 24}),
        ("Mpt", 24, {"n_layers": 1, "n_heads": 2, "max_seq_len": 24}),
        ("Whisper", 24, {"decoder_layers": 1, "decoder_attention_heads": 2, "max_target_positions": 24}),
        ("Bloom", None, {"n_layer": 1, "n_head": 2}),
    ],
)
def test_the_limit_is_the_models_own(kind, limit, config):
    transformers = pytest.importorskip("transformers")
    width = {"d_model": 32, "hidden_size": 32, "word_embed_proj_dim": 32}
    special = {"pad_token_id": 0, "decoder_start_token_id": 1} | config
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(vocab_size=96, **width, **special)
    )
    assert acqcore.Student.from_model(model).max_length == limit
    lengths = torch.tensor([limit or 30, 20, 5])
    samples = {
        "input_ids": torch.randint(5, 96, (3, limit or 30)),
        "attention_mask": (torch.arange(limit or 30) < lengths[:, None]).long(),
    }
    assert acqcore.score(model, samples, "loss").valid.all()
    if limit is not None:
        samples["input_ids"] = torch.randint(5, 96, (1, limit + 1))
        del samples["attention_mask"]
        assert acqcore.score(model, samples, "loss", max_length=limit).valid.all()
        with pytest.raises(ValueError, match=f"the student takes at most {limit}"):
            acqcore.score(model, samples, "loss")


def test_the_head_is_what_the_configuration_says(tiny_model):
    def head(kind, **config):
        return acqcore.Student.from_model(tiny_model(kind, **config)).head

    assert head("Gemma2").softcap == 2.0
    assert head("Cohere").scale == 0.25
    assert head("Granite").scale == pytest.approx(1 / 3)
    assert head("Phi").bias is not None
    assert head("Llama").bias is None


def test_a_model_that_names_no_input_embedding(tiny_model, monkeypatch):
    model = tiny_model("Llama")
    model.extra = torch.nn.ModuleDict({"position_embeddings": torch.nn.Module()})
    model.extra["position_embeddings"].padding_idx = 0
    monkeypatch.setattr(model, "get_input_embeddings", Mock(side_effect=NotImplementedError))
    monkeypatch.setattr(model, "get_output_embeddings", lambda: model.lm_head)
    assert acqcore.Student.from_model(model).max_length == model.config.max_position_embeddings


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads_share_the_models_memory(tied, tiny_model):
    model = tiny_model("Qwen3", tie_word_embeddings=tied)
    assert_own_logits(model)
    weight = acqcore.Student.from_model(model).head.weight
    assert weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert (weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()) == tied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes_the_probe(dtype, tiny_model):
    student = acqcore.Student.from_model(tiny_model("Gemma2").to(dtype))
    assert student.head.weight.dtype == dtype


def test_a_student_follows_its_model_in_training(tiny_model):
    model = tiny_model("Llama")
    student = acqcore.Student.from_model(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert_own_logits(model, student)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda student: pickle.loads(pickle.dumps(student))])
@pytest.mark.parametrize("explicit", [False, True])
def test_copies(how, explicit, tiny_model, tokenizer):
    """A deep copy does not follow the model, and nothing of it runs the model."""
    model = tiny_model("GPT2", resid_pdrop=0.3)
    student = acqcore.Student.from_model(model, tokenizer=tokenizer)
    if explicit:
        student = acqcore.Student(model.transformer, acqcore.Head(model.lm_head.weight), tokenizer=tokenizer)
    student.max_length = 32

    def values(student):
        own = {"mutual_information": {"layers": "own"}}
        scores = acqcore.score(student, ["a lazy dog"], ["entropy", *own], acquisition_args=own)
        return [*scores.values(), acqcore.grad_norm(student, ["a lazy dog"], 1)]

    expected = values(student)
    found = how(student)
    assert found.max_length == 32
    if how is not copy.copy:
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
            model.transformer.h[1].mlp.c_fc.weight.mul_(1.5)
    torch.testing.assert_close(values(found), expected)


@pytest.mark.parametrize("part", ["trunk", "vocabulary"])
def test_a_student_follows_new_parts_of_its_model(part, tiny_model, exact):
    model, samples = tiny_model("Qwen2"), {"input_ids": IDS % 40, "attention_mask": torch.ones_like(IDS)}
    student = acqcore.Student.from_model(model)
    if part == "trunk":
        model.model = tiny_model("Qwen2", num_hidden_layers=1).model
        model.tie_weights()
    else:
        model.resize_token_embeddings(40)
    expected = exact(model, samples, list(model.parameters())).norm(dim=1)
    torch.testing.assert_close(acqcore.grad_norm(student, samples, "all").double(), expected, rtol=1e-4, atol=0)


def test_a_pruned_head_follows_its_training(tiny_model):
    """Pruning multiplies weight and mask only when the head is called."""
    model = tiny_model("Llama")
    prune.l1_unstructured(model.lm_head, "weight", 0.3)
    student = acqcore.Student.from_model(model)
    model.lm_head.weight_orig.data.mul_(1.3)
    torch.testing.assert_close(student.head.weight, model.lm_head.weight_orig * model.lm_head.weight_mask)


def _on_logits(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    return lambda model: model.register_forward_hook(
        lambda _, args, output: setattr(output, "logits", change(output.logits))
    )


def _leak(_: Any, args: Any, output: Any) -> None:
    output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(1, keepdim=True)


CHANGED = "LlamaForCausalLM changes the logits of its output embedding by more than a scale"
#: Name -> change to a model, message with which it is then refused.
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "logits of other tokens": (_on_logits(lambda z: z.cumsum(1)), CHANGED),
    "a bias of the logits": (_on_logits(lambda z: z + torch.arange(320)), CHANGED),
    "no logits": (
        lambda model: model.register_forward_hook(lambda _, args, output: output.to_tuple()),
        "model: expected LlamaForCausalLM to return an object with logits",
    ),
    "logits of another shape": (_on_logits(lambda z: z[..., 1:]), CHANGED),
    "more than tokens": (
        lambda model: model.model.register_forward_pre_hook(lambda *_: {}["images"]),
        "model: LlamaForCausalLM does not run on token ids alone: KeyError: 'images'",
    ),
    "no weights": (lambda model: model.to("meta"), "model: LlamaForCausalLM has no weights, all parameters are on the"),
    "later tokens": (lambda model: model.model.register_forward_hook(_leak), "a token sees later tokens"),
}


class Slots:
    """A callable without weak references."""

    __slots__ = ("function",)

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)


@dataclass
class Unhashable:
    function: Callable[..., Any]

    def __call__(self, *args):
        return self.function(*args)


class TestVerification:
    def test_changes_between_two_calls(self, tiny_model):
        model = tiny_model("Gemma2")
        assert_own_logits(model)
        kept = acqcore.Student.from_model(model)
        for cap in (None, 1.0, 2.0):
            model.config.final_logit_softcapping = cap
            assert_own_logits(model)
            assert acqcore.Student.from_model(model).head.softcap == kept.head.softcap == cap
        model.resize_token_embeddings(300)
        assert acqcore.Student.from_model(model).head.vocab_size == kept.head.vocab_size == 300
        hook = _on_logits(lambda z: z.cumsum(1))(model)
        for student in (model, kept):
            with pytest.raises(ValueError, match="changes the logits"):
                acqcore.score(student, {"input_ids": torch.arange(5)[None]})
        hook.remove()
        assert acqcore.Student.from_model(model).head.softcap == kept.head.softcap == 2.0

    def test_a_learned_scale_and_bias_of_the_logits(self, tiny_model):
        model = tiny_model("Llama")
        model.logit_gain = torch.nn.Parameter(torch.tensor(1.0))
        _on_logits(lambda z: z * model.logit_gain)(model)
        assert_own_logits(model)
        kept = acqcore.Student.from_model(model)
        model.logit_gain.data.fill_(2.0)
        assert acqcore.Student.from_model(model).head.scale == kept.head.scale == pytest.approx(2.0)
        model.logit_bias = torch.nn.Parameter(torch.zeros(320))
        _on_logits(lambda z: z + model.logit_bias)(model)
        assert_own_logits(model, kept)
        model.logit_bias.data.normal_()
        with pytest.raises(ValueError, match="changes the logits"):
            kept.head  # noqa: B018

    @pytest.mark.parametrize("kind", ["slots", "unhashable"])
    def test_any_callable_may_replace_a_forward(self, kind, tiny_model):
        model = tiny_model("Llama")
        ids = torch.arange(5, 17)[None]
        expected = acqcore.score(model, {"input_ids": ids}, "loss")["loss"]
        for layer in (model.lm_head, model.model.layers[0].mlp.down_proj):
            layer.forward = (Slots if kind == "slots" else Unhashable)(layer.forward)
        assert torch.equal(acqcore.score(model, {"input_ids": ids}, "loss")["loss"], expected)
        assert acqcore.grad_norm(model, {"input_ids": ids}, "all").isfinite().all()

    @pytest.mark.parametrize("name", REFUSED)
    def test_what_trunk_and_head_would_not_reproduce_is_refused(self, name, tiny_model):
        model, (change, message) = tiny_model("Llama"), REFUSED[name]
        change(model)
        with pytest.raises(ValueError, match=message):
            acqcore.Student.from_model(model)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("how", ["forward", "class", "number", "parameter", "hook"])
    def test_a_head_that_is_not_what_its_weight_says_is_refused(self, how, dtype, tiny_model):
        """A deviation of 3 % is refused, although logits in half precision may differ by more."""

        class Scaled(torch.nn.Linear):
            factor = 1.03

            def forward(self, hidden):
                return super().forward(hidden) * getattr(self, "learned", self.factor)

        model = tiny_model("Llama").to(dtype)
        if how in ("number", "parameter"):
            model.lm_head.__class__, model.lm_head.factor = Scaled, 1.0
        if how == "parameter":  # Dory learns a factor for each token
            model.lm_head.learned = torch.nn.Parameter(torch.ones(320, dtype=dtype))
        acqcore.Student.from_model(model)
        own = model.lm_head.forward
        if how == "forward":
            model.lm_head.forward = lambda hidden: own(hidden) * 1.03
        elif how == "class":
            model.lm_head.__class__ = Scaled
        elif how == "number":
            model.lm_head.factor = 1.03
        elif how == "parameter":
            model.lm_head.learned.data.fill_(1.03)
        else:
            model.lm_head.register_forward_hook(lambda _, args, output: output * 1.03)
        with pytest.raises(
            ValueError, match="output embedding of LlamaForCausalLM differs from the product with its weight"
        ):
            acqcore.Student.from_model(model)
        acqcore.Student.from_model(model, verify=False)

    @pytest.mark.parametrize("masked", [-math.inf, -1e30])
    def test_a_bias_that_masks_tokens(self, masked, tiny_model):
        """It neither fails the comparison nor widens its tolerance."""
        model, ids = tiny_model("Llama"), torch.arange(5, 17)[None]
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(320).index_fill(0, torch.arange(4), masked))
        model.lm_head.register_forward_hook(lambda *_: None)
        logits = model(input_ids=ids).logits[0, :-1].double()
        found = acqcore.score(model, {"input_ids": ids}, ["loss", "entropy"])
        expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
        torch.testing.assert_close(found["loss"][0].double(), expected, rtol=1e-5, atol=0)
        entropy = torch.distributions.Categorical(logits=logits[:, 4:]).entropy().mean()
        torch.testing.assert_close(found["entropy"][0].double(), entropy, rtol=1e-5, atol=0)
        hook = model.lm_head.register_forward_hook(lambda _, args, output: output + args[0][..., :1])
        with pytest.raises(ValueError, match="output embedding of LlamaForCausalLM differs from the product"):
            acqcore.Student.from_model(model)
        hook.remove()

        def shift(_, args, kwargs, output):  # of tokens that the search for scale and softcap does not use
            output.logits = output.logits + (kwargs["input_ids"] > 9)[..., None]

        model.register_forward_hook(shift, with_kwargs=True)
        with pytest.raises(ValueError, match="differ from those of its trunk and head by 1 "):
            acqcore.Student.from_model(model)

    def test_hooks_that_only_look_are_allowed(self, tiny_model):
        model, seen = tiny_model("Llama").to(torch.bfloat16), []
        model.lm_head.register_forward_hook(lambda _, args, output: seen.append(output.shape))
        acqcore.Student.from_model(model)
        assert seen

    def test_prompts_of_several_tasks_are_refused(self, tiny_model):
        peft = pytest.importorskip("peft")
        config = peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2)
        with pytest.raises(ValueError, match="does not run on token ids alone: ValueError: task_ids"):
            acqcore.Student.from_model(peft.get_peft_model(tiny_model("Llama"), config))

    @pytest.mark.parametrize("prefix", ["model", "none"])
    def test_a_model_in_training_is_probed_once(self, prefix, tiny_model):
        model = tiny_model("Llama")
        model.base_model_prefix = prefix
        calls: list[int] = []
        model.register_forward_hook(lambda *_: calls.append(1))
        acqcore.Student.from_model(model)
        probed = len(calls)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        acqcore.Student.from_model(model)
        assert len(calls) == probed


class TestPeft:
    @pytest.fixture
    def adapted(self, tiny_model):
        """``adapted(kind, **LoraConfig)``: a model with non-zero adapters."""
        peft = pytest.importorskip("peft")

        def build(kind="Llama", **config):
            model = peft.get_peft_model(tiny_model(kind), peft.LoraConfig(r=4, **config))
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.5)
            return model.eval()

        return build

    def test_lora_on_the_trunk(self, adapted):
        assert_own_logits(adapted(target_modules=["q_proj", "down_proj"]))

    @pytest.mark.parametrize("lora_bias", [False, True])
    def test_lora_on_the_head(self, lora_bias, adapted):
        model = adapted("Phi", target_modules=["q_proj", "lm_head"], lora_bias=lora_bias)
        assert_own_logits(model)
        student = acqcore.Student.from_model(model)
        assert not torch.equal(student.head.weight, model.get_base_model().lm_head.base_layer.weight)

    def test_lora_with_a_bias_on_a_head_without_one(self, adapted):
        model = adapted("Llama", target_modules=["lm_head"], lora_bias=True)
        torch.nn.init.normal_(model.base_model.model.lm_head.lora_B["default"].bias)
        assert_own_logits(model)

    def test_several_disabled_and_merged_adapters(self, adapted):
        peft = pytest.importorskip("peft")
        model = adapted(target_modules=["q_proj", "lm_head"])
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"]))
        torch.nn.init.normal_(model.base_model.model.lm_head.lora_B["second"].weight)
        student = acqcore.Student.from_model(model)
        seen = []
        for active in (["default"], ["second"], ["default", "second"]):
            model.base_model.set_adapter(active)
            assert_own_logits(model, student)
            seen.append(student_logits(student))
        with model.disable_adapter():
            assert_own_logits(model, student)
            seen.append(student_logits(student))
        assert not any(torch.allclose(a, b, atol=1e-2) for i, a in enumerate(seen) for b in seen[:i])
        model.merge_adapter()
        assert_own_logits(model, student)
        torch.testing.assert_close(student_logits(student), seen[2], rtol=1e-4, atol=1e-4)

    def test_lora_on_a_half_precision_head_is_summed_in_float32(self, adapted):
        model = adapted(target_modules=["lm_head"]).to(torch.bfloat16)
        assert acqcore.Student.from_model(model).head.weight.dtype == torch.float32

    def test_modules_to_save(self, adapted):
        model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
        head = model.base_model.model.lm_head.modules_to_save["default"]
        torch.nn.init.normal_(head.weight)
        student = acqcore.Student.from_model(model)
        assert_own_logits(model, student)
        assert student.head.weight.data_ptr() == head.weight.data_ptr()
        with model.disable_adapter():
            assert_own_logits(model, student)

    def test_trainable_tokens_of_a_tied_head(self, tiny_model):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5], task_type="CAUSAL_LM")
        model = peft.get_peft_model(tiny_model("Llama", tie_word_embeddings=True), config)
        student = acqcore.Student.from_model(model)
        delta = model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
        torch.nn.init.normal_(delta)
        assert_own_logits(model, student)
        torch.testing.assert_close(student.head.weight[[3, 5]], delta.detach())
        with pytest.raises(ValueError, match=r"trainable_tokens_delta.*the head's weight is computed from it"):
            acqcore.grad_norm(student, {"input_ids": torch.arange(8)[None]}, "trainable")
        with model.disable_adapter():
            assert_own_logits(model, student)
        model.merge_adapter()
        assert_own_logits(model, student)

    def test_a_head_adapter_of_another_kind_is_refused(self, adapted):
        with pytest.raises(ValueError, match=r"LoRA variant \(Dora.*merge it first"):
            acqcore.Student.from_model(adapted(target_modules=["lm_head"], use_dora=True))
        merged = adapted(target_modules=["lm_head"])
        student = acqcore.Student.from_model(merged)
        merged.merge_adapter()
        with merged.disable_adapter(), pytest.raises(ValueError, match="both merged and disabled"):
            student.head  # noqa: B018

    def test_an_adapter_that_is_no_lora_is_refused(self, tiny_model):
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(tiny_model("Llama"), peft.LoHaConfig(target_modules=["lm_head"]))
        with pytest.raises(ValueError, match="expected LoRA or modules_to_save"):
            acqcore.Student.from_model(model)


class TestScoringMode:
    def test_training_flags_come_back_one_by_one(self, tiny_model):
        model = tiny_model("Llama").train()
        model.model.layers[1].mlp.eval()
        model.model.norm.weight.requires_grad_(False)
        flags = [module.training for module in model.modules()]
        grads = [parameter.requires_grad for parameter in model.parameters()]
        student = acqcore.Student.from_model(model)
        seen: list[bool] = []

        def fail_inside():
            with student.scoring():
                seen.extend([torch.is_grad_enabled(), *(module.training for module in model.modules())])
                raise KeyError

        with pytest.raises(KeyError):
            fail_inside()
        assert not any(seen)
        assert torch.is_grad_enabled()
        assert [module.training for module in model.modules()] == flags
        assert [parameter.requires_grad for parameter in model.parameters()] == grads

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("loss", None),
            ("grad_norm", {"parameters": "trainable"}),
            ("mutual_information", {"layers": 1, "probes": 1}),
            ("predictive_entropy", {"layers": 1, "draws": 2}),
            ("predictive_entropy", "members"),
        ],
    )
    def test_threads_take_turns(self, name, arguments, tiny_model):
        def calls():
            models = [tiny_model("GPT2", attn_pdrop=0.5).train(), tiny_model("Llama").train()]
            members = [models[::-1], models]  # a thread may hold a model that another waits for
            given = [{"members": m} if arguments == "members" else arguments for m in members]
            run = lambda i: acqcore.score(  # noqa: E731
                models[i], {"input_ids": IDS}, name, batch_tokens=11, progress=False,
                acquisition_args=None if given[i] is None else {name: given[i]},
            )[name]  # fmt: skip
            return models, run

        expected = [calls()[1](i) for i in (0, 1)]
        models, run = calls()
        flags = [module.training for model in models for module in model.modules()]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            with ThreadPoolExecutor(3) as pool:
                found = [(i, pool.submit(run, i)) for i in (0, 1, 0) * 4]
                for i, future in found:
                    torch.testing.assert_close(future.result(timeout=60), expected[i], rtol=1e-4, atol=1e-6)
        finally:
            sys.setswitchinterval(interval)
        assert [module.training for model in models for module in model.modules()] == flags
        assert not any("forward" in vars(module) for model in models for module in model.modules())
        assert all(parameter.requires_grad for model in models for parameter in model.parameters())


class TestWrappers:
    def test_data_parallel_and_compiled(self, tiny_model):
        model = tiny_model("Llama")
        for wrapped in (torch.nn.DataParallel(model), torch.compile(model)):
            student = acqcore.Student.from_model(wrapped, verify=False)
            assert student.trunk is model.model
            assert student.head.weight.data_ptr() == model.lm_head.weight.data_ptr()


class TestBadInput:
    def test_not_a_student(self):
        with pytest.raises(TypeError, match=r"student: expected acqcore\.Student.*got int"):
            as_student(3)
        with pytest.raises(TypeError, match=r"model: expected.* causal language model.*got Linear"):
            acqcore.Student.from_model(torch.nn.Linear(2, 2))

    def test_a_model_without_a_head(self, tiny_model):
        with pytest.raises(TypeError, match="with an output embedding, got LlamaModel"):
            acqcore.Student.from_model(tiny_model("Llama").model)

    def test_an_encoder_decoder(self):
        from transformers import T5Config, T5ForConditionalGeneration

        config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
            acqcore.Student.from_model(T5ForConditionalGeneration(config))

    def test_explicit_parts(self):
        head = acqcore.Head(torch.zeros(5, 3))
        with pytest.raises(TypeError, match=r"trunk: expected a callable.*got int"):
            acqcore.Student(3, head)
        with pytest.raises(TypeError, match=r"head: expected acqcore\.Head, got float32 tensor of shape \[5, 3\]"):
            acqcore.Student(lambda ids: ids, torch.zeros(5, 3))
        with pytest.raises(ValueError, match="max_length: expected an int >= 1, got 0"):
            acqcore.Student(lambda ids: ids, head, max_length=0)

    def test_a_trunk_that_gives_something_else(self):
        head = acqcore.Head(torch.zeros(5, 3))
        ids = torch.zeros(2, 4, dtype=torch.int64)
        with pytest.raises(TypeError, match=r"trunk: expected it to return a tensor.*got str"):
            acqcore.Student(lambda ids: "no", head).hidden(ids)
        with pytest.raises(ValueError, match=r"trunk: expected hidden states \[B, T, D\].*\[4, 3\]"):
            acqcore.Student(lambda ids: torch.zeros(4, 3), head).hidden(ids)


def test_explicit_trunks_give_a_tensor_or_an_object():
    head = acqcore.Head(torch.zeros(5, 3))
    ids = torch.zeros(2, 4, dtype=torch.int64)
    hidden = torch.rand(2, 4, 3)
    assert acqcore.Student(lambda ids: hidden, head).hidden(ids) is hidden
    output = SimpleNamespace(last_hidden_state=hidden)
    assert acqcore.Student(lambda ids: output, head).hidden(ids) is hidden
