"""Tables of a recipe as the configuration objects of the libraries, names checked."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def build(kind: type[T], options: Mapping[str, Any], *, table: str = "options") -> T:
    """``kind(**options)``.

    Args:
        kind: a dataclass.
        options: field -> value.
        table: what the options are called where they were written, for the message.

    Raises:
        ValueError: a name that is no field; the nearest one is named.
    """
    names = [entry.name for entry in dataclasses.fields(kind) if entry.init]  # type: ignore[arg-type]
    for name in options:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{table}: expected fields of {kind.__name__}, got {name!r}{hint}")
    return kind(**options)
