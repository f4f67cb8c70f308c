"""What ``acqcore plan`` is asked for."""

from __future__ import annotations

from pathlib import Path

from acqcore.checks.basic import positive, positive_int


def row_tokens(tokens: object, scored: object, limit: int | None) -> None:
    """Tokens of a row, and those of them that are scored; None scored stands for all but the first."""
    positive_int("tokens", tokens)
    assert isinstance(tokens, int)
    if tokens < 2:
        raise ValueError(f"tokens: expected at least 2 (a scored token and its predecessor), got {tokens}")
    if limit is not None and tokens > limit:
        raise ValueError(f"tokens: the student takes at most {limit} tokens, got {tokens}")
    if scored is None:
        return
    positive_int("scored", scored)
    assert isinstance(scored, int)
    if scored >= tokens:
        raise ValueError(f"scored: expected at most {tokens - 1} of a row of {tokens} tokens, got {scored}")


def config_here(config: str | None) -> None:
    """A configuration given by its place exists; what does not would be asked of a hub."""
    if config is not None and not Path(config).exists():
        raise ValueError(f"config: no file or folder {config}")


def rates(flops: object, bandwidth: object) -> None:
    """Both or neither."""
    if (flops is None) != (bandwidth is None):
        raise ValueError("--flops and --bandwidth: expected both or neither")
    if flops is not None:
        positive("flops", flops)
        positive("bandwidth", bandwidth)


def device_here(device: str, present: bool) -> None:
    if not present:
        raise ValueError(
            f"device: {device!r} is not on this machine, so nothing is measured; --flops and --bandwidth tell what it "
            "achieves"
        )


def fits(what: str, needed: int, room: int) -> None:
    """A measurement fits into memory."""
    if needed > room:
        raise ValueError(
            f"plan: {what} need {needed / 2**30:.2f} GiB to be measured, {room / 2**30:.2f} GiB are free; lower "
            "--batch-tokens, or give a device's --flops and --bandwidth"
        )
