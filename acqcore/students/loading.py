"""Loads models and tokenizers; arguments are checked before transformers searches the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from acqcore import checks
from acqcore.students.sharding import loading_whole

#: Weight dtypes that the commands offer.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_TOKENIZER_FILES = ("*token*", "vocab*", "*.model", "merges.txt", "*.tiktoken")


def checked_source(path: object) -> str:
    """A folder with a model, or a hub id. Raises ValueError for any other path, TypeError for neither text nor path."""
    path = _checked_path(path)
    folder = Path(path)
    if (path.startswith(("/", ".", "~")) or folder.exists()) and not (
        (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()
    ):
        raise ValueError(f"student: {path} holds no model (no config.json)")
    return path


def _checked_path(path: object) -> str:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected a folder or hub id, got {type(path).__name__}")
    return os.path.expanduser(os.fspath(path))


def load_model(path: str | os.PathLike[str], dtype: torch.dtype | str | None = None, kind: Any = None) -> Any:
    """Load a transformers model on the CPU, unsharded even in a run that shards its models.

    Args:
        path: folder or hub id, as for ``from_pretrained``.
        dtype: of the weights; by default as stored.
        kind: the class whose ``from_pretrained`` loads it; by default ``AutoModelForCausalLM``.

    Raises:
        OSError: no such model. TypeError: path is neither text nor a path. ValueError: an unknown dtype.
    """
    from transformers import AutoModelForCausalLM

    path = _checked_path(path)
    if dtype not in (None, "auto", *checks.FLOAT_DTYPES):
        names = [str(known).removeprefix("torch.") for known in checks.FLOAT_DTYPES]
        checks.one_of("dtype", str(dtype).removeprefix("torch."), names)
    with loading_whole():
        try:
            return (kind or AutoModelForCausalLM).from_pretrained(path, dtype="auto" if dtype is None else dtype)
        except OSError as error:
            if os.path.isdir(path):
                raise
            reason = str(error).strip().splitlines()[0]
            raise OSError(f"{path!r} is not a local folder and did not load from the hub: {reason}") from error


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """Load the tokenizer stored with a model; None if a folder has no tokenizer files.

    Raises:
        ValueError: the tokenizer does not load. TypeError: path is neither text nor a path.
    """
    from transformers import AutoTokenizer

    path = _checked_path(path)
    if os.path.isdir(path) and not any(any(Path(path).glob(name)) for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a broken file may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"student: the tokenizer of {path} does not load: {reason}") from error
