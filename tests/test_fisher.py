"""Random cotangents propagated back through the head on every available backend, against their float64 definition."""

from __future__ import annotations

import functools

import pytest
import torch

import acqcore
from acqcore.backends import Probes, get
from acqcore.fisher import fisher_grad, fisher_visit
from acqcore.philox import signs
from acqcore.testing import Case, case_from_logits, random_case

OFFSETS = torch.tensor([0, 1, 3, 20, 60])
IN_PAIRS = ("x86-64-v4-bf16", "x86-64-v4-amx")  # instruction sets with products of bfloat16 pairs
CASES = {
    "plain": lambda: random_case(60, 40, 700),
    "one column": lambda: random_case(60, 16, 1),
    "two columns": lambda: random_case(60, 16, 2),
    "odd shapes": lambda: random_case(60, 33, 257),
    "large logits": lambda: random_case(60, 40, 513, std=30.0),
    "everything": lambda: random_case(60, 41, 600, bias=True, softcap=15.0, scale=0.5, temperature=1.3),
    "softcap": lambda: random_case(60, 40, 513, std=20.0, softcap=30.0),
}


def _case(name: str) -> Case:
    case = CASES[name]()
    case.targets[[5, 9, 59]] = -100
    return case


def _places(offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sample = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
    return sample, torch.arange(int(offsets[-1])) - offsets[sample]


def _tolerance(implementation: str, dtype: torch.dtype) -> float:
    """Relative error of a gradient. Triton rounds a cotangent's entries to the inputs' dtype; its interpreter truncates
    them, so errors have one sign. Products of bfloat16 round square roots of probabilities to it. Where a softcap
    flattens the slopes, either error is larger relative to the gradient."""
    if implementation == "triton":
        return {torch.bfloat16: 2**-6, torch.float16: 2**-10}.get(dtype, 1e-4)
    in_pairs = get(implementation).instruction_set() in IN_PAIRS
    return 2**-7 if in_pairs and dtype == torch.bfloat16 else 1e-4


def _in_tiles(implementation: str) -> bool:
    return "amx" in str(get(implementation).instruction_set())


def _cotangent(
    z: torch.Tensor,  # [N, V] logits
    r: torch.Tensor,  # [N, V] signs
) -> torch.Tensor:
    """``r_a sqrt(p_a (1 - p_a)) (e_a - q) + sqrt(1 - p_a) (sqrt(q) r - q sum sqrt(q) r)``, ``[N, V]`` float64."""
    a = z.argmax(dim=1, keepdim=True)
    others = z.double().scatter(1, a, -torch.inf)
    rest = (others - z.gather(1, a).double()).exp().sum(dim=1, keepdim=True)  # (1 - p_a) / p_a
    q = others.softmax(dim=1).nan_to_num(0)  # a single column has no others
    within = q.sqrt() * r
    within = within - q * within.sum(dim=1, keepdim=True)
    between = (-q).scatter(1, a, 1.0)
    return r.gather(1, a) * rest.sqrt() / (1 + rest) * between + (rest / (1 + rest)).sqrt() * within


def _definition(case: Case, probe: int, seed: int, offsets: torch.Tensor) -> torch.Tensor:
    """``[N, D]`` float64: the cotangent as the vector of a vector-Jacobian product."""
    exact = case.to(torch.float64)
    hidden = exact.hidden.clone().requires_grad_()
    z = exact.head.logits(hidden, exact.temperature)
    r = signs(*_places(offsets), slice(0, z.shape[1]), seed, probe).double() * 2 - 1
    cotangent = _cotangent(z.detach(), r)
    if case.targets is not None:
        cotangent[case.targets == -100] = 0
    return torch.autograd.grad(z, hidden, cotangent)[0]


def _definitions(case: Case, probes: int) -> list[torch.Tensor]:
    return [_definition(case, probe, 7, OFFSETS) for probe in range(probes)]


@functools.cache
def _definitions_of(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Computed once for all implementations, because they are slower than these are."""
    return _definitions(_case(name).to(dtype), 3)


def _assert_probes(got: torch.Tensor, definitions: list[torch.Tensor], rtol: float, atol: float = 0.0) -> None:
    """Each row of every probe ``[P, N, D]`` with seed 7 is within ``rtol`` of its definition's norm, and ``atol``."""
    for of_probe, expected in zip(got.double(), definitions, strict=True):
        assert ((of_probe - expected).norm(dim=1) <= rtol * expected.norm(dim=1) + atol).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_is_the_product_with_the_cotangent(name, dtype, implementation):
    case = _case(name).to(dtype)
    got = fisher_grad(
        case.hidden, case.head, case.targets, probes=3, seed=7, offsets=OFFSETS, temperature=case.temperature,
        backend=implementation,
    )  # fmt: skip
    assert not got[:, case.targets == -100].any()
    # A row with p = 1e-20 for all tokens but one has entries of 1e-10; 1e-9 allows for its float32 logits.
    _assert_probes(got, _definitions_of(name, dtype), _tolerance(implementation, dtype), atol=1e-9)


@pytest.mark.parametrize("isa", [isa for isa, missing in acqcore._core.isas() if not missing and isa in IN_PAIRS])
def test_products_of_bfloat16_round_square_roots(isa, monkeypatch):
    """An error above that of float32 shows that the products take rounded factors."""
    monkeypatch.setenv("ACQCORE_ISA", isa)
    case = _case("plain").to(torch.bfloat16)
    [got] = fisher_grad(case.hidden, case.head, case.targets, seed=7, offsets=OFFSETS, backend="cpu").double()
    expected = _definitions_of("plain", torch.bfloat16)[0]
    scored = case.targets != -100
    error = ((got - expected).norm(dim=1) / expected.norm(dim=1))[scored]
    assert 3e-4 < float(error.max()) <= 2**-7


def test_a_direction_that_all_weights_share_cancels():
    """A cotangent sums to 0 even with rounded entries, so the part that all rows of W share has no effect."""
    case = CASES["plain"]()
    weight = (case.head.weight + 30 * torch.randn(1, 40, generator=torch.Generator().manual_seed(1))).bfloat16()
    head = acqcore.Head(weight)
    shared = Case(case.hidden.bfloat16() / 32, head, case.targets)
    got = fisher_grad(shared.hidden, head, case.targets, seed=7, offsets=OFFSETS, backend="cpu")
    _assert_probes(got, _definitions(shared, 1), rtol=2**-8)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_mixed_dtypes_are_exact(dtypes):
    """Square roots are rounded only if hidden states and weights are both bfloat16."""
    case = CASES["plain"]()
    hidden, weight = case.hidden.to(dtypes[0]), case.head.weight.to(dtypes[1])
    mixed = Case(hidden, acqcore.Head(weight), case.targets)
    got = fisher_grad(hidden, mixed.head, case.targets, seed=7, offsets=OFFSETS, backend="cpu")
    _assert_probes(got, _definitions(mixed, 1), rtol=1e-4)


@pytest.mark.parametrize("gap", [10.0, 30.0, 60.0])
def test_confident_rows_lose_nothing(gap, implementation):
    """Rows with 1 - p down to 1e-24, which is 0 if computed in float32."""
    logits = torch.randn(12, 300, generator=torch.Generator().manual_seed(0)) * 0.5 - gap
    targets = torch.arange(12) * 7
    logits[torch.arange(12), targets] = 0.0
    case = case_from_logits(logits, targets)
    got = fisher_grad(case.hidden, case.head, targets, probes=2, backend=implementation)
    for k in range(2):
        r = signs(*_places(torch.tensor([0, 12])), slice(0, 300), 0, k).double() * 2 - 1
        cotangent = _cotangent(logits, r)
        expected = cotangent @ case.head.weight.double()
        # Tile registers represent weights and factors as sums of two bfloat16, with an error of 2^-17 each.
        atol = 2e-5 if _in_tiles(implementation) else 1e-5
        torch.testing.assert_close(got[k].double(), expected, rtol=1e-4, atol=atol * float(expected.abs().max()))


def test_ties_and_impossible_tokens(implementation):
    """Equal maxima, all logits far below zero, and tokens that a bias of -inf rules out."""
    logits = torch.zeros(3, 9)
    logits[1] = -150.0
    logits[2, [2, 5]] = 40.0
    bias = torch.zeros(9)
    bias[[0, 8]] = -torch.inf
    plain = case_from_logits(logits, torch.ones(3, dtype=torch.int64))
    head = acqcore.Head(plain.head.weight, bias)
    got = fisher_grad(plain.hidden, head, probes=2, backend=implementation)
    for k in range(2):
        r = signs(*_places(torch.tensor([0, 3])), slice(0, 9), 0, k).double() * 2 - 1
        cotangent = _cotangent(logits + bias, r)
        expected = cotangent @ plain.head.weight.double()
        torch.testing.assert_close(got[k].double(), expected, rtol=1e-5, atol=1e-4)


@functools.cache
def _expected_norms(name: str) -> torch.Tensor:
    """``sum_v p_v ||d log p_v / dh||^2`` of each row, computed once for all implementations."""
    exact = CASES[name]().to(torch.float64)
    hidden = exact.hidden.clone().requires_grad_()
    log_p = exact.head.logits(hidden, exact.temperature).log_softmax(dim=1)
    expected = torch.zeros(60, dtype=torch.float64)
    for of_token in log_p.T:
        (g,) = torch.autograd.grad(of_token.sum(), hidden, retain_graph=True)
        expected += of_token.exp().detach() * g.square().sum(dim=1)
    return expected


@pytest.mark.parametrize("name", ["plain", "one column", "everything", "large logits"])
def test_expected_norms_are_exact(name, implementation):
    """``tr(W^T F W)``, the trace of the Fisher matrix in the hidden state."""
    case = _case(name)
    of_rows = Probes(1, 0, *_places(OFFSETS))
    _, grads = fisher_visit(case.hidden, case.head, case.targets, of_rows, case.temperature, get(implementation))
    expected = _expected_norms(name).masked_fill(case.targets == -100, 0)
    torch.testing.assert_close(grads.expected, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_the_same_visit_gives_the_statistics(name, implementation):
    case = _case(name)
    of_rows = Probes(2, 0, *_places(OFFSETS))
    got, _ = fisher_visit(case.hidden, case.head, case.targets, of_rows, case.temperature, get(implementation))
    expected = acqcore.row_stats(
        case.hidden, case.head, case.targets, temperature=case.temperature, backend=implementation
    )
    torch.testing.assert_close(got.state, expected.state, rtol=1e-6, atol=0, equal_nan=True)
    assert torch.equal(got.max_index, expected.max_index)
    assert torch.equal(got.hidden_norm.nan_to_num(-1), expected.hidden_norm.nan_to_num(-1))


@functools.cache
def _rising(step: float) -> tuple[Case, list[torch.Tensor]]:
    plain = random_case(60, 40, 2100)
    bias = torch.arange(2100.0) * step
    bias[:300] = bias[900:1500] = -torch.inf
    case = Case(plain.hidden, acqcore.Head(plain.head.weight, bias), torch.full((60,), 1600))
    return case, _definitions(case, 2)


@pytest.mark.parametrize("step", [0.03, -0.03, 1.0])
def test_a_maximum_that_rises_at_every_tile(step, implementation):
    """Sums are rescaled at every tile and gain the former maximum; some tiles have no finite logit."""
    case, expected = _rising(step)
    got = fisher_grad(case.hidden, case.head, probes=2, seed=7, offsets=OFFSETS, backend=implementation)
    _assert_probes(got, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("bias", [0.0, -torch.inf])
def test_rows_of_certain_tokens(bias, implementation):
    """All other logits are below the largest by 60, 200 or 720, or are -inf; if that is -inf too, the row is NaN."""
    weight = random_case(1, 40, 2100).head.weight
    weight[:, 0] = -1
    weight[0] = 0
    hidden = torch.zeros(60, 40)
    hidden[:, 0] = torch.tensor([60.0, 200.0, 720.0]).repeat(20)
    impossible = torch.full((2100,), bias)
    impossible[0] = 0
    case = Case(hidden, acqcore.Head(weight, impossible), torch.zeros(60, dtype=torch.int64))
    of_rows = Probes(2, 7, *_places(OFFSETS))
    _, grads = fisher_visit(hidden, case.head, case.targets, of_rows, 1.0, get(implementation))
    _assert_probes(grads.gradients, _definitions(case, 2), rtol=1e-4, atol=1e-15)
    assert (grads.expected < 1e-20).all()
    if bias:
        head = acqcore.Head(weight, torch.full((2100,), bias))
        _, grads = fisher_visit(hidden, head, case.targets, of_rows, 1.0, get(implementation))
        assert grads.gradients.isnan().all()


def test_its_second_moment_is_the_fisher_matrix():
    """Averages over the signs of 20,000 positions, for each of three hidden states."""
    case = random_case(3, 8, 50).to(torch.float64)
    got = fisher_grad(case.hidden.repeat(20000, 1), case.head, backend="eager").view(20000, 3, 8)
    weight = case.head.weight
    p = case.head.logits(case.hidden, 1.0).softmax(dim=1)
    for row in range(3):
        centred = weight - p[row] @ weight
        expected = centred.T @ (p[row, :, None] * centred)
        torch.testing.assert_close(
            got[:, row].T @ got[:, row] / len(got), expected, rtol=0, atol=0.03 * float(expected.diag().max())
        )


def test_signs_do_not_depend_on_the_batch(implementation):
    case = random_case(60, 40, 700)
    whole = fisher_grad(case.hidden, case.head, probes=2, offsets=OFFSETS, backend=implementation)
    sample, position = _places(OFFSETS)
    assert not torch.equal(whole[0], whole[1])
    some = signs(sample, position, slice(0, 700), 0, 1)
    for first, last in ((0, 700), (5, 131), (256, 700), (640, 641)):
        assert torch.equal(signs(sample, position, slice(first, last), 0, 1), some[:, first:last])
    assert torch.equal(signs(sample[3:20], position[3:20], slice(0, 700), 0, 1), some[3:20])


def test_signs_are_fair_and_independent():
    row = torch.arange(64)
    of = {
        (seed, probe): signs(torch.zeros_like(row), row, slice(0, 4096), seed, probe).double() * 2 - 1
        for seed in (0, 1)
        for probe in (0, 1)
    }
    for value in of.values():
        assert abs(float(value.mean())) < 0.01
        assert abs(float((value[:, 1:] * value[:, :-1]).mean())) < 0.01
        assert abs(float((value[1:] * value[:-1]).mean())) < 0.01
    values = list(of.values())
    for i in range(4):
        for j in range(i):
            assert abs(float((values[i] * values[j]).mean())) < 0.01


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"probes": 0}, ValueError, "probes: expected 1 to 65535, got 0"),
        ({"probes": 1.5}, TypeError, "probes: expected an int, got float"),
        ({"seed": -1}, ValueError, "seed: expected 0 to"),
        ({"offsets": torch.tensor([0, 3, 3, 60])}, ValueError, "offsets: expected increasing"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"backend": "fast"}, ValueError, "backend: unknown 'fast'"),
        ({"hidden": [[0.0] * 16]}, TypeError, r"hidden: expected a tensor \[N, D\], got list"),
    ],
)
def test_bad_arguments(options, error, message):
    case = random_case(60, 16, 30)
    with pytest.raises(error, match=message):
        fisher_grad(**{"hidden": case.hidden, "head": case.head, **options})


@pytest.mark.parametrize("group", [None, object()])
def test_a_shard_of_a_head_is_refused(group):
    case = random_case(4, 16, 30)
    shard = acqcore.Head(case.head.weight, vocab_start=20, vocab_size=60)
    object.__setattr__(shard, "group", group)
    with pytest.raises(ValueError, match="head: expected the whole vocabulary, got a shard of 30 of 60 rows"):
        fisher_grad(case.hidden, shard)


def test_the_cpu_backend_runs_its_own_kernel_once(monkeypatch):
    """All probes share one visit, and the kernel runs rather than the reference."""
    asked, original = [], acqcore._core.fisher_sums
    monkeypatch.setattr(acqcore._core, "fisher_sums", lambda *given: (asked.append(given), original(*given)))
    case = CASES["plain"]()
    fisher_grad(case.hidden, case.head, case.targets, probes=3, offsets=OFFSETS, backend="cpu")
    assert len(asked) == 1
