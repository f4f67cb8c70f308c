"""Head gradients and mixtures of draws in chunked torch, against the unchunked reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import acqcore
from acqcore.backends import _BACKENDS, Probes, chunked, chunked_mixture, get
from acqcore.backends.base import Gram, HeadRows
from acqcore.backends.chunked import Chunked
from acqcore.backends.eager import Eager
from acqcore.backends.scatter import add_at, add_segments
from acqcore.bayes import BayesStats
from acqcore.fisher import fisher_visit
from acqcore.head_grad import grad_sketch
from acqcore.testing import Case, random_case

OFFSETS = torch.tensor([0, 1, 3, 20, 26, 60])


class _Chunked(Chunked):
    name = "chunked"
    automatic = False
    dtypes = Eager.dtypes

    def row_stats(self, rows: HeadRows, gram: Gram | None = None) -> None:
        Eager().row_stats(rows)
        if gram is not None:
            self.fill_gram(rows, gram)

    def logit_stats(self, *arguments: object) -> None:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(_BACKENDS, "chunked", _Chunked())


@pytest.fixture(params=["one chunk", "many chunks"])
def case(request, monkeypatch):
    """60 rows, in float64 to hide the order of sums; chunks of about 13 rows and 7 columns, or one chunk."""
    if request.param == "many chunks":
        monkeypatch.setattr(chunked, "BUFFER_BYTES", 16 * 24 * 13)
        monkeypatch.setattr(chunked, "MAX_ROWS", 24)
    made = random_case(60, 24, 130, bias=True, softcap=15.0, temperature=1.3).to(torch.float64)
    made.targets[[5, 9, 59]] = -100
    return made


def _both(case: Case, function: Callable[..., torch.Tensor], *arguments: object, **named: object) -> None:
    got, expected = (
        function(
            case.hidden, case.head, case.targets, *arguments, temperature=case.temperature, backend=backend, **named
        )
        for backend in ("chunked", "eager")
    )
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_hidden_grad(case):
    _both(case, acqcore.hidden_grad)


@pytest.mark.parametrize("at_once", [1, 40, 1 << 14])
def test_fisher_grads(at_once, case, monkeypatch):
    """Signs are drawn for one vocabulary chunk at a time, for several, or for all."""
    monkeypatch.setattr(chunked, "SIGN_COLUMNS", at_once)
    probes = Probes(2, 3, torch.arange(60) // 7, torch.arange(60) % 7)
    (_, got), (_, expected) = (
        fisher_visit(case.hidden, case.head, case.targets, probes, case.temperature, get(backend))
        for backend in ("chunked", "eager")
    )
    torch.testing.assert_close(got.gradients, expected.gradients, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got.expected, expected.expected, rtol=1e-10, atol=1e-12)


def test_grad_sketch(case):
    _both(case, grad_sketch, OFFSETS, dim=64)


@pytest.mark.parametrize("form", ["gram", "direct", "auto"])
def test_head_grad_norm(form, case):
    _both(case, acqcore.head_grad_norm, OFFSETS, form=form)


def _same_mixture(got: BayesStats, expected: BayesStats) -> None:
    torch.testing.assert_close(got.state, expected.state, rtol=1e-9, atol=1e-11, equal_nan=True)
    assert torch.equal(got.votes, expected.votes)


@pytest.mark.parametrize(("form", "block"), [("element", 1), ("block", 7)])
def test_mutual_information(form, block, case, monkeypatch):
    _small_mixtures(case, monkeypatch)
    head = acqcore.Head(case.head.weight, case.head.bias, softcap=9.0, scale=0.7)
    got, expected = (
        acqcore.bayes.mutual_information(
            case.hidden, head, draws=5, dropout=0.3, form=form, block=block, targets=case.targets, backend=backend
        )
        for backend in ("chunked", "eager")
    )
    _same_mixture(got, expected)


@pytest.mark.parametrize("shared", [True, False])
def test_ensembles(shared, case, monkeypatch):
    _small_mixtures(case, monkeypatch)
    hidden = torch.stack([case.hidden, case.hidden + 1, case.hidden * 2])
    hidden[1, 7] = torch.nan
    weight = case.head.weight
    heads = [acqcore.Head(weight if shared else weight * k, vocab_start=3, vocab_size=140) for k in (1, 2, 3)]
    heads = heads[:1] if shared else heads
    got, expected = (
        acqcore.bayes.ensemble_stats(hidden, heads, case.targets, backend=backend) for backend in ("chunked", "eager")
    )
    assert not got.valid[7]
    assert not expected.valid[7]
    rest = torch.arange(60) != 7
    _same_mixture(
        BayesStats(got.state[:, rest], got.votes[:, rest]), BayesStats(expected.state[:, rest], expected.votes[:, rest])
    )


def test_impossible_tokens_in_a_mixture(monkeypatch):
    made = random_case(6, 24, 130, bias=True).to(torch.float64)
    _small_mixtures(made, monkeypatch)
    made.head.bias[:50] = -torch.inf
    made.head.bias[100:] = -torch.inf
    got, expected = (
        acqcore.bayes.mutual_information(made.hidden, made.head, draws=3, backend=backend)
        for backend in ("chunked", "eager")
    )
    assert got.valid.all()
    _same_mixture(got, expected)


def _small_mixtures(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets chunks of 4 rows and 16 columns in tests whose other chunks are small."""
    if chunked.BUFFER_BYTES < 1 << 20 or len(case.hidden) < 60:
        monkeypatch.setattr(chunked_mixture, "MAX_ROWS", 20)
        monkeypatch.setattr(chunked_mixture, "OPERAND_BYTES", 4 * 24 * 16)


def test_groups_of_samples():
    bounds = [(0, 3), (3, 7), (7, 9), (9, 12), (12, 30), (30, 31), (31, 40), (40, 41)]
    assert list(chunked._groups(bounds, 10)) == [(0, 3), (3, 4), (4, 5), (5, 7), (7, 8)]
    assert list(chunked._groups(bounds, 3)) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7, 8)]
    assert list(chunked._groups([], 3)) == []


@pytest.mark.parametrize(
    "call",
    [
        "fill_hidden_grad(None, rows, torch.zeros(256, 128))",
        "delta_hash(None, rows, torch.zeros(131072, dtype=torch.int32), torch.zeros(256, 256))",
        "mixture_stats(chunked, draws)",
        "fill_gram(None, rows, gram)",
        "gram_norm(None, rows, gram, state[0], weights, weights.new_empty(4))",
        "head_grad_norm(None, rows, bounds, weights, weights.new_empty(4))",
    ],
)
def test_memory_is_bounded(call, extra_mib):
    """At most 64 MiB plus 4 for a result; gradients or draws of the logits would take 128, the float32 weight 64."""
    setup = (
        "from acqcore.backends import DrawRows, Dropout, Gram, HeadRows\n"
        "from acqcore.backends.chunked import Chunked\n"
        "h, head = torch.randn(256, 128).bfloat16(), acqcore.Head(torch.randn(131072, 128).bfloat16())\n"
        "y, weights = torch.arange(256), torch.ones(256, dtype=torch.float64)\n"
        "state = torch.zeros(7, 256, dtype=torch.float64)\n"  # any, because values do not matter
        "rows = HeadRows(h, head, y, 1.0, state, y)\n"
        "class C(Chunked): row_stats = logit_stats = None\n"
        "chunked, dropout = C(), Dropout(0.1, 'element', 1, 0, y[:64] * 0, y[:64])\n"
        "draws = DrawRows(h[:64], (head,), y[:64], 4, dropout, weights.new_empty(6, 64), y.new_empty(4, 64))\n"
        "bounds = tuple((64 * i, 64 * i + 64) for i in range(4))\n"
        "gram = Gram(bounds, tuple(4096 * i for i in range(4)), torch.zeros(4 * 4096))"
    )
    assert extra_mib(setup, f"Chunked.{call}") <= 68


@pytest.mark.parametrize(("n", "d", "v"), [(4096, 4096, 131072), (100, 8192, 256000), (20000, 576, 49152), (1, 16, 7)])
def test_chunks_of_large_shapes_fit(n, d, v):
    """Counts float32 hidden states, weights and values, and tiles with their temporaries."""
    head = acqcore.Head(torch.empty(v, d, dtype=torch.bfloat16, device="meta"))
    hidden = torch.empty(n, d, dtype=torch.bfloat16, device="meta")
    state, index = torch.empty(7, n, dtype=torch.float64, device="meta"), torch.empty(n, device="meta")
    rows = HeadRows(hidden, head, index, 1.0, state, index)
    part, piece = next(iter(chunked._row_chunks(rows, 0, n)))
    columns = next(iter(chunked._vocab_chunks(rows, n, d)))
    tall, wide = len(hidden[part]), columns.stop
    tiles = 4 * chunked.TEMPORARIES * tall * wide
    assert 4 * tall * d + 4 * wide * 2 * d + tiles <= chunked.BUFFER_BYTES
    assert piece.hidden.dtype == torch.float32


def test_products_are_float32_whatever_the_process_allows(monkeypatch):
    seen = []
    monkeypatch.setattr(chunked, "unnormalised", lambda *_: seen.append(settings.fp32_precision) or _stop())
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        made = random_case(4, 4, 8)
        with pytest.raises(StopIteration):
            acqcore.hidden_grad(made.hidden, made.head, made.targets, backend="chunked")
        assert seen == ["ieee"]
        assert settings.fp32_precision == "tf32"
    finally:
        settings.fp32_precision = before


@pytest.mark.parametrize(
    "setting",
    [
        "pass",
        "torch.set_float32_matmul_precision('high')",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    ],
)
def test_either_setting_of_torch_is_overruled_and_restored(setting, forked):
    """Runs in a separate process, since touching either setting cannot be undone."""
    forked(
        "from acqcore.defaults import float32_products\n"
        "def seen():\n"
        "    try: older = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32\n"
        "    except RuntimeError: older = 'they disagree'\n"
        "    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision, older\n"
        f"{setting}\n"
        "before = seen()\n"
        "with float32_products(): assert seen() == ('ieee', 'ieee', ('highest', False)), seen()\n"
        "assert seen() == before, (before, seen())\n"
    )


def test_sums_at_places():
    """The GPU form matches ``index_add_`` along either dimension and for complex numbers."""
    places = torch.tensor([2, 0, 2, 1, 2])
    for dim, dtype in [(0, torch.float64), (1, torch.float32), (0, torch.complex64)]:
        values = torch.randn(5, 5, dtype=dtype)
        expected, got = torch.zeros(4, 5, dtype=dtype), torch.zeros(4, 5, dtype=dtype)
        if dim:
            expected, got = expected.T.contiguous(), got.T.contiguous()
        add_at(expected, dim, places, values)
        torch.ops.aten.index_put_(got, [*[None] * dim, places], values, True)
        torch.testing.assert_close(got, expected)


def test_sums_of_segments():
    """The GPU form matches ``index_add_``, for segments of any length and values of any shape."""
    values, lengths = torch.randn(9, 3, 2), [1, 0, 5, 3]
    expected = torch.stack([values[:1].sum(0), torch.zeros(3, 2), values[1:6].sum(0), values[6:].sum(0)])
    for ordered in (False, True):
        got = torch.ones(4, 3, 2)
        add_segments(got, lengths, values, ordered)
        torch.testing.assert_close(got, 1 + expected)


def _stop() -> torch.Tensor:
    raise StopIteration
