"""Model names in recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from acqsynth import models, world


@pytest.mark.parametrize(("name", "seed"), [("world:base", 0), ("world:7", 7), ("world:skewed", 0)])
def test_the_worlds_model_goes_by_its_seed(name, seed, monkeypatch):
    asked = []

    def base_model(settings):
        asked.append(settings)
        return Path("made")

    monkeypatch.setattr(world, "base_model", base_model)
    assert models.resolve(name) == "made"
    assert asked == [world.Settings(seed=seed, skewed=name == "world:skewed")]


def test_smollm2_is_the_packaged_one(monkeypatch):
    monkeypatch.setattr(models, "smollm2_path", lambda: Path("converted"))
    assert models.resolve("smollm2") == "converted"


@pytest.mark.parametrize("name", ["a/hub-id", "world:", "world:x", "smollm2-135m"])
def test_anything_else_is_a_path_or_hub_id(name):
    assert models.resolve(name) == name


def test_a_path_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} holds no model \(no config.json\)"):
        models.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert models.resolve(str(tmp_path)) == str(tmp_path)
