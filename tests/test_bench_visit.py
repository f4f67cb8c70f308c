"""The peers that ``bench_visit`` times, on small shapes."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_gradients, bench_visit


@pytest.fixture
def inputs(monkeypatch):
    for module in (bench_visit, bench_gradients):
        monkeypatch.setattr(module, "D", 8)
        monkeypatch.setattr(module, "V", 600)
    return bench_visit.inputs(256, torch.float32)


def test_the_norms_of_peers_agree(inputs):
    peers = bench_visit.norm_peers(*inputs, length=64)
    expected = peers["statistics and norm"]()
    for name in ("statistics and norm, two visits", "one backward per sample"):
        torch.testing.assert_close(peers[name](), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("peers", [bench_visit.row_peers, bench_visit.draw_peers])
def test_every_peer_runs(peers, inputs):
    assert all(call() is not None for call in peers(*inputs).values())
