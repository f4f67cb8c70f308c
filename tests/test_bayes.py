"""Mutual information and related statistics on every backend and instruction set, against float64 with equal masks."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

import acqcore
from acqcore.backends import Dropout, get as get_backend
from acqcore.bayes import FIELDS, BayesStats, ensemble_stats, mutual_information
from acqcore.philox import keep_mask, philox4x32
from acqcore.testing import CASES, Case, random_case

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}  # absolute up to 1, relative above


def _worst(got: BayesStats, oracle: BayesStats) -> dict[str, float]:
    """Largest error of each field, relative to ``max(1, |value|)``; infinite where validity differs."""
    errors = {}
    for field in FIELDS:
        value, expected = getattr(got, field), getattr(oracle, field)
        if expected is None:
            assert value is None
            continue
        value = value.double()
        same = (value == expected) | (value.isnan() & expected.isnan())
        error = ((value - expected).abs() / expected.abs().clamp_min(1)).masked_fill(same, 0).nan_to_num(torch.inf)
        errors[field] = float(error.max()) if len(error) else 0.0
    return errors


def _assert_close(got: BayesStats, oracle: BayesStats, dtype: torch.dtype, times: float = 1) -> None:
    allowed = times * TOLERANCE[dtype]
    assert {field: error for field, error in _worst(got, oracle).items() if not error <= allowed} == {}


def _run(case: Case, backend: str, **options: Any) -> BayesStats:
    options = {"draws": 4, "seed": 3, **options}
    return mutual_information(case.hidden, case.head, targets=case.targets, backend=backend, **options)


def _odd() -> Case:
    return random_case(11, 1411, 700, bias=True, softcap=9.0, scale=0.7)


@functools.cache
def _oracle(make: Callable[[], Case], dtype: torch.dtype, **options: Any) -> BayesStats:
    """Float64 result, computed once for all implementations because it is slower than they are."""
    return _run(make().to(dtype).to(torch.float64), "eager", **options)


@pytest.mark.parametrize(
    ("form", "block", "dtype"),
    [
        *((form, block, dtype) for form, block in (("element", 1), ("block", 16)) for dtype in DTYPES),
        ("block", 32, torch.bfloat16),  # fills a row of a tile register
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_parity(name, form, block, dtype, implementation):
    """Without fused multiply-add (x86-64-v2), logits of +-130 have an error of 1.3e-5; the contract allows 2e-5."""
    case = CASES[name]().to(dtype)
    got = _run(case, implementation, form=form, block=block)
    times = 2 if (os.environ.get("ACQCORE_ISA"), name) == ("x86-64-v2", "std 30") else 1
    _assert_close(got, _oracle(CASES[name], dtype, form=form, block=block), dtype, times)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("draws", "dropout"), [(2, 0.3), (8, 0.3), (19, 0.7)])
@pytest.mark.parametrize(("form", "block"), [("element", 1), ("block", 7), ("block", 64), ("block", 5000)])
def test_draws_and_blocks(draws, dropout, form, block, dtype, implementation):
    """Covers blocks that do not divide D, one block for all of D, odd blocks with pairs of bfloat16, D beyond one
    packed depth, and more blocks dropped than kept."""
    options = {"draws": draws, "form": form, "block": block, "dropout": dropout}
    _assert_close(_run(_odd().to(dtype), implementation, **options), _oracle(_odd, dtype, **options), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_ensembles(shared, dtype, implementation):
    """Uses given hidden states of every draw, with one shared head or one head per draw."""
    cases = [random_case(21, 700, 911, bias=True, seed=seed).to(dtype) for seed in range(3)]
    hidden, targets = torch.stack([case.hidden for case in cases]), cases[0].targets
    heads = [case.head for case in cases]
    exact = [case.to(torch.float64).head for case in cases]
    got = ensemble_stats(hidden, heads[0] if shared else heads, targets, backend=implementation)
    oracle = ensemble_stats(hidden.double(), exact[:1] if shared else exact, targets, backend="eager")
    _assert_close(got, oracle, dtype)


def test_definitions():
    """The eager backend matches the written-out definitions of entropies and divergences."""
    case = random_case(6, 20, 30).to(torch.float64)
    stats = _run(case, "eager", draws=5, dropout=0.4)
    z = []
    for k in range(5):
        keep = keep_mask(torch.zeros(6, dtype=torch.int64), torch.arange(6), 20, 0.4, 3, k)
        z.append(case.head.logits(case.hidden * keep / 0.6))
    p = torch.stack(z).softmax(dim=2)  # [K, N, V]
    m = p.mean(dim=0)
    entropies = -(p * p.log()).sum(dim=2)
    predictive = -(m * m.log()).sum(dim=1)
    pairwise = (p[:, None] * (p[:, None] / p[None]).log()).sum(dim=3).mean(dim=(0, 1))
    votes = p.argmax(dim=2)
    modes = torch.tensor([votes[:, i].bincount().max() for i in range(6)])
    expected = {
        "mutual_information": predictive - entropies.mean(dim=0),
        "predictive_entropy": predictive,
        "expected_entropy": entropies.mean(dim=0),
        "variation_ratio": 1 - modes.double() / 5,
        "expected_pairwise_kl": pairwise,
        "logprob": m[torch.arange(6), case.targets].log(),
        "quadratic_mutual_information": (p.square().sum(dim=2).mean(dim=0) / m.square().sum(dim=1)).log(),
    }
    assert tuple(expected) == FIELDS
    for field, value in expected.items():
        torch.testing.assert_close(getattr(stats, field), value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["element", "block"])
def test_converges_to_torch_dropout(form):
    """With 4096 draws the statistics agree with torch's own dropout, whose masks are unrelated.

    One backend is enough: all draw the same masks and have the same values.
    """
    torch.manual_seed(0)
    case = random_case(3, 48, 40, std=2.0)
    stats = _run(case, "cpu", draws=4096, form=form, block=1, dropout=0.2)
    hidden = torch.nn.functional.dropout(case.hidden.double().expand(20_000, 3, 48), 0.2)
    p = (hidden @ case.head.weight.double().T).softmax(dim=2)
    m = p.mean(dim=0)
    expected = -(p * p.log()).sum(dim=2).mean(dim=0)
    predictive = -(m * m.log()).sum(dim=1)
    # Standard errors: about 0.4 / sqrt(4096) = 0.006 for an entropy, and less for a difference.
    torch.testing.assert_close(stats.expected_entropy.double(), expected, rtol=0, atol=0.03)
    torch.testing.assert_close(stats.mutual_information.double(), predictive - expected, rtol=0.05, atol=0.005)


@pytest.mark.parametrize("form", ["element", "block"])
def test_bounds(form, implementation):
    """0 without dropout (exactly 0 on the cpu backend), and at most log K, reached by draws that never agree."""
    case = random_case(16, 64, 500)
    still = _run(case, implementation, form=form, dropout=0.0)
    for field in ("mutual_information", "quadratic_mutual_information", "variation_ratio"):
        value = getattr(still, field)
        torch.testing.assert_close(value, torch.zeros(16), rtol=0, atol=0 if implementation == "cpu" else 1e-6)
    assert float(still.expected_pairwise_kl.max()) < 1e-6
    apart = torch.zeros(8, 4, 8)  # draw k is certain of token k
    apart[range(8), :, range(8)] = 200.0
    stats = ensemble_stats(apart, acqcore.Head(torch.eye(8)), backend=implementation)
    for field in ("mutual_information", "quadratic_mutual_information", "predictive_entropy"):
        torch.testing.assert_close(getattr(stats, field), torch.full((4,), math.log(8)), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.variation_ratio, torch.full((4,), 7 / 8))
    torch.testing.assert_close(stats.expected_entropy, torch.zeros(4))
    torch.testing.assert_close(stats.expected_pairwise_kl, torch.full((4,), 200 * 7 / 8))


@pytest.mark.parametrize("form", ["element", "block", "given"])
@pytest.mark.parametrize("bias", [0.0, torch.inf])
def test_rows_with_a_nan_or_an_infinite_logit_are_nan(bias, form, implementation):
    """A bias of inf makes one logit of every row infinite."""
    case = random_case(5, 32, 300, bias=True)
    case.hidden[2, 3], case.head.bias[200] = torch.nan, bias
    if form == "given":
        stats = ensemble_stats(case.hidden.expand(4, 5, 32), case.head, case.targets, backend=implementation)
    else:
        stats = _run(case, implementation, form=form, block=16, dropout=0.0)
    for field in FIELDS:
        assert getattr(stats, field).isnan().tolist() == [bias > 0, bias > 0, True, bias > 0, bias > 0], field


@pytest.mark.parametrize("form", ["element", "block"])
def test_rows_do_not_depend_on_the_batch(form, implementation):
    """Masks are keyed by sample and position, so samples scored separately give the same numbers."""
    case = random_case(90, 96, 1000)
    offsets = torch.tensor([0, 20, 21, 90])
    whole = _run(case, implementation, form=form, offsets=offsets)
    samples = torch.tensor([0, 0, 1, 2])
    positions = torch.tensor([3, 19, 0, 68])
    rows = torch.tensor([3, 19, 20, 89])
    dropout = Dropout(0.1, form, 64, 3, samples, positions)
    hidden, targets = case.hidden[rows], case.targets[rows]
    apart = acqcore.bayes.mixture_stats(hidden, (case.head,), dropout, 4, targets, implementation)
    tolerance = 0 if implementation == "cpu" else 1e-6
    torch.testing.assert_close(apart.state, whole.state[:, rows], rtol=tolerance, atol=tolerance)
    assert torch.equal(apart.votes, whole.votes[:, rows])
    other = _run(case, implementation, form=form, offsets=torch.tensor([0, 30, 90]))
    assert not torch.equal(other.mutual_information[30:], whole.mutual_information[30:])
    assert torch.equal(other.mutual_information[:20], whole.mutual_information[:20])


def test_threads_do_not_change_a_bit(set_threads):
    case = random_case(70, 64, 2000)
    states = []
    for count in (1, 2, 5):
        set_threads(count)
        states.append(torch.cat([_run(case, "cpu", form=form).state for form in ("element", "block")]))
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_many_chunks_of_rows():
    """More rows than are held at a time: at V = 262144, 8 rows are kept between the visits."""
    case = random_case(18, 8, 262144)
    _assert_close(_run(case, "cpu", draws=8), _run(case.to(torch.float64), "eager", draws=8), torch.float32)


def test_philox_known_answers():
    """The test vectors published with the generator."""
    ones = 0xFFFFFFFF
    known = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, words in known:
        got = philox4x32(tuple(torch.tensor(word) for word in counter), key)
        assert got.tolist() == list(words)


@pytest.mark.parametrize(("site", "seed", "units"), [(0, 0, 1), (0, 5, 97), (7, 2**62 + 12345, 576), (65535, 1, 130)])
def test_masks_bit_for_bit(site, seed, units, implementation):
    """Every backend draws the mask of ``philox.keep_mask``, regardless of tile and row."""
    samples = torch.tensor([0, 1, 2**32 - 1, 77, 77, 77])
    positions = torch.tensor([0, 4, 2**20 + 3, 0, 1, 2])
    keep = torch.empty(3, 6, units, dtype=torch.bool)
    get_backend(implementation).dropout_mask(Dropout(0.37, "element", 1, seed, samples, positions), site, keep)
    for k in range(3):
        assert torch.equal(keep[k], keep_mask(samples, positions, units, 0.37, seed, k, site))
    alone = torch.empty(3, 1, units, dtype=torch.bool)
    single = Dropout(0.37, "element", 1, seed, samples[4:5], positions[4:5])
    get_backend(implementation).dropout_mask(single, site, alone)
    assert torch.equal(alone[:, 0], keep[:, 4])


def test_masks_are_the_ones_applied(implementation):
    """Reads the mask off the logits: token d's logit depends only on column d of the hidden state."""
    d = 40
    head = acqcore.Head(torch.eye(d) * 300)
    votes = mutual_information(
        torch.arange(1.0, d + 1).expand(5, d).contiguous(), head, draws=6, dropout=0.6, seed=11, backend=implementation
    ).votes
    for k in range(6):
        keep = keep_mask(torch.zeros(5, dtype=torch.int64), torch.arange(5), d, 0.6, 11, k)
        last_kept = (keep * torch.arange(d)).amax(dim=1)
        assert torch.equal(votes[k], last_kept)


def test_mask_rates():
    """Keep rates over columns, positions, samples, draws and sites match independent coin flips."""
    kept = []
    for draw in range(4):
        for site in range(4):
            samples = torch.arange(50).repeat_interleave(10)
            kept.append(keep_mask(samples, torch.arange(10).repeat(50), 200, 0.1, 0, draw, site))
    kept_all = torch.stack(kept).double()  # [16, 500, 200]
    assert kept_all.mean().item() == pytest.approx(0.9, abs=0.001)
    for dims in ((0, 1), (0, 2), (1, 2)):
        share = kept_all.mean(dim=dims)
        deviation = (0.09 / (kept_all.numel() / share.numel())) ** 0.5
        assert float((share - 0.9).abs().max()) < 5 * deviation
    flat = kept_all.flatten(1) - 0.9
    correlation = (flat @ flat.T) / flat.shape[1] / 0.09
    assert float((correlation - torch.eye(16)).abs().max()) < 5 / flat.shape[1] ** 0.5 + 0.02


def test_compiled_call():
    """The custom op runs under torch.compile, and its fake implementation passes torch's checks."""
    case = random_case(4, 16, 30)

    def call(hidden):
        return _run(Case(hidden, case.head, case.targets), "cpu").mutual_information

    compiled = torch.compile(call, backend="aot_eager")
    torch.testing.assert_close(compiled(case.hidden), call(case.hidden), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"draws": 1}, ValueError, "draws: expected 2 to 65535, got 1"),
        ({"draws": 2.0}, TypeError, "draws: expected an int"),
        ({"dropout": 1.0}, ValueError, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, ValueError, "dropout"),
        ({"dropout": "x"}, TypeError, "dropout: expected a number"),
        ({"form": "row"}, ValueError, "form: unknown 'row', expected one of element, block"),
        ({"block": 0}, ValueError, "block"),
        ({"block": 2**63}, ValueError, r"block: expected an int below 2\*\*63"),
        ({"seed": -1}, ValueError, "seed"),
        ({"offsets": torch.tensor([0, 2])}, ValueError, "offsets: expected to run from 0 to N = 3"),
        ({"offsets": torch.tensor([0, 0, 3])}, ValueError, "offsets: expected increasing"),
        ({"targets": torch.tensor([0, 1])}, ValueError, "targets"),
        ({"targets": torch.tensor([0, 1, 9])}, ValueError, "targets: expected values in"),
        ({"backend": "gpu"}, ValueError, "backend"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        mutual_information(torch.ones(3, 4), acqcore.Head(torch.ones(5, 4)), **options)


def test_bad_ensembles():
    head = acqcore.Head(torch.ones(5, 4))
    with pytest.raises(ValueError, match=r"hidden: expected shape \[K, N, D\]"):
        ensemble_stats(torch.ones(3, 4), head)
    with pytest.raises(ValueError, match="draws: expected 2"):
        ensemble_stats(torch.ones(1, 3, 4), head)
    with pytest.raises(ValueError, match="head: expected one, or one for each of the 3 draws, got 2"):
        ensemble_stats(torch.ones(3, 2, 4), [head, head])
    for heads in (None, {"head": head}):
        with pytest.raises(TypeError, match=r"head: expected acqcore\.Head, got"):
            ensemble_stats(torch.ones(2, 2, 4), heads)
    with pytest.raises(ValueError, match="with the same shape"):
        ensemble_stats(torch.ones(2, 2, 4), [head, acqcore.Head(torch.ones(6, 4))])
    with pytest.raises(ValueError, match=r"with the same softcap, got None and 2.0 for draw 1"):
        ensemble_stats(torch.ones(2, 2, 4), [head, acqcore.Head(torch.ones(5, 4), softcap=2.0)])


def test_empty_and_repr():
    head = acqcore.Head(torch.ones(5, 4))
    assert len(mutual_information(torch.ones(0, 4), head).mutual_information) == 0
    stats = mutual_information(torch.ones(2, 4), head, targets=torch.tensor([-100, 1]))
    assert repr(stats) == "BayesStats(rows=2, draws=8, valid=1)"
    assert stats.mutual_information.isnan().tolist() == [True, False]
    assert stats.votes[:, 0].tolist() == [-1] * 8


@pytest.mark.parametrize("call", ["", ", form='block', block=8"])
def test_never_holds_the_logits_of_every_draw(call, extra_mib):
    """At most 256 MiB where ``[N, K, V]`` would take 1 GiB; fails if the reference runs instead of the kernel."""
    setup = (
        "h, head = torch.randn(512, 32), acqcore.Head(torch.randn(65536, 32))\n"
        "acqcore.mutual_information(h[:2], head, draws=2)"
    )
    assert extra_mib(setup, f"acqcore.mutual_information(h, head, draws=8{call}, backend='cpu')") <= 256
