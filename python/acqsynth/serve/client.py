"""A client of the scorer: retries with exponential backoff behind a circuit breaker; samples without an answer get no
value."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx

from acqcore.students.tables import listed, plain
from acqsynth import checks
from acqsynth.rewards.scoring import Scored
from acqsynth.serve.options import TOKEN_VARIABLE, checked_token, is_loopback, token_from

logger = logging.getLogger(__name__)

#: Status codes worth retrying; a server that answers 429 is healthy but busy.
_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_AT_ONCE = 8  #: concurrent requests per call
_CONNECT_SECONDS = 10.0


class ScorerError(RuntimeError):
    """The scorer rejects the request, and retrying would not help: a wrong token, acquisition or address."""


class CircuitBreaker:
    """Opens after ``failures`` consecutive requests fail despite all retries. After ``cooldown`` seconds one
    request may try once; if it succeeds, the breaker closes."""

    def __init__(self, failures: int = 3, cooldown: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        checks.positive_int("failures", failures)
        if not isinstance(cooldown, int | float) or not cooldown >= 0:
            raise ValueError(f"cooldown: expected at least 0 seconds, got {cooldown!r}")
        self.failures = failures
        self.cooldown = cooldown
        self._clock = clock
        self._in_a_row = 0
        self._since: float | None = None  # when it opened, or when the last trial began

    @property
    def is_open(self) -> bool:
        return self._since is not None

    def allows(self) -> bool:
        """Whether a request may be sent; while the breaker is open, True permits a single trial."""
        if self._since is None:
            return True
        if self._clock() - self._since < self.cooldown:
            return False
        self._since = self._clock()
        return True

    def succeeded(self) -> None:
        self._in_a_row, self._since = 0, None

    def failed(self) -> None:
        self._in_a_row += 1
        if self._in_a_row >= self.failures:
            self._since = self._clock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_in_a_row": 0, "_since": None}  # closed in another process


class ScorerClient:
    """A scorer at a URL.

    Args:
        url: address of ``acqsynth serve``, ``http://host:port``.
        token: token of the server; by default that in the environment variable ``ACQSYNTH_TOKEN``, if set.
        batch: maximum samples per request; larger calls are split into concurrent requests.
        timeout: maximum seconds per call, retries included.
        attempts: maximum tries per request.
        backoff: seconds before the second try; doubles with each try, plus or minus half. A longer ``Retry-After`` from
            the server takes precedence.
        breaker: by default opens after 3 failures for 30 seconds.

    A scorer on this machine is reached directly; otherwise the proxies of the environment apply.

    Raises:
        ValueError: an invalid URL or token, or a number that is out of range or of another type.
        RuntimeError: the environment names a proxy that httpx cannot use.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        batch: int = 64,
        timeout: float = 300.0,
        attempts: int = 5,
        backoff: float = 0.5,
        breaker: CircuitBreaker | None = None,
    ) -> None:
        try:
            address = httpx.URL(url)
        except httpx.InvalidURL:
            address = httpx.URL()
        sent = address.scheme in ("http", "https") and address.host and not re.search("[?#]", url)
        if not sent or (address.port or 0) > 65535:
            raise ValueError(f"url: expected http://host:port, got {_without_password(url)!r}")
        for name, value in (("batch", batch), ("attempts", attempts)):
            checks.positive_int(name, value)
        if not isinstance(timeout, int | float) or not timeout > 0:
            raise ValueError(f"timeout: expected seconds above 0, got {timeout!r}")
        if not isinstance(backoff, int | float) or not backoff >= 0:
            raise ValueError(f"backoff: expected at least 0 seconds, got {backoff!r}")
        self.url = str(address.copy_with(userinfo=b"")).rstrip("/")  # without the password, as messages show it
        self.batch = batch
        self.timeout = timeout
        self.attempts = attempts
        self.backoff = backoff
        self.breaker = breaker or CircuitBreaker()
        self._token = None if token is None else checked_token(token, "token")
        self._auth = (address.username, address.password) if address.userinfo else None
        self._loopback = is_loopback(address.host)
        try:
            self._client({})
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise RuntimeError(f"{self.url}: {self._proxy()}cannot be used: {error}") from error

    async def score(
        self,
        samples: Any,
        acquisitions: str | Sequence[str],
        *,
        arguments: Mapping[str, Mapping[str, Any]] | None = None,
        reduction: str = "mean",
        max_length: int | None = None,
    ) -> Scored:
        """Values of each acquisition, scored-token counts and standard errors of n samples; None and 0 without an
        answer.

        Args:
            samples, acquisitions, reduction, max_length: as in ``acqcore.score``.
            arguments: as ``acquisition_args`` in ``acqcore.score``.

        Raises:
            ScorerError: the server rejects the request, or is not a scorer.
            TypeError: samples are neither a list nor a table, or arguments hold more than text and numbers.
        """
        # Arrays, as in frames of parquet files, become lists; a mapping without any value is named below.
        samples = [plain(sample) or sample for sample in listed(samples)]
        acquisitions = [acquisitions] if isinstance(acquisitions, str) else list(acquisitions)
        question = {
            "acquisitions": acquisitions,
            "acquisition_args": dict(arguments or {}),
            "reduction": reduction,
            "max_length": max_length,
        }
        try:
            json.dumps(question["acquisition_args"], ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError) as fault:
            raise TypeError(f"arguments: expected text and numbers: {fault}") from fault
        token = self._token if self._token is not None else token_from(TOKEN_VARIABLE)
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        sound = [i for i, sample in enumerate(samples) if _encodable(i, sample)]
        chunks = [sound[i : i + self.batch] for i in range(0, len(sound), self.batch)]
        bodies = [{"samples": [samples[i] for i in chunk], **question} for chunk in chunks]
        answers = await self._all(bodies, headers)
        values: dict[str, list[float | None]] = {name: [None] * len(samples) for name in acquisitions}
        stderr: dict[str, list[float | None]] = {}
        n_tokens = [0] * len(samples)
        for chunk, answer in zip(chunks, answers, strict=True):
            if answer is None:
                continue
            for i, count in zip(chunk, self._column(answer["n_tokens"], chunk), strict=True):
                n_tokens[i] = count or 0
            for name, column in values.items():
                for i, value in zip(chunk, self._column(answer["values"].get(name, []), chunk), strict=True):
                    column[i] = value
            for name, errors in answer.get("stderr", {}).items():
                for i, error in zip(chunk, self._column(errors, chunk), strict=True):
                    stderr.setdefault(name, [None] * len(samples))[i] = error
        return Scored(values, n_tokens, stderr)

    def _client(self, headers: Mapping[str, str]) -> httpx.AsyncClient:
        timeout = httpx.Timeout(None, connect=_CONNECT_SECONDS)
        return httpx.AsyncClient(auth=self._auth, headers=dict(headers), timeout=timeout, trust_env=not self._loopback)

    def _proxy(self) -> str:
        """Names the proxy that requests go through; empty without a proxy."""
        bypassed = self._loopback or urllib.request.proxy_bypass(urlsplit(self.url).hostname or "")
        proxies = {} if bypassed else urllib.request.getproxies()
        proxy = proxies.get(urlsplit(self.url).scheme) or proxies.get("all")
        return f"through the proxy {_without_password(proxy)} of the environment: " if proxy else ""

    async def _all(
        self, bodies: Sequence[Mapping[str, Any]], headers: Mapping[str, str]
    ) -> list[Mapping[str, Any] | None]:
        """The answers to requests; None for those not answered in time."""
        if not bodies:
            return []
        at_once = asyncio.Semaphore(_AT_ONCE)

        async def ask(http: httpx.AsyncClient, body: Mapping[str, Any]) -> Mapping[str, Any] | None:
            async with at_once:
                return await self._ask(http, body)

        # A new client for each call, as connections belong to the running event loop.
        async with self._client(headers) as http:
            tasks = [asyncio.ensure_future(ask(http, body)) for body in bodies]
            try:
                _, late = await asyncio.wait(tasks, timeout=self.timeout, return_when=asyncio.FIRST_EXCEPTION)
                refused = [task for task in tasks if task.done() and task.exception() is not None]
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        if refused:
            refused[0].result()
        for _ in late:
            self.breaker.failed()
        if late:
            logger.error("%s: no answer within %g seconds to %d requests", self.url, self.timeout, len(late))
        return [None if task.cancelled() else task.result() for task in tasks]

    async def _ask(self, http: httpx.AsyncClient, body: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The answer to one request; None if all tries fail."""
        if not self.breaker.allows():
            logger.error("%s: request not sent, as the last %d requests failed", self.url, self.breaker.failures)
            return None
        tries = 1 if self.breaker.is_open else self.attempts
        for attempt in range(tries):
            least, well = 0.0, False
            try:
                response = await http.post(f"{self.url}/score", json=body)
            except httpx.RequestError as error:
                reason = f"{self._proxy()}{type(error).__name__}: {error}"
            else:
                if response.status_code not in _AGAIN:
                    self.breaker.succeeded()
                    return self._answer(response)
                reason, least, well = _reason(response), _retry_after(response), response.status_code == 429
            if attempt + 1 < tries:
                wait = max(self.backoff * 2**attempt * random.uniform(0.5, 1.5), least)
                logger.warning("%s: %s; retrying in %.1f s", self.url, reason, wait)
                await asyncio.sleep(wait)
        logger.error("%s: %s; gave up after %d tries", self.url, reason, tries)
        if well:
            self.breaker.succeeded()
        else:
            self.breaker.failed()
        return None

    def _answer(self, response: httpx.Response) -> Mapping[str, Any]:
        if response.status_code != 200:
            raise ScorerError(f"{self.url}: {_reason(response)}")
        try:
            answer = response.json()
        except (ValueError, RecursionError):
            answer = None
        columns = [answer.get("values"), answer.get("stderr", {})] if isinstance(answer, dict) else [None]
        if not all(isinstance(each, dict) for each in columns) or "n_tokens" not in answer:
            raise ScorerError(f"{self.url}: expected the response of a scorer, got something else")
        return answer

    def _column(self, column: Any, chunk: list[Any]) -> list[Any]:
        """The numbers of a chunk; None for one that is not finite."""
        if not isinstance(column, list) or len(column) != len(chunk):
            got = len(column) if isinstance(column, list) else type(column).__name__
            raise ScorerError(f"{self.url}: expected {len(chunk)} values, one per sample, got {got}")
        for value in column:
            if value is not None and type(value) not in (int, float):
                raise ScorerError(f"{self.url}: expected numbers or null as values, got {type(value).__name__}")
        return [value if value is not None and abs(value) <= sys.float_info.max else None for value in column]

    def __repr__(self) -> str:
        return f"ScorerClient({self.url!r})"


def _encodable(index: int, sample: Any) -> bool:
    """Whether a sample can be sent as UTF-8 JSON; one with half a surrogate pair, for example, cannot."""
    try:
        json.dumps(sample, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        logger.error("samples[%d]: cannot be sent: %s", index, error)
        return False
    return True


def _without_password(url: str) -> str:
    return re.sub(r"^(\w*://)?.*@", r"\1", url)


def _reason(response: httpx.Response) -> str:
    """Status and message of an error response."""
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        message = response.reason_phrase
    return f"{response.status_code} {message}"[:500]


def _retry_after(response: httpx.Response) -> float:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isascii() and value.isdigit() else 0.0
