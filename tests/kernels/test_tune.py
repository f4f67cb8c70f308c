"""The tuner, as far as it goes without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from acqcore.kernels import tune
from acqcore.kernels.config import FOLDER, Tiles


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--output", str(tmp_path / "x.json")]) == 1
    assert "acqcore.kernels.tune: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreter, which has no speed to measure" in str(tune.why_not())
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "tile shapes can be measured on a GPU only" in str(tune.why_not())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    assert tune.why_not() == "Tesla V100 has a compute capability below 8.0, which acqcore does not serve"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert tune.why_not() is None


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_what_it_writes_is_what_is_read(path: Path, tmp_path: Path) -> None:
    tune.write(tmp_path / path.name, json.loads(path.read_text()))
    assert (tmp_path / path.name).read_text() == path.read_text()


def test_candidates() -> None:
    fallback = Tiles(128, 256, 64, 8, 4, 16, 128, descriptors=True, flatten=False)
    assert all(tiles.splits == 128 and tiles.group_m == 16 for tiles in tune.tile_candidates("half", 9, fallback))
    assert any(tiles.descriptors for tiles in tune.tile_candidates("half", 9, fallback))
    assert not any(tiles.descriptors for tiles in tune.tile_candidates("half", 8, fallback))
    assert fallback in tune.tile_candidates("half", 9, fallback)


def test_the_fastest_that_agrees_is_taken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Candidates are times here; 1 computes something else, 2 does not fit the device."""

    def run(candidate: int) -> torch.Tensor:
        if candidate == 2:
            raise tune.OutOfResources(1, 0, "shared memory")
        ran.append(candidate)
        return torch.tensor(1.0 if candidate == 1 else 0.0)

    def time(function: object, return_mode: str) -> float:
        function()  # type: ignore[operator]
        return float(ran[-1])

    ran: list[int] = []
    monkeypatch.setattr(tune.triton.testing, "do_bench", time)
    assert tune.fastest(run, [5, 1, 2, 3, 4], 9) == 3
    assert "dropped, its statistics differ: 1" in capsys.readouterr().out
