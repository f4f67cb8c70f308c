"""Head gradients on every available backend and instruction set, against float64 autograd of each sample alone."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch

import acqcore
from acqcore import checks
from acqcore.backends import HeadRows, get
from acqcore.backends.cpu import Cpu
from acqcore.backends.triton import INTERPRETED
from acqcore.head_grad import SKETCH_ROWS, grad_sketch_from, hidden_grad_from, loss_weights
from acqcore.head_visit import visit
from acqcore.signs import rotated_places
from acqcore.testing import Case, case_from_logits, exact_hidden_grad, random_case

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = [isa for isa, missing in acqcore._core.isas() if not missing]
OFFSETS = torch.tensor([0, 1, 3, 20, 60])


def _case(name: str) -> Case:
    case = {
        "plain": lambda: random_case(60, 40, 700),
        "deep": lambda: random_case(60, 150 if INTERPRETED else 1500, 300),  # several steps of a product
        "one column": lambda: random_case(60, 16, 1),
        "two columns": lambda: random_case(60, 16, 2),
        "odd shapes": lambda: random_case(60, 33, 257),
        "everything": lambda: random_case(60, 41, 600, bias=True, softcap=15.0, scale=0.5, temperature=1.3),
        "softcap": lambda: random_case(60, 40, 513, std=20.0, softcap=30.0),
        "absent targets": lambda: random_case(60, 40, 257, bias=True),
    }[name]()
    case.targets[[5, 9, 59]] = -100
    if name == "absent targets":
        case.head.bias[case.targets[[0, 30, 31]]] = -torch.inf
    return case


CASES = ("plain", "deep", "one column", "two columns", "odd shapes", "everything", "softcap", "absent targets")


def _autograd(
    case: Case,
    offsets: torch.Tensor,  # [B + 1]
    loss: str = "mean",
    weights: torch.Tensor | None = None,  # [N]
) -> list[tuple[torch.Tensor, ...]]:
    """Gradients of each sample's loss in (weight, bias if any), by autograd in float64."""
    exact = case.to(torch.float64)
    head, y = exact.head, exact.targets
    parameters = [head.weight.requires_grad_()]
    bias = None if head.bias is None else head.bias.double().requires_grad_()
    if bias is not None:
        parameters.append(bias)
    gradients = []
    for begin, end in itertools.pairwise(offsets.tolist()):
        live = acqcore.Head(head.weight, bias, head.softcap, head.scale)
        z = live.logits(exact.hidden[begin:end], exact.temperature)
        token = torch.nn.functional.cross_entropy(z, y[begin:end], ignore_index=-100, reduction="none")
        if weights is not None:
            token = token * weights[begin:end].double()
        total = token.sum()
        if loss == "mean":
            total = total / (y[begin:end] != -100).sum()
        gradients.append(torch.autograd.grad(total, parameters))
    return gradients


def _norms(gradients: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    return torch.stack([sum(g.square().sum() for g in sample).sqrt() for sample in gradients])


@functools.cache
def _expected_norms(name: str, dtype: torch.dtype) -> torch.Tensor:
    """Computed once for all implementations and forms, because it is slower than they are."""
    return _norms(_autograd(_case(name).to(dtype), OFFSETS))


@functools.cache
def _expected_hidden_grad(name: str, dtype: torch.dtype) -> torch.Tensor:
    return exact_hidden_grad(_case(name).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["gram", "direct"])
def test_head_grad_norm(form, name, dtype, implementation):
    case = _case(name).to(dtype)
    got = acqcore.head_grad_norm(
        case.hidden, case.head, case.targets, OFFSETS, temperature=case.temperature, form=form, backend=implementation
    )
    torch.testing.assert_close(got.double(), _expected_norms(name, dtype), rtol=1e-4, atol=1e-12)


def test_sum_and_token_weights(implementation):
    case = _case("plain")
    weights = torch.linspace(-1, 2, 60)
    given = weights.where(case.targets != -100, torch.nan)  # those of ignored tokens do not matter
    for loss in ("mean", "sum"):
        options = {"loss": loss, "token_weights": given, "backend": implementation}
        expected = _norms(_autograd(case, OFFSETS, loss, weights))
        for form in ("gram", "direct"):
            got = acqcore.head_grad_norm(case.hidden, case.head, case.targets, OFFSETS, form=form, **options)
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-9)
        sketch = acqcore.grad_sketch(case.hidden, case.head, case.targets, OFFSETS, dim=64, **options)
        assert sketch.isfinite().all()


@pytest.mark.parametrize("form", ["gram", "direct"])
@pytest.mark.parametrize("runner_up", [False, True])
@pytest.mark.parametrize("gap", [7.0, 10.0, 14.0, 20.0, 27.0])
def test_confident_samples(gap, runner_up, form, implementation):
    """With every token confident, norms down to 1e-9 are accurate, also if all rows share a runner-up."""
    if runner_up:
        logits = torch.full((12, 900), -gap - 20.0)
        logits[:, 450] = -gap
    else:
        logits = torch.randn(12, 300, generator=torch.Generator().manual_seed(0)) * 0.5 - gap
    targets = torch.arange(12) * (70 if runner_up else 7)
    logits[torch.arange(12), targets] = 0.0
    case = case_from_logits(logits, targets)
    offsets = torch.tensor([0, 5, 12])
    got = acqcore.head_grad_norm(case.hidden, case.head, targets, offsets, form=form, backend=implementation)
    p = logits.double().softmax(dim=1)
    p[torch.arange(12), targets] = 0
    p[torch.arange(12), targets] = -p.sum(dim=1)  # hidden states are unit vectors, so these are the rows of G
    expected = torch.stack([p[:5].norm() / 5, p[5:].norm() / 7])
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("form", ["gram", "direct", "auto"])
def test_samples_do_not_depend_on_the_batch(form, implementation):
    case = random_case(200, 24, 250 if implementation == "triton" else 600)  # two tiles
    offsets = torch.tensor([0, 10, 11, 150, 199, 200])
    whole = acqcore.head_grad_norm(case.hidden, case.head, case.targets, offsets, form=form, backend=implementation)
    for i, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        alone = acqcore.head_grad_norm(
            case.hidden[begin:end], case.head, case.targets[begin:end], torch.tensor([0, end - begin]), form=form,
            backend=implementation,
        )  # fmt: skip
        torch.testing.assert_close(alone[0], whole[i], rtol=1e-5, atol=0)


def test_a_sketch_takes_one_visit(monkeypatch):
    """On a CPU the statistics come with it, not from an operation of their own."""
    case, asked = random_case(6, 16, 40), []
    for op in ("row_stats", "delta_hash", "delta_sums"):
        original = getattr(Cpu, op)
        monkeypatch.setattr(Cpu, op, lambda *given, op=op, original=original: (asked.append(op), original(*given)))
    acqcore.grad_sketch(case.hidden, case.head, case.targets, torch.tensor([0, 2, 6]), dim=32, backend="cpu")
    assert asked == ["delta_sums"]


@pytest.mark.parametrize("length", [30, SKETCH_ROWS + 20])
@pytest.mark.parametrize("dim", [999, 1000])
def test_a_sketch_does_not_depend_on_the_batch(dim, length):
    """Bit for bit at every place in a vector, next to samples that are hashed with it, and hashed in two parts."""
    case = random_case(SKETCH_ROWS + 70, 16, 40)
    alone = acqcore.grad_sketch(
        case.hidden[:length], case.head, case.targets[:length], torch.tensor([0, length]), dim=dim, backend="cpu"
    )
    for place in (*range(1, 10), len(case.hidden) - length - 1):
        hidden, targets = case.hidden.roll(place, 0), case.targets.roll(place)
        offsets = torch.tensor([0, place, place + length, len(case.hidden)])
        found = acqcore.grad_sketch(hidden, case.head, targets, offsets, dim=dim, backend="cpu")
        assert torch.equal(found[1], alone[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [40, 1500])
def test_hidden_grad_of_many_rows_is_that_of_each(width, dtype):
    """A block has several panels of rows; with 1,500 inputs, all wait for their logits before any gradient is added."""
    case = random_case(300, width, 500).to(dtype)
    whole = acqcore.hidden_grad(case.hidden, case.head, case.targets, backend="cpu")
    for i in (0, 31, 32, 149, 150, 299):
        alone = acqcore.hidden_grad(case.hidden[i : i + 1], case.head, case.targets[i : i + 1], backend="cpu")
        assert torch.equal(alone[0], whole[i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_hidden_grad(name, dtype, implementation):
    case = _case(name).to(dtype)
    got = acqcore.hidden_grad(
        case.hidden, case.head, case.targets, temperature=case.temperature, backend=implementation
    )
    expected = _expected_hidden_grad(name, dtype)
    scale = expected.norm(dim=1).mean().item()
    rounded = implementation == "triton" and dtype in (torch.bfloat16, torch.float16)  # it rounds factors of dL/dz
    if rounded:
        error = (got.double() - expected).norm(dim=1)
        assert bool((error <= 5e-3 * expected.norm(dim=1) + 2e-5 * scale).all()), error / expected.norm(dim=1)
    else:
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=2e-5 * max(scale, 1e-6))
    norms = acqcore.hidden_grad_norm(
        case.hidden, case.head, case.targets, temperature=case.temperature, backend=implementation
    )
    assert norms.isnan().nonzero()[:, 0].tolist() == [5, 9, 59]
    scored = ~norms.isnan()
    torch.testing.assert_close(
        norms[scored].double(), expected.norm(dim=1)[scored], rtol=5e-3 if rounded else 1e-4, atol=2e-5 * scale + 1e-12
    )


@pytest.mark.parametrize("name", ["plain", "two columns", "everything", "softcap"])
def test_sums_of_a_shard_from_the_statistics_of_the_whole(name, implementation):
    """A pass of its own over some rows of the weight gives their sums relative to the largest logit of all rows."""
    case = _case(name)
    exact = case.to(torch.float64)
    stats = case.run(implementation)
    z = exact.head.logits(exact.hidden, exact.temperature)
    p = (z - z.amax(dim=1, keepdim=True)).exp()
    if case.head.softcap is not None:
        p = p * (1 - (z * (case.temperature / case.head.softcap)).square())
    scored = case.targets != -100
    p[scored, case.targets[scored]] = 0
    p[~scored] = 0
    vocab = len(case.head.weight)
    for begin, end in ((0, vocab // 2), (vocab // 2, vocab)):
        bias = None if case.head.bias is None else case.head.bias[begin:end]
        shard = dataclasses.replace(
            case.head, weight=case.head.weight[begin:end], bias=bias, vocab_start=begin, vocab_size=vocab
        )
        rows = HeadRows(case.hidden, shard, case.targets, case.temperature, stats.state, stats.max_index)
        got = torch.full_like(case.hidden, torch.nan)
        get(implementation).fill_hidden_grad(rows, got)
        expected = p[:, begin:end] @ exact.head.weight[begin:end]
        error = (got.double() - expected).abs().amax(dim=1)
        assert (error <= 1e-4 * (p[:, begin:end] @ exact.head.weight[begin:end].abs()).amax(dim=1) + 1e-30).all()


def test_a_target_outside_the_vocabulary_spoils_only_its_sample(implementation, monkeypatch):
    """On the CPU it raises; on a GPU, whose targets are not read, its row is NaN and so is what is summed over it."""
    case = random_case(6, 16, 600)
    targets, offsets = torch.tensor([1, 2, 600, -100, -7, 4]), torch.tensor([0, 2, 4, 6])
    options = {"backend": implementation}

    def results():
        stats = acqcore.row_stats(case.hidden, case.head, targets, **options)
        yield stats.hidden_norm, stats.logprob, acqcore.hidden_grad_norm(case.hidden, case.head, targets, **options)
        of_samples = case.hidden, case.head, targets, offsets
        norms = [acqcore.head_grad_norm(*of_samples, form=form, **options) for form in ("gram", "direct")]
        yield (*norms, acqcore.grad_sketch(*of_samples, dim=64, **options)[:, 0])

    with pytest.raises(ValueError, match=r"expected values in \[0, 600\) or -100 \(ignored\), got 600 at row 2"):
        acqcore.grad_sketch(case.hidden, case.head, targets, offsets, dim=64, **options)
    monkeypatch.setattr(checks, "targets_in_range", checks.ignored_outside)
    of_rows, of_samples = results()
    for values in of_rows:
        assert values.isnan().tolist() == [False, False, True, True, True, False]
    for values in of_samples:
        assert values.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("value", [torch.nan, 3e38])  # the latter makes one logit infinite
def test_a_row_without_finite_logits_spoils_only_its_sample(value, implementation):
    case, offsets = random_case(20, 24, 900), torch.tensor([0, 5, 9, 20])
    case.head.weight[:, 0] = torch.zeros(900).index_fill(0, torch.tensor([700]), 100)
    case.hidden[6, 0] = value
    given = case.hidden, case.head, case.targets
    grad = acqcore.hidden_grad(*given, backend=implementation)
    assert grad.isnan().all(dim=1).nonzero().flatten().tolist() == [6]
    assert int(grad.isnan().any(dim=1).sum()) == 1
    for form in ("gram", "direct"):
        norms = acqcore.head_grad_norm(*given, offsets, form=form, backend=implementation)
        assert norms.isnan().tolist() == [False, True, False]
    sketches = acqcore.grad_sketch(*given, offsets, dim=32, backend=implementation)
    assert sketches.isnan().all(dim=1).tolist() == sketches.isnan().any(dim=1).tolist() == [False, True, False]


def _sketched_case() -> tuple[Case, torch.Tensor]:
    case = random_case(40, 24, 130)
    case.targets[3] = -100
    return case, torch.tensor([0, 9, 25, 40])


@pytest.mark.parametrize("seed", [0, 1])
def test_sketch_is_that_of_the_definition(seed, implementation):
    case, offsets = _sketched_case()
    exact = case.to(torch.float64)
    got, expected = (
        acqcore.grad_sketch(given.hidden, given.head, case.targets, offsets, dim=256, seed=seed, backend=backend)
        for given, backend in ((case, implementation), (exact, "eager"))
    )
    assert ((got.double() - expected).norm(dim=1) <= 1e-5 * expected.norm(dim=1)).all()


def test_sketch_keeps_inner_products():
    """The mean over seeds is within five standard errors of the exact inner products, norms included."""
    case, offsets = _sketched_case()
    gradients = torch.stack([g[0].flatten() for g in _autograd(case, offsets)])  # [3, V D]
    exact = gradients @ gradients.T
    products = []
    for seed in range(24):
        s = acqcore.grad_sketch(case.hidden, case.head, case.targets, offsets, dim=256, seed=seed).double()
        products.append(s @ s.T)
    stacked = torch.stack(products)
    error = (stacked.mean(dim=0) - exact).abs()
    standard_error = stacked.std(dim=0) / 24**0.5
    assert (error <= 5 * standard_error).all()
    # A tensor sketch's variance is at most 8 / dim ||G||^4; the factor of 1.5 allows for the 24 draws.
    assert (stacked.var(dim=0).diagonal() <= 8 / 256 * exact.diagonal().square() * 1.5).all()


@pytest.mark.parametrize("dim", [7, 300])  # a vector crosses several groups of places, and parts of two
@pytest.mark.parametrize("name", ["odd shapes", "everything", "absent targets", "two columns", "rising", "confident"])
@pytest.mark.parametrize("isa", ISAS, ids="cpu/{}".format)
def test_hashed_delta(name, dim, isa, monkeypatch):
    """In one visit with the statistics and dL/dh, and after it, within 1e-5 of each row's largest entry. For Triton's
    kernel see ``kernels/test_sketch.py``."""
    monkeypatch.setenv("ACQCORE_ISA", isa)
    if name == "rising":
        case = case_from_logits(torch.linspace(-40, 40, 600).repeat(3, 1), torch.tensor([599, 0, -100]))
    elif name == "confident":
        case = case_from_logits(torch.tensor([[80.0, 0.0, 1.0, 2.0], [0.0, 80.0, 1.0, 2.0]]), torch.tensor([0, 0]))
    else:
        case = _case(name)
        case = dataclasses.replace(case, hidden=case.hidden[:8], targets=case.targets[:8])
    n, exact = len(case.targets), case.to(torch.float64)
    places = rotated_places(len(case.head.weight), dim, 3, 0)

    def rows(case: Case) -> HeadRows:
        state, index = torch.empty(7, n, dtype=torch.float64), torch.empty(n, dtype=torch.int64)
        return HeadRows(case.hidden, case.head, case.targets, case.temperature, state, index)

    expected, of_eager = torch.empty(n, dim, dtype=torch.float64), rows(exact)
    expected_values = torch.empty(case.hidden.shape, dtype=torch.float64)
    get("eager").delta_sums(of_eager, expected_values, places, expected)
    together, values, filled = torch.full((n, dim), torch.nan), torch.full_like(case.hidden, torch.nan), rows(case)
    get("cpu").delta_sums(filled, values, places, together)
    apart = torch.full((n, dim), torch.nan)
    get("cpu").delta_hash(filled, places, apart)
    values_alone, hash_alone = torch.empty_like(values), torch.empty_like(together)
    get("cpu").delta_sums(rows(case), values_alone)
    get("cpu").delta_sums(rows(case), None, places, hash_alone)
    assert torch.equal(values, values_alone)
    assert torch.equal(together, hash_alone)
    of_weights = case.head.weight.double().norm(dim=1).mean()
    bound = 1e-5 * (expected_values.norm(dim=1) + of_weights)
    assert ((values.double() - expected_values).norm(dim=1) <= bound).all()
    torch.testing.assert_close(filled.state, of_eager.state, rtol=2e-5, atol=2e-5, equal_nan=True)
    assert torch.equal(filled.index, of_eager.index)
    size = expected.abs().amax(dim=1, keepdim=True).clamp_min(1e-300)
    for got in (together, apart):
        assert float(((got.double() - expected).abs() / size).max()) < 1e-5


def test_ranks_of_inner_products_survive_sketching():
    """Samples share a target and, to different degrees, a direction of their hidden states."""
    case = random_case(128 * 4, 32, 400)
    shared = torch.linspace(-1, 1, 128).repeat_interleave(4)[:, None] * torch.ones(32)
    hidden, targets = case.hidden + shared, torch.full((512,), 3)
    case = Case(hidden, case.head, targets)
    offsets = torch.arange(129) * 4
    gradients = torch.stack([g[0].flatten() for g in _autograd(case, offsets)])
    exact = gradients @ gradients[96:].mean(dim=0)
    sketch = acqcore.grad_sketch(hidden, case.head, targets, offsets, dim=4096)
    approximate = sketch @ sketch[96:].mean(dim=0)
    ranks = torch.stack([exact.argsort().argsort(), approximate.argsort().argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] >= 0.95


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"offsets": torch.tensor([0, 5, 5, 60])}, ValueError, r"increasing values, got 5 then 5 \(sample 1\)"),
        ({"offsets": torch.tensor([0, 50])}, ValueError, "offsets: expected to run from 0 to N = 60, got 0 to 50"),
        ({"offsets": torch.tensor([0.0, 60.0])}, TypeError, "offsets: expected an int64 tensor"),
        ({"offsets": [0, 60]}, TypeError, "offsets: expected an int64 tensor"),
        ({"offsets": torch.tensor([0, 59, 60])}, ValueError, "targets: sample 1 has no scored token"),
        ({"targets": None}, TypeError, "targets: expected a tensor, got None"),
        ({"loss": "median"}, ValueError, "loss: unknown 'median', expected one of mean, sum"),
        ({"form": "fast"}, ValueError, "form: unknown 'fast'"),
        ({"token_weights": torch.ones(3)}, ValueError, r"token_weights: expected \[N\] with N = 60"),
        ({"token_weights": torch.ones(60).long()}, TypeError, "token_weights: expected float32"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    case = _case("plain")
    arguments = {"targets": case.targets, "offsets": OFFSETS, **change}
    with pytest.raises(error, match=message):
        acqcore.head_grad_norm(case.hidden, case.head, **arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim: expected an int >= 1, got 0"),
        ({"seed": 1.5}, TypeError, "seed: expected an int, got float"),
        ({"seed": 2**63}, ValueError, "seed: expected 0 to"),
    ],
)
def test_bad_sketch(change, error, message):
    case = _case("plain")
    with pytest.raises(error, match=message):
        acqcore.grad_sketch(case.hidden, case.head, case.targets, OFFSETS, **change)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ignored_rows_may_hold_anything(dtype, bias, implementation):
    """Their hidden states change no bit of a result, and their gradients are zero; logits of 1000 would overflow."""
    case = random_case(60, 40, 130 if implementation == "triton" else 400, bias=bias).to(dtype)  # two tiles or more
    if bias:
        case.head.bias.mul_(1000)
    targets = case.targets
    ignored = [0, 5, 9, 17, 20, 40, 59]  # among them the first and the last of a sample
    targets[ignored] = -100
    offsets = torch.tensor([0, 3, 20, 60])
    bounds = checks.offsets(offsets, targets)
    weights, _ = loss_weights(targets, bounds, "mean")
    found = []
    for values in ([0.0], [torch.nan, torch.inf, 1e38]):
        hidden = case.hidden.clone()
        hidden[ignored] = torch.tensor((values * 7)[:7], dtype=dtype)[:, None]
        arguments = hidden, case.head, targets
        norms = [
            acqcore.head_grad_norm(*arguments, offsets, form=form, backend=implementation)
            for form in ("gram", "direct")
        ]
        gradient = acqcore.hidden_grad(*arguments, backend=implementation)
        assert not gradient[targets == -100].any()
        sketch = acqcore.grad_sketch(*arguments, offsets, dim=32, backend=implementation)
        stats = acqcore.row_stats(*arguments, backend=implementation)
        known = hidden, case.head, stats
        visited = visit(*arguments, bounds, 1.0, get(implementation), known=stats)
        found.append(
            [
                *norms,
                gradient,
                sketch,
                hidden_grad_from(*known, implementation),
                visited.grad_norm(weights),
                grad_sketch_from(*known, bounds, weights, 1.0, implementation, 32, 0),
            ]
        )
    of_zeros, of_anything = found
    assert all(result.isfinite().all() for result in of_zeros)
    assert all(map(torch.equal, of_anything, of_zeros))
