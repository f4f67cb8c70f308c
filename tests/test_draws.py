"""Bayesian acquisitions of ``score``: dropout in the trunk, ensembles, arguments, and ignorance versus ambiguity."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import acqcore
from acqcore.acquisitions import REGISTRY
from benchmarks import toy_student

NAMES = ["mutual_information", "predictive_entropy", "expected_entropy", "variation_ratio", "bald_quadratic"]
KINDS = ["Llama", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "GPT2", "Cohere", "Granite", "Phi", "JetMoe"]


def _ids(*lengths: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(3, 320, (length,), generator=g) for length in lengths]


def _padded(ids: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return {"input_ids": pad_sequence(ids, batch_first=True), "attention_mask": mask}


def _score(student: Any, ids: list[torch.Tensor], names: str | list[str] = NAMES, **options: Any) -> acqcore.Scores:
    listed = [names] if isinstance(names, str) else names
    arguments = dict.fromkeys(listed, options if "members" in options else {"draws": 8, **options})
    return acqcore.score(student, _padded(ids), listed, acquisition_args=arguments, keep_tokens=True)


def _assert_draws(scores: acqcore.Scores, logits: list[list[torch.Tensor]], atol: float = 5e-5) -> None:
    """Values of each sample match the references for the logits ``[T, V]`` of its draws."""
    for i, drawn in enumerate(logits):
        p = torch.stack([z[:-1] for z in drawn]).softmax(dim=2)  # [K, T - 1, V]
        for name in NAMES:
            value = REGISTRY[name].reference(p)
            torch.testing.assert_close(scores.tokens[name][i].double(), value, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("layers", [1, "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_trunk_dropout_is_that_of_single_forwards(kind, layers, tiny_model, dropped_logits):
    """Batched draws from cached activations of padded samples match one forward per draw and sample."""
    model = tiny_model(kind)
    blocks = acqcore.Student.from_model(model).blocks
    names = ({"GPT2": "attn", "JetMoe": "self_attention"}.get(kind, "self_attn"), "mlp")
    sites = [(2 * i + j + 1, getattr(block, name)) for i, block in enumerate(blocks) for j, name in enumerate(names)]
    branches = sites[-2:] if layers == 1 else sites
    ids = _ids(7, 3, 12)
    scores = _score(model, ids, layers=layers, draws=3, dropout=0.25)
    _assert_draws(scores, [[dropped_logits(model, row, branches, 0.25, k) for k in range(3)] for row in ids])


def test_blocks_that_hand_on_more_than_the_stream(small_model, dropped_logits):
    """Zaya's blocks also return router states, which the next block adds to its own, for every draw."""
    model, ids = small_model("zaya"), [row % 120 + 8 for row in _ids(7, 3, 12)]
    branches = [branch for of_block in acqcore.Student.from_model(model).branches for branch in of_block]
    sites = list(enumerate(branches, 1))[-2:]
    scores = _score(model, ids, layers=1, draws=3, dropout=0.25)
    _assert_draws(scores, [[dropped_logits(model, row, sites, 0.25, k) for k in range(3)] for row in ids])


def test_last_hidden_state(tiny_model, dropped_logits):
    model = tiny_model("Qwen2")
    ids = _ids(6, 11)
    sites = [(0, model.model.norm)]
    for options in ({"layers": 0}, {"form": "element"}):
        scores = _score(model, ids, draws=4, **options)
        _assert_draws(scores, [[dropped_logits(model, row, sites, 0.1, k) for k in range(4)] for row in ids])
    assert not torch.equal(
        _score(model, ids, form="block", block=8)["mutual_information"], scores["mutual_information"]
    )


@pytest.mark.parametrize("options", [{}, {"layers": 1}, {"layers": 0}, {"form": "block", "block": 8}], ids=str)
def test_a_sample_does_not_depend_on_its_batch(options, tiny_model):
    model = tiny_model("Llama")
    ids = _ids(5, 9, 17, 9, 2)
    whole = _score(model, ids, **options)
    reverse = _score(model, ids[::-1], **options)
    for name in NAMES:
        torch.testing.assert_close(reverse[name].flip(0), whole[name], rtol=1e-4, atol=1e-5)
        for i, row in enumerate(ids):
            torch.testing.assert_close(
                _score(model, [row], name, **options)[name][0], whole[name][i], rtol=1e-4, atol=1e-5
            )
    twice = _score(model, [ids[1], ids[1]], **options)
    assert twice["mutual_information"][0] == twice["mutual_information"][1]
    assert not torch.equal(_score(model, ids, seed=1, **options)["mutual_information"], whole["mutual_information"])


def test_small_batches_of_draws(tiny_model):
    """Batches of draws obey the token limit of any forward and do not change the values."""
    model = tiny_model("Llama")
    ids = _ids(9, 8, 7, 9)
    seen: list[int] = []
    block = model.model.layers[-1]
    block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[:2].numel()))
    arguments = {"mutual_information": {"draws": 2}}
    few = acqcore.score(model, _padded(ids), "mutual_information", acquisition_args=arguments, batch_tokens=36)
    assert max(seen) <= 36
    torch.testing.assert_close(
        few["mutual_information"], _score(model, ids, draws=2)["mutual_information"], rtol=1e-4, atol=1e-5
    )


def test_work_shared_by_draws_runs_once(tiny_model):
    """Two of three blocks and the last one's attention run once for eight draws; no forward runs without dropout, since
    nothing reads it."""
    model = tiny_model("Llama", num_hidden_layers=3)
    rows: dict[str, int] = {}

    def count(name):
        def hook(module, arguments, keywords):
            if "forward" not in module.__dict__:  # a module with a stored output does not compute
                rows[name] = rows.get(name, 0) + len(arguments[0] if arguments else keywords["hidden_states"])

        return hook

    *blocks, last = model.model.layers
    for i, module in enumerate([*blocks, last.self_attn, last.mlp]):
        module.register_forward_pre_hook(count(("block 0", "block 1", "attention", "mlp")[i]), with_kwargs=True)
    student = acqcore.Student.from_model(model)
    _score(student, _ids(6, 6), "mutual_information", layers=1, draws=8)  # looks at the model, once
    rows.clear()
    _score(student, _ids(6, 6), "mutual_information", layers=1, draws=8)
    assert rows == {"block 0": 2, "block 1": 2, "attention": 2, "mlp": 16}


@pytest.mark.parametrize("name", ["layers.0", "layers.1.self_attn"])
def test_a_hook_set_between_calls_acts_once(name, tiny_model):
    """A hook on a module whose output would be stored, set after a first call: its output is not altered twice."""
    model, ids = tiny_model("Llama", num_hidden_layers=3), _ids(7, 4)

    def triple(module, arguments, output):
        return (output[0] * 3, *output[1:]) if isinstance(output, tuple) else output * 3

    _score(model, ids, "mutual_information", layers=2)
    model.model.get_submodule(name).register_forward_hook(triple)
    again = _score(model, ids, "mutual_information", layers=2)["mutual_information"]
    anew = _score(copy.deepcopy(model), ids, "mutual_information", layers=2)["mutual_information"]
    torch.testing.assert_close(again, anew)


def test_a_branch_behind_a_norm_that_was_zero(tiny_model):
    """A first call finds no branch behind norms that scale by zero; a later one, with other weights, does."""
    ids, model = _ids(7, 4), tiny_model("Gemma2")
    expected = _score(copy.deepcopy(model), ids, "mutual_information")["mutual_information"]
    norms = [block.post_attention_layernorm for block in model.model.layers]
    kept = [norm.weight.detach().clone() for norm in norms]
    for norm in norms:
        norm.weight.data.fill_(-1.0)  # Gemma's norms scale by 1 + weight
    _score(model, ids, "mutual_information")
    for norm, weight in zip(norms, kept, strict=True):
        norm.weight.data.copy_(weight)
    torch.testing.assert_close(_score(model, ids, "mutual_information")["mutual_information"], expected)


class ReadsFirst(torch.nn.Module):
    """Each of four blocks also reads the output of the first, through a gate that is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(320, 8)
        self.blocks = torch.nn.ModuleList(self.Block() for _ in range(4))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        first = hidden = self.blocks[0](hidden, hidden)
        for block in self.blocks[1:]:
            hidden = block(hidden, first)
        return hidden

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = torch.nn.Linear(8, 8)
            self.gate = torch.nn.Parameter(torch.zeros(8))

        def forward(self, hidden: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
            return hidden + self.mlp(hidden + self.gate * first)


def test_a_gate_that_opens_between_calls():
    """Stored outputs stand for the first blocks until a later block reads them one by one."""
    torch.manual_seed(0)
    trunk, head, ids = ReadsFirst(), acqcore.Head(torch.randn(320, 8)), _ids(7, 4)
    _score(acqcore.Student(trunk, head), ids, "mutual_information", layers=2)
    trunk.blocks[3].gate.data.fill_(1.0)
    again, anew = (_score(acqcore.Student(t, head), ids, layers=2) for t in (trunk, copy.deepcopy(trunk)))
    torch.testing.assert_close(again["mutual_information"], anew["mutual_information"])


def test_the_model_is_left_as_found(tiny_model):
    model = tiny_model("Llama").train()
    _score(model, _ids(4, 6), layers=1)

    def fail(*_):
        raise RuntimeError("on purpose")

    with model.model.layers[1].mlp.register_forward_hook(fail), pytest.raises(RuntimeError, match="on purpose"):
        _score(model, _ids(4, 6), layers=1)
    for module in model.modules():
        assert not module._forward_hooks
        assert "forward" not in module.__dict__
        assert module.training


def test_own_dropout_layers(tiny_model, dropped_logits):
    """GPT-2's residual dropout runs at its own rate; layers with rate 0 stay off."""
    model = tiny_model("GPT2", resid_pdrop=0.2, embd_pdrop=0.0, attn_pdrop=0.0).eval()
    layers = [m for m in model.transformer.modules() if isinstance(m, torch.nn.Dropout)]
    sites = [(site, layer) for site, layer in enumerate(layers, 1) if layer.p > 0]
    assert len(sites) == 4
    ids = _ids(8, 5)
    scores = _score(model, ids, layers="own", draws=3)
    _assert_draws(scores, [[dropped_logits(model, row, sites, 0.2, k) for k in range(3)] for row in ids])


@pytest.mark.parametrize("layers", [1, "all"])
def test_draws_of_a_model_whose_rows_affect_each_other(layers, tiny_model, dropped_logits):
    model = tiny_model("Llama")
    model.model.norm.register_forward_hook(lambda module, args, hidden: hidden / (1 + hidden.abs().amax()))
    sites = [(1, model.model.layers[0].self_attn), (2, model.model.layers[0].mlp)] if layers == "all" else []
    sites += [(3, model.model.layers[1].self_attn), (4, model.model.layers[1].mlp)]
    ids = _ids(7, 7, 9)
    scores = _score(model, ids, layers=layers, draws=3, dropout=0.25)
    _assert_draws(scores, [[dropped_logits(model, row, sites, 0.25, k) for k in range(3)] for row in ids])


def test_a_branch_that_blocks_share_drops_once_per_call(tiny_model, dropped_logits):
    model = tiny_model("Llama")
    first, second = model.model.layers
    second.mlp = first.mlp
    sites = [(1, first.self_attn), (3, first.mlp), (4, second.self_attn)]
    ids = _ids(7, 9)
    scores = _score(model, ids, draws=3, dropout=0.25)
    _assert_draws(scores, [[dropped_logits(model, row, sites, 0.25, k) for k in range(3)] for row in ids])


@pytest.mark.parametrize("options", [{"draws": 2}, {"form": "linear"}])
def test_dropout_without_a_module(options, tiny_model):
    """Attention applies dropout by a function; its module never runs, so it cannot be switched on."""
    model = tiny_model("GPT2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.3)
    own = {"mutual_information": {"layers": "own", **options}}
    with pytest.raises(ValueError, match="went through none of the modules"):
        acqcore.score(model, _padded(_ids(6)), "mutual_information", acquisition_args=own)


def test_lora_dropout(tiny_model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("Llama"), config).eval()
    scores = _score(model, _ids(6, 9), layers="own")
    assert float(scores["mutual_information"].min()) > 1e-4


def test_members(tiny_model):
    """An ensemble of students, each with its own trunk and head."""
    members = []
    for seed in range(3):
        model = tiny_model("Llama")
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * 0.05
        members.append(model)
    ids = _ids(5, 8)
    scores = _score(members[0], ids, members=members)
    with torch.no_grad():
        logits = [[model(row[None]).logits[0].double() for model in members] for row in ids]
    _assert_draws(scores, logits, atol=2e-5)


@pytest.mark.parametrize("config", [{"hidden_size": 48}, {"vocab_size": 321}])
def test_members_have_heads_of_one_shape(config, tiny_model):
    members = [tiny_model("Llama"), tiny_model("Llama", **config)]
    with pytest.raises(ValueError, match=r"members: expected heads of one shape, got \[320, 32\] and .* at 1"):
        _score(members[0], _ids(5), members=members)


def test_the_shortest_member_limits_the_length(tiny_model):
    errors: dict[int, str] = {}
    samples = _padded(_ids(40, 16))
    short = [tiny_model("GPT2", n_positions=n) for n in (16, 32)]
    arguments = {"predictive_entropy": {"members": short}}
    found = acqcore.score(tiny_model("Llama"), samples, "predictive_entropy", acquisition_args=arguments, errors=errors)
    assert found.valid.tolist() == [False, True]
    assert errors == {0: "40 tokens, the student takes at most 16; max_length= truncates"}


def test_equal_arguments_share_the_draws(tiny_model):
    model = tiny_model("Llama")
    together = _score(model, _ids(5, 8), layers=1)
    mixed = acqcore.score(
        model,
        _padded(_ids(5, 8)),
        NAMES[:2],
        acquisition_args={NAMES[0]: {"layers": 1, "draws": 8}, NAMES[1]: {"layers": 0}},
    )
    assert torch.equal(mixed[NAMES[0]], together[NAMES[0]])
    assert not torch.equal(mixed[NAMES[1]], together[NAMES[1]])


def test_every_reduction(tiny_model):
    model, ids = tiny_model("Llama"), _padded(_ids(5, 8))
    arguments = {"mutual_information": {"layers": 1, "draws": 3}}
    tokens = acqcore.score(model, ids, "mutual_information", acquisition_args=arguments, keep_tokens=True).tokens
    for reduction, function in {"sum": torch.sum, "max": torch.amax, "mean": torch.mean}.items():
        got = acqcore.score(model, ids, "mutual_information", acquisition_args=arguments, reduction=reduction)
        expected = torch.stack([function(values) for values in tokens["mutual_information"]])
        torch.testing.assert_close(got["mutual_information"], expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"draws": 1}, ValueError, "draws: expected 2 to"),
        ({"dropout": 1}, ValueError, "dropout"),
        ({"layers": 3}, ValueError, "layers: expected at most 2 transformer blocks, got 3"),
        ({"layers": -1}, ValueError, "layers: expected at least 0 blocks, got -1"),
        ({"layers": "some"}, ValueError, "layers: expected a number of blocks, 'all' or 'own', got 'some'"),
        ({"layers": 1.5}, TypeError, "layers: expected a number of blocks"),
        ({"layers": "own"}, ValueError, "layers: 'own' needs a student with dropout layers"),
        ({"layers": 1, "form": "block"}, ValueError, "form: applies to dropout on the last hidden state"),
        ({"form": "diagonal"}, ValueError, "form: unknown 'diagonal'"),
        ({"members": []}, ValueError, "members: expected at least 2 students, got 0"),
        ({"members": "a/path"}, TypeError, "members: expected a sequence of students"),
        ({"members": [1, 2]}, TypeError, "student: expected"),
        ({"members": [None, None], "draws": 3}, ValueError, "members: replaces draws by dropout, so 'draws' must"),
        ({"rate": 0.1}, ValueError, r"acquisition_args\['mutual_information'\]: unknown 'rate'"),
    ],
)
def test_bad_arguments(options, error, message, tiny_model):
    with pytest.raises(error, match=message):
        _score(tiny_model("Llama"), _ids(4), "mutual_information", **options)


def test_trunks_without_blocks():
    student = acqcore.Student(torch.nn.Embedding(320, 8), acqcore.Head(torch.randn(320, 8)))
    with pytest.raises(ValueError, match="layers: no list of transformer blocks found"):
        _score(student, _ids(4), "mutual_information")
    assert len(_score(student, _ids(4), "mutual_information", layers=0)["mutual_information"]) == 1


def test_tells_ignorance_from_ambiguity(informed_students):
    """Mutual information ranks unseen keys above random answers and known keys; entropy does not."""
    found: dict[str, list[float]] = {"mutual_information": [], "entropy": []}
    for student in informed_students:
        generator = torch.Generator().manual_seed(0)
        values: dict[str, dict[str, torch.Tensor]] = {}
        for kind in toy_student.KINDS:
            asked = toy_student.samples(toy_student.questions(kind, 128, generator))
            values[kind] = dict(acqcore.score(student, asked, list(found)).items())
        for name, aurocs in found.items():
            others = torch.cat([values["easy"][name], values["ambiguous"][name]])
            aurocs.append(toy_student.auroc(values["unseen"][name], others))
    assert statistics.fmean(found["mutual_information"]) >= 0.9
    assert statistics.fmean(found["entropy"]) <= 0.65


@pytest.mark.parametrize("layers", ["all", 1])
def test_forwards_of_draws_get_tokens_on_the_students_device(layers, tiny_model, monkeypatch):
    """Batches are made on the CPU; a device without kernels stands in for a GPU."""
    student = acqcore.Student.from_model(tiny_model("Llama"))
    seen: list[str] = []

    def hidden(self, input_ids):
        seen.append(input_ids.device.type)
        raise InterruptedError

    monkeypatch.setattr(acqcore.Student, "device", torch.device("meta"))
    monkeypatch.setattr(acqcore.Student, "hidden", hidden)
    with pytest.raises(InterruptedError):
        _score(student, _ids(5, 7), "mutual_information", layers=layers)
    assert seen == ["meta"]
