"""row_stats on every available backend and instruction set, against float64."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

import acqcore
from acqcore.backends.triton import INTERPRETED
from acqcore.checks import ignored_outside
from acqcore.testing import CASES, assert_close_to_oracle, assert_no_worse_than_eager, case_from_logits, random_case

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@functools.cache
def _oracle(name: str, dtype: torch.dtype) -> acqcore.RowStats:
    """Computed once for all implementations, because it is slower than they are."""
    return CASES[name]().to(dtype).oracle()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in CASES
        for dtype in DTYPES
        # In the interpreter, which takes seconds for each, sizes are held in one dtype.
        if not INTERPRETED or dtype == torch.float32 or name not in ("N = 8200", "V = 262144")
    ],
    ids=str,
)
def test_parity(name, dtype, implementation):
    case = CASES[name]().to(dtype)
    assert_close_to_oracle(case.run(implementation), _oracle(name, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("std", [3.0, 30.0])
def test_error_is_no_larger_than_eager(std, dtype, implementation):
    vocab = 2065 if INTERPRETED else 8209  # several tiles, and a part of one
    assert_no_worse_than_eager(random_case(64, 576, vocab, std=std).to(dtype), implementation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(dtype, implementation):
    case = random_case(9, 50, 400)
    head = acqcore.Head(case.head.weight.to(dtype))
    got = acqcore.row_stats(case.hidden, head, case.targets, backend=implementation)
    exact = acqcore.Head(head.weight.double())
    oracle = acqcore.row_stats(case.hidden.double(), exact, case.targets, backend="eager")
    assert_close_to_oracle(got, oracle)


def test_confident_row_by_hand(implementation):
    """p = 1 - 1e-12 and one other token of e = 1e-12: values from the definition, in exact arithmetic."""
    e = 1e-12
    case = case_from_logits(torch.tensor([[0.0, torch.tensor(e).log().item()]]), torch.tensor([0]))
    stats = case.run(implementation)
    e = float(case.head.weight[1, 0].double().exp())  # 1e-12 with its logarithm rounded to float32
    assert stats.residual_norm.item() == pytest.approx(2**0.5 * e, rel=1e-5)
    assert stats.gini.item() == pytest.approx(2 * e, rel=1e-5)
    assert stats.least_confidence.item() == pytest.approx(e, rel=1e-5)


def test_rows_do_not_depend_on_the_batch(implementation):
    case = random_case(300, 96, 3000)
    whole = case.run(implementation)
    for rows in (slice(0, 1), slice(5, 40), slice(299, 300)):
        part = acqcore.row_stats(case.hidden[rows], case.head, case.targets[rows], backend=implementation)
        assert torch.equal(part.max_index, whole.max_index[rows])
        # Bit for bit; products of torch, and of numpy in Triton's interpreter, do not guarantee that.
        if implementation == "cpu" or (implementation == "triton" and not INTERPRETED):
            assert torch.equal(part.state, whole.state[:, rows])


def test_threads_do_not_change_a_bit(set_threads):
    case = random_case(100, 64, 2000)
    set_threads(1)
    one = case.run("cpu")
    set_threads(3)
    three = case.run("cpu")
    assert torch.equal(one.state, three.state)


def test_targets_outside_the_vocabulary_are_ignored_where_reading_them_would_stall():
    targets = torch.tensor([0, -1, -100, 9, 10, 2**40])
    assert ignored_outside(targets, 10).tolist() == [0, -100, -100, 9, -100, -100]


def test_nan_stays_in_its_row(implementation):
    case = random_case(5, 16, 600)
    case.hidden[2, 3] = torch.nan
    stats = case.run(implementation)
    assert stats.valid.tolist() == [True, True, False, True, True]
    assert stats.entropy.isnan().tolist() == [False, False, True, False, False]
    assert stats.top1_index[2] == -1


@pytest.mark.parametrize("position", [0, 5, 299, 511])
def test_a_nan_logit_shows(position, implementation):
    logits = torch.zeros(2, 512)
    logits[0, position] = torch.nan
    stats = acqcore.logit_stats(logits, backend=implementation)
    assert stats.valid.tolist() == [False, True]


def test_nan_among_minus_infinities_shows(implementation):
    logits = torch.full((1, 600), -torch.inf)
    logits[0, 10], logits[0, 400] = torch.nan, 1.0
    assert not acqcore.logit_stats(logits, backend=implementation).valid.item()


def test_a_row_without_finite_logit_is_nan(implementation):
    logits = torch.zeros(2, 600)
    logits[1] = -torch.inf
    stats = acqcore.logit_stats(logits, torch.tensor([3, 3]), backend=implementation)
    assert stats.valid.tolist() == [True, False]
    assert stats.logprob.isnan().tolist() == [False, True]
    assert stats.entropy[0].item() == pytest.approx(torch.tensor(600.0).log().item(), abs=1e-5)


@pytest.mark.parametrize("cuts", [(0, 250, 507), (0, 1, 506, 507), (0, 100, 200, 300, 507)])
def test_merged_shards_equal_the_whole(cuts, implementation):
    case = random_case(21, 40, 507, bias=True)
    case.targets[4] = -100
    shards = []
    for begin, end in itertools.pairwise(cuts):
        head = acqcore.Head(case.head.weight[begin:end], case.head.bias[begin:end], vocab_start=begin, vocab_size=507)
        shards.append(acqcore.row_stats(case.hidden, head, case.targets, backend=implementation))
    for order in (shards, shards[::-1]):
        merged = order[0]
        for shard in order[1:]:
            merged = merged.merge(shard)
        assert_close_to_oracle(merged, case.oracle())


def test_merge_with_a_shard_of_impossible_tokens(implementation):
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    logits[:, 200:] = -torch.inf
    whole = acqcore.logit_stats(logits.double(), backend="eager")
    left = acqcore.logit_stats(logits[:, :200], backend=implementation)
    right = acqcore.logit_stats(logits[:, 200:], backend=implementation)
    assert_close_to_oracle(left.merge(right), whole)
    assert_close_to_oracle(right.merge(left), whole)


def test_merge_of_equal_maxima_keeps_the_lower_index():
    weight = torch.zeros(10, 4)
    hidden = torch.ones(1, 4)
    left = acqcore.row_stats(hidden, acqcore.Head(weight[:6], vocab_size=10))
    right = acqcore.row_stats(hidden, acqcore.Head(weight[6:], vocab_start=6))
    assert right.merge(left).top1_index.item() == 0
    assert left.merge(right).entropy.item() == pytest.approx(2.302585, abs=1e-6)


def test_float64_fields_on_eager():
    stats = random_case(3, 8, 20).oracle()
    assert stats.entropy.dtype == torch.float64


def test_inputs_that_require_grad_are_left_alone(implementation):
    case = random_case(3, 8, 20)
    case.hidden.requires_grad_()
    assert not case.run(implementation).entropy.requires_grad


def test_compiles_without_graph_breaks(implementation):
    case = random_case(12, 16, 300)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(hidden, weight, targets):
        stats = acqcore.row_stats(hidden * 2, acqcore.Head(weight), targets, backend=implementation)
        return stats.entropy + stats.logprob

    got = compiled(case.hidden, case.head.weight, case.targets)
    expected = acqcore.row_stats(case.hidden * 2, case.head, case.targets, backend=implementation)
    torch.testing.assert_close(got, expected.entropy + expected.logprob)


def test_custom_ops_are_well_formed():
    case = random_case(6, 8, 40)
    state, index = torch.empty(7, 6, dtype=torch.float64), torch.empty(6, dtype=torch.int64)
    args = (case.hidden, case.head.weight, None, case.targets, None, 1.0, 1.0, 0, 40, "cpu")
    torch.library.opcheck(torch.ops.acqcore.row_stats.default, (*args, [], state, index, None))
    products = torch.empty(2 * 2 + 4 * 4)
    torch.library.opcheck(torch.ops.acqcore.row_stats.default, (*args, [0, 2, 2, 6], state, index, products))
    args = (case.head.logits(case.hidden), case.targets, 1.0, "cpu", state, index)
    torch.library.opcheck(torch.ops.acqcore.logit_stats.default, args)
