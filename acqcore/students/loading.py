"""What ``Student.load`` is asked for, checked before transformers looks for it on the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from acqcore import checks
from acqcore.students.sharding import loading_whole

#: Dtypes of weights that the commands offer.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_TOKENIZER_FILES = ("*token*", "vocab*", "*.model", "merges.txt", "*.tiktoken")


def check_request(path: str, dtype: object, device: object) -> None:
    """Check the arguments of ``Student.load``.

    Raises:
        ValueError: a path without a model, a dtype that is none or not of floating point, a device that is not here.
        TypeError: a dtype that is neither a name nor a torch.dtype.
    """
    folder = Path(path)
    if (path.startswith(("/", ".", "~")) or folder.exists()) and not (
        (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()
    ):
        raise ValueError(f"student: {path} holds no model (no config.json)")
    _check_dtype(dtype)
    checks.device("device", device)


def _check_dtype(dtype: object) -> None:
    if dtype is not None and dtype not in checks.FLOAT_DTYPES:
        names = [str(known).removeprefix("torch.") for known in checks.FLOAT_DTYPES]
        checks.one_of("dtype", str(dtype).removeprefix("torch."), names)


def _checked_path(path: object) -> str:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected a folder or hub id, got {type(path).__name__}")
    return os.fspath(path)


def load_model(path: str | os.PathLike[str], dtype: torch.dtype | str | None = None, kind: Any = None) -> Any:
    """A transformers model on the CPU, whole even in a run that shards its models.

    Args:
        path: folder or hub id, as for ``from_pretrained``.
        dtype: of the weights; by default as stored.
        kind: the class whose ``from_pretrained`` loads it; by default ``AutoModelForCausalLM``.

    Raises:
        OSError: no such model. TypeError: a path that is none. ValueError: an unknown dtype.
    """
    from transformers import AutoModelForCausalLM

    path = _checked_path(path)
    _check_dtype(None if dtype == "auto" else dtype)
    with loading_whole():
        try:
            return (kind or AutoModelForCausalLM).from_pretrained(path, dtype="auto" if dtype is None else dtype)
        except OSError as error:
            if os.path.isdir(path):
                raise
            told = str(error).strip().splitlines()[0]
            raise OSError(f"{path!r} is no folder here, and the hub did not give it: {told}") from error


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer beside a model; None where a folder has no file of one.

    Raises:
        ValueError: there is one that does not load. TypeError: a path that is none.
    """
    from transformers import AutoTokenizer

    path = _checked_path(path)
    if os.path.isdir(path) and not any(any(Path(path).glob(name)) for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # of any file that is broken
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"student: the tokenizer of {path} does not load: {told}") from error
