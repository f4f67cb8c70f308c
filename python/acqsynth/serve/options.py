"""Options of a server: its limits, its tokens, its command line."""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

TOKEN_VARIABLE = "ACQSYNTH_TOKEN"
ADMIN_TOKEN_VARIABLE = "ACQSYNTH_ADMIN_TOKEN"


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Args:
        batch_tokens: most tokens scored in one call; requests are coalesced up to it.
        batch_seconds: longest time of one call; another request waits for about three calls at most.
        wait: seconds that a sample waits for others while the model is idle.
        queue_tokens: most tokens in the queue; beyond it requests get 429.
        max_samples: most samples in a request.
        max_length: most tokens in a sample.
        max_characters: most characters in a sample; a longer one is not tokenized.
        max_body: most bytes in a request body.
        max_bodies: bytes of all bodies held at a time, a bound on memory; beyond it requests get 429.
        max_requests: most requests read or answered at a time.
        timeout: seconds from the arrival of a request to its answer; later it gets 504.
        body_timeout: seconds for a body to arrive; later it gets 408.

    Raises:
        ValueError: a limit below 1 (0 for wait; any seconds above 0), a max_length below 2.
    """

    batch_tokens: int = 8192
    batch_seconds: float = 0.5
    wait: float = 0.005
    queue_tokens: int = 262_144
    max_samples: int = 256
    max_length: int = 2048
    max_characters: int = 1 << 16
    max_body: int = 8 << 20
    max_bodies: int = 64 << 20
    max_requests: int = 256
    timeout: float = 120.0
    body_timeout: float = 10.0

    def __post_init__(self) -> None:
        for name in (
            "batch_tokens", "queue_tokens", "max_samples", "max_characters", "max_body", "max_bodies", "max_requests"
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.max_length < 2:
            raise ValueError(f"max_length: expected at least 2 tokens, got {self.max_length}")
        if self.max_bodies < self.max_body:
            raise ValueError(f"max_bodies: expected at least max_body ({self.max_body} bytes), got {self.max_bodies}")
        if not 0 <= self.wait < float("inf"):
            raise ValueError(f"wait: expected seconds, 0 or more, got {self.wait}")
        for name in ("timeout", "body_timeout", "batch_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected seconds above 0, got {getattr(self, name)}")


#: Limit -> its help on the command line.
_HELP = {
    "batch_tokens": "most tokens scored in one call",
    "batch_seconds": "longest time of one call, which bounds how long requests wait for each other",
    "wait": "how long a sample waits for others",
    "queue_tokens": "most tokens in the queue",
    "max_samples": "most samples in a request",
    "max_length": "most tokens in a sample",
    "max_characters": "most characters in a sample; a longer one is not tokenized",
    "max_body": "most bytes in a request body",
    "max_bodies": "most bytes of all bodies held at once",
    "max_requests": "most requests read or answered at once",
    "timeout": "longest time to an answer",
    "body_timeout": "longest time for a body to arrive",
}


def token_from(variable: str, file: Path | None, environment: Mapping[str, str] | None = None) -> str | None:
    """A token from a file, else from an environment variable, else None; never from the command line, which every user
    of the machine can read.

    Raises:
        ValueError: it is empty or has a character that a header cannot carry.
        OSError: the file cannot be read.
    """
    if file is not None:
        token, source = file.read_text(encoding="utf-8").strip(), str(file)
    else:
        found = (os.environ if environment is None else environment).get(variable)
        if found is None:
            return None
        token, source = found.strip(), variable
    if not token or not all("!" <= character <= "~" for character in token):
        raise ValueError(f"{source}: expected a token of visible ASCII characters without spaces")
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: what it resolves to may change
        return False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``acqsynth serve``."""
    default = Limits()
    add = parser.add_argument
    add("--student", required=True, help="path, hub id, or one of the names smollm2, world:base and world:skewed")
    add("--host", default="127.0.0.1", help="address to serve on; any but loopback needs a token")
    add("--port", type=int, default=8000, help="0 takes a free one")
    add("--device", help="device of the student (default: cpu)")
    add("--backend", help="backend of acqcore (default: the first that fits)")
    add("--acquisition", default="entropy", help="acquisition that /get_reward returns (default: %(default)s)")
    add("--token-file", type=Path, help=f"file with the clients' token (default: ${TOKEN_VARIABLE})")
    add(
        "--admin-token-file", type=Path,
        help=f"file with the token for POST /student (default: ${ADMIN_TOKEN_VARIABLE})",
    )  # fmt: skip
    add(
        "--student-root",
        type=Path,
        help="folder that POST /student loads students from; without it the student cannot be changed",
    )
    for name, text in _HELP.items():
        value = getattr(default, name)
        unit = " s" if isinstance(value, float) else ""
        help = f"{text} (default: %(default)s{unit})"
        add(f"--{name.replace('_', '-')}", type=type(value), default=value, help=help)
