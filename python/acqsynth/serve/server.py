"""``acqsynth serve``: runs the scorer on a socket."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import os
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import fields
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

import acqcore
from acqsynth.models import resolve
from acqsynth.serve.app import Service, create_app
from acqsynth.serve.middleware import Access
from acqsynth.serve.options import ADMIN_TOKEN_VARIABLE, TOKEN_VARIABLE, Limits, is_loopback, token_from
from acqsynth.serve.students import Students

HEAD_BYTES = 1 << 15  #: maximum bytes of request line and headers; a token and a path need a few hundred


class _Server(uvicorn.Server):
    """Stops accepting immediately on a signal, not one tick later, and does not re-raise the signal at exit. A second
    interrupt ends the process."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.stopping and sig == signal.SIGINT:
            print("acqsynth: interrupted; requests in progress were not answered", file=sys.stderr, flush=True)
            os._exit(130)  # the batch in progress cannot be cancelled
        self._service.stopping = True
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def main(options: argparse.Namespace) -> int:
    """Serves until SIGTERM or SIGINT, then drains the accepted requests.

    Returns:
        0, or 2 if the options are wrong. A second SIGINT ends the process with 130.
    """
    try:
        service, listener = prepare(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"acqsynth: error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2
    print(banner(service, listener, options), flush=True)
    config = uvicorn.Config(
        create_app(service),
        http=bounded_protocol(service.limits),
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,  # the client address is not used
        timeout_graceful_shutdown=int(service.limits.timeout + service.limits.body_timeout) + 5,
    )
    _Server(config, service).run(sockets=[listener])
    print("acqsynth: stopped; all accepted requests were answered", flush=True)
    return 0


def prepare(options: argparse.Namespace) -> tuple[Service, socket.socket]:
    """Creates the service and its socket from the options; the cheap checks come first.

    Raises:
        ValueError: invalid options, a student that does not load, or the address is in use.
        OSError: no such file. RuntimeError: the backend is not available on this machine.
    """
    access = Access(
        token_from(TOKEN_VARIABLE, options.token_file), token_from(ADMIN_TOKEN_VARIABLE, options.admin_token_file)
    )
    if access.token is None and not is_loopback(options.host):
        raise ValueError(
            f"--host {options.host} is not loopback and needs a token: set {TOKEN_VARIABLE} or pass --token-file"
        )
    if options.student_root is not None:
        if not options.student_root.is_dir():
            raise ValueError(f"--student-root: no such folder: {options.student_root}")
        if access.admin_token is None:
            raise ValueError(f"--student-root needs an admin token: set {ADMIN_TOKEN_VARIABLE}")
    if not 0 <= options.port < 2**16:
        raise ValueError(f"--port: expected 0 to {2**16 - 1}, got {options.port}")
    limits = Limits(**{field.name: getattr(options, field.name) for field in fields(Limits)})
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        listener = socket.create_server((options.host, options.port), family=family, backlog=2048)
    except OSError as error:
        raise ValueError(f"{options.host}:{options.port} cannot be bound: {error}") from error
    if not sys.stderr.isatty() and importlib.util.find_spec("transformers"):
        from transformers.utils import logging

        logging.disable_progress_bar()  # progress bars clutter log files
    try:
        try:
            student = acqcore.Student.load(resolve(options.student), device=options.device)
        except Exception as error:  # transformers raises arbitrary exceptions for broken files
            raise ValueError(f"--student {options.student} cannot be loaded: {str(error).strip()}") from error
        students = Students(student, options.student, root=options.student_root, device=options.device)
        service = Service(
            students, limits=limits, access=access, acquisition=options.acquisition, backend=options.backend
        )
    except BaseException:
        listener.close()
        raise
    return service, listener


def banner(service: Service, listener: socket.socket, options: argparse.Namespace) -> str:
    """The banner, printed before the first request is accepted."""
    host = f"[{options.host}]" if ":" in options.host else options.host
    loaded, limits = service.students.current, service.limits
    reload = "none" if options.student_root is None else f"from {options.student_root}, admin token required"
    return "\n".join(
        [
            f"acqsynth: serving http://{host}:{listener.getsockname()[1]}",
            f"  student  {loaded.name}, fingerprint {loaded.fingerprint}, on {loaded.student.device}",
            f"  limits   {limits.max_samples} samples of {limits.max_length} tokens, {limits.max_body} bytes in all,",
            f"           {limits.queue_tokens} tokens waiting, {limits.timeout:g} s",
            f"  token    {'required' if service.access.token else 'none: any program on this machine may score'}",
            f"  reload   {reload}",
        ]
    )


def bounded_protocol(limits: Limits) -> type[HttpToolsProtocol]:
    """uvicorn's protocol, but closes connections with an oversized or late request head, neither of which ASGI sees.

    A head must be complete ``limits.body_timeout`` seconds after the connection opens or the previous answer ends. A
    client that does not read its answers is cut off after the same time.
    A whole request, including chunk headers and trailers, may have at most twice ``limits.max_body`` bytes.
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

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self.loop.call_later(limits.body_timeout, self.transport.abort)

        def resume_writing(self) -> None:
            self._unread.cancel()
            super().resume_writing()

        def data_received(self, data: bytes) -> None:
            self._size += len(data)  # before the parser, whose callbacks may reset the count
            super().data_received(data)
            if self._size > (HEAD_BYTES if self._in_head else 2 * limits.max_body + HEAD_BYTES):
                self._refuse()

        def on_message_begin(self) -> None:
            self._in_head, self._size = True, 0
            super().on_message_begin()

        def on_header(self, name: bytes, value: bytes) -> None:
            if self._in_head:
                super().on_header(name, value)  # trailers are dropped, as they are never used

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
            self._timer = self.loop.call_later(limits.body_timeout, self.transport.abort)

        def _disarm(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _refuse(self) -> None:
            answering = self.cycle is not None and not self.cycle.response_complete
            if self._in_head and not self.transport.is_closing() and not answering:
                self.transport.write(
                    b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                )
            self.transport.close()

    return Bounded
