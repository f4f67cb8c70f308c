"""The tuner, as far as it runs without a GPU."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from acqcore.kernels import tune
from acqcore.kernels.config import FOLDER, Tiles


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert tune.main(["--output", str(tmp_path / "x.json")]) == 1
    assert "acqcore.kernels.tune: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_reasons(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreter, where timings mean nothing" in str(tune.why_not())
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "tile shapes can only be measured on a GPU" in str(tune.why_not())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    assert tune.why_not() == "Tesla V100 has a compute capability below 8.0, which acqcore does not support"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert tune.why_not() is None


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_written_files_are_the_committed_ones(path, tmp_path):
    tune.write(tmp_path / path.name, json.loads(path.read_text()))
    assert (tmp_path / path.name).read_text() == path.read_text()


def test_candidates():
    fallback = Tiles(128, 256, 64, 8, 4, 16, 128, descriptors=True, flatten=False)
    candidates = tune.tile_candidates("half", 9, fallback)
    assert all(tiles.splits == 128 and tiles.group_m == 16 for tiles in candidates)
    assert candidates[0] == fallback  # the nearest comes first
    assert replace(fallback, stages=3) in candidates[1:6]
    assert not any(tiles.descriptors for tiles in tune.tile_candidates("half", 8, fallback))


@pytest.fixture
def search(monkeypatch):
    """``fastest`` over candidates that are their times; 1 computes wrong values, and 2 and 4 fail in different ways."""
    ran: list[int] = []

    def run(candidate: int) -> torch.Tensor:
        if candidate == 2:
            raise tune.OutOfResources(1, 0, "shared memory")
        if candidate == 4:
            raise RuntimeError("PassManager::run failed")
        ran.append(candidate)
        return torch.tensor(1.0 if candidate == 1 else 0.0)

    def time(function: object, return_mode: str) -> float:
        function()
        return float(ran[-1])

    monkeypatch.setattr(tune.triton.testing, "do_bench", time)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return lambda candidates, budget: tune.fastest(run, candidates, 9, budget)


def test_the_fastest_that_agrees_is_taken(search, capsys):
    assert search([5, 1, 2, 4, 3, 6], tune.Budget()) == 3
    said = capsys.readouterr().out
    assert "dropped, wrong statistics: 1" in said
    assert "dropped, failed with RuntimeError: 4" in said


def test_a_search_ends_with_its_budget(search, capsys):
    assert search([5, 6, 3], tune.Budget(candidates=2)) == 5
    assert "the budget ends after 2 candidates" in capsys.readouterr().out
    assert search([5, 6, 3], tune.Budget(deadline=0.0)) == 9


@pytest.fixture
def _on_an_h100(monkeypatch):
    monkeypatch.setattr(tune, "why_not", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.mark.usefixtures("_on_an_h100")
def test_every_entry_is_written_when_it_is_known(tmp_path, monkeypatch):
    """After an interrupt in the second entry, the file has the first, and the architecture's tables for the rest. A
    later run for other products keeps it."""

    def measured(product: str, vocab: int, depth: int, fallback: Tiles, major: int, budget: object) -> dict[str, Any]:
        if product == "tf32":
            raise KeyboardInterrupt
        return {"vocab": vocab, "depth": depth, **asdict(fallback)}

    monkeypatch.setattr(tune, "tune_row_stats", measured)
    path = tmp_path / "tiles.json"
    with pytest.raises(KeyboardInterrupt):
        tune.main(["--shapes", "1024x512", "--output", str(path)])
    base, written = json.loads((FOLDER / "sm_90.json").read_text()), json.loads(path.read_text())
    assert [(entry["vocab"], entry["depth"]) for entry in written["row_stats"]["half"]] == [(1024, 512)]
    assert written["row_stats"]["tf32"] == base["row_stats"]["tf32"]
    assert written["logit_stats"] == base["logit_stats"]
    monkeypatch.setattr(tune, "tune_logit_stats", lambda vocab, *_: {**base["logit_stats"][0], "vocab": vocab})
    assert tune.main(["--shapes", "2048x512", "--products", "ieee", "--output", str(path)]) == 0
    again = json.loads(path.read_text())
    assert again["row_stats"]["half"] == written["row_stats"]["half"]
    assert [entry["vocab"] for entry in (*again["row_stats"]["ieee"], *again["logit_stats"])] == [2048, 2048]


@pytest.mark.usefixtures("_on_an_h100")
def test_a_file_that_cannot_be_written_is_named_before_the_search(tmp_path, capsys):
    assert tune.main(["--output", str(tmp_path / "missing" / "tiles.json")]) == 1
    assert f"cannot write to {tmp_path / 'missing'}; name another file with --output" in capsys.readouterr().err
