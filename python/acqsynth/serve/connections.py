"""Bounds connections where ASGI does not see them: before a request's head is complete."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from acqsynth.serve.options import Limits

HEAD_BYTES = 1 << 15  #: most bytes of request line and headers; a token and a path need a few hundred


def bounded_protocol(limits: Limits) -> type[HttpToolsProtocol]:
    """uvicorn's protocol, which closes connections that send too large a head or none in time.

    A head must be complete ``limits.body_timeout`` seconds after the connection opens or the previous answer ends.
    The bytes of a whole request, chunk marks and trailers included, are bounded by twice ``limits.max_body``.
    """

    class Bounded(HttpToolsProtocol):
        _timer: asyncio.TimerHandle | None = None
        _in_head = True
        _size = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect_head()

        def connection_lost(self, error: Exception | None) -> None:
            self._disarm()
            super().connection_lost(error)

        def data_received(self, data: bytes) -> None:
            self._size += len(data)  # before the parser, whose callbacks may begin to count anew
            super().data_received(data)
            if self._size > (HEAD_BYTES if self._in_head else 2 * limits.max_body + HEAD_BYTES):
                self._refuse()

        def on_message_begin(self) -> None:
            self._in_head, self._size = True, 0
            super().on_message_begin()

        def on_header(self, name: bytes, value: bytes) -> None:
            if self._in_head:
                super().on_header(name, value)  # trailers are dropped: nobody reads them

        def on_headers_complete(self) -> None:
            self._in_head = False
            self._disarm()
            super().on_headers_complete()

        def on_response_complete(self) -> None:
            waiting = bool(self.pipeline)
            super().on_response_complete()
            if not waiting:
                self._expect_head()

        def _expect_head(self) -> None:
            self._disarm()
            self._timer = self.loop.call_later(limits.body_timeout, self.transport.close)

        def _disarm(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _refuse(self) -> None:
            if self._in_head and not self.transport.is_closing() and not self._answering():
                self.transport.write(
                    b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )
            self.transport.close()

        def _answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

    return Bounded
