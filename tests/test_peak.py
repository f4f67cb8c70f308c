"""The ceiling with which benchmarks compare their rates."""

from __future__ import annotations

import itertools

import pytest
import torch

from acqcore import _core
from benchmarks import harness, peak

HERE = [key for key in peak.LOOPS if dict(_core.isas()).get(key[0]) == ""]


@pytest.mark.parametrize(("instruction_set", "dtype"), HERE, ids=lambda value: str(value).removeprefix("torch."))
def test_every_loop_this_processor_has_runs(instruction_set, dtype):
    sums = list(peak.multiply_adds(1e6, instruction_set, dtype)())
    assert len(sums) == torch.get_num_threads()
    assert all(0 < total < 1e3 for total in sums)


def test_an_instruction_set_without_a_loop_is_named():
    with pytest.raises(LookupError, match="mips"):
        peak.multiply_adds(1e6, "mips", torch.float32)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    peak._library.cache_clear()
    with pytest.raises(RuntimeError, match="no-such-compiler"):
        peak.multiply_adds(1e6, *HERE[0])
    peak._library.cache_clear()


def test_the_share_is_the_median_over_turns():
    readings = itertools.accumulate([0, 4, 0, 2, 0, 4, 0, 1, 0, 4, 0, 3])  # the peer takes 4 s, the ceiling 2, 1, 3
    rows = harness.measure(
        "case",
        {"peer": lambda: None, "ceiling": lambda: None},
        baseline="peer",
        work=8e9,
        turns=3,
        memory=False,
        ceiling="ceiling",
        clock=lambda: next(readings),
    )
    assert [(row.peer, row.rate, row.share) for row in rows] == [("peer", 2.0, 0.5), ("ceiling", 4.0, 1.0)]
