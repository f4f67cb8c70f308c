"""Gram matrices and unnormalised sums formed in one pass over the head's weights with the statistics: hard inputs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import pytest
import torch

import acqcore
from acqcore import head_grad
from acqcore.backends import Dropout, Gram, HeadRows, get as get_backend
from acqcore.backends.cpu import Cpu
from acqcore.bayes import dropout_rows, mixture_stats
from acqcore.head_grad import delta_visit, loss_weights
from acqcore.head_visit import visit
from acqcore.row_stats import RowStats, empty_state
from acqcore.signs import rotated_places
from acqcore.testing import Case, case_from_logits, exact_hidden_grad, random_case, worst_errors

#: Rows per sample; the longer lengths are not multiples of a block or panel.
LENGTHS = (1, 2, 17, 40, 21, 5)
Bounds = tuple[tuple[int, int], ...]
BOUNDS: Bounds = tuple((sum(LENGTHS[:i]), sum(LENGTHS[: i + 1])) for i in range(len(LENGTHS)))
N = sum(LENGTHS)
ISAS = [isa for isa, missing in acqcore._core.isas() if not missing]


def _rising() -> Case:
    """Each row's logits rise or fall across the tiles at the row's own pace.

    There are enough columns for the cpu backend's partial sums to cover several tiles on every instruction set.
    """
    g = torch.Generator().manual_seed(3)
    steps = torch.arange(16000.0) / 1600
    pace = torch.linspace(-1, 1, N)[:, None]
    logits = steps * pace + torch.randn(N, 16000, generator=g)
    return case_from_logits(logits, torch.randint(0, 16000, (N,), generator=g))


def _repeated() -> Case:
    """Two targets for all rows, and similar rows, so that cross-token terms are as large as they can be."""
    case = random_case(N, 40, 700)
    hidden = case.hidden[:1] + 0.01 * case.hidden
    return Case(hidden, case.head, torch.arange(N) % 2 * 600)


def _with_targets(top: bool) -> Case:
    """Every target has the largest logit of its row, or every target has the smallest."""
    case = random_case(N, 48, 1000, std=6.0)
    z = case.head.logits(case.hidden)
    return Case(case.hidden, case.head, z.argmax(dim=1) if top else z.argmin(dim=1))


def _impossible() -> Case:
    """Whole tiles of -inf logits, including the first and the last."""
    case = random_case(N, 40, 2000, bias=True)
    case.head.bias[:1100] = -math.inf
    case.head.bias[1900:] = -math.inf
    return Case(case.hidden, case.head, torch.arange(N) + 1100)


CASES = {
    "rising": _rising,
    "repeated targets": _repeated,
    "top targets": lambda: _with_targets(True),
    "far targets": lambda: _with_targets(False),
    "-inf tiles": _impossible,
    "one tile and a column": lambda: random_case(N, 24, 385),
    "few columns": lambda: random_case(N, 24, 7),
    "one column": lambda: random_case(N, 24, 1),
    "deep": lambda: random_case(N, 1400, 900),
    "flat": lambda: random_case(N, 40, 5000, std=0.01),
    "std 30": lambda: random_case(N, 64, 3000, std=30.0),
    "softcap": lambda: random_case(N, 40, 1300, std=20.0, softcap=10.0),
    "everything": lambda: random_case(N, 41, 1500, bias=True, softcap=15.0, scale=0.5, temperature=1.3),
}


def _case(name: str) -> Case:
    case = CASES[name]()
    case.targets[[2, 7, 30, N - 1]] = -100
    return case


def _weights(case: Case) -> torch.Tensor:
    return torch.linspace(0.1, 2, len(case.hidden)).double() * (case.targets != -100)


def _autograd(case: Case, weights: torch.Tensor, bounds: Bounds = BOUNDS) -> torch.Tensor:
    """Norm of each sample's gradient in weight and bias, ``[B]``, by autograd in float64."""
    exact = case.to(torch.float64)
    weight = exact.head.weight.requires_grad_()
    bias = None if exact.head.bias is None else exact.head.bias.double().requires_grad_()
    head = dataclasses.replace(exact.head, weight=weight, bias=bias)
    norms = []
    for begin, end in bounds:
        z = head.logits(exact.hidden[begin:end], exact.temperature)
        loss = torch.nn.functional.cross_entropy(z, exact.targets[begin:end], ignore_index=-100, reduction="none")
        parameters = [weight] if bias is None else [weight, bias]
        gradients = torch.autograd.grad((loss * weights[begin:end]).sum(), parameters)
        norms.append(sum(g.nan_to_num(0).square().sum() for g in gradients).sqrt())
    return torch.stack(norms)


@functools.cache
def _expected_norms(name: str, dtype: torch.dtype) -> torch.Tensor:
    """Computed once for all implementations and forms, because it is slower than they are."""
    case = _case(name).to(dtype)
    return _autograd(case, _weights(case))


@functools.cache
def _expected_hidden_grad(name: str, dtype: torch.dtype) -> torch.Tensor:
    return exact_hidden_grad(_case(name).to(dtype))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("form", ["gram", "direct"])
@pytest.mark.parametrize("name", CASES)
def test_norms(name, form, dtype, rtol, implementation):
    case = _case(name).to(dtype)
    chosen = get_backend(implementation)
    visited = visit(case.hidden, case.head, case.targets, BOUNDS, case.temperature, chosen, form)
    got = visited.grad_norm(_weights(case)).double()
    torch.testing.assert_close(got, _expected_norms(name, dtype), rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_hidden_grad(name, dtype, implementation):
    """Each row's error is within 1e-4 of the gradient's norm, or within float32's rounding of the sum over weights."""
    case = _case(name).to(dtype)
    got = acqcore.hidden_grad(
        case.hidden, case.head, case.targets, temperature=case.temperature, backend=implementation
    )
    expected = _expected_hidden_grad(name, dtype)
    error = (got.double() - expected).norm(dim=1)
    assert (error <= 1e-4 * expected.norm(dim=1) + 1e-6 * case.head.weight.double().norm(dim=1).mean()).all()


@pytest.mark.parametrize("name", CASES)
def test_statistics_are_those_of_row_stats(name, implementation):
    """Forming a Gram matrix or an unnormalised sum does not change a bit of the statistics."""
    case = _case(name)
    chosen = get_backend(implementation)
    alone = case.run(implementation)
    with_gram = visit(case.hidden, case.head, case.targets, BOUNDS, case.temperature, chosen, "gram").stats
    assert torch.equal(with_gram.state.nan_to_num(7), alone.state.nan_to_num(7))
    assert torch.equal(with_gram.max_index, alone.max_index)
    state, index = empty_state(case.hidden)
    rows = HeadRows(case.hidden, case.head, case.targets, case.temperature, state, index)
    chosen.delta_sums(rows, torch.empty_like(case.hidden))
    assert torch.equal(state.nan_to_num(7), alone.state.nan_to_num(7))
    assert torch.equal(index, alone.max_index)


@pytest.mark.parametrize("beside", ["statistics", "dL/dh", "dL/dh and a sketch"])
@pytest.mark.parametrize("length", [N // 2, N])  # N: longer than the cpu backend leaves unpacked, in all but AVX-512
@pytest.mark.parametrize("name", ["rising", "repeated targets", "everything", "-inf tiles", "std 30", "deep"])
def test_products_are_their_definition(name, length, beside, implementation):
    """Grams without the targets' columns match float64 entry by entry, are symmetric, and are zero in ignored rows."""
    case = _case(name)
    got = _products(case, length, beside, implementation)
    expected = _expected_products(name, length)
    scale = expected.diagonal(dim1=1, dim2=2).sqrt()
    bound = scale[:, :, None] * scale[:, None, :]
    assert ((got.double() - expected).abs() <= 1e-4 * bound + 1e-30).all()
    assert torch.equal(got, got.mT)
    ignored = (case.targets == -100).view(-1, length)
    assert (got[ignored] == 0).all()


def _products(case: Case, length: int, beside: str, backend: str) -> torch.Tensor:
    """Gram matrices of the samples of ``length`` rows, ``[N / length, length, length]``.

    They do not change a bit of the statistics and sums beside them.
    """
    bounds = tuple((begin, begin + length) for begin in range(0, N, length))
    chosen = get_backend(backend)

    def run(gram: Gram | None) -> list[torch.Tensor]:
        state, index = empty_state(case.hidden)
        rows = HeadRows(case.hidden, case.head, case.targets, case.temperature, state, index)
        if beside == "statistics":
            chosen.row_stats(rows, gram)
            return [state, index]
        values, hashed = torch.empty_like(case.hidden), None
        places = rotated_places(len(case.head.weight), 50, 3, 0)
        if beside == "dL/dh and a sketch":
            hashed = torch.empty(N, 50, dtype=case.hidden.dtype)
        chosen.delta_sums(rows, values, places, hashed, gram)
        return [state, index, values, *([] if hashed is None else [hashed])]

    gram = Gram.empty(bounds, case.hidden.dtype, case.hidden.device)
    gram.products.fill_(torch.nan)
    for with_gram, alone in zip(run(gram), run(None), strict=True):
        torch.testing.assert_close(with_gram, alone, rtol=0, atol=0, equal_nan=True)
    return gram.products.view(-1, length, length)


@functools.cache
def _expected_products(name: str, length: int) -> torch.Tensor:
    return _products(_case(name).to(torch.float64), length, "statistics", "eager")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sample_does_not_depend_on_its_batch(threads, dtype, isa, monkeypatch, set_threads):
    """Values are the same bit for bit in any batch and with any number of threads."""
    monkeypatch.setenv("ACQCORE_ISA", isa)
    case = random_case(700, 40, 5000).to(dtype)
    offsets = torch.tensor([0, 3, 40, 41, 350, 700])
    set_threads(threads)
    whole = acqcore.head_grad_norm(case.hidden, case.head, case.targets, offsets, form="gram", backend="cpu")
    grads = acqcore.hidden_grad(case.hidden, case.head, case.targets, backend="cpu")
    set_threads(1)
    for i, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        own, head, y = case.hidden[begin:end], case.head, case.targets[begin:end]
        alone = acqcore.head_grad_norm(own, head, y, torch.tensor([0, end - begin]), form="gram", backend="cpu")
        assert alone[0] == whole[i]
        assert torch.equal(acqcore.hidden_grad(own, head, y, backend="cpu"), grads[begin:end])


@pytest.mark.parametrize("isa", [isa for isa, missing in acqcore._core.isas() if not missing and isa.endswith("-amx")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_tiles_multiply_split_factors(dtype, isa, monkeypatch):
    """AMX splits factors, and weights other than bfloat16, in two, so the last bits differ from the vector code's."""
    grads, states = [], []
    case = random_case(70, 41, 500).to(dtype)
    for name in (isa, isa.removesuffix("-amx") + "-bf16"):
        monkeypatch.setenv("ACQCORE_ISA", name)
        grads.append(acqcore.hidden_grad(case.hidden, case.head, case.targets, backend="cpu"))
        states.append(acqcore.row_stats(case.hidden, case.head, case.targets, backend="cpu").state)
    assert not torch.equal(*grads)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=2e-5 * float(grads[0].abs().max()))
    assert torch.equal(*states) == (dtype != torch.bfloat16)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("std", [1.0, 30.0])
def test_long_samples(std, isa, monkeypatch):
    """Grams of long samples are formed in tile registers if available, for float32 too; short ones never are."""
    monkeypatch.setenv("ACQCORE_ISA", isa)
    bounds = ((0, 300), (300, 305), (305, 700))
    case = random_case(700, 40, 2000, std=std)
    case.targets[::3] = 17  # shared by a third of the rows, so cross terms are large
    case.targets[[0, 299, 301, 500]] = -100
    weights = _weights(case)
    made = visit(case.hidden, case.head, case.targets, bounds, 1.0, get_backend("cpu"), "gram")
    torch.testing.assert_close(made.grad_norm(weights).double(), _autograd(case, weights, bounds), rtol=1e-5, atol=0)
    monkeypatch.setenv("ACQCORE_ISA", isa.replace("-amx", "-bf16"))
    vectors = visit(case.hidden, case.head, case.targets, bounds, 1.0, get_backend("cpu"), "gram")
    torch.testing.assert_close(made.gram.products, vectors.gram.products, rtol=3e-5, atol=1e-20)
    assert torch.equal(made.gram.products, vectors.gram.products) == (not isa.endswith("-amx"))
    short = slice(300 * 300, 300 * 300 + 5 * 5)
    assert torch.equal(made.gram.products[short], vectors.gram.products[short])
    torch.testing.assert_close(made.stats.state, vectors.stats.state, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["everything", "-inf tiles"])
def test_shards_add_up(name, implementation):
    """Shares from each shard's Gram and the whole vocabulary's state add up, even if the first has no finite logit."""
    case = _case(name)
    chosen, head = get_backend(implementation), case.head
    weights = _weights(case)
    whole = visit(case.hidden, head, case.targets, BOUNDS, case.temperature, chosen, "gram")
    expected = whole.grad_norm(weights).double().square()
    parts = []
    for begin, end in ((0, 400), (400, len(head.weight))):
        shard = acqcore.Head(
            head.weight[begin:end], head.bias[begin:end], head.softcap, head.scale, begin, len(head.weight)
        )
        parts.append(visit(case.hidden, shard, case.targets, BOUNDS, case.temperature, chosen, "gram"))
    stats = parts[0].stats.merge(parts[1].stats)
    shares = [dataclasses.replace(part, stats=stats).grad_norm(weights).double().square() for part in parts]
    torch.testing.assert_close(shares[0] + shares[1], expected, rtol=1e-5, atol=0)


def _short_and_long(name: str, dtype: torch.dtype) -> list[tuple[Case, Bounds]]:
    """Rows of several samples, and of one that is so long that its Gram is formed in tile registers."""
    case = dataclasses.replace(_case(name), temperature=1.0).to(dtype)
    long = dataclasses.replace(case, hidden=case.hidden.repeat(4, 1)[:300], targets=case.targets.repeat(4)[:300])
    return [(case, BOUNDS), (long, ((0, 300),))]


@functools.cache
def _expected_of_short_and_long(name: str, dtype: torch.dtype) -> list[tuple[RowStats, torch.Tensor]]:
    cases = _short_and_long(name, dtype)
    return [(rows.oracle(), _autograd(rows, _weights(rows), bounds)) for rows, bounds in cases]


@pytest.mark.parametrize(
    ("block", "dtype", "isa"),
    [
        *((block, dtype, isa) for block, dtype in ((16, torch.float32), (32, torch.bfloat16)) for isa in ISAS),
        (7, torch.float32, ISAS[-1]),
        (5, torch.bfloat16, ISAS[-1]),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "name", ["rising", "repeated targets", "-inf tiles", "one tile and a column", "one column", "deep", "everything"]
)
def test_draws_share_the_pass(name, block, dtype, isa, monkeypatch):
    """Block dropout's draws come with the statistics and norms of the rows without dropout, and are those of a call of
    their own bit for bit; rows of long samples too."""
    monkeypatch.setenv("ACQCORE_ISA", isa)
    cases, expected = _short_and_long(name, dtype), _expected_of_short_and_long(name, dtype)
    for (rows, bounds), (oracle, expected_norms) in zip(cases, expected, strict=True):
        key = torch.arange(len(rows.hidden))
        dropout = Dropout(0.2, "block", block, 3, torch.zeros_like(key), key)
        drawn, found = dropout_rows(rows.hidden, rows.head, dropout, 5, rows.targets)
        got = visit(rows.hidden, rows.head, rows.targets, bounds, 1.0, get_backend("cpu"), "gram", draws=drawn)
        alone = mixture_stats(rows.hidden, (rows.head,), dropout, 5, rows.targets, "cpu")
        assert torch.equal(found.state.nan_to_num(7), alone.state.nan_to_num(7))
        assert torch.equal(found.votes, alone.votes)
        errors = worst_errors(got.stats, oracle)
        assert max(errors.values()) <= 1, errors
        norms = got.grad_norm(_weights(rows)).double()
        tolerance = 1e-4 if dtype == torch.float32 else 1e-3
        torch.testing.assert_close(norms, expected_norms, rtol=tolerance, atol=1e-12)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_gradients_share_the_pass(backend, monkeypatch):
    """Norms, dL/dh and sketches of samples that are sketched in several parts are those of their own calls.

    The fourth sample is longer than a part but has a Gram matrix; the fifth has none.
    """
    monkeypatch.setattr(head_grad, "SKETCH_ROWS", 64)
    case = random_case(520, 48, 60)
    offsets = torch.tensor([0, 40, 70, 71, 201, 501, 520])
    assert 130 < get_backend("cpu").longest_gram(48, torch.float32) < 300
    bounds = tuple(itertools.pairwise(offsets.tolist()))
    weights, _ = loss_weights(case.targets, bounds, "mean")
    rows = case.hidden, case.head, case.targets
    visited, hidden_grads, sketches = delta_visit(
        *rows, bounds, weights, 1.0, get_backend(backend), norms=True, with_hidden=True, sketch=(64, 5)
    )
    norms = acqcore.head_grad_norm(*rows, offsets, backend="eager")
    torch.testing.assert_close(visited.grad_norm(weights), norms, rtol=1e-5, atol=0)
    expected = acqcore.hidden_grad(*rows, backend="eager")
    torch.testing.assert_close(hidden_grads, expected, rtol=1e-4, atol=1e-5)
    expected = acqcore.grad_sketch(*rows, offsets, dim=64, seed=5, backend="eager")
    torch.testing.assert_close(sketches, expected, rtol=1e-4, atol=1e-5)
    expected = acqcore.row_stats(*rows, backend=backend).state
    torch.testing.assert_close(visited.stats.state, expected, rtol=0 if backend == "cpu" else 1e-5, atol=1e-7)


@pytest.mark.parametrize(("longest", "own_passes"), [(60, 0), (61, 1)])
def test_a_long_sample_does_not_keep_the_other_threads_waiting(longest, own_passes, set_threads, monkeypatch):
    """Of two threads' 120 rows, one sample may take half."""
    set_threads(2)
    asked, original = [], Cpu.row_stats
    monkeypatch.setattr(Cpu, "row_stats", lambda *given: (asked.append(given), original(*given)))
    case = random_case(120, 32, 400)
    offsets = torch.tensor([0, longest, 120])
    bounds = tuple(itertools.pairwise(offsets.tolist()))
    weights, _ = loss_weights(case.targets, bounds, "mean")
    rows = case.hidden, case.head, case.targets
    visited, hidden_grads, _ = delta_visit(
        *rows, bounds, weights, 1.0, get_backend("cpu"), norms=True, with_hidden=True
    )
    assert len(asked) == own_passes
    norms = acqcore.head_grad_norm(*rows, offsets, backend="eager")
    torch.testing.assert_close(visited.grad_norm(weights), norms, rtol=1e-5, atol=0)
    expected = acqcore.hidden_grad(*rows, backend="eager")
    torch.testing.assert_close(hidden_grads, expected, rtol=1e-4, atol=1e-5)


def test_samples_that_are_too_long_take_the_other_form(monkeypatch):
    case = _case("repeated targets")
    cpu = get_backend("cpu")
    monkeypatch.setattr(type(cpu), "longest_gram", lambda *_: 17)
    weights, _ = loss_weights(case.targets, BOUNDS, "sum")
    visited = visit(case.hidden, case.head, case.targets, BOUNDS, 1.0, cpu)
    assert visited.short == (0, 1, 2, 5)
    torch.testing.assert_close(visited.grad_norm(weights).double(), _autograd(case, weights), rtol=1e-4, atol=0)
