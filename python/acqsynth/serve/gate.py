"""What stands before the routes: tokens, limits of bodies and of requests at a time, the count of answers."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from acqsynth.serve.auth import OPEN, Access
from acqsynth.serve.errors import BusyError, GoneError, InvalidRequestError, ServiceError, SlowBodyError, TooLargeError
from acqsynth.serve.metrics import Metrics
from acqsynth.serve.options import Limits

logger = logging.getLogger(__name__)

ROUTES = frozenset({"/score", "/get_reward", "/student", "/health", "/metrics", "/openapi.json"})


class Gate:
    """An ASGI middleware. A request passes with its token checked and its body read: no route waits for a client."""

    def __init__(self, app: ASGIApp, access: Access, limits: Limits, metrics: Metrics) -> None:
        self.app = app
        self._access = access
        self._limits = limits
        self._metrics = metrics
        self._active = 0
        self._held = 0  # bytes of bodies
        metrics.watch("acqsynth_active_requests", "Requests that are read or answered now", lambda: self._active)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin = time.monotonic()
        status = GoneError.status

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._active += 1
        held = _Held(self, self._limits.max_bodies)
        try:
            body = await self._admitted(scope, receive, held)
            await self.app(scope, _replayed(body, receive), counted)
        except ServiceError as error:
            # What was not read of the body is still on its way: the connection cannot be used again.
            await error_response(error, close=True)(scope, receive, counted)
        except Exception:
            logger.exception("%s failed", scope["path"] if scope["path"] in ROUTES else "a request")
            await error_response(ServiceError("the scorer failed; its log tells why"))(scope, receive, counted)
        finally:
            self._active -= 1
            held.release()
            route = scope["path"] if scope["path"] in ROUTES else "other"
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.monotonic() - begin)

    async def _admitted(self, scope: Scope, receive: Receive, held: _Held) -> bytes:
        """The body of a request that may pass."""
        self._access.check(scope["path"], scope["headers"])
        if self._active > self._limits.max_requests and scope["path"] not in OPEN:
            raise BusyError(f"{self._limits.max_requests} requests are being answered, which is the most", 1)
        most = self._limits.max_body
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isascii() or not declared.isdigit():
            raise InvalidRequestError("content-length: expected a number of bytes")
        if len(declared) > 18 or int(declared) > most:
            raise TooLargeError(f"the body has {declared[:18]} bytes, at most {most} are taken")
        try:
            async with asyncio.timeout(self._limits.body_timeout):
                return await _read(receive, most, held)
        except TimeoutError:
            raise SlowBodyError(f"the body did not arrive in {self._limits.body_timeout:g} seconds") from None


class _Held:
    """The bytes that one request adds to those of a gate."""

    def __init__(self, gate: Gate, most: int) -> None:
        self._gate = gate
        self._most = most
        self._size = 0

    def add(self, size: int) -> None:
        """
        Raises:
            BusyError: all requests together hold too many bytes.
        """
        self._size += size
        self._gate._held += size
        if self._gate._held > self._most:
            raise BusyError(f"requests of {self._most} bytes are being answered, which is the most", 1)

    def release(self) -> None:
        self._gate._held -= self._size


async def _read(receive: Receive, most: int, held: _Held) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise GoneError("the client closed the connection")
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        held.add(len(pieces[-1]))
        if size > most:
            raise TooLargeError(f"the body has more than {most} bytes, at most {most} are taken")
        if not message.get("more_body", False):
            return b"".join(pieces)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """``receive`` after the body was read: it once more, then what follows."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return left.pop() if left else await receive()

    return replay


def error_response(error: ServiceError, *, close: bool = False) -> JSONResponse:
    """The answer that tells of an error."""
    headers: dict[str, Any] = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if close:
        headers["Connection"] = "close"
    return JSONResponse({"error": {"type": error.kind, "message": str(error)}}, error.status, headers)
