"""Types of command-line options."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from acqcore import checks


def at_least(least: int) -> Callable[[str], int]:
    """An int of at least ``least``."""

    def value(text: str) -> int:
        with suppress(ValueError):
            if (number := int(text)) >= least:
                return number
        raise argparse.ArgumentTypeError(f"expected an int >= {least}, got {text}")

    return value


def json_value(text: str) -> Any:
    """JSON without repeated keys."""
    try:
        return json.loads(text, object_pairs_hook=checks.unique_keys)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected JSON, got {text!r}: {error}") from None


def output(name: str) -> Path:
    """The path of an output. A link to a file gives the file's path."""
    target = os.path.realpath(name)  # may not exist although the link works: /dev/stdout
    to_file = os.path.islink(name) and (os.path.isfile(target) or not os.path.exists(name))
    path = Path(target if to_file else name)
    if not path.name:
        raise argparse.ArgumentTypeError(f"expected a name, got {name!r}")
    return path


def table_output(name: str) -> Path:
    """As :func:`output`, for a table, whose format follows from the extension."""
    path = output(name)
    if path.suffix != Path(name).suffix:
        raise argparse.ArgumentTypeError(f"expected a link to a file of the same extension, got one to {path}")
    return path
