"""Tile shapes: which ones are chosen, and the warning for devices without measured shapes."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest

from acqcore.kernels import config
from acqcore.kernels.config import FOLDER, Strips, Tiles


@pytest.fixture(autouse=True)
def _fresh():
    for function in (config.table, config.tiles_for, config.strips_for):
        function.cache_clear()


def test_a_device_without_measured_tiles_warns_once():
    with pytest.warns(UserWarning, match="no tile shapes measured for 'NVIDIA Imaginary 9', using those of sm_90"):
        first = config.tiles_for("NVIDIA Imaginary 9", 9, "half", 131072, 4096)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config.tiles_for("NVIDIA Imaginary 9", 9, "half", 50000, 3000) == first
        config.tiles_for("NVIDIA Imaginary 9", 9, "ieee", 50000, 576)
        config.strips_for("NVIDIA Imaginary 9", 9, 50000)


@pytest.mark.parametrize(("major", "architecture"), [(8, "sm_80"), (9, "sm_90"), (10, "sm_100"), (12, "sm_80")])
def test_architecture(major, architecture):
    with pytest.warns(UserWarning, match=f"using those of {architecture}"):
        assert config.table("NVIDIA Imaginary", major)["architecture"] == architecture


def test_a_measured_device_is_found_by_its_name(tmp_path, monkeypatch):
    entries = [
        {"vocab": 1000, "depth": 64, **_tiles(16)},
        {"vocab": 100000, "depth": 64, **_tiles(32)},
        {"vocab": 100000, "depth": 4096, **_tiles(64)},
    ]
    strips = [{"vocab": 1000, "rows": 1, "columns": 256, "split_columns": 512, "warps": 2}]
    file = tmp_path / "NVIDIA_H100_80GB_HBM3.json"
    file.write_text(json.dumps({"row_stats": {"half": entries}, "logit_stats": strips}))
    shutil.copy(FOLDER / "sm_90.json", tmp_path)
    monkeypatch.setattr(config, "FOLDER", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = [
            config.tiles_for("NVIDIA H100 80GB HBM3", 9, "half", vocab, depth).block_m
            for vocab, depth in [(1, 1), (9000, 64), (11000, 64), (200000, 400), (200000, 600), (1000, 4096)]
        ]
        assert config.strips_for("NVIDIA H100 80GB HBM3", 9, 5) == Strips(1, 256, 512, 2)
        sketch = config.tiles_for("NVIDIA H100 80GB HBM3", 9, "half", 131072, 4096, "sketch")  # not in the file
    assert got == [16, 16, 32, 32, 64, 16]
    assert sketch == config.tiles_for("sm_90", 9, "half", 131072, 4096, "sketch")


def _tiles(block_m: int) -> dict[str, int | bool]:
    return {
        "block_m": block_m, "block_n": 64, "block_k": 32, "warps": 4, "stages": 3, "group_m": 8, "splits": 4,
        "descriptors": False, "flatten": False,
    }  # fmt: skip


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_committed_files(path):
    tables = json.loads(path.read_text())
    assert tables["architecture"] in {*config.ARCHITECTURES.values(), "interpreter"}
    assert set(tables["row_stats"]) == {"half", "tf32", "ieee"}
    for entry in (entry for entries in tables["row_stats"].values() for entry in entries):
        tiles = Tiles(**{key: value for key, value in entry.items() if key not in ("vocab", "depth")})
        for size in (tiles.block_m, tiles.block_n, tiles.block_k):
            assert size >= 16
            assert size & (size - 1) == 0
    for entry in tables["logit_stats"]:
        strips = Strips(**{key: value for key, value in entry.items() if key != "vocab"})
        assert strips.columns & (strips.columns - 1) == 0
        assert strips.split_columns % strips.columns == 0


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 640, 641, 50257, 131072])
@pytest.mark.parametrize("most", [1, 2, 7, 128])
def test_splits_cover_the_vocabulary(most, vocab):
    splits, each = Tiles(**(_tiles(16) | {"splits": most})).split(vocab)
    assert splits <= most
    assert (splits - 1) * each * 64 < vocab <= splits * each * 64
