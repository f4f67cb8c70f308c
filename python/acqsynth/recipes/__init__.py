"""The recipes in the package."""

from __future__ import annotations

from importlib import resources


def recipes() -> list[str]:
    """Their names."""
    folder = resources.files(__name__)
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
