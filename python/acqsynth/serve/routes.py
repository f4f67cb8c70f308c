"""Reading of request bodies, and waiting for results with deadlines."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar, get_type_hints

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import ValidationError

from acqsynth.serve.middleware import ServiceError

T = TypeVar("T")

DEEPEST = 128  # levels of a body; pydantic allows at most 200
SMALL = 1 << 14  # bytes checked in the event loop, in well under a millisecond

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# A string or a structural character. Possessive, so that no text causes backtracking.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{},:]', re.DOTALL)


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
            if len(raw) <= SMALL:
                body = read(raw, most)
            else:
                body = await asyncio.to_thread(read, raw, most)
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
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if fault["type"] == "json_invalid":
        return ServiceError("bad_request", fault["msg"])
    place = ".".join(str(part) for part in fault["loc"] if not isinstance(part, str) or part.isidentifier())
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    kind = "too_large" if fault["type"] in ("too_long", "string_too_long") else "invalid_request"
    return ServiceError(kind, f"{place[:200] or 'body'}: {fault['msg'][:1000]}{more}")
