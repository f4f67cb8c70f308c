"""Errors of the service: a status, a type for programs and a message for people."""

from __future__ import annotations

#: Type of an error -> status of its answer.
STATUS = {
    "bad_request": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "slow_body": 408,
    "reload_in_progress": 409,
    "too_large": 413,
    "invalid_request": 422,
    "busy": 429,
    "client_closed": 499,  # as in nginx; nobody reads the answer, it only appears in the metrics
    "internal": 500,
    "stopping": 503,
    "deadline_exceeded": 504,
}


class ServiceError(Exception):
    """A request that gets no scores.

    Args:
        kind: the error's type, a key of ``STATUS``.
        message: both are in the body, ``{"error": {"type", "message"}}``.
        retry_after: whole seconds after which to retry.
    """

    def __init__(self, kind: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after = retry_after

    @property
    def status(self) -> int:
        return STATUS[self.kind]
