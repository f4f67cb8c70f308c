"""``score`` agrees with a loop over single samples with full logits, however samples are batched."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import acqcore
from acqcore.acquisitions import REGISTRY, RowNeed
from acqcore.scoring.plan import reduce
from acqcore.students.samples import encode

NAN = float("nan")
NAMES = tuple(name for name, entry in REGISTRY.items() if entry.needs == RowNeed())
TEXTS = [
    "The quick brown fox jumps over the lazy dog. What is 2 + 3?",
    "a fox",
    "A patient has fever and a cough; which drug helps? The answer is 5.",
    "def add(a, b): return a + b",
    "the lazy dog",
    "naïve café, 日本語!",
]
SAMPLES = [{"prompt": text[: len(text) // 2], "completion": text[len(text) // 2 :]} for text in TEXTS]
KINDS = ["Llama", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "GPT2", "Cohere", "Granite", "Phi"]

REDUCE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda x: x.mean(),
    "sum": lambda x: x.sum(),
    "max": lambda x: x.max(),
    "topk": lambda x: x.sort(descending=True).values[:3].mean(),
}


@pytest.fixture(params=["eager", "cpu"])
def backend(request):
    return request.param


@pytest.fixture
def expected(tokenizer, brute_force):
    """``expected(model, samples)``: per-token references of each sample, name -> ``[scored tokens]``."""

    def run(model, samples):
        rows = encode(samples, tokenizer, vocab_size=320, limit=64)
        return [brute_force(model, row.ids, row.targets != -100) for row in rows]

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_one_sample_at_a_time(kind, backend, tiny_model, tokenizer, expected):
    """Covers padded batches without a mask, sliding windows and learned positions."""
    model = tiny_model(kind)
    scores = acqcore.score(
        model, SAMPLES, NAMES, tokenizer=tokenizer, backend=backend, batch_tokens=120, keep_tokens=True
    )
    for i, reference in enumerate(expected(model, SAMPLES)):
        for name in NAMES:
            torch.testing.assert_close(scores.tokens[name][i], reference[name], rtol=2e-4, atol=2e-5)
            mean = reference["loss"].mean().exp() if name == "perplexity" else reference[name].mean()
            torch.testing.assert_close(scores[name][i], mean, rtol=1e-4, atol=1e-5)
    assert scores.valid.all()
    assert scores.n_tokens.tolist() == [len(tokens) for tokens in scores.tokens["loss"]]


@pytest.mark.parametrize("parameters", ["head", 1, "all"])
@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_grad_norm_is_that_of_autograd(loss, parameters, backend, tiny_model, tokenizer, exact):
    """Values are the same in a call with token acquisitions."""
    model = tiny_model("Llama")
    arguments = {"grad_norm": {"parameters": parameters, "loss": loss}}
    scores = acqcore.score(
        model, SAMPLES, ("entropy", "grad_norm"), acquisition_args=arguments, tokenizer=tokenizer, backend=backend,
        batch_tokens=120, keep_tokens=True,
    )  # fmt: skip
    of = {"head": model.lm_head.parameters, 1: model.model.layers[-1].parameters, "all": model.parameters}[parameters]
    rows = encode(SAMPLES, tokenizer, vocab_size=320, limit=64)
    ids, labels = (pad_sequence([getattr(row, name) for row in rows], True) for name in ("ids", "targets"))
    mask = (torch.arange(ids.shape[1]) < torch.tensor([len(row.ids) for row in rows])[:, None]).long()
    samples = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    expected = exact(model, samples, list(of()), loss).norm(dim=1)
    torch.testing.assert_close(scores["grad_norm"].double(), expected, rtol=1e-3, atol=0)
    alone = acqcore.score(model, SAMPLES, "grad_norm", acquisition_args=arguments, tokenizer=tokenizer, backend=backend)
    torch.testing.assert_close(alone["grad_norm"], scores["grad_norm"], rtol=1e-4, atol=0)
    assert alone.valid.all()
    assert list(scores.tokens) == ["entropy"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"margin": {}}, ValueError, "acquisition_args: 'margin' is not among the acquisitions asked for"),
        ({"entropy": {}}, ValueError, "acquisition_args: 'entropy' takes no arguments"),
        ({"grad_norm": {"layers": 2}}, ValueError, r"acquisition_args\['grad_norm'\]: unknown 'layers'"),
        (
            {"grad_norm": 2},
            TypeError,
            r"acquisition_args\['grad_norm'\]: expected a mapping or GradNormOptions, got int",
        ),
        ({"grad_norm": {"loss": "max"}}, ValueError, "loss: unknown 'max', expected one of mean, sum"),
        ({"grad_norm": {"parameters": 99}}, ValueError, "parameters: "),
        ([("grad_norm", 1)], TypeError, "acquisition_args: expected a mapping"),
    ],
)
def test_acquisition_args(arguments, error, message, tiny_model, tokenizer):
    with pytest.raises(error, match=message):
        acqcore.score(
            tiny_model("Llama"), TEXTS, ("entropy", "grad_norm"), acquisition_args=arguments, tokenizer=tokenizer
        )


def test_influence_beside_entropy(backend, tiny_model, tokenizer):
    model = tiny_model("Llama")
    reference = acqcore.influence_reference(model, SAMPLES[:2], tokenizer=tokenizer, backend=backend)
    arguments = {"influence": {"reference": reference, "similarity": "dot"}}
    scores = acqcore.score(
        model, SAMPLES, ("influence", "entropy"), acquisition_args=arguments, tokenizer=tokenizer, backend=backend
    )
    expected = acqcore.influence(model, SAMPLES, reference, similarity="dot", tokenizer=tokenizer, backend=backend)
    torch.testing.assert_close(scores["influence"], expected, rtol=1e-5, atol=0)
    assert scores.valid.all()
    assert scores["entropy"].isfinite().all()
    with pytest.raises(ValueError, match="acquisition_args: 'influence' needs 'reference'"):
        acqcore.score(model, SAMPLES, ("influence", "entropy"), tokenizer=tokenizer)


@pytest.mark.parametrize("reduction", REDUCE)
def test_reductions(reduction, tiny_model, tokenizer, expected):
    model = tiny_model("Llama")
    scores = acqcore.score(model, SAMPLES, NAMES, tokenizer=tokenizer, reduction=reduction, topk=3, backend="eager")
    for i, reference in enumerate(expected(model, SAMPLES)):
        for name in ("entropy", "el2n"):
            torch.testing.assert_close(scores[name][i], REDUCE[reduction](reference[name]))
        perplexity = REDUCE[reduction](reference["loss"]).exp()  # overflows for a sum
        perplexity = perplexity.clamp_max(torch.finfo(torch.float32).max)
        torch.testing.assert_close(scores["perplexity"][i], perplexity, rtol=1e-4, atol=0)


def test_a_score_does_not_depend_on_the_rest_of_the_batch(backend, tiny_model, tokenizer):
    model = tiny_model("Gemma2")

    def run(samples, batch_tokens=8192):
        scores = acqcore.score(model, samples, NAMES, tokenizer=tokenizer, backend=backend, batch_tokens=batch_tokens)
        return torch.stack([scores[name] for name in NAMES])

    together = run(TEXTS)
    alone = torch.cat([run([text]) for text in TEXTS], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    torch.testing.assert_close(together, run(TEXTS[::-1]).flip(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(together, run(TEXTS, batch_tokens=1), rtol=1e-5, atol=0)
    assert torch.equal(together, run(TEXTS))


def test_one_trunk_forward_and_one_head_pass_per_batch(tiny_model, tokenizer, monkeypatch):
    module = sys.modules["acqcore.scoring.run"]
    passes: list[int] = []
    real = module.row_stats
    monkeypatch.setattr(
        module, "row_stats", lambda hidden, *a, **k: (passes.append(len(hidden)), real(hidden, *a, **k))[1]
    )
    student = acqcore.Student.from_model(tiny_model("Llama"), tokenizer=tokenizer)
    forwards: list[torch.Size] = []
    student.trunk.register_forward_pre_hook(
        lambda _, args, kwargs: forwards.append((args[0] if args else kwargs["input_ids"]).shape), with_kwargs=True
    )
    acqcore.score(student, SAMPLES, NAMES, backend="eager")  # does the once-per-model work
    passes.clear()
    forwards.clear()
    scores = acqcore.score(student, SAMPLES, NAMES, backend="eager", batch_tokens=70)
    assert all(shape.numel() <= 70 for shape in forwards)
    assert 1 < len(forwards) < len(SAMPLES)
    assert [shape[1] for shape in forwards] == sorted((s[1] for s in forwards), reverse=True)
    head_passes = [n for n in passes if n]
    assert len(head_passes) == len(forwards)
    assert sum(head_passes) == scores.n_tokens.sum()  # scored rows only


def test_tensors_padded_on_either_side(tiny_model, tokenizer):
    model = tiny_model("GPT2")
    texts = TEXTS[:3]
    whole = acqcore.score(model, texts, NAMES, tokenizer=tokenizer, backend="eager")
    for side in ("left", "right"):
        batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
        scores = acqcore.score(model, batch, NAMES, backend="eager")
        for name in NAMES:
            assert torch.equal(scores[name], whole[name])


def test_rows_score_as_their_texts(tiny_model, tokenizer):
    """Also holds for acquisitions with their own backward pass."""
    model, names = tiny_model("Llama"), ("entropy", "grad_norm")
    rows = acqcore.encode(SAMPLES, tokenizer, vocab_size=320, limit=64)
    options: Any = {"acquisition_args": {"grad_norm": {"parameters": "all"}}}
    found = acqcore.score(model, rows, names, **options)
    expected = acqcore.score(model, SAMPLES, names, tokenizer=tokenizer, **options)
    for name in names:
        assert found[name].tolist() == expected[name].tolist()


def test_the_model_is_left_as_found(tiny_model, tokenizer):
    model = tiny_model("GPT2", resid_pdrop=0.5).train()
    model.transformer.h[0].eval()
    model.transformer.wpe.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    flags = [module.training for module in model.modules()]
    state = {name: (p.clone(), p.requires_grad, p.dtype, p.device) for name, p in model.named_parameters()}
    first = acqcore.score(model, TEXTS, tokenizer=tokenizer, backend="eager")
    second = acqcore.score(model, TEXTS, tokenizer=tokenizer, backend="eager")
    assert torch.equal(first["entropy"], second["entropy"])  # no dropout
    assert [module.training for module in model.modules()] == flags
    assert torch.is_grad_enabled()
    for name, p in model.named_parameters():
        before, *flags_of_p = state[name]
        assert torch.equal(p, before)
        assert [p.requires_grad, p.dtype, p.device] == flags_of_p
    assert (model.lm_head.weight.grad == 1).all()


@pytest.mark.parametrize("target", ["q_proj", "lm_head"])
def test_peft(target, tiny_model, tokenizer, brute_force, backend):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model("Llama"), peft.LoraConfig(r=4, target_modules=[target])).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    scores = acqcore.score(model, TEXTS, ("loss", "entropy"), tokenizer=tokenizer, backend=backend)
    for i, row in enumerate(encode(TEXTS, tokenizer, vocab_size=320, limit=64)):
        reference = brute_force(model, row.ids, row.targets != -100)
        for name in scores:
            torch.testing.assert_close(scores[name][i], reference[name].mean(), rtol=1e-4, atol=1e-5)


def test_bfloat16_student_with_a_float32_adapter_sum(tiny_model, tokenizer, backend):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["lm_head"])
    model = peft.get_peft_model(tiny_model("Llama"), config).to(torch.bfloat16)
    assert acqcore.score(model, TEXTS, tokenizer=tokenizer, backend=backend).valid.all()


def test_values_that_are_not_finite_invalidate_only_their_sample(backend):
    """Token 5 has a broken hidden state, and token 8 can never be predicted."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(10, 4, generator=generator)
    embedding[5] = torch.nan
    bias = torch.zeros(10)
    bias[8] = -torch.inf
    student = acqcore.Student(lambda ids: embedding[ids], acqcore.Head(torch.randn(10, 4, generator=generator), bias))
    ids = torch.tensor([[1, 2, 3], [1, 5, 3], [1, 8, 3], [1, 3, 5]])
    scores = acqcore.score(student, {"input_ids": ids}, ("entropy", "loss"), backend=backend)
    # the last sample ends in the broken token, which is predicted but predicts nothing
    assert scores["entropy"].isnan().tolist() == [False, True, False, False]
    assert scores["loss"].isnan().tolist() == [False, True, True, False]
    assert scores.valid.tolist() == [True, False, False, True]


def test_a_registered_acquisition_of_the_wrong_shape_is_named(tiny_model, tokenizer):
    with mock.patch.dict(REGISTRY):

        @acqcore.register("wrong_shape")
        def wrong_shape(stats):
            """Not one value per token."""
            return stats.entropy.sum()

        with pytest.raises(ValueError, match=r"acquisition 'wrong_shape': expected it to return a tensor \[\d+\]"):
            acqcore.score(tiny_model("Llama"), TEXTS, "wrong_shape", tokenizer=tokenizer, backend="eager")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"acquisitions": "entropie"}, ValueError, "acquisitions: unknown 'entropie', expected one of"),
        ({"acquisitions": "entropie"}, ValueError, "did you mean 'entropy'?"),
        ({"acquisitions": ()}, ValueError, "acquisitions: expected at least one"),
        ({"acquisitions": 3}, TypeError, "acquisitions: expected a sequence of names, got int"),
        ({"acquisitions": {"entropy": {}}}, TypeError, "acquisitions: expected a sequence of names, got dict"),
        ({"reduction": "median"}, ValueError, "reduction: unknown 'median', expected one of mean, sum, max, topk"),
        ({"topk": 0}, ValueError, "topk: expected an int >= 1, got 0"),
        ({"batch_tokens": 1.5}, TypeError, "batch_tokens: expected an int, got float"),
        ({"backend": "gpu"}, ValueError, "backend: unknown 'gpu'"),
        ({"samples": ["a fox", ""]}, ValueError, "samples[1]: nothing to score"),
        ({"samples": ["fox " * 80]}, ValueError, "the student takes at most 64"),
        ({"tokenizer": None}, TypeError, "tokenizer: text samples require one, got none"),
        ({"student": 3}, TypeError, "student: expected acqcore.Student"),
    ],
)
def test_bad_arguments(options, error, message, tiny_model, tokenizer):
    arguments = {"student": tiny_model("Llama"), "samples": TEXTS, "tokenizer": tokenizer, "backend": "eager"}
    with pytest.raises(error, match=re.escape(message)):
        acqcore.score(**(arguments | options))


def test_a_backend_that_does_not_serve_is_known_before_any_forward(tiny_model):
    student = acqcore.Student.from_model(tiny_model("Llama").double(), verify=False)
    student.trunk.register_forward_pre_hook(lambda *_: pytest.fail("the trunk ran"))
    with pytest.raises(ValueError, match="backend 'cpu' supports"):
        acqcore.score(student, {"input_ids": torch.ones(1, 4, dtype=torch.int64)}, backend="cpu")


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [("mean", [1.5, NAN, -5.5]), ("sum", [3, NAN, -11]), ("max", [2, NAN, -5]), ("topk", [2, NAN, -5])],
)
def test_one_nan_makes_its_sample_nan(reduction, expected):
    values = torch.tensor([1, 2, NAN, 4, -5, -6], dtype=torch.float64)
    found = reduce(values, [2, 2, 2], reduction, topk=1)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), equal_nan=True)


def test_kept_tokens_do_not_keep_their_batch(tiny_model, tokenizer):
    scores = acqcore.score(tiny_model("Llama"), SAMPLES, "entropy", tokenizer=tokenizer, keep_tokens=True)
    kept = scores.tokens["entropy"]
    assert [len(values) for values in kept] == scores.n_tokens.tolist()
    assert [values.untyped_storage().nbytes() for values in kept] == [4 * len(values) for values in kept]


def test_no_samples(tiny_model, tokenizer):
    scores = acqcore.score(tiny_model("Llama"), [], tokenizer=tokenizer, backend="eager", keep_tokens=True)
    assert scores["entropy"].shape == (0,)
    assert scores.tokens["entropy"] == []
    assert "0 samples" in repr(scores)


def test_progress_is_shown_on_request(tiny_model, tokenizer, capsys):
    model = tiny_model("Llama")
    for show in (None, False):  # stderr is not a terminal here
        acqcore.score(model, TEXTS, tokenizer=tokenizer, backend="eager", progress=show)
        assert capsys.readouterr().err == ""
    acqcore.score(model, TEXTS, tokenizer=tokenizer, backend="eager", progress=True)
    assert "scoring" in capsys.readouterr().err


@pytest.mark.parametrize("reduction", ["sum", "max", "mean"])
def test_a_perplexity_beyond_float32_is_its_largest(reduction):
    """The most surprising sample keeps the largest value; an infinite one would be invalid and never chosen."""
    weight = torch.zeros(8, 4)
    weight[0] = 60.0
    student = acqcore.Student(torch.nn.Embedding.from_pretrained(torch.ones(8, 4)), acqcore.Head(weight))
    samples = {
        "input_ids": torch.tensor([[1, 2, 3, 4], [1, 0, 0, 0]]),
        "labels": torch.tensor([[-100, 2, 3, 4], [-100, 0, 0, 0]]),
    }
    scores = acqcore.score(student, samples, "perplexity", reduction=reduction, keep_tokens=True)
    assert scores.valid.tolist() == [True, True]
    assert scores["perplexity"].tolist() == [torch.finfo(torch.float32).max, 1.0]
    assert bool(scores.tokens["perplexity"][0].isfinite().all())
