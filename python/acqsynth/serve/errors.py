"""Errors of the service: a status, a type for programs and a message for people."""

from __future__ import annotations

from typing import ClassVar


class ServiceError(Exception):
    """A request that gets no scores.

    Args:
        message: of the body's ``{"error": {"type", "message"}}``.
        retry_after: whole seconds after which to retry.
    """

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "internal"

    def __init__(self, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotJsonError(ServiceError):
    status, kind = 400, "bad_request"


class UnauthorizedError(ServiceError):
    status, kind = 401, "unauthorized"


class ForbiddenError(ServiceError):
    status, kind = 403, "forbidden"


class SlowBodyError(ServiceError):
    status, kind = 408, "slow_body"


class ReloadInProgressError(ServiceError):
    status, kind = 409, "reload_in_progress"


class TooLargeError(ServiceError):
    status, kind = 413, "too_large"


class InvalidRequestError(ServiceError):
    status, kind = 422, "invalid_request"


class BusyError(ServiceError):
    status, kind = 429, "busy"


class GoneError(ServiceError):
    """The client disconnected; 499 (as in nginx) only appears in the metrics."""

    status, kind = 499, "client_closed"


class StoppingError(ServiceError):
    status, kind = 503, "stopping"


class DeadlineExceededError(ServiceError):
    status, kind = 504, "deadline_exceeded"
