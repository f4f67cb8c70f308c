"""Validation of arguments, shared by several callers."""

from __future__ import annotations

from typing import Any


def positive_int(name: str, value: Any) -> None:
    """Raises ValueError unless the value is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an int >= 1, got {value!r}")
