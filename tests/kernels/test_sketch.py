"""Hashed gradients computed with the row states in Triton's interpreter, with cuts that committed tiles do not reach.

``test_cuts`` catches a wrong tail tile and an unmasked stretch that wraps around its group (dims that divide neither V
nor a tile), bucket sums not rescaled to a new maximum (rising logits), and a target's column not left out (confident
rows). ``test_kernel_runs`` catches the reference running instead of the kernel.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from acqcore.backends import HeadRows, get as get_backend
from acqcore.backends.triton import Triton
from acqcore.head import Head
from acqcore.kernels import sketch
from acqcore.kernels.config import Tiles
from acqcore.kernels.product import Product
from acqcore.signs import rotated_places
from acqcore.testing import CASES, Case, case_from_logits, random_case

TILES = Tiles(16, 16, 64, 4, 1, 2, 4, descriptors=False, flatten=False)


def _run(case: Case, dim: int, tiles: Tiles = TILES) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hashed gradients ``[N, dim]``, state ``[7, N]`` and index ``[N]`` of one visit."""
    head, n = case.head, len(case.hidden)
    state, index = torch.empty(7, n, dtype=torch.float64), torch.empty(n, dtype=torch.int64)
    out = torch.empty(n, dim)
    places = rotated_places(len(head.weight), dim, 3, 0, head.vocab_start)
    bias = None if head.bias is None else head.bias.float()
    how = Product(
        head.weight, bias, head.softcap, head.scale, case.temperature, head.vocab_start, tiles, "ieee", True
    )  # fmt: skip
    sketch.hashed_delta(how, case.hidden, case.targets, places, state, index, True, out)
    return out, state, index


def _oracle(case: Case, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    exact, n = case.to(torch.float64), len(case.hidden)
    state, index = torch.empty(7, n, dtype=torch.float64), torch.empty(n, dtype=torch.int64)
    out = torch.empty(n, dim, dtype=torch.float64)
    places = rotated_places(len(case.head.weight), dim, 3, 0, case.head.vocab_start)
    rows = HeadRows(exact.hidden, exact.head, case.targets, case.temperature, state, index)
    get_backend("eager").delta_sums(rows, None, places, out)
    return out, state, index


def _assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-5 of each row's largest entry, however small that is."""
    assert torch.equal(got.isnan(), expected.isnan())
    size = expected.abs().amax(dim=1, keepdim=True).nan_to_num(1.0).clamp_min(1e-300)
    assert float(((got.double() - expected).abs() / size).nan_to_num(0).max()) < 1e-5


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("random", 40), ("rising logits", 40), ("-inf columns", 40), ("confident 1e-20", 40), ("ties", 40),
        ("everything", 40), ("V = 257", 7),
        ("rising logits", 300), ("everything", 1000),  # two groups of columns, and a part of one
    ],
)  # fmt: skip
def test_cuts(name, dim):
    if name == "rising logits":  # at every tile, as in the shared case of this name, which is three times as wide
        case = case_from_logits(torch.arange(600.0).expand(2, 600) / 16, torch.tensor([0, 599]))
    else:
        case = CASES[name]()
    case = replace(case, hidden=case.hidden[:4], targets=case.targets[:4])
    got, state, index = _run(case, dim)
    expected, expected_state, expected_index = _oracle(case, dim)
    _assert_close(got, expected)
    torch.testing.assert_close(state, expected_state, rtol=2e-5, atol=2e-5, equal_nan=True)
    assert torch.equal(index, expected_index)


def test_some_rows_ignored():
    case = CASES["some rows ignored"]()
    got, _, index = _run(case, 32)
    _assert_close(got, _oracle(case, 32)[0])
    assert got[case.targets == -100].count_nonzero() == 0
    assert torch.equal(index == -1, case.targets == -100)


def test_bits_do_not_depend_on_the_batch(in_eighths, monkeypatch):
    case = in_eighths(random_case(20, 32, 60))
    whole, _, _ = _run(case, 32)
    assert torch.equal(_run(case, 32)[0], whole)
    part = Case(case.hidden[15:], case.head, case.targets[15:])
    assert torch.equal(_run(part, 32)[0], whole[15:])
    monkeypatch.setattr(sketch, "SCRATCH_BYTES", 1 << 12)
    assert torch.equal(_run(case, 32)[0], whole)


def test_shards_add_up():
    """Each shard uses the statistics of the whole vocabulary; the cut is not at the start of a group of columns."""
    case = random_case(5, 24, 130)
    whole, state, index = _run(case, 32)
    total = torch.zeros_like(whole)
    for begin, end in ((0, 45), (45, 130)):
        head = Head(case.head.weight[begin:end], vocab_start=begin, vocab_size=130)
        part = torch.empty_like(whole)
        rows = HeadRows(case.hidden, head, case.targets, 1.0, state, index)
        Triton().delta_hash(rows, rotated_places(end - begin, 32, 3, 0, begin), part)
        total += part
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-6)


def test_kernel_runs(monkeypatch):
    case = random_case(2, 16, 20)
    monkeypatch.setattr(sketch, "sketch_fold", None)
    state, index = torch.empty(7, 2, dtype=torch.float64), torch.empty(2, dtype=torch.int64)
    rows = HeadRows(case.hidden, case.head, case.targets, 1.0, state, index)
    with pytest.raises(TypeError):
        Triton().delta_sums(rows, None, rotated_places(20, 16, 0, 0), torch.empty(2, 16))
