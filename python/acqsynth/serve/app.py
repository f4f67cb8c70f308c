"""The routes of the scorer.

A request is validated, tokenized and queued; the student that was current when it was tokenized scores all of it.
Every error has one form, ``{"error": {"type", "message"}}``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import statistics
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

import acqcore
from acqsynth.batching import Batcher
from acqsynth.integrations.openrlhf import response_of
from acqsynth.parsing import parse_sample
from acqsynth.serve.errors import BusyError, InvalidRequestError, ServiceError, StoppingError, TooLargeError
from acqsynth.serve.middleware import Access, Gate, Metrics, error_response
from acqsynth.serve.options import Limits
from acqsynth.serve.routes import JsonRoute, answered
from acqsynth.serve.schema import (
    ErrorBody,
    Health,
    RewardRequest,
    RewardResponse,
    ScoreRequest,
    ScoreResponse,
    StudentInfo,
    StudentRequest,
    served_acquisitions,
    template_variables,
)
from acqsynth.serve.students import Loaded, Question, Students, Values, text_size

logger = logging.getLogger(__name__)

Key = tuple[Loaded, Question]

_RESERVE = 8  # one part in so many of the queue is kept for small requests, beside a queue that is full


class Service:
    """What the routes share.

    Args:
        students: holds the student.
        limits, access: of the server.
        acquisition: the reward of ``/get_reward``.
        backend: as in ``acqcore.score``.

    Raises:
        ValueError: an acquisition that cannot be served, a backend that is unknown or does not serve the student.
        RuntimeError: the backend is not available here.
    """

    def __init__(
        self,
        students: Students,
        *,
        limits: Limits | None = None,
        access: Access | None = None,
        acquisition: str = "entropy",
        backend: str | None = None,
    ) -> None:
        if acquisition not in served_acquisitions():
            raise ValueError(
                f"acquisition: unknown {acquisition!r}, expected one of {', '.join(served_acquisitions())}"
            )
        # No samples: raises now what every request would.
        acqcore.score(students.current.student, [], acquisition, backend=backend, progress=False)
        self.students = students
        self.limits = limits or Limits()
        self.access = access or Access()
        self.acquisition = acquisition
        self.backend = backend
        self.metrics = Metrics()
        self.metrics.student_version.set(students.current.version)
        self.batcher: Batcher[Key, acqcore.Row, Values] = Batcher(
            self._values,
            limit=self.limits.batch_tokens,
            wait=self.limits.wait,
            seconds=self.limits.batch_seconds,
            observe=self.metrics.batch,
        )
        self.metrics.watch("acqsynth_queue_tokens", "Tokens in the queue", lambda: self.batcher.waiting)
        #: Set when the server is draining: new requests are refused, accepted ones are answered.
        self.stopping = False
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="acqsynth-encode")
        # Of /get_reward: what a masked sample gets, and the bound that no gated one passes.
        self._typical = 0.0
        self._parsed = False
        self._least = 0.0

    def _values(self, key: Key, rows: list[acqcore.Row]) -> list[Values]:
        loaded, question = key
        return question.values(loaded, rows, self.limits.batch_tokens, self.backend)

    async def score(
        self, samples: Sequence[Any], question: Question, max_length: int | None
    ) -> tuple[Loaded, list[Values], list[int], dict[int, str]]:
        """The student, values and scored tokens of n samples, and why some could not be scored: index -> message."""
        if self.stopping:
            raise StoppingError("the server is stopping")
        limits = self.limits
        if len(samples) > limits.max_samples:
            raise TooLargeError(f"samples: expected at most {limits.max_samples}, got {len(samples)}")
        if max_length is not None and max_length > limits.max_length:
            raise InvalidRequestError(f"max_length: expected at most {limits.max_length}, the limit of this server")
        loaded = self.students.current
        loop = asyncio.get_running_loop()
        rows: list[acqcore.Row] = []
        errors: dict[int, str] = {}
        for chunk in _chunks(samples, limits.max_characters):  # others are served between two of them
            found = await loop.run_in_executor(self._encoding, loaded.encode, chunk, limits, max_length)
            errors |= {len(rows) + i: message for i, message in found[1].items()}
            rows += found[0]
        picked = [i for i in range(len(rows)) if i not in errors]
        values = [Values((None,) * len(question.acquisitions), {})] * len(rows)
        tokens = [len(rows[i].ids) for i in picked]
        self._admit(sum(tokens))
        try:
            scored = await asyncio.wrap_future(
                self.batcher.submit((loaded, question), [rows[i] for i in picked], tokens)
            )
        except (ValueError, TypeError) as error:  # the rows are sound: it is what was asked of them
            raise InvalidRequestError(str(error)) from error
        for i, value in zip(picked, scored, strict=True):
            values[i] = value
        self.metrics.samples.labels("refused").inc(len(errors))
        return loaded, values, [row.n_scored for row in rows], errors

    def _admit(self, tokens: int) -> None:
        """
        Raises:
            TooLargeError: more tokens than may ever wait. BusyError: too many wait already. StoppingError.
        """
        if self.batcher.closed:
            raise StoppingError("the server is stopping")
        most, waiting = self.limits.queue_tokens, self.batcher.waiting
        if tokens > most:
            raise TooLargeError(f"the request has {tokens} tokens, at most {most} may wait: send fewer samples")
        # A small request finds room in a queue that others have filled.
        if waiting + tokens > most + (most // _RESERVE if tokens <= most // _RESERVE else 0):
            raise BusyError(f"{waiting} tokens wait, and at most {most} may", self.batcher.seconds_for(waiting))

    async def close(self) -> None:
        """Answers all accepted requests, then ends the threads."""
        self.stopping = True
        await asyncio.to_thread(self.batcher.close)
        self._encoding.shutdown()

    async def rewards(self, queries: Sequence[str], prompts: Sequence[str]) -> dict[str, Any]:
        """The answer of ``/get_reward``: as :class:`acqsynth.rewards.AcquisitionReward`, but that OpenRLHF knows no
        masked sample. One gets the mean of the others of its request, else of the last request that had some."""
        responses = [response_of(query, prompt) for query, prompt in zip(queries, prompts, strict=True)]
        samples = [None if response is None else parse_sample(response) for response in responses]
        parsed = [i for i, sample in enumerate(samples) if sample is not None]
        question = Question((self.acquisition,), "mean", "{}")
        _, scored, _, _ = await self.score([samples[i] for i in parsed], question, self.limits.max_length)
        values = dict(zip(parsed, (row.values[0] for row in scored), strict=True))
        if responses and not parsed and not self._parsed:
            logger.warning(
                "/get_reward: none of %d responses has the form <question>...</question><answer>...</answer>, so each "
                "gets the least reward; ask for this form in the prompts",
                len(responses),
            )
        self._parsed = True  # or said once
        known = [value for value in values.values() if value is not None]
        if known:
            self._typical = statistics.fmean(known)
            self._least = min(self._least, *known)
        masked = [response is None or values.get(i, 0.0) is None for i, response in enumerate(responses)]
        rewards = []
        for i, hidden in enumerate(masked):
            value = values.get(i)
            rewards.append(self._typical if hidden else self._least if value is None else value)
        gated = [sample is None and not hidden for sample, hidden in zip(samples, masked, strict=True)]
        return {
            "rewards": rewards,
            "scores": [_logistic(reward) for reward in rewards],
            "extra_logs": {
                "masked": [float(x) for x in masked],
                "gated": [float(x) for x in gated],
                self.acquisition: [values.get(i) or 0.0 for i in range(len(samples))],
            },
        }

    async def reload(self, path: str) -> Loaded:
        """Replaces the student for requests from now on."""
        try:
            loaded = await self.students.load(path)
        except ServiceError:
            self.metrics.reloads.labels("refused").inc()
            raise
        self.metrics.reloads.labels("done").inc()
        self.metrics.student_version.set(loaded.version)
        logger.info("student %s, version %d, %s", loaded.name, loaded.version, loaded.fingerprint)
        return loaded


class _Documented:
    """Which errors a route may answer with."""

    EVERYWHERE: ClassVar = {401: "token missing or wrong", 429: "too many requests; retry after Retry-After seconds"}
    BODY: ClassVar = {
        400: "the body is not JSON",
        408: "the body arrived too slowly",
        413: "too large: body, samples, or their tokens",
        422: "a field is missing or wrong",
        503: "the server is stopping",
        504: "no answer before the deadline",
    }

    @classmethod
    def responses(cls, *, body: bool = False, extra: dict[int, str] | None = None) -> dict[int | str, dict[str, Any]]:
        texts = {**cls.EVERYWHERE, **(cls.BODY if body else {}), **(extra or {})}
        return {status: {"model": ErrorBody, "description": text} for status, text in sorted(texts.items())}


def create_app(service: Service) -> FastAPI:
    """The ASGI application of a service; the batcher lives as long as its lifespan."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(
        title="acqsynth scorer",
        version=acqcore.__version__,
        description="Acquisition values of samples for one student.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(Gate, access=service.access, limits=service.limits, metrics=service.metrics)
    app.state.max_values = 4096 + 128 * service.limits.max_samples
    _handle_errors(app)
    bodies = APIRouter(route_class=JsonRoute)

    @bodies.post("/score", response_model=ScoreResponse, responses=_Documented.responses(body=True))
    async def score(body: ScoreRequest, request: Request) -> Response:
        """Values of samples, one a sample and acquisition."""
        for i, sample in enumerate(body.samples):
            try:
                template_variables(sample)
            except ValueError as error:
                raise InvalidRequestError(f"samples.{i}.{error}") from error
        names = tuple(dict.fromkeys(body.acquisitions))
        arguments = {name: given.model_dump(exclude_none=True) for name, given in body.acquisition_args.items()}
        question = Question(names, body.reduction, json.dumps(arguments, sort_keys=True))
        loaded, values, n_tokens, errors = await answered(
            request, service.score(body.samples, question, body.max_length), service.limits.timeout
        )
        columns = [list(column) for column in zip(*(row.values for row in values), strict=True)] or [[] for _ in names]
        estimated = [name for name in names if any(name in row.stderr for row in values)]
        return JSONResponse(
            {
                "student": loaded.described(),
                "values": dict(zip(names, columns, strict=True)),
                "stderr": {name: [row.stderr.get(name) for row in values] for name in estimated},
                "n_tokens": n_tokens,
                "valid": [None not in row.values for row in values],
                "errors": [{"index": i, "message": message} for i, message in sorted(errors.items())],
            }
        )

    @bodies.post("/get_reward", response_model=RewardResponse, responses=_Documented.responses(body=True))
    async def get_reward(body: RewardRequest, request: Request) -> Response:
        """Rewards in the wire format of OpenRLHF."""
        if len(body.query) != len(body.prompts):
            raise InvalidRequestError(f"prompts: expected {len(body.query)}, one a query, got {len(body.prompts)}")
        return JSONResponse(await answered(request, service.rewards(body.query, body.prompts), service.limits.timeout))

    @bodies.post(
        "/student",
        response_model=StudentInfo,
        responses=_Documented.responses(
            body=True, extra={403: "the server was started without admin token or root", 409: "another is being loaded"}
        ),
    )
    async def student(body: StudentRequest, request: Request) -> Response:
        """Replaces the student; queued requests keep theirs."""
        return JSONResponse((await service.reload(body.path)).described())

    @app.get("/health", response_model=Health, responses={503: {"model": Health, "description": "stopping"}})
    async def health() -> Response:
        """Whether requests are accepted."""
        if service.stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get(
        "/metrics",
        response_class=Response,
        responses={**_Documented.responses(), 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    app.include_router(bodies)
    return app


def _handle_errors(app: FastAPI) -> None:
    kinds = {404: "not_found", 405: "method_not_allowed"}
    handlers: dict[type[Exception], Callable[[Any], Response]] = {
        ServiceError: error_response,
        HTTPException: lambda error: JSONResponse(
            {"error": {"type": kinds.get(error.status_code, "bad_request"), "message": str(error.detail)}},
            error.status_code,
            error.headers,
        ),
    }
    for kind, handler in handlers.items():
        _add_handler(app, kind, handler)


def _add_handler(app: FastAPI, kind: type[Exception], handler: Callable[[Any], Response]) -> None:
    async def handle(request: Request, error: Exception) -> Response:
        return handler(error)

    app.add_exception_handler(kind, handle)


def _chunks(samples: Sequence[Any], characters: int) -> Iterator[list[Any]]:
    """Samples in order, of about so many characters at a time; at least one chunk."""
    chunk: list[Any] = []
    total = 0
    for sample in samples:
        size = text_size(sample)
        if chunk and total + size > characters:
            yield chunk
            chunk, total = [], 0
        chunk.append(sample)
        total += size
    yield chunk


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
