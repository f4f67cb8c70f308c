"""logit_stats on every available backend and instruction set, against float64."""

from __future__ import annotations

import pytest
import torch

import acqcore
from acqcore.backends.triton import INTERPRETED
from acqcore.testing import assert_logits_match, logit_cases

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(dtype, implementation):
    for name, logits, targets, temperature in logit_cases():
        if INTERPRETED and dtype != torch.float32 and name in ("N = 8200", "V = 262144"):
            continue  # the interpreter takes seconds for each: sizes are held in one dtype
        try:
            assert_logits_match(logits.to(dtype), targets, temperature, implementation)
        except AssertionError as error:
            raise AssertionError(f"case {name!r}: {error}") from error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_half_precision_value_is_read_exactly(dtype, implementation):
    if dtype == torch.float32:
        values = torch.randn(65536, generator=torch.Generator().manual_seed(0))
    else:
        values = torch.arange(65536).to(torch.int32).to(torch.int16).view(dtype)
    values = values[values.float().isfinite()]
    stats = acqcore.logit_stats(values[:, None], backend=implementation)  # with V = 1, logsumexp is the logit
    assert torch.equal(stats.logsumexp, values.float())


def test_strides(implementation):
    base = torch.randn(12, 900, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(6)
    for view in (base[::2], base[:6, 1:], base.T[:, :6].T, base[:6, ::3], base[:1].expand(6, 900)):
        assert_logits_match(view, targets, 1.0, implementation)


def test_input_is_not_written(implementation):
    logits = torch.randn(4, 700)
    before = logits.clone()
    acqcore.logit_stats(logits, temperature=0.5, backend=implementation)
    assert torch.equal(logits, before)


def test_no_hidden_norm():
    assert acqcore.logit_stats(torch.zeros(2, 3)).hidden_norm is None
