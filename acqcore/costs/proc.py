"""Memory as Linux counts it."""

from __future__ import annotations

from pathlib import Path

_PROC = Path("/proc")


def bytes_of(file: str, field: str) -> int:
    """A field of ``meminfo`` or ``self/status``.

    Raises:
        RuntimeError: there is no such file or field, as on other systems than Linux.
    """
    try:
        lines = (_PROC / file).read_text().splitlines()
    except OSError as error:
        raise _unmeasured(error) from error
    for line in lines:
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{file} has no {field}")


def reset_peak() -> None:
    """Make the peak of resident memory what is resident now.

    Raises:
        RuntimeError: the system has no such switch, or refuses.
    """
    try:
        (_PROC / "self/clear_refs").write_text("5")
    except OSError as error:
        raise _unmeasured(error) from error


def _unmeasured(error: OSError) -> RuntimeError:
    return RuntimeError(
        f"memory is measured through Linux's /proc, which refuses ({error.strerror}); elsewhere give the device's "
        "--flops and --bandwidth"
    )
