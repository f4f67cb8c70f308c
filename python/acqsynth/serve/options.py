"""Server options: limits, tokens and the command line."""

from __future__ import annotations

import argparse
import ipaddress
import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

TOKEN_VARIABLE = "ACQSYNTH_TOKEN"
ADMIN_TOKEN_VARIABLE = "ACQSYNTH_ADMIN_TOKEN"


def _limit(default: float, help: str, least: float = 1) -> Any:
    return field(default=default, metadata={"help": help, "least": least})


@dataclass(frozen=True)
class Limits:
    """Limits of a server, with help texts."""

    batch_tokens: int = _limit(8192, "maximum tokens per scoring call; requests are batched up to this")
    batch_seconds: float = _limit(0.5, "maximum time per scoring call; requests wait for about three at most", 0.001)
    wait: float = _limit(0.005, "time a sample waits for others while the model is idle", 0)
    queue_tokens: int = _limit(262_144, "maximum tokens in the queue; requests beyond it get 429")
    max_samples: int = _limit(256, "maximum samples per request")
    max_length: int = _limit(2048, "maximum tokens per sample", 2)
    max_characters: int = _limit(1 << 16, "maximum characters per sample; longer ones are not tokenized")
    max_body: int = _limit(8 << 20, "maximum bytes per request body")
    max_bodies: int = _limit(64 << 20, "maximum total bytes of bodies held; requests beyond it get 429")
    max_requests: int = _limit(256, "maximum concurrent requests")
    timeout: float = _limit(120.0, "maximum time from a request's arrival to its answer; after that it gets 504", 0.001)
    body_timeout: float = _limit(10.0, "maximum time for a body to arrive; after that it gets 408", 0.001)

    def __post_init__(self) -> None:
        for limit in fields(self):
            value, least = getattr(self, limit.name), limit.metadata["least"]
            if not least <= value < math.inf:
                raise ValueError(f"{limit.name}: expected a finite number >= {least}, got {value}")
        if self.max_bodies < self.max_body:
            raise ValueError(f"max_bodies: expected at least max_body ({self.max_body} bytes), got {self.max_bodies}")


def token_from(variable: str, file: Path | None = None) -> str | None:
    """Reads a token from a file, else from an environment variable, else returns None. Tokens are never taken from the
    command line, which every user of the machine can read."""
    if file is not None:
        return checked_token(file.read_text(encoding="ascii", errors="replace"), str(file))
    found = os.environ.get(variable)
    return None if found is None else checked_token(found, variable)


def checked_token(text: str, source: str) -> str:
    """The token in ``text``, without white space around it; ValueError, which names the source, if it is none."""
    token = text.strip() if isinstance(text, str) else ""
    if not token or not all("!" <= character <= "~" for character in token):
        raise ValueError(f"{source}: expected a token of visible ASCII characters without spaces")
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may resolve to another address later
        return False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``acqsynth serve``."""
    add = parser.add_argument
    add("--student", required=True, help="path, hub id, or one of the names smollm2, world:base and world:skewed")
    add("--host", default="127.0.0.1", help="address to listen on; any address but loopback needs a token")
    add("--port", type=int, default=8000, help="port to listen on; 0 picks a free one")
    add("--device", help="device of the student (default: cpu)")
    add("--backend", help="acqcore backend (default: the first suitable one)")
    add("--acquisition", default="entropy", help="acquisition returned by /get_reward (default: %(default)s)")
    add("--token-file", type=Path, help=f"file with the clients' token (default: ${TOKEN_VARIABLE})")
    add(
        "--admin-token-file", type=Path,
        help=f"file with the token for POST /student (default: ${ADMIN_TOKEN_VARIABLE})",
    )  # fmt: skip
    add(
        "--student-root",
        type=Path,
        help="folder from which POST /student loads students; without it the student cannot be changed",
    )
    for limit in fields(Limits):
        unit = " s" if isinstance(limit.default, float) else ""
        help = f"{limit.metadata['help']} (default: %(default)s{unit})"
        add(f"--{limit.name.replace('_', '-')}", type=type(limit.default), default=limit.default, help=help)
