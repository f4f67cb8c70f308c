"""A process either interprets or compiles kernels; tests of the other kind are not collected."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import replace

import numpy as np
import pytest

from acqcore.backends.triton import INTERPRETED

OF_INTERPRETER = [
    "test_cotangents.py", "test_factors.py", "test_gram.py", "test_mixture.py", "test_philox.py", "test_row_stats.py",
    "test_sketch.py",
]  # fmt: skip
COMPILED = ["test_compile.py", "test_gpu_static.py"]
collect_ignore = COMPILED if INTERPRETED else OF_INTERPRETER
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _numpy_may_meet_infinities():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.fixture
def in_eighths():
    """``in_eighths(case)``: the case with values rounded to multiples of 1/8, whose products are exact in any order.

    The interpreter uses numpy's product, which, unlike a matrix unit, rounds a row by its place in the tile.
    """

    def rounded(case):
        head = case.head
        weight, hidden = ((x * 8).round() / 8 for x in (head.weight, case.hidden))
        bias = None if head.bias is None else (head.bias * 8).round() / 8
        return replace(case, hidden=hidden, head=replace(head, weight=weight, bias=bias))

    return rounded


@pytest.fixture
def rounded_once(monkeypatch):
    """Products of tiles in float64, rounded at the end, for values that cannot be made exact: the same in any place."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(builder, a, b, c, input_precision, max_num_imprecise_acc):
        product = a.data.astype(np.float64) @ b.data.astype(np.float64) + c.data
        return TensorHandle(product.astype(c.data.dtype), c.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
