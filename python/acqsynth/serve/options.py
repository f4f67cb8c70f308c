"""What a server is told when it starts: its limits, and who may ask it."""

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
    """What a server takes on.

    Args:
        batch_tokens: tokens that are scored in one call; requests are coalesced up to it.
        batch_seconds: seconds that one call may take; another request waits for three of them at most.
        wait: seconds that a sample waits for others while the model is free.
        queue_tokens: tokens that may wait; beyond them a request is told to come again (429).
        max_samples: of a request.
        max_length: tokens of a sample.
        max_characters: of a sample; a longer one is not tokenized.
        max_body: bytes of a request's body.
        max_bodies: bytes of all bodies held at a time, a bound on memory; beyond it requests get 429.
        max_requests: most requests read or answered at a time.
        timeout: seconds from the arrival of a request to its answer, else 504.
        body_timeout: seconds in which a body has to arrive, else 408.

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


def token_from(variable: str, file: Path | None, environment: Mapping[str, str] | None = None) -> str | None:
    """A token from a file, else from an environment variable, else None. Command lines are public on a machine, so it
    is never taken from there.

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
    """Whether a server bound to ``host`` is reached from this machine alone."""
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
    add("--student", required=True, help="path, hub id, or one of the names smollm2 and world:base")
    add("--host", default="127.0.0.1", help="address to serve on; any but loopback needs a token")
    add("--port", type=int, default=8000, help="0 takes a free one")
    add("--device", help="where the student is loaded, by default the CPU")
    add("--backend", help="of acqcore, by default the first that fits")
    add("--acquisition", default="entropy", help="the reward of /get_reward (entropy)")
    add("--token-file", type=Path, help=f"file with the token of clients, by default the variable {TOKEN_VARIABLE}")
    add(
        "--admin-token-file", type=Path,
        help=f"file with the token for POST /student, by default the variable {ADMIN_TOKEN_VARIABLE}",
    )  # fmt: skip
    add("--student-root", type=Path, help="folder below which POST /student finds students; without it none is taken")
    add("--batch-tokens", type=int, default=default.batch_tokens, help="tokens scored in one call (%(default)s)")
    add(
        "--batch-seconds", type=float, default=default.batch_seconds,
        help="seconds that one call may take, which bounds what a request waits for another (%(default)s)",
    )  # fmt: skip
    add("--wait", type=float, default=default.wait, help="seconds a sample waits for others (%(default)s)")
    add("--queue-tokens", type=int, default=default.queue_tokens, help="tokens that may wait (%(default)s)")
    add("--max-samples", type=int, default=default.max_samples, help="of a request (%(default)s)")
    add("--max-length", type=int, default=default.max_length, help="tokens of a sample (%(default)s)")
    add(
        "--max-characters", type=int, default=default.max_characters,
        help="characters of a sample; a longer one is not tokenized (%(default)s)",
    )  # fmt: skip
    add("--max-body", type=int, default=default.max_body, help="bytes of a request (%(default)s)")
    add("--max-bodies", type=int, default=default.max_bodies, help="bytes of all requests held at once (%(default)s)")
    add("--max-requests", type=int, default=default.max_requests, help="in work at a time (%(default)s)")
    add("--timeout", type=float, default=default.timeout, help="seconds to an answer (%(default)s)")
    add("--body-timeout", type=float, default=default.body_timeout, help="seconds for a body to arrive (%(default)s)")
