"""Heads and students sharded over several processes give the values of whole ones and send few bytes per row."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("sharding_cases.py")
_SCRIPT = runpy.run_path(str(SCRIPT))
CASES, RANKS = _SCRIPT["CASES"], _SCRIPT["RANKS"]

#: Tolerances relative to max(1, |value|). float64 checks the algorithm. In float32, a shard's tiles may round products
#: differently, and gradients sum the vocabulary in another order. Draws have the tolerance of the contract, because
#: shards form their products in torch, while a single process uses a fused backend.
FLOAT64, FLOAT32, HIDDEN_GRAD, DRAWS = 1e-9, 1e-6, 5e-6, 2e-5

#: Cases in which each rank has its own samples.
OWN_SAMPLES = {
    "DistributedDataParallel",
    "FSDP2",
    "FSDP2, LoRA",
    "FSDP2 in one unit",
    "FSDP2 and tensor parallel",
    "FSDP1, flat parameters",
    "FSDP1, original parameters",
    "a contract like ZeRO-3's",
    "ZeRO-3",
}


def run(folder: Path, *groups: str) -> dict[str, list[dict[str, Any]]]:
    """Results of each rank for each case of every group."""
    command = [sys.executable, str(SCRIPT), str(folder), *groups]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return {
        group: [torch.load(folder / f"{group} {rank}", weights_only=False) for rank in range(RANKS[group])]
        for group in groups
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Results of both groups; a process of its own for each would import the libraries again."""
    return run(tmp_path_factory.mktemp("sharding"), "two ranks", "four ranks")


def assert_same(results: list[dict[str, Any]], name: str) -> None:
    """Every rank's values match those of one process; if ranks share samples, they agree bit for bit."""
    for rank, of_rank in enumerate(results):
        assert not isinstance(of_rank[name], str), f"rank {rank}: {of_rank[name]}"
        assert of_rank[name], name
        for key, (got, expected) in of_rank[name].items():
            if not isinstance(expected, torch.Tensor):
                assert got == expected, (rank, key)
                continue
            if name not in OWN_SAMPLES:
                same = torch.equal(got.nan_to_num(7.0), results[0][name][key][0].nan_to_num(7.0))
                assert same, f"{key}: ranks 0 and {rank} differ"
            loose = DRAWS if name.startswith("draws") else HIDDEN_GRAD if key.endswith("hidden_grad") else FLOAT32
            tolerance = FLOAT64 if expected.dtype == torch.float64 else loose
            torch.testing.assert_close(
                got / expected.abs().clamp_min(1),
                expected / expected.abs().clamp_min(1),
                rtol=0,
                atol=tolerance,
                equal_nan=True,
                msg=lambda text, key=key, rank=rank: f"rank {rank}, {key}: {text}",
            )


@pytest.mark.parametrize(("ranks", "name"), [(n, name) for n in ("two ranks", "four ranks") for name in CASES[n]])
def test_every_case(found, ranks, name):
    assert_same(found[ranks], name)


@pytest.mark.parametrize("name", ["rows: confident 1e-12", "rows: confident 1e-20", "gradients: confident 1e-12"])
def test_confident_rows_keep_their_digits(found, name):
    """If all but the maximum is 1e-12 or 1e-20, relative errors would reveal digits lost in subtracting 1 from 1."""
    seen = 0
    for key, (got, expected) in found["two ranks"][0][name].items():
        if key.rsplit(" ", 1)[-1] in ("gini", "residual_norm", "entropy", "gram", "direct", "auto"):
            seen += 1
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=0, msg=lambda text, key=key: f"{key}: {text}")
    assert seen >= 12


def test_zero3(tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    assert_same(run(tmp_path, "ZeRO-3")["ZeRO-3"], "ZeRO-3")
