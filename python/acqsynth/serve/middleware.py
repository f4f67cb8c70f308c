"""Middleware between a request and its route: tokens, limits on bodies and concurrency, deadlines, errors, metrics."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, get_type_hints

from fastapi import Request, Response
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from acqsynth.serve.options import Limits

logger = logging.getLogger(__name__)

T = TypeVar("T")

ROUTES = frozenset({"/score", "/get_reward", "/student", "/health", "/metrics", "/openapi.json"})
OPEN = frozenset({"/health"})  #: routes that reveal nothing and need no token
ADMIN = frozenset({"/student"})  #: routes that need the admin token

#: Error type -> HTTP status and, for the schema, its description.
ERRORS = {
    "bad_request": (400, "the body is not JSON"),
    "unauthorized": (401, "missing or wrong token"),
    "forbidden": (403, "the server was started without an admin token or a student root"),
    "slow_body": (408, "the body arrived too slowly"),
    "reload_in_progress": (409, "another student is being loaded"),
    "too_large": (413, "the body, the samples or their tokens are too large"),
    "invalid_request": (422, "a field is missing or invalid"),
    "busy": (429, "too many requests; retry after Retry-After seconds"),
    "client_closed": (499, "as in nginx; the answer is never read and only shows in the metrics"),
    "internal": (500, "the scorer failed"),
    "stopping": (503, "the server is stopping"),
    "deadline_exceeded": (504, "no answer before the deadline"),
}

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SAMPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

DEEPEST = 128  # levels of a body; pydantic allows at most 200
SMALL = 1 << 14  # bytes checked in the event loop, in well under a millisecond
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# A string or a structural character. Possessive, so that no text causes backtracking.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{},:]', re.DOTALL)


class ServiceError(Exception):
    """A failed request.

    Args:
        kind: the error's type, a key of ``ERRORS``.
        message: sent with kind in the body, ``{"error": {"type", "message"}}``.
        retry_after: whole seconds to wait before a retry.
    """

    def __init__(self, kind: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after = retry_after

    @property
    def status(self) -> int:
        return ERRORS[self.kind][0]


@dataclass(frozen=True)
class Access:
    """The tokens of a server. Without ``token`` anyone may score; without ``admin_token`` the student cannot be
    changed."""

    token: str | None = field(default=None, repr=False)
    admin_token: str | None = field(default=None, repr=False)

    def check(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Checks the token of a request.

        Args:
            path: decoded path of the request.
            headers: headers of the request, with lower-case names.

        Raises:
            ServiceError: ``unauthorized``, a missing or wrong token; ``forbidden``, an admin route of a server without
                an admin token.
        """
        if path in OPEN:
            return
        expected = self.admin_token if path in ADMIN else self.token
        if expected is None:
            if path in ADMIN:
                raise ServiceError(
                    "forbidden", "the student cannot be changed: the server was started without an admin token"
                )
            return
        given = [value for name, value in headers if name == b"authorization"]
        secret = _secret(given[0]) if len(given) == 1 else None
        if secret is None:
            raise ServiceError("unauthorized", "expected the header 'Authorization: Bearer <token>'")
        if not hmac.compare_digest(secret, expected.encode("ascii")):
            raise ServiceError("unauthorized", "the token is wrong")


def _secret(header: bytes) -> bytes | None:
    """The token of a bearer header, or the password of a basic one: OpenRLHF cannot set headers, but a URL such as
    ``http://user:token@host`` produces a basic one."""
    scheme, _, rest = header.strip().partition(b" ")
    if scheme.lower() == b"bearer":
        return rest.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return None
    return None


class Metrics:
    """Counters and histograms of one server, in a separate registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter, histogram = partial(Counter, registry=self.registry), partial(Histogram, registry=self.registry)
        self.requests = counter("acqsynth_requests", "Requests answered", ["route", "status"])
        self.seconds = histogram("acqsynth_request_seconds", "Time to answer a request", ["route"], buckets=_SECONDS)
        self.samples = counter("acqsynth_samples", "Samples scored, and samples refused before scoring", ["outcome"])
        self.batch_samples = histogram("acqsynth_batch_samples", "Samples scored in one call", buckets=_SAMPLES)
        self.batch_tokens = counter("acqsynth_batch_tokens", "Tokens scored")
        self.batch_seconds = histogram("acqsynth_batch_seconds", "Time of one scoring call", buckets=_SECONDS)
        self.reloads = counter("acqsynth_reloads", "Reloads of the student", ["outcome"])
        self.student_version = Gauge(
            "acqsynth_student_version", "1 for the initial student, incremented by each reload", registry=self.registry
        )

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Adds a gauge computed at each scrape."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def batch(self, samples: int, tokens: int, seconds: float) -> None:
        """Records one scoring call."""
        self.samples.labels("scored").inc(samples)
        self.batch_samples.observe(samples)
        self.batch_tokens.inc(tokens)
        self.batch_seconds.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Gate:
    """ASGI middleware that checks the token and reads the body, so that routes never wait for a client."""

    def __init__(self, app: ASGIApp, access: Access, limits: Limits, metrics: Metrics) -> None:
        self.app = app
        self._access = access
        self._limits = limits
        self._metrics = metrics
        self._active = 0
        self._held = 0  # bytes of bodies in memory
        metrics.watch("acqsynth_active_requests", "Requests being read or answered", lambda: self._active)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin = time.monotonic()
        route = scope["path"] if scope["path"] in ROUTES else "other"
        status, _ = ERRORS["client_closed"]

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._active += 1
        pieces: list[bytes] = []  # of the body
        try:
            await self._admitted(scope, receive, pieces)
            pieces[:] = [b"".join(pieces)]
            await self.app(scope, _replayed(pieces[0], receive), counted)
        except ServiceError as error:
            # The rest of the body may still arrive, so the connection cannot be reused.
            await error_response(error, close=True)(scope, receive, counted)
        except Exception:
            logger.exception("a request failed, route %s", route)
            await error_response(ServiceError("internal", "the scorer failed; see its log"))(scope, receive, counted)
        finally:
            self._active -= 1
            self._held -= sum(map(len, pieces))
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.monotonic() - begin)

    async def _admitted(self, scope: Scope, receive: Receive, pieces: list[bytes]) -> None:
        """Admits a request and reads its body into ``pieces``."""
        self._access.check(scope["path"], scope["headers"])
        if self._active > self._limits.max_requests and scope["path"] not in OPEN:
            raise ServiceError("busy", f"{self._limits.max_requests} requests are already being answered", 1)
        most = self._limits.max_body
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isascii() or not declared.isdigit():
            raise ServiceError("invalid_request", "content-length: expected a number of bytes")
        if len(declared) > 18 or int(declared) > most:
            raise ServiceError("too_large", f"the body has {declared[:18]} bytes, at most {most} are allowed")
        try:
            async with asyncio.timeout(self._limits.body_timeout):
                await self._read(receive, pieces)
        except TimeoutError:
            raise ServiceError(
                "slow_body", f"the body did not arrive within {self._limits.body_timeout:g} seconds"
            ) from None

    async def _read(self, receive: Receive, pieces: list[bytes]) -> None:
        most, held, size, more = self._limits.max_body, self._limits.max_bodies, 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ServiceError("client_closed", "the client closed the connection")
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            self._held += len(pieces[-1])
            if self._held > held:
                raise ServiceError("busy", f"requests already hold {held} bytes", 1)
            if size > most:
                raise ServiceError("too_large", f"the body has more than {most} bytes, at most {most} are allowed")
            more = message.get("more_body", False)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` for the route that replays the body and then continues with ``receive``."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return left.pop() if left else await receive()

    return replay


def error_response(error: ServiceError, *, close: bool = False) -> JSONResponse:
    """The response to a failed request."""
    headers: dict[str, Any] = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if close:
        headers["Connection"] = "close"
    return JSONResponse({"error": {"type": error.kind, "message": str(error)}}, error.status, headers)


class JsonRoute(APIRoute):
    """A route whose endpoint takes ``body``, a pydantic model, and ``request``.

    The body is parsed and validated in one pass. FastAPI's own handler parses, resolves dependencies and then
    validates; measured without scoring, that took 15 to 20 % more CPU time for a request of one short sample. The
    structure of a body is bounded before pydantic sees it, since pydantic reports every error of every value.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        model = get_type_hints(self.endpoint)["body"]

        async def handle(request: Request) -> Response:
            if not _is_json(request.headers.get("content-type", "")):
                raise ServiceError("invalid_request", "content-type: expected application/json")
            raw, most = await request.body(), request.app.state.max_values
            body = read(raw, most) if len(raw) <= SMALL else await asyncio.to_thread(read, raw, most)
            return await self.endpoint(body, request)

        def read(raw: bytes, most: int) -> Any:
            check_structure(raw, most)
            try:
                try:
                    return model.model_validate_json(raw)
                except ValidationError as error:
                    if not _SURROGATE.search(raw) or error.errors(include_url=False)[0]["type"] != "json_invalid":
                        raise
                # pydantic rejects the whole body for half a surrogate pair; only its sample should fail.
                return model.model_validate(json.loads(raw))
            except ValidationError as error:
                raise _refused(error) from None
            except (ValueError, RecursionError) as error:
                raise ServiceError("bad_request", f"Invalid JSON: {error}"[:500]) from None

        return handle


async def answered(request: Request, work: Awaitable[T], timeout: float) -> T:
    """Awaits ``work``; cancels it at the deadline or when the client disconnects.

    Raises:
        ServiceError: ``deadline_exceeded``, ``client_closed``.
    """
    own = asyncio.current_task()
    assert own is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        own.cancel()

    watcher = asyncio.get_running_loop().create_task(watch())
    try:
        async with asyncio.timeout(timeout) as deadline:
            return await work
    except TimeoutError:
        if not deadline.expired():
            raise
        raise ServiceError("deadline_exceeded", f"no answer within {timeout:g} seconds") from None
    except asyncio.CancelledError:
        if not gone or own.uncancel():
            raise
        raise ServiceError("client_closed", "the client closed the connection") from None
    finally:
        watcher.cancel()


def _is_json(content_type: str) -> bool:
    """Whether this is JSON; browsers send other content types cross-site without a CORS preflight."""
    media = content_type.partition(";")[0].strip().lower()
    return media == "application/json" or (media.startswith("application/") and media.endswith("+json"))


def check_structure(body: bytes, most: int) -> None:
    """Counts the values of a JSON text without building them; the text need not be valid.

    Raises:
        ServiceError: ``too_large``, more than ``most`` values; ``bad_request``, nested deeper than ``DEEPEST``.
    """
    if len(body) <= most and body.count(b"[") + body.count(b"{") <= DEEPEST:
        return
    depth = values = 0
    for i, found in enumerate(_TOKEN.finditer(body)):
        sign = found[0]
        if sign in (b"[", b"{"):
            depth += 1
            if depth > DEEPEST:
                raise ServiceError("bad_request", f"Invalid JSON: nested deeper than {DEEPEST} levels")
        elif sign in (b"]", b"}"):
            depth -= 1
        values += sign in (b"[", b"{", b",", b":")
        if values > most or i > 4 * most:  # JSON has at most one string and one closing bracket for each of these
            raise ServiceError("too_large", f"the body has more than {most} values")


def _refused(error: ValidationError) -> ServiceError:
    """The first error: its place and what was expected, but not the arbitrary value found."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    if faults[0]["type"] == "json_invalid":
        return ServiceError("bad_request", faults[0]["msg"])

    def place(fault: Any) -> str:
        return ".".join(str(part) for part in fault["loc"] if not isinstance(part, str) or part.isidentifier())

    # The alternatives of a value fail at one place. pydantic marks messages of our own checks.
    first = place(faults[0])
    expected = [fault["msg"].removeprefix("Value error, ") for fault in faults if place(fault) == first]
    more = f" (and {len(faults) - len(expected)} more)" if len(faults) > len(expected) else ""
    kind = "too_large" if faults[0]["type"] in ("too_long", "string_too_long") else "invalid_request"
    return ServiceError(kind, f"{first[:200] or 'body'}: {', or '.join(dict.fromkeys(expected))[:1000]}{more}")
