"""Gradients match autograd regardless of a student's hooks and of how it calls its modules."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import acqcore
from acqcore import grad_norm
from acqcore.gradients.rules import ModuleCall

Exact = Callable[..., torch.Tensor]


def rows(*lengths: int, seed: int = 1, vocabulary: int = 320) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


def assert_norms(
    student: Any,
    model: Any,
    samples: dict[str, torch.Tensor],
    chosen: Any,
    parameters: Sequence[torch.Tensor],
    exact: Exact,
) -> None:
    """Norms in a batch and alone match one backward per sample."""
    expected = exact(model, samples, parameters).norm(dim=1)
    assert float(expected.min()) > 0
    for batch_tokens in (8192, 1):
        norms = grad_norm(student, samples, chosen, backend="eager", batch_tokens=batch_tokens)
        torch.testing.assert_close(norms.double(), expected, rtol=1e-4, atol=0)


def lora(model: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **options)).eval()


def trainable(model: Any) -> list[torch.Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class TestHooksOfOthers:
    """Tensors other than our own leaf that require a gradient neither start our backward nor take part in it."""

    @pytest.mark.parametrize("kind", ["GPT2", "Llama", "Phi"])
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("how", ["gradient_checkpointing_enable", "enable_input_require_grads"])
    def test_gradient_checkpointing(self, how, training, kind, tiny_model, exact):
        model, samples = tiny_model(kind), rows(9, 6)
        blocks = model.transformer.h if kind == "GPT2" else model.model.layers
        expected = exact(model, samples, list(blocks[-1].parameters())).norm(dim=1)
        whole = exact(model, samples, list(model.parameters())).norm(dim=1)
        getattr(model.train(training), how)()
        for chosen, norms in ((1, expected), ("all", whole)):
            found = grad_norm(model, samples, chosen, backend="eager")
            torch.testing.assert_close(found.double(), norms, rtol=1e-4, atol=0)

    def test_adapters_under_gradient_checkpointing(self, tiny_model, exact):
        model = lora(tiny_model("Llama"), target_modules="all-linear")
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
        assert_norms(model, model, rows(9, 6), "trainable", trainable(model), exact)

    @pytest.mark.parametrize("how", ["hook", "backward hook", "forward"])
    def test_changes_between_two_calls(self, how, tiny_model, exact):
        """Each exchanges something of the same kind that had no effect."""
        model, samples = tiny_model("Llama"), rows(9, 6)
        layer = model.model.layers[0].mlp.up_proj

        def change(factor):
            if how == "hook":
                return layer.register_forward_hook(lambda *args: args[-1] * factor).remove
            if how == "backward hook":
                return layer.register_full_backward_hook(lambda *args: tuple(g * factor for g in args[1])).remove
            layer.forward = lambda x: factor * torch.nn.functional.linear(x, layer.weight)
            return None

        undo = change(1)
        grad_norm(model, samples, "all", backend="eager")
        if undo is not None:
            undo()
        change(3)
        expected = exact(model, samples, list(model.parameters())).norm(dim=1)
        torch.testing.assert_close(grad_norm(model, samples, "all").double(), expected, rtol=1e-4, atol=0)

    def test_a_hook_that_acts_on_some_tokens(self, tiny_model, exact):
        """The probe's random tokens may lack them."""
        model, samples = tiny_model("Llama"), rows(9, 6)
        token = samples["input_ids"][0, 3]
        model.model.embed_tokens.register_forward_hook(
            lambda _, args, output: output * torch.where(args[0] == token, 3, 1)[..., None]
        )
        assert_norms(model, model, samples, "all", list(model.parameters()), exact)

    def test_a_hook_that_adds_a_parameter_of_its_own(self, tiny_model, exact):
        model, foreign = tiny_model("Llama"), torch.zeros(32, requires_grad=True)
        model.model.layers[0].register_forward_hook(lambda *args: args[-1] + foreign)
        assert_norms(model, model, rows(9, 6), 1, list(model.model.layers[1].parameters()), exact)
        assert foreign.grad is None

    @pytest.mark.parametrize("chosen", [1, "all", "trainable"])
    @pytest.mark.parametrize("how", ["wrapper", "inside", "function"])
    def test_blocks_that_compute_again_in_the_backward(self, how, chosen, tiny_model, exact):
        """If nothing before a block requires a gradient, the graph begins in the block, also when it is recomputed."""
        from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrapper
        from torch.utils.checkpoint import checkpoint

        model = tiny_model("Llama")
        if chosen == "trainable":
            model = lora(model, target_modules="all-linear")
        if how == "function":
            for block in acqcore.Student.from_model(model).blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        else:
            kinds = ("LlamaDecoderLayer",) if how == "wrapper" else ("LlamaMLP", "LlamaAttention")
            wrapper.apply_activation_checkpointing(model, check_fn=lambda m: type(m).__name__ in kinds)
        blocks = acqcore.Student.from_model(model).blocks
        parameters = {1: list(blocks[-1].parameters()), "all": list(model.parameters()), "trainable": trainable(model)}
        assert_norms(model, model, rows(9, 6), chosen, parameters[chosen], exact)

    @pytest.mark.parametrize("chosen", [1, "all"])
    def test_reentrant_checkpointing_is_refused(self, chosen, tiny_model):
        from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrapper

        model = tiny_model("Llama")
        reentrant = partial(wrapper.checkpoint_wrapper, checkpoint_impl=wrapper.CheckpointImpl.REENTRANT)
        wrapper.apply_activation_checkpointing(
            model, checkpoint_wrapper_fn=reentrant, check_fn=lambda m: type(m).__name__ == "LlamaDecoderLayer"
        )
        with pytest.raises(ValueError, match=r"parameters: .*use_reentrant=True"):
            grad_norm(model, rows(9, 6), chosen, backend="eager")

    def test_an_optimizer_in_the_backward_takes_no_step(self, tiny_model, exact):
        model = tiny_model("Llama")
        expected = exact(model, rows(9, 6), list(model.parameters())).norm(dim=1)
        before = [parameter.detach().clone() for parameter in model.parameters()]

        def step(parameter):
            with torch.no_grad():
                parameter -= 0.1 * parameter.grad
            parameter.grad = None

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        norms = grad_norm(model, rows(9, 6), "all", backend="eager")
        torch.testing.assert_close(norms.double(), expected, rtol=1e-4, atol=0)
        assert all(map(torch.equal, before, model.parameters()))
        model(input_ids=rows(9)["input_ids"]).logits.sum().backward()
        assert not any(map(torch.equal, before, model.parameters())), "training goes on with its hooks"

    @pytest.mark.parametrize("kind", ["Llama", "routed"])
    @pytest.mark.parametrize("how", ["accumulation", "before accumulation", "tensor", "tensor that changes it"])
    def test_hooks_that_wait_for_gradients_of_parameters(self, how, kind, tiny_model, exact, with_logits):
        """DeepSpeed and DDP hook the accumulation node; loggers and masks that zero gradients hook the tensor."""
        if kind == "Llama":
            model = student = tiny_model(kind)
        else:  # the experts' gradients come from autograd itself
            torch.manual_seed(0)
            trunk, weight = routed(1), torch.randn(320, 16)
            model, student = with_logits(trunk, weight), acqcore.Student(trunk, acqcore.Head(weight))
        trained = list(model.parameters())
        parameters = trained if kind == "Llama" else [*trained, weight]
        samples, fired, nodes = rows(9, 6), [], []
        expected = exact(model, samples, parameters).norm(dim=1)
        for parameter in trained:
            node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
            nodes.append(node)
            if how == "accumulation":
                node.register_hook(lambda *gradients: fired.append(gradients))
            elif how == "before accumulation":
                node.register_prehook(lambda gradients: fired.append(gradients))
            else:
                scale = 0 if "changes" in how else 1
                parameter.register_hook(lambda gradient, scale=scale: fired.append(gradient) or gradient * scale)
        for _ in range(2):
            norms = grad_norm(student, samples, "all", backend="eager")
            torch.testing.assert_close(norms.double(), expected, rtol=1e-4, atol=0)
        assert not fired
        model(input_ids=samples["input_ids"]).logits.sum().backward()
        assert fired, "training goes on with its hooks"

    def test_gradients_of_training_are_left_alone(self, tiny_model):
        model = tiny_model("Llama")
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 7.0)
        grad_norm(model, rows(9, 6), "all", backend="eager")
        assert all(bool((parameter.grad == 7).all()) for parameter in model.parameters())


class Adds(nn.Module):
    """Modifies its layers' outputs in place, among them a view of one sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.position = nn.Embedding(320, 16), nn.Embedding(32, 16)
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids) + self.position(torch.arange(input_ids.shape[1])[None])
        y = self.one(x)
        y += self.two(x)
        y.mul_(0.5)
        return y


class Experts(nn.Module):
    """Linear layers, each called with the tokens routed to it."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 3)
        self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.k = k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.gate(tokens).softmax(1).topk(self.k, 1)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            slot, token = torch.where(e == chosen.T)
            if len(token):
                out = out.index_add(0, token, expert(tokens[token]) * weights[token, slot, None])
        return x + out.view(x.shape)


def routed(k: int) -> nn.Module:
    return nn.Sequential(nn.Embedding(320, 16), Experts(k), Experts(k))


class TestSamplesAreToldApartByValue:
    @pytest.mark.parametrize("k", [1, 2])
    @pytest.mark.parametrize("lengths", [(2, 2), (2, 2, 2), (3, 3), (4, 2, 3)])
    def test_experts_called_with_the_tokens_routed_to_them(self, lengths, k, exact, with_logits):
        for seed in range(6):
            torch.manual_seed(seed)
            trunk, weight = routed(k), torch.randn(320, 16)
            student = acqcore.Student(trunk, acqcore.Head(weight))
            parameters = [*trunk.parameters(), weight]
            assert_norms(student, with_logits(trunk, weight), rows(*lengths, seed=seed), "all", parameters, exact)

    def test_an_expert_that_the_probe_does_not_reach(self, exact, with_logits):
        """Only token 319 reaches the expert, so its first call is on a batch of several samples."""
        torch.manual_seed(0)

        class Rare(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding, self.rare = nn.Embedding(320, 16), nn.Linear(16, 16)

            def forward(self, input_ids):
                x = self.embedding(input_ids)
                place = torch.where(input_ids.flatten() == 319)[0]
                if not len(place):
                    return x
                return x.flatten(0, 1).index_add(0, place, self.rare(x.flatten(0, 1)[place])).view(x.shape)

        trunk, weight = Rare(), torch.randn(320, 16)
        samples = rows(4, 4)
        samples["input_ids"][0, 1:3] = 319  # as many tokens as samples, all from one sample
        samples["labels"] = samples["input_ids"]
        student = acqcore.Student(trunk, acqcore.Head(weight))
        assert_norms(student, with_logits(trunk, weight), samples, "all", [*trunk.parameters(), weight], exact)

    def test_outputs_that_are_changed_in_place(self, exact, with_logits):
        trunk, weight = Adds(), torch.randn(320, 16)
        student = acqcore.Student(trunk, acqcore.Head(weight))
        parameters = [*trunk.parameters(), weight]
        for lengths in ((7,), (7, 4)):
            assert_norms(student, with_logits(trunk, weight), rows(*lengths), "all", parameters, exact)

    def test_falcon_adds_in_place(self, small_model, exact):
        model = small_model("falcon")
        for lengths in ((9,), (9, 6)):
            assert_norms(model, model, rows(*lengths, vocabulary=128), "all", list(model.parameters()), exact)


class TestAdapters:
    @pytest.mark.parametrize("length", [9, 32])
    def test_dora(self, length, tiny_model, exact):
        """DoRA uses its magnitudes without calling their layers; 32 tokens equal the width."""
        model = lora(tiny_model("Llama"), target_modules=["q_proj", "down_proj"], use_dora=True)
        assert_norms(model, model, rows(length, 6), "trainable", trainable(model), exact)

    def test_on_fused_experts(self, small_model, exact):
        model, samples = small_model("mixtral"), rows(9, 6, vocabulary=128)
        assert_norms(model, model, samples, "all", list(model.parameters()), exact)
        experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        model = lora(model, target_modules=["q_proj"], target_parameters=experts)
        assert_norms(model, model, samples, "trainable", trainable(model), exact)

    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            ("IA3", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
            ("LoHa", {"target_modules": ["q_proj"], "init_weights": False}),
            ("OFT", {"target_modules": ["q_proj"], "oft_block_size": 8}),
        ],
    )
    def test_of_other_kinds(self, kind, options, tiny_model, exact):
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(tiny_model("Llama"), getattr(peft, f"{kind}Config")(**options)).eval()
        assert_norms(model, model, rows(9, 6), "trainable", trainable(model), exact)

    def test_that_wait_for_a_token(self, tiny_model, exact):
        """aLoRA acts from its invocation tokens on; the wrapper finds them in the ids, the bare trunk does not."""
        invoked = [7, 8]
        model = lora(
            tiny_model("Llama"), target_modules=["q_proj", "down_proj"], alora_invocation_tokens=invoked,
            task_type="CAUSAL_LM",
        )  # fmt: skip
        samples = rows(9, 8)
        samples["input_ids"][:, 3:5] = torch.tensor(invoked)
        samples["labels"] = samples["input_ids"].masked_fill(samples["attention_mask"] == 0, -100)
        for i, length in enumerate((9, 8)):
            ids = samples["input_ids"][i : i + 1, :length]
            with torch.no_grad():
                expected = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:])
                off = torch.nn.functional.cross_entropy(
                    model.get_base_model()(input_ids=ids).logits[0, :-1], ids[0, 1:]
                )
            assert abs(float(expected - off)) > 1e-2
            assert float(acqcore.score(model, samples, "loss")["loss"][i]) == pytest.approx(float(expected), abs=1e-4)
        assert_norms(model, model, samples, "trainable", trainable(model), exact)

    def test_of_tokens_that_the_first_samples_lack(self, tiny_model, exact):
        """The gradient of new tokens' rows is 0 in samples without these."""
        model = lora(tiny_model("Llama"), target_modules=["q_proj"], trainable_token_indices=[319])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("trainable_tokens" in name)
        samples = rows(9, 6, 7, 8, 9, 9, vocabulary=319)
        samples["input_ids"][5, 4] = samples["labels"][5, 4] = 319
        norms = grad_norm(model, samples, "trainable", backend="eager")
        expected = exact(model, samples, trainable(model)).norm(dim=1)
        assert expected[5] > 0
        torch.testing.assert_close(norms.double(), expected, rtol=1e-4, atol=0)

    @pytest.mark.parametrize("state", ["merged", "disabled"])
    def test_that_the_forward_does_not_use_are_refused(self, state, tiny_model):
        model = lora(tiny_model("Llama"), target_modules=["q_proj"])
        if state == "merged":
            model.merge_adapter()
        else:
            model.base_model.disable_adapter_layers()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("lora" in name)
        with pytest.raises(ValueError, match=r"parameters: 'trainable': .*lora_A.* have no gradient"):
            grad_norm(model, rows(9, 6), "trainable", backend="eager")


class TestUsedWithoutAGradient:
    def test_a_detached_part(self, tiny_model):
        """Blocks before a cut in the graph have no gradient; zeros would say that training does not move them."""
        model = tiny_model("Llama")
        model.model.norm.register_forward_pre_hook(lambda _, args: (args[0].detach(),))
        with pytest.raises(ValueError, match=r"parameters: 1: .* have no gradient"):
            grad_norm(model, rows(9, 6), 1, backend="eager")

    def test_a_part_detached_after_the_probe(self, tiny_model):
        model, calls = tiny_model("Llama"), []

        def cut(_, args):
            calls.append(args[0].shape)
            return (args[0].detach(),) if args[0].shape[1] == 13 else None

        model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(cut)
        with pytest.raises(
            ValueError, match=r"parameters: model.layers.1.* took part in the forward and got no gradient"
        ):
            grad_norm(model, rows(13, 6), 1, backend="eager")
        assert len(calls) > 1


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_do_not_underflow(dtype, mixed, tiny_model, exact):
    """The mean over hundreds of confident tokens divides gradients that are already small."""
    model = tiny_model("Llama", max_position_embeddings=1024)
    if mixed:  # as accelerate prepares a model
        model.forward = torch.autocast("cpu", dtype)(model.forward)
    else:
        model.to(dtype)
    with torch.no_grad():
        model.lm_head.weight *= 8
        ids = torch.randint(3, 320, (1, 1024), generator=torch.Generator().manual_seed(0))
        probability, token = model(input_ids=ids).logits[:, :-1].float().softmax(2).max(2)
        sure = torch.cat([ids[:, :1], token.masked_fill(probability < 0.995, -100)], 1)
    samples = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": sure}
    scores = acqcore.score(model, samples, "loss")
    assert float(scores["loss"]) < 0.003
    assert int(scores.n_tokens) > 100
    mean = float(grad_norm(model, samples, 1, backend="eager"))
    total = float(grad_norm(model, samples, 1, loss="sum", backend="eager"))
    assert mean == pytest.approx(total / int(scores.n_tokens), rel=1e-3)
    vars(model).pop("forward", None)
    [expected] = exact(model.float(), samples, list(model.model.layers[-1].parameters())).norm(dim=1).tolist()
    assert mean == pytest.approx(expected, rel=0.02 if dtype == torch.float16 else 0.1)


@pytest.mark.parametrize(
    "kind",
    [
        "transformers.models.llama.modeling_llama.LlamaRMSNorm",
        "transformers.models.gemma.modeling_gemma.GemmaRMSNorm",
        "torch.nn.LayerNorm",
        "torch.nn.RMSNorm",
    ],
)
def test_a_norm_is_differentiated_by_two_calls(kind, monkeypatch):
    """Norms that scale by w, by 1 + w, and with a bias match autograd on each sample."""
    monkeypatch.setattr(ModuleCall, "_other", None)
    generator = torch.Generator().manual_seed(0)
    module = pkgutil.resolve_name(kind)(12)
    for parameter in module.parameters():
        parameter.data.normal_(generator=generator)
    value, gradient = (torch.randn(3, 5, 12, generator=generator) for _ in range(2))
    names = {key: key for key, _ in module.named_parameters()}
    pieces = ModuleCall(module, names, (value,), {}, module(value), 3, 5).pieces(gradient)
    for i in range(3):
        expected = torch.autograd.grad(module(value[i : i + 1]), list(module.parameters()), gradient[i : i + 1])
        for key, one in zip(names, expected, strict=True):
            torch.testing.assert_close(pieces[key].values[i], one, rtol=1e-5, atol=1e-5)


class Late(nn.Module):
    """Uses its weight outside the layer, and only in long samples, which may also call the layer."""

    def __init__(self, called: bool) -> None:
        super().__init__()
        self.layer, self.called = nn.Linear(16, 16, bias=False), called

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] <= 8:
            return x
        return nn.functional.linear(x, self.layer.weight) + (self.layer(x.tanh()) if self.called else x)


class Routed(nn.Module):
    """Sends each token through the weight of one of many experts, whose layers it may call."""

    def __init__(self, called: bool) -> None:
        super().__init__()
        self.router, self.called = nn.Linear(16, 64, bias=False), called
        self.experts = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, chosen = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for e in chosen.unique().tolist():
            layer = self.experts[e]
            mine = x[chosen == e]
            y[chosen == e] = layer(mine) if self.called else nn.functional.linear(mine, layer.weight)
        return y * weight[..., None]


@pytest.mark.parametrize("make", [lambda: Late(False), lambda: Late(True), lambda: Routed(False), lambda: Routed(True)])
def test_parameters_that_the_probe_does_not_reach(make):
    torch.manual_seed(0)
    trunk, weight = nn.Sequential(nn.Embedding(96, 16), make(), nn.LayerNorm(16)), torch.randn(96, 16)
    student = acqcore.Student(trunk, acqcore.Head(weight))
    lengths = (40, 33, 6)
    ids = torch.randint(0, 96, (3, 40))
    mask = (torch.arange(40) < torch.tensor(lengths)[:, None]).long()
    found = acqcore.grad_norm(student, {"input_ids": ids, "attention_mask": mask}, "all")
    for i, length in enumerate(lengths):
        own = weight.clone().requires_grad_()
        logits = trunk(ids[i : i + 1, : length - 1])[0] @ own.T
        loss = nn.functional.cross_entropy(logits, ids[i, 1:length])
        gradients = torch.autograd.grad(loss, [*trunk.parameters(), own], allow_unused=True)
        expected = sum(float(g.double().square().sum()) for g in gradients if g is not None) ** 0.5
        assert float(found[i]) == pytest.approx(expected, rel=1e-5)
