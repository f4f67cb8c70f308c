"""The routes of the scorer.

A request is validated, tokenized and queued; the student that was current at tokenization scores all of it. All
errors have the form ``{"error": {"type", "message"}}``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import statistics
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

import acqcore
from acqsynth.batching import Batcher
from acqsynth.integrations.openrlhf import response_of
from acqsynth.parsing import parse_sample
from acqsynth.serve.middleware import ERRORS, Access, Gate, JsonRoute, Metrics, ServiceError, answered, error_response
from acqsynth.serve.options import Limits
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
from acqsynth.serve.students import Loaded, Question, Students, Values, kind_of_sample, text_size

logger = logging.getLogger(__name__)

Key = tuple[Loaded, Question]

_RESERVE = 8  # small requests still fit into a full queue, up to 1 / _RESERVE of its size


class Service:
    """State shared by the routes.

    Args:
        acquisition: acquisition used as the reward of ``/get_reward``.
        backend: as in ``acqcore.score``.

    Raises:
        ValueError: the acquisition cannot be served, or the backend is unknown or does not support the student.
        RuntimeError: the backend is not available on this machine.
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
        # Scores no samples, to raise now what every request would raise.
        acqcore.score(students.current.student, [], acquisition, backend=backend, progress=False)
        self.students = students
        self.limits = limits or Limits()
        self.access = access or Access()
        self.acquisition = acquisition
        self.metrics = Metrics()
        self.metrics.student_version.set(students.current.version)
        self.batcher: Batcher[Key, acqcore.Row, Values] = Batcher(
            lambda key, rows: key[1].values(key[0], rows, self.limits.batch_tokens, backend),
            limit=self.limits.batch_tokens,
            wait=self.limits.wait,
            seconds=self.limits.batch_seconds,
            observe=self.metrics.batch,
        )
        self.metrics.watch("acqsynth_queue_tokens", "Tokens in the queue", lambda: self.batcher.waiting)
        #: Set while the server drains: new requests are refused, accepted ones are answered.
        self.stopping = False
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="acqsynth-encode")
        # For /get_reward: the reward of masked samples, and the lowest known reward, which gated ones get.
        self._typical = 0.0
        self._parsed = False
        self._least = 0.0

    async def score(
        self, samples: Sequence[Any], question: Question, max_length: int | None
    ) -> tuple[Loaded, list[Values], list[int], dict[int, str]]:
        """The student, values and scored-token counts of n samples, and errors of unscorable ones: index -> message."""
        if self.stopping:
            raise ServiceError("stopping", "the server is stopping")
        limits = self.limits
        if len(samples) > limits.max_samples:
            raise ServiceError("too_large", f"samples: expected at most {limits.max_samples}, got {len(samples)}")
        if max_length is not None and max_length > limits.max_length:
            raise ServiceError(
                "invalid_request", f"max_length: expected at most {limits.max_length}, the limit of this server"
            )
        loaded = self.students.current
        loop = asyncio.get_running_loop()
        rows: list[acqcore.Row] = []
        errors: dict[int, str] = {}
        kind = next((kind for kind in map(kind_of_sample, samples) if kind is not None), None)
        for chunk in _chunks(samples, limits.max_characters):  # other requests are served between chunks
            found = await loop.run_in_executor(self._encoding, loaded.encode, chunk, limits, max_length, kind)
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
        except (ValueError, TypeError) as error:  # the rows are valid, so the request itself is at fault
            raise ServiceError("invalid_request", str(error)) from error
        for i, value in zip(picked, scored, strict=True):
            values[i] = value
        self.metrics.samples.labels("refused").inc(len(errors))
        return loaded, values, [row.n_scored for row in rows], errors

    def _admit(self, tokens: int) -> None:
        """Checks that the queue accepts a request of this size."""
        most, waiting = self.limits.queue_tokens, self.batcher.waiting
        if tokens > most:
            raise ServiceError(
                "too_large", f"the request has {tokens} tokens, but the queue holds at most {most}: send fewer samples"
            )
        if waiting + tokens > most + (most // _RESERVE if tokens <= most // _RESERVE else 0):
            raise ServiceError(
                "busy", f"{waiting} tokens are queued, at most {most} are allowed", self.batcher.seconds_for(waiting)
            )

    async def close(self) -> None:
        """Answers all accepted requests, then stops the threads."""
        self.stopping = True
        await asyncio.to_thread(self.batcher.close)
        self._encoding.shutdown()

    async def rewards(self, queries: Sequence[str], prompts: Sequence[str]) -> dict[str, Any]:
        """The answer of ``/get_reward``, as by :class:`acqsynth.rewards.AcquisitionReward`. OpenRLHF does not support
        masked samples; they get the mean of the scored samples of the request, else of the last request with any."""
        responses = [response_of(query, prompt) for query, prompt in zip(queries, prompts, strict=True)]
        samples = [None if response is None else parse_sample(response) for response in responses]
        parsed = [sample for sample in samples if sample is not None]
        question = Question((self.acquisition,), "mean", "{}")
        _, scored, _, _ = await self.score(parsed, question, self.limits.max_length)
        left = iter(scored)
        values = [None if sample is None else next(left).values[0] for sample in samples]
        if responses and not parsed and not self._parsed:
            logger.warning(
                "/get_reward: none of %d responses has the form <question>...</question><answer>...</answer>, so each "
                "gets the lowest reward; ask for this form in the prompts",
                len(responses),
            )
        self._parsed |= bool(responses)  # or the warning was logged
        if known := [value for value in values if value is not None]:
            self._typical = statistics.fmean(known)
            self._least = min(self._least, *known)
        gated = [response is not None and sample is None for response, sample in zip(responses, samples, strict=True)]
        masked = [value is None and not out for value, out in zip(values, gated, strict=True)]
        missing = [self._least if out else self._typical for out in gated]
        rewards = [other if value is None else value for value, other in zip(values, missing, strict=True)]
        return {
            "rewards": rewards,
            "scores": torch.tensor(rewards, dtype=torch.float64).sigmoid().tolist(),
            "extra_logs": {
                "masked": [float(x) for x in masked],
                "gated": [float(x) for x in gated],
                self.acquisition: [value or 0.0 for value in values],
            },
        }

    async def reload(self, path: str) -> Loaded:
        """Replaces the student for future requests."""
        try:
            loaded = await self.students.load(path)
        except ServiceError:
            self.metrics.reloads.labels("refused").inc()
            raise
        self.metrics.reloads.labels("done").inc()
        self.metrics.student_version.set(loaded.version)
        logger.info("student %s, version %d, %s", loaded.name, loaded.version, loaded.fingerprint)
        return loaded


_OF_BODIES = (400, 401, 408, 413, 422, 429, 503, 504)


def _documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors that a route may return."""
    return {status: {"model": ErrorBody, "description": text} for status, text in ERRORS.values() if status in statuses}


def create_app(service: Service) -> FastAPI:
    """The ASGI application of a service, which it closes at the end of its lifespan."""

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

    @app.exception_handler(ServiceError)
    async def service_error(request: Request, error: ServiceError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
        body = {"error": {"type": kind, "message": str(error.detail)}}
        return JSONResponse(body, error.status_code, error.headers)

    bodies = APIRouter(route_class=JsonRoute)

    @bodies.post("/score", response_model=ScoreResponse, responses=_documented(*_OF_BODIES))
    async def score(body: ScoreRequest, request: Request) -> Response:
        """Values of samples, one per sample and acquisition."""
        for i, sample in enumerate(body.samples):
            try:
                template_variables(sample)
            except ValueError as error:
                raise ServiceError("invalid_request", f"samples.{i}.{error}") from error
        names = tuple(dict.fromkeys(body.acquisitions))
        arguments = {name: given.model_dump(exclude_none=True) for name, given in body.acquisition_args.items()}
        question = Question(names, body.reduction, json.dumps(arguments, sort_keys=True))
        loaded, values, n_tokens, errors = await answered(
            request, service.score(body.samples, question, body.max_length), service.limits.timeout
        )
        estimated = [name for name in names if any(name in row.stderr for row in values)]
        return JSONResponse(
            {
                "student": loaded.described(),
                "values": {name: [row.values[k] for row in values] for k, name in enumerate(names)},
                "stderr": {name: [row.stderr.get(name) for row in values] for name in estimated},
                "n_tokens": n_tokens,
                "valid": [None not in row.values for row in values],
                # A template may quote half a surrogate pair, which has no UTF-8.
                "errors": [
                    {"index": i, "message": message.encode(errors="backslashreplace").decode()}
                    for i, message in sorted(errors.items())
                ],
            }
        )

    @bodies.post("/get_reward", response_model=RewardResponse, responses=_documented(*_OF_BODIES))
    async def get_reward(body: RewardRequest, request: Request) -> Response:
        """Rewards in the wire format of OpenRLHF."""
        if len(body.query) != len(body.prompts):
            raise ServiceError(
                "invalid_request", f"prompts: expected {len(body.query)}, one per query, got {len(body.prompts)}"
            )
        return JSONResponse(await answered(request, service.rewards(body.query, body.prompts), service.limits.timeout))

    @bodies.post("/student", response_model=StudentInfo, responses=_documented(*_OF_BODIES, 403, 409))
    async def student(body: StudentRequest, request: Request) -> Response:
        """Replaces the student; queued requests keep the previous one."""
        return JSONResponse((await service.reload(body.path)).described())

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_model=Health, responses={503: {"model": Health, "description": "stopping"}})
    async def health() -> Response:
        """Whether requests are accepted."""
        if service.stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get(
        "/metrics",
        response_class=Response,
        responses={**_documented(401, 429), 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    app.include_router(bodies)
    return app


def _chunks(samples: Sequence[Any], characters: int) -> Iterator[list[Any]]:
    """Samples in order, in chunks of about this many characters; at least one chunk."""
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
