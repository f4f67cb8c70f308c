"""Tables that depend only on a few numbers: copied to a device, and kept there so that no step rebuilds them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def on_device(
    table: torch.Tensor,  # on the host
    device: torch.device,
) -> torch.Tensor:
    """A copy on ``device``; unlike ``table.to``, it does not wait for work queued on a GPU."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def kept(most: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Cache the last ``most`` results of ``build(..., device)``, per stream; callers must not change them.

    Nothing is cached during CUDA graph capture, because such a table has its values only in replays.
    """

    def decorate(build: Callable[..., T]) -> Callable[..., T]:
        @functools.lru_cache(maxsize=most)
        def for_stream(stream: int, *arguments: Any) -> T:
            with torch.inference_mode(False), torch.no_grad():
                return build(*arguments)

        @functools.wraps(build)
        def tables(*arguments: Any) -> T:
            device = torch.device(arguments[-1])
            if device.type != "cuda":
                return for_stream(0, *arguments)
            if torch.cuda.is_current_stream_capturing():
                return build(*arguments)
            stream = torch.cuda.current_stream(device)
            return for_stream(stream.cuda_stream, *arguments[:-1], stream.device)

        return tables

    return decorate
