"""Errors for bad input name the argument, its value and the expected value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import acqcore
from acqcore.acquisitions import DrawOptions, LinearOptions
from acqcore.fisher import fisher_grad

H = torch.zeros(3, 4)
HEAD = acqcore.Head(torch.zeros(10, 4))
Y = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("hidden", "error", "message"),
    [
        (torch.zeros(3, 5), ValueError, r"hidden: .* D = 4 as in head.weight \[10, 4\], got float32 .* \[3, 5\]"),
        (torch.zeros(4), ValueError, r"hidden: expected shape \[N, D\], got float32 tensor of shape \[4\]"),
        (torch.zeros(2, 3, 4), ValueError, r"hidden: expected shape \[N, D\]"),
        (torch.zeros(3, 4, dtype=torch.int64), TypeError, r"hidden: expected float32, .*int64 tensor of shape"),
        ([[0.0] * 4], TypeError, r"hidden: expected a tensor \[N, D\], got list"),
        (torch.zeros(3, 4).to_sparse(), TypeError, "hidden: expected a dense tensor, got layout torch.sparse_coo"),
        (torch.nested.nested_tensor([H, H]), TypeError, "hidden: expected a dense tensor, got layout nested"),
        (torch.zeros(3, 4, device="meta"), ValueError, "hidden: is on meta but head.weight is on cpu"),
    ],
)  # fmt: skip
def test_hidden(hidden, error, message):
    with pytest.raises(error, match=message):
        acqcore.row_stats(hidden, HEAD)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (Y.int(), TypeError, r"targets: expected an int64 tensor \[N\], got int32"),
        ([0, 1, 2], TypeError, r"targets: expected an int64 tensor \[N\], got list"),
        (Y[:2], ValueError, r"targets: expected \[N\] with N = 3 as in hidden, got int64 tensor of shape \[2\]"),
        (Y + 10, ValueError, r"targets: expected values in \[0, 10\) or -100 \(ignored\), got 10 at row 0"),
        (torch.tensor([0, 3, -1]), ValueError, "got -1 at row 2"),
    ],
)
def test_targets(targets, error, message, backend):
    with pytest.raises(error, match=message):
        acqcore.row_stats(H, HEAD, targets, backend=backend)
    with pytest.raises(error, match=message.replace("hidden", "logits")):
        acqcore.logit_stats(torch.zeros(3, 10), targets, backend=backend)


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"logits: expected shape \[N, V\]"),
        (torch.zeros(3, 0), ValueError, r"logits: expected \[N, V\] with V >= 1"),
        (torch.zeros(3, 4, dtype=torch.bool), TypeError, "logits: expected float32"),
    ],
)
def test_logits(logits, error, message):
    with pytest.raises(error, match=message):
        acqcore.logit_stats(logits)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperature(temperature):
    with pytest.raises(ValueError, match="temperature: expected a"):
        acqcore.row_stats(H, HEAD, temperature=temperature)
    with pytest.raises(ValueError, match="temperature: expected a"):
        acqcore.logit_stats(torch.zeros(1, 2), temperature=temperature)


def test_head_type():
    with pytest.raises(TypeError, match=r"head: expected acqcore\.Head, got float32"):
        acqcore.row_stats(H, HEAD.weight)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": torch.zeros(3)}, ValueError, r"weight: expected shape \[V, D\]"),
        ({"weight": torch.zeros(0, 4)}, ValueError, "with V >= 1, got V = 0"),
        ({"weight": torch.zeros(3, 3, dtype=torch.int8)}, TypeError, "weight: expected float32"),
        ({"bias": torch.zeros(9)}, ValueError, r"bias: expected \[V\] with V = 10 as in weight, got float32"),
        ({"bias": torch.zeros(10, dtype=torch.int64)}, TypeError, "bias: expected float32"),
        ({"softcap": 0.0}, ValueError, "softcap: expected a number > 0, got 0.0"),
        ({"softcap": "30"}, TypeError, "softcap: expected a number, got str"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number"),
        ({"vocab_start": -1}, ValueError, "vocab_start: expected an index >= 0"),
        ({"vocab_start": 1.5}, TypeError, "vocab_start: expected an int, got float"),
        ({"vocab_size": 20.5}, TypeError, "vocab_size: expected an int, got float"),
        ({"vocab_start": 5, "vocab_size": 5}, ValueError, "vocab_size: expected more than vocab_start = 5, got 5"),
        ({"group": "world"}, TypeError, r"group: expected a torch\.distributed\.ProcessGroup or None, got str"),
    ],
)  # fmt: skip
def test_head(arguments, error, message):
    with pytest.raises(error, match=message):
        acqcore.Head(**{"weight": torch.zeros(10, 4), **arguments})


def test_merge():
    stats = acqcore.row_stats(H, HEAD)
    with pytest.raises(ValueError, match="other: expected 3 rows, got 2"):
        stats.merge(acqcore.row_stats(H[:2], HEAD))
    with pytest.raises(ValueError, match="other: expected both sides with targets"):
        stats.merge(acqcore.row_stats(H, HEAD, Y))
    with pytest.raises(TypeError, match="other: expected RowStats, got dict"):
        stats.merge({})


def test_errors_reach_through_compile():
    compiled = torch.compile(lambda y: acqcore.row_stats(H, HEAD, y).entropy, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match="got 99 at row 1"):
        compiled(torch.tensor([0, 99, 0]))
    assert torch.is_grad_enabled()


def test_a_head_whose_memory_was_freed():
    """FSDP frees a parameter's storage between forwards; a kernel would read freed memory."""
    head = acqcore.Head(torch.randn(30, 8))
    hidden, targets = torch.randn(4, 8), torch.tensor([1, 2, 3, 4])
    head.weight.untyped_storage().resize_(0)
    for call in (acqcore.row_stats, acqcore.hidden_grad, acqcore.hidden_grad_norm):
        with pytest.raises(ValueError, match=r"head\.weight: its storage was freed"):
            call(hidden, head, targets)


@pytest.mark.parametrize("kind", [np.int64, np.uint8])
def test_integers_of_numpy_are_ints(kind, tiny_model):
    """In their own arithmetic, -5 is 251 in eight bits, and 2^63 does not fit into 64."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 8, generator=generator), torch.randn(40, 8, generator=generator)
    targets, offsets = torch.arange(6), torch.tensor([0, 2, 6])
    student = acqcore.Student.from_model(tiny_model("Llama"))
    samples = {"input_ids": torch.arange(24).view(2, 12), "labels": torch.tensor([[-100] * 8 + [9, 3, 2, 1]] * 2)}
    arguments = {
        "entropy": {},
        "grad_norm": {"parameters": 1},
        "gradient_diversity": {"dim": 64, "seed": 7},
        "mutual_information": {"probes": 3, "layers": 1, "seed": 200},
        "expected_entropy": {"draws": 3, "block": 8, "seed": 5},
    }

    def results(integer):
        head = acqcore.Head(weight, vocab_start=integer(3), vocab_size=integer(40))
        options = {name: {k: integer(v) for k, v in given.items()} for name, given in arguments.items()}
        yield head.vocab_size, head.weight
        yield acqcore.select(weight, integer(5), "badge", seed=integer(3))
        yield acqcore.Archive(integer(9)).state_dict()["capacity"]
        yield acqcore.mutual_information(
            hidden, acqcore.Head(weight), draws=integer(3), form="block", block=integer(4), seed=integer(2)
        ).mutual_information
        yield acqcore.grad_sketch(hidden, acqcore.Head(weight), targets, offsets, dim=integer(32), seed=integer(9))
        yield fisher_grad(hidden, acqcore.Head(weight), probes=integer(2), seed=integer(9))
        yield acqcore.prompt_embedding(student, samples, max_length=integer(5), batch_tokens=integer(100))
        scores = acqcore.score(
            student, samples, list(arguments), acquisition_args={k: v for k, v in options.items() if v},
            topk=integer(2), batch_tokens=integer(200), max_length=integer(10),
        )  # fmt: skip
        yield from scores.values()
        made = acqcore.epig_reference(student, samples, layers=integer(1), probes=integer(2), dim=integer(16))
        yield made.sketches
        yield acqcore.epig(student, samples, made, probes=integer(2))

    for found, expected in zip(results(kind), results(int), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [np.float16, np.array, torch.tensor])
def test_floats_of_numpy_and_scalar_tensors_are_floats(kind, tiny_model):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 8, generator=generator), torch.randn(40, 8, generator=generator)
    targets, offsets = torch.arange(6), torch.tensor([0, 2, 6])
    student = acqcore.Student.from_model(tiny_model("Llama"))
    samples = {"input_ids": torch.arange(24).view(2, 12)}
    arguments = {
        "mutual_information": {"posterior": "isotropic", "variance": 0.25},
        "expected_entropy": {"draws": 2, "dropout": 0.5},
        "gradient_diversity": {"dim": 64, "ridge": 0.125},
    }

    def results(number):
        head, warm = acqcore.Head(weight, softcap=number(30.0), scale=number(0.5)), {"temperature": number(2.0)}
        yield acqcore.row_stats(hidden, head, **warm).entropy
        yield acqcore.logit_stats(hidden, **warm).entropy
        yield acqcore.hidden_grad_norm(hidden, head, targets, **warm)
        yield acqcore.head_grad_norm(hidden, head, targets, offsets, **warm)
        yield acqcore.grad_sketch(hidden, head, targets, offsets, dim=32, **warm)
        yield fisher_grad(hidden, head, probes=2, **warm)
        yield acqcore.mutual_information(hidden, head, dropout=number(0.5)).mutual_information
        yield acqcore.select(weight, 5, "log_det", ridge=number(0.125))
        yield acqcore.Archive(9, ridge=number(0.125)).novelty(weight)
        given = {name: {k: number(v) if type(v) is float else v for k, v in o.items()} for name, o in arguments.items()}
        yield from acqcore.score(student, samples, list(arguments), acquisition_args=given).values()
        made = acqcore.laplace_posterior(student, samples, observations=number(4.0), damping=number(0.5))
        yield from (factor for of_weight in made.factors.values() for factor in of_weight)
        reference = acqcore.epig_reference(student, samples, dim=16)
        yield acqcore.epig(student, samples, reference, variance=number(0.25))

    for found, expected in zip(results(kind), results(float), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("value", [True, np.True_, np.array([2.0]), torch.tensor([2.0]), np.complex64(1), "2"])
def test_values_that_are_not_numbers(value):
    with pytest.raises(TypeError, match="temperature: expected a number, got"):
        acqcore.row_stats(H, HEAD, temperature=value)


@pytest.mark.parametrize(
    "value", [10**400, -(10**400), float("inf"), float("nan")], ids=["large", "small", "inf", "nan"]
)
def test_numbers_that_are_not_finite(value):
    with pytest.raises(ValueError, match="scale: expected a finite number, got"):
        acqcore.Head(torch.zeros(10, 4), scale=value)


@pytest.mark.parametrize("value", [True, np.True_, 8.0, np.float64(8), "8", torch.tensor(8)])
def test_values_that_are_not_integers(value):
    for check in (
        lambda: acqcore.select(torch.zeros(9), value),
        lambda: DrawOptions(draws=value),
        lambda: LinearOptions(layers=1, probes=value),
        lambda: LinearOptions(layers=1, seed=value),
    ):
        with pytest.raises(TypeError, match=r"(k|draws|probes|seed): expected an int, got"):
            check()
