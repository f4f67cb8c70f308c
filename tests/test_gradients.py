"""Norms and sketches of per-sample gradients match one backward per sample and leave the model unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import acqcore
from acqcore import grad_norm, grad_sketch
from acqcore.gradients import head_pass, measures
from acqcore.scoring.plan import Plan

KINDS = ["Llama", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "GPT2", "Cohere", "Phi"]
LENGTHS = (17, 9, 12, 5, 14)


def make_samples(lengths: Sequence[int] = LENGTHS, seed: int = 1) -> dict[str, torch.Tensor]:
    """Padded token ids with repeats, an unscored context, and the padding token among the real ones."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    ids = torch.randint(3, 320, shape, generator=generator)
    ids[:, 2:4] = ids[:, :2]
    ids[:, 1] = 0
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def assert_norms(actual: torch.Tensor, gradients: torch.Tensor, rtol: float = 1e-4) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), gradients.norm(dim=1), rtol=rtol, atol=0)


def chosen(model: Any, parameters: int | str) -> list[torch.Tensor]:
    if isinstance(parameters, str):
        return list((model if parameters == "all" else model.lm_head).parameters())
    trunk = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    return [p for block in trunk[-parameters:] for p in block.parameters()]


def lora(model: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_dropout=0.1, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize(
    ("parameters", "loss", "tied"),
    [("all", "mean", True), ("all", "mean", False), (1, "sum", True), (2, "sum", True), ("head", "mean", False)],
)
@pytest.mark.parametrize("kind", [*KINDS, "Granite"])
def test_norms(kind, parameters, loss, tied, tiny_model, exact):
    model, samples = tiny_model(kind, tie_word_embeddings=tied), make_samples()
    gradients = exact(model, samples, chosen(model, parameters), loss)
    assert_norms(grad_norm(model, samples, parameters, loss=loss, backend="eager"), gradients)


def test_a_confident_token_keeps_its_part_of_a_tied_weight():
    """Its gradient in its own column is -R / Z, about 1e-9, where p - 1 from float32 logits would keep no digit."""
    hidden = torch.eye(3)
    weight = torch.tensor([[21.0, 0.0, 0.0], [0.0, 22.0, 0.0], [0.0, 0.0, 20.0]])
    head, targets = acqcore.Head(weight), torch.tensor([0, 1, 2])
    stats = acqcore.row_stats(hidden, head, targets, backend="eager")
    stats.state[0] += 1e-6  # the logits are formed again, and float32 rounds a product in another order
    keys = torch.zeros(3, dtype=torch.int64)
    rows = head_pass.HeadPass(hidden, head, ((0, 2), (2, 3)), "sum", "eager", keys, keys, stats)
    ids, values = torch.tensor([[0, 1], [2, 2]]), torch.ones(2, 2, 3)
    p = (hidden.double() @ weight.double().T).softmax(dim=1)
    residual = torch.stack([p[i].sum() - p[i, i] for i in range(3)])  # 1 - p of the target
    others = torch.stack([p[0, 1], p[1, 0]])  # the two tokens of the first sample meet each other's column
    expected = torch.stack([others.sum() - residual[:2].sum(), -2 * residual[2]])
    torch.testing.assert_close(rows.row_products(ids, values), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
def test_a_norm_of_zeros_tells_nothing_about_its_weight(kind, tiny_model, exact):
    """The first batch gives the norms behind these projections zeros, later ones do not."""
    model = tiny_model(kind, tie_word_embeddings=False)
    samples = make_samples()
    projections = [module for name, module in model.named_modules() if name.endswith(("o_proj", "down_proj"))]
    kept = [module.weight.detach().clone() for module in projections]
    with torch.no_grad():
        for module in projections:
            module.weight.zero_()
        grad_norm(model, samples, "all")
        for module, weight in zip(projections, kept, strict=True):
            module.weight.copy_(weight)
    assert_norms(grad_norm(model, samples, "all"), exact(model, samples, list(model.parameters())))


@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
def test_tied_weights_in_parts(kind, tiny_model, exact, monkeypatch):
    """The inner products of a tied weight's two gradients, and its hashed rows, a few entries at a time."""
    model = tiny_model(kind, tie_word_embeddings=True)
    samples = make_samples()
    gradients = exact(model, samples, list(model.parameters()))
    sketches = grad_sketch(model, samples, "all", dim=64)
    for most in (1, 20, 300):
        monkeypatch.setattr(head_pass, "PRODUCT_ELEMENTS", most)
        monkeypatch.setattr(measures, "HASHED_ELEMENTS", 64 * most)
        assert_norms(grad_norm(model, samples, "all"), gradients)
        torch.testing.assert_close(grad_sketch(model, samples, "all", dim=64), sketches)


def test_every_backend(implementation, tiny_model, exact):
    model = tiny_model("Gemma2", tie_word_embeddings=True)
    samples = make_samples()
    norms = grad_norm(model, samples, "all", backend=implementation)
    assert_norms(norms, exact(model, samples, list(model.parameters())))
    sketch = grad_sketch(model, samples, "all", dim=64, backend=implementation)
    expected = grad_sketch(model, samples, "all", dim=64, backend="eager")
    torch.testing.assert_close(sketch, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("save", [None, ["lm_head"], ["embed_tokens"]])
@pytest.mark.parametrize(("kind", "targets"), [("Llama", ["q_proj", "down_proj"]), ("Qwen3", "all-linear")])
def test_trainable_adapters(kind, targets, save, tiny_model, exact):
    model = lora(tiny_model(kind), target_modules=targets, modules_to_save=save)
    samples = make_samples()
    trainable = [p for p in model.parameters() if p.requires_grad]
    gradients = exact(model, samples, trainable)
    model.train()  # adapters have dropout: scoring turns it off
    assert_norms(grad_norm(model, samples, "trainable", backend="eager"), gradients)


class Factors(torch.nn.Module):
    """A product of two matrices, whose modules are not called."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.down, self.up = torch.nn.Linear(size, 4, bias=False), torch.nn.Linear(4, size, bias=False)
        torch.nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(torch.nn.functional.linear(x, self.down.weight), self.up.weight)


def experts_with_adapters(small_model):
    peft = pytest.importorskip("peft")
    model = small_model("mixtral", vocab_size=320, num_local_experts=4, num_experts_per_tok=2)
    named = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=named)
    return peft.get_peft_model(model, config).eval()


def uncalled_factors(small_model):
    model = small_model("llama", vocab_size=320)
    model.model.norm.factors = Factors(model.config.hidden_size)
    model.model.norm.register_forward_hook(lambda module, args, out: out + module.factors(out))
    return model


class Gated(torch.nn.Module):
    """A gate, closed at first, before a weight used by its module and in a function."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.factors_gate = torch.nn.Linear(size, size, bias=False), torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factors_gate * torch.nn.functional.linear(self.up(x).tanh(), self.up.weight.t())


def gated(small_model):
    model = small_model("llama", vocab_size=320)
    model.model.norm.mixed = Gated(model.config.hidden_size)
    model.model.norm.register_forward_hook(lambda module, args, out: out + module.mixed(out))
    return model


@pytest.mark.parametrize("make", [experts_with_adapters, uncalled_factors, gated])
def test_a_gradient_that_was_zero_in_an_earlier_call(make, small_model):
    """A factor's gradient is zero as long as its partner is, as in LoRA before training."""
    model, samples = make(small_model), make_samples()
    grad_norm(model, samples, "trainable", backend="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "factors" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    later = grad_norm(model, samples, "trainable", backend="eager")
    torch.testing.assert_close(later, grad_norm(copy.deepcopy(model), samples, "trainable", backend="eager"))


def test_frozen_parameters_count_among_all_and_trainable_ones_alone_do_not(tiny_model, exact):
    model = lora(tiny_model("GPT2"), target_modules=["c_attn"], fan_in_fan_out=True)
    samples = make_samples()
    assert_norms(grad_norm(model, samples, "all", backend="eager"), exact(model, samples, list(model.parameters())))
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert_norms(grad_norm(model, samples, "trainable", backend="eager"), exact(model, samples, trainable))


def test_float64_and_bfloat16(tiny_model, exact):
    model = tiny_model("Qwen2").double()
    samples = make_samples()
    gradients = exact(model, samples, list(model.parameters()))
    assert_norms(grad_norm(model, samples, "all", backend="eager"), gradients, 1e-6)
    # The trunk itself rounds to eight bits; the tolerance only rules out larger errors.
    half = grad_norm(model.bfloat16(), samples, "all", backend="eager")
    assert_norms(half, gradients, 0.05)


@pytest.mark.parametrize("parameters", ["head", 1, "all"])
def test_a_sample_does_not_depend_on_its_batch(parameters, tiny_model):
    model = tiny_model("Gemma3", tie_word_embeddings=True)
    samples = make_samples()
    for function in (grad_norm, grad_sketch):
        together = function(model, samples, parameters, backend="eager")
        alone = function(model, samples, parameters, backend="eager", batch_tokens=1)
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))


def test_long_samples_take_the_direct_form(tiny_model, exact):
    model = tiny_model("Llama")
    samples = make_samples((64, 60))  # too many tokens for Gram products to pay off in layers of 32 columns
    assert_norms(grad_norm(model, samples, "all", backend="eager"), exact(model, samples, list(model.parameters())))


class Trunk(nn.Module):
    """Embedding and one linear layer, called twice."""

    def __init__(self, twice: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(320, 16)
        self.layer = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.twice = twice

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embedding(input_ids))
        x = self.layer(x).relu()
        return self.norm(self.layer(x)) if self.twice else x


def test_a_layer_that_is_used_twice_and_a_head_given_as_such(exact, with_logits):
    trunk, weight = Trunk(), torch.randn(320, 16)
    samples = make_samples()
    student = acqcore.Student(trunk, acqcore.Head(weight))
    model = with_logits(trunk, weight)
    gradients = exact(model, samples, [*trunk.parameters(), weight])
    assert_norms(grad_norm(student, samples, "all", backend="eager"), gradients)
    tied = acqcore.Student(trunk, acqcore.Head(trunk.embedding.weight.detach()))
    gradients = exact(with_logits(trunk, trunk.embedding.weight), samples, list(trunk.parameters()))
    assert_norms(grad_norm(tied, samples, "all", backend="eager"), gradients)


def state(model: nn.Module) -> list[Any]:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
    return [hooks, [(p.requires_grad, p.grad is None) for p in model.parameters()], torch.is_grad_enabled()]


@pytest.mark.parametrize("parameters", ["head", 1, "all", "trainable"])
def test_the_model_is_left_as_found(parameters, tiny_model):
    model = tiny_model("Llama")
    model.model.layers[0].train()
    model.lm_head.weight.requires_grad_(False)
    before = state(model)
    samples = make_samples()
    grad_norm(model, samples, parameters, backend="eager")
    assert state(model) == before

    def fail(*_):
        raise RuntimeError("out of memory")

    model.model.norm.register_forward_hook(fail)
    before = state(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        grad_norm(acqcore.Student.from_model(model, verify=False), samples, parameters, backend="eager")
    assert state(model) == before


def test_hooks_that_use_the_weight_of_their_layer(exact, with_logits):
    """Such uses change the gradient by little, or turn it round without changing its norm."""
    samples, weight = make_samples(), torch.randn(320, 16)
    trunk = Trunk()
    trunk.layer.register_forward_hook(lambda module, _, output: output * module.weight.sum())
    student = acqcore.Student(trunk, acqcore.Head(weight))
    gradients = exact(with_logits(trunk, weight), samples, [*trunk.parameters(), weight])
    assert_norms(grad_norm(student, samples, "all", backend="eager"), gradients)
    turned, reference = Trunk(), Trunk()
    turned.layer.register_forward_hook(lambda m, args, out: out - 2 * nn.functional.linear(args[0], m.weight))
    layer = reference.layer
    layer.forward = lambda x: nn.functional.linear(x, -layer.weight, layer.bias)  # type: ignore[method-assign]
    found, expected = (
        grad_sketch(acqcore.Student(each, acqcore.Head(weight)), samples, "all", backend="eager")
        for each in (turned, reference)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_out_of_memory_while_the_rules_are_tested_leaves_no_rule_untested(exact, with_logits, monkeypatch):
    """A layer that acts on its output alone fits no rule, which a second call with the same runner must still find."""
    trunk, weight = Trunk(), torch.randn(320, 16)
    trunk.layer.register_forward_hook(lambda module, _, output: output * module.weight.sum())
    samples = make_samples()
    gradients = exact(with_logits(trunk, weight), samples, [*trunk.parameters(), weight])
    plan = Plan.of("grad_norm", {"grad_norm": {"parameters": "all"}}, backend="eager")
    runner = plan.runner(acqcore.Student(trunk, acqcore.Head(weight)))
    rows = runner.encode(samples, None, None)

    exhausted = [True]

    def fail_once(*_):
        if exhausted and torch.is_grad_enabled():
            exhausted.clear()
            raise torch.OutOfMemoryError("out of memory")

    trunk.norm.register_forward_hook(fail_once)
    with pytest.raises(torch.OutOfMemoryError):
        list(plan.batches(runner, rows))
    found = list(plan.batches(runner, rows))
    norms = torch.empty(len(rows))
    for batch in found:
        norms[batch.indices] = batch.values[0]
    assert_norms(norms, gradients)


def test_under_no_grad_and_inference_mode(tiny_model):
    model, samples = tiny_model("Llama"), make_samples()
    expected = grad_norm(model, samples, 1, backend="eager")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(grad_norm(model, samples, 1, backend="eager"), expected)


def test_earlier_blocks_keep_no_activations(tiny_model):
    model = tiny_model("Llama", num_hidden_layers=4)
    seen: dict[int, bool] = {}
    for i, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda m, a, out, i=i: seen.update({i: out.requires_grad}))
    grad_norm(model, make_samples(), 2, backend="eager")
    assert seen == {0: False, 1: False, 2: True, 3: True}


def test_no_samples(tiny_model):
    model = tiny_model("Llama")
    assert grad_norm(model, [], "all").shape == (0,)
    assert grad_sketch(model, [], "all", dim=8).shape == (0, 8)


@pytest.mark.parametrize(("kind", "parameters"), [("Qwen2", "all"), ("GPT2", "all"), ("Llama", 1)])
def test_sketches_keep_inner_products_on_average(kind, parameters, tiny_model, exact):
    model, samples = tiny_model(kind), make_samples()
    gradients = exact(model, samples, chosen(model, parameters))
    products = []
    for seed in range(60):
        sketch = grad_sketch(model, samples, parameters, dim=64, seed=seed, backend="eager").double()
        products.append(sketch @ sketch.T)
    stacked = torch.stack(products)
    error = (stacked.mean(0) - gradients @ gradients.T) / (stacked.std(0) / len(stacked) ** 0.5)
    assert error.abs().max() < 4
    norms = gradients.norm(dim=1)
    assert (stacked.std(0) / (norms * norms[:, None])).max() < 0.5


def test_sketches_rank_pairs_as_gradients_do(tiny_model, exact):
    model = tiny_model("Llama", tie_word_embeddings=True)
    stream = torch.randint(3, 320, (111,), generator=torch.Generator().manual_seed(0))
    ids = stream.unfold(0, 48, 1)  # 64 windows that share from none to all but one of their tokens with another
    samples = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    gradients = exact(model, samples, list(model.parameters()))
    sketch = grad_sketch(model, samples, "all", backend="eager").double()
    i, j = torch.triu_indices(64, 64, 1)
    true, sketched = ((x @ x.T)[i, j] for x in (gradients, sketch))
    ranks = torch.stack([x.argsort().argsort().double() for x in (true, sketched)])
    assert torch.corrcoef(ranks)[0, 1] > 0.95
    true, sketched = (x / x.norm(dim=1, keepdim=True) for x in (gradients, sketch))
    noise = (true @ true.T - sketched @ sketched.T)[i, j].std()
    assert noise < 1.5 / 4096**0.5  # signs without factors would give 1


def test_a_head_sketch_is_that_of_the_hidden_states(tiny_model):
    model, samples = tiny_model("Llama"), make_samples((9,))
    student = acqcore.Student.from_model(model)
    with student.scoring():
        hidden = student.hidden(samples["input_ids"])[0, 1:-1]
    expected = acqcore.grad_sketch(
        hidden, student.head, samples["input_ids"][0, 2:], torch.tensor([0, 7]), dim=64, backend="eager"
    )
    torch.testing.assert_close(grad_sketch(student, samples, dim=64, backend="eager"), expected)


def test_seeds_and_names_give_other_signs(tiny_model):
    model, samples = tiny_model("Llama"), make_samples((9,))
    first, again, other = (grad_sketch(model, samples, 1, dim=64, seed=s) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ("al", ValueError, "parameters: unknown 'al', expected one of head, trainable, all"),
        (3, ValueError, "parameters: expected at most 2 transformer blocks, got 3"),
        (0, ValueError, "parameters: expected at least 1 transformer block, got 0"),
        (True, TypeError, "parameters: expected head, trainable, all or a number of transformer blocks, got bool"),
        (None, TypeError, "parameters: .* got NoneType"),
        ("trainable", ValueError, "parameters: 'trainable': no parameter of the student has requires_grad=True"),
    ],
)
def test_wrong_parameters(parameters, error, message, tiny_model):
    model = tiny_model("Llama").requires_grad_(False)
    with pytest.raises(error, match=message):
        grad_norm(model, make_samples(), parameters)


def test_other_wrong_arguments(tiny_model):
    model, samples = tiny_model("Llama"), make_samples()
    with pytest.raises(ValueError, match="loss: unknown 'max'"):
        grad_norm(model, samples, loss="max")
    with pytest.raises(ValueError, match="batch_tokens: expected an int >= 1"):
        grad_norm(model, samples, batch_tokens=0)
    with pytest.raises(ValueError, match="dim: expected an int >= 1, got 0"):
        grad_sketch(model, samples, dim=0)
    with pytest.raises(ValueError, match="dim: expected an int >= 1, got 0"):
        acqcore.badge_embedding(model, samples, dim=0)
    student = acqcore.Student(lambda ids: torch.randn(*ids.shape, 4), acqcore.Head(torch.randn(320, 4)))
    with pytest.raises(ValueError, match=r"parameters: 'all' needs a student whose trunk is a torch.nn.Module"):
        grad_norm(student, samples, "all")


class Bare(nn.Module):
    """Has a parameter that its owning module never uses in a call."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(320, 16)
        self.scales = nn.ParameterList([torch.ones(16)])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(input_ids) * self.scales[0]


class Pair(Trunk):
    """Takes the first of two values that a linear layer returns."""

    class Two(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), x

    def __init__(self) -> None:
        super().__init__(twice=False)
        self.layer = self.Two(16, 16)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.layer(self.embedding(input_ids))[0]


class Changed(Trunk):
    """Changes a layer's input in place after the call."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        y = self.layer(x)
        x.mul_(2)
        return y


class Mixed(Trunk):
    """Calls a layer without the dimension of samples."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        return self.layer(x[:, :, None].sum(2)[0])[None].expand(len(x), -1, -1)


class Squared(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids).square()


class Scaled(nn.Module):
    """Uses its weight for some inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight if x.sum() > 0 else x


class Large(nn.Module):
    """Has more parameters than are differentiated sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1025, 1024, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight.mean()


def projected() -> nn.Module:
    """An embedding and a linear layer that share a weight."""
    trunk = nn.Sequential(nn.Embedding(320, 16), nn.Linear(16, 320, bias=False))
    trunk[1].weight = trunk[0].weight
    return trunk


UNCOVERED: dict[str, Callable[[], nn.Module]] = {
    "a bare parameter": Bare,
    "a tuple": Pair,
    "mixed samples": Mixed,
    "a shared weight": projected,
    "an embedding of its own": lambda: nn.Sequential(Squared(320, 16)),
    "some inputs only": lambda: nn.Sequential(nn.Embedding(320, 16), Scaled()),
    "a large weight": lambda: nn.Sequential(nn.Embedding(320, 16), Large()),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_a_parameter_that_no_rule_covers_is_left_to_autograd(name, exact, with_logits):
    """Each sample has its own backward."""
    torch.manual_seed(0)
    trunk = UNCOVERED[name]()
    width = trunk(torch.zeros(1, 2, dtype=torch.int64)).shape[-1]
    weight, samples = torch.randn(320, width), make_samples()
    gradients = exact(with_logits(trunk, weight), samples, [*trunk.parameters(), weight])
    student = acqcore.Student(trunk, acqcore.Head(weight))
    assert_norms(grad_norm(student, samples, "all", backend="eager"), gradients)


def test_what_autograd_cannot_do_is_named():
    student = acqcore.Student(Changed(), acqcore.Head(torch.randn(320, 16)))
    with pytest.raises(ValueError, match=r"parameters: cannot compute the gradient of .*: .* inplace operation"):
        grad_norm(student, make_samples(), "all", backend="eager")


@pytest.mark.parametrize(("name", "own"), [("grad_norm", {"parameters": "all"}), ("mutual_information", {})])
def test_an_error_of_the_students_backward_is_shown(name, own, tiny_model):
    model = tiny_model("Llama")
    model.model.layers[1].mlp.register_full_backward_hook(lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=r"cannot compute the gradient of .*: division by zero"):
        acqcore.score(model, make_samples(), name, acquisition_args={name: own}, backend="eager")


def test_adapters_on_the_head_and_half_of_it_are_named(tiny_model):
    model = lora(tiny_model("Llama"), target_modules=["lm_head", "q_proj"])
    with pytest.raises(ValueError, match=r"no rule covers base_model.model.lm_head.lora_A.default.weight and 1 more"):
        grad_norm(model, make_samples(), "trainable", backend="eager")
    tied = tiny_model("Llama", tie_word_embeddings=True)
    nn.utils.parametrizations.spectral_norm(tied.lm_head)
    with pytest.raises(ValueError, match=r"no rule covers model.embed_tokens.weight: the head's weight is computed"):
        grad_norm(tied, make_samples(), "all", backend="eager")
    phi = tiny_model("Phi", tie_word_embeddings=False)
    phi.lm_head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no rule covers lm_head.bias without the head's weight"):
        grad_norm(phi, make_samples(), "trainable", backend="eager")


def test_a_quantised_parameter_is_named():
    trunk = Trunk()
    trunk.layer.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)
    student = acqcore.Student(trunk, acqcore.Head(torch.randn(320, 16)))
    with pytest.raises(ValueError, match=r"layer.weight is int8 tensor of shape \[16, 16\], which has no gradient"):
        grad_norm(student, make_samples(), "all")


def test_the_comparison_with_autograd_copies_no_parameter(extra_mib):
    """A new student's gradient of an embedding of 64 MiB exists twice, by autograd and by its rule; a copy in float64
    would take 128 MiB more."""
    setup = (
        "embedding, weight = torch.nn.Embedding(1 << 18, 64), torch.randn(1 << 18, 64)\n"
        "student = acqcore.Student(embedding, acqcore.Head(weight))\n"
        "ids = {'input_ids': torch.arange(8).view(2, 4)}\n"
        "acqcore.grad_norm(student, ids)"
    )
    assert extra_mib(setup, "acqcore.grad_norm(student, ids, 'all')") <= 180
