"""Service errors: a status, a type for programs and a message for people."""

from __future__ import annotations

#: Error type -> HTTP status.
STATUS = {
    "bad_request": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "slow_body": 408,
    "reload_in_progress": 409,
    "too_large": 413,
    "invalid_request": 422,
    "busy": 429,
    "client_closed": 499,  # as in nginx; the answer is never read and only shows in the metrics
    "internal": 500,
    "stopping": 503,
    "deadline_exceeded": 504,
}


class ServiceError(Exception):
    """A failed request.

    Args:
        kind: the error's type, a key of ``STATUS``.
        message: sent with kind in the body, ``{"error": {"type", "message"}}``.
        retry_after: whole seconds to wait before a retry.
    """

    def __init__(self, kind: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after = retry_after

    @property
    def status(self) -> int:
        return STATUS[self.kind]
