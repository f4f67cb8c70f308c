"""Memory counters of Linux."""

from __future__ import annotations

from pathlib import Path

_PROC = Path("/proc")


def bytes_of(file: str, field: str) -> int:
    """A field of ``meminfo`` or ``self/status``.

    Raises:
        RuntimeError: the file or field does not exist, as on systems other than Linux.
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
    """Reset the peak of resident memory to the current value.

    Raises:
        RuntimeError: the system does not support or permit this.
    """
    try:
        (_PROC / "self/clear_refs").write_text("5")
    except OSError as error:
        raise _unmeasured(error) from error


def _unmeasured(error: OSError) -> RuntimeError:
    return RuntimeError(
        f"memory is measured through Linux's /proc, which failed ({error.strerror}); give the device's --flops and "
        "--bandwidth instead"
    )
