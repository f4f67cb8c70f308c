"""Bodies of requests and responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from acqcore import Reduction
from acqcore.acquisitions import REGISTRY
from acqcore.students.messages import TAKEN


def served_acquisitions() -> list[str]:
    """Names from ``acqcore.acquisitions()`` whose value depends only on the sample and the student. The others need an
    object that a request cannot carry, or the whole set at once."""
    return [name for name, entry in REGISTRY.items() if entry.over != "set" and not entry.options.required()]


def _served(name: str) -> str:
    if name not in served_acquisitions():
        raise ValueError(f"unknown {name!r}, expected one of {', '.join(served_acquisitions())}")
    return name


def _list_served(schema: dict[str, Any]) -> None:
    schema.clear()  # the bound on the length would only repeat the names
    schema.update(type="string", enum=served_acquisitions())


#: One of :func:`served_acquisitions` at the time of the check.
AcquisitionName = Annotated[str, Field(max_length=64, json_schema_extra=_list_served), AfterValidator(_served)]

T = TypeVar("T")
Names = Annotated[
    list[AcquisitionName],
    Field(min_length=1, max_length=32, fail_fast=True),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
]
Many = Annotated[list[T], Field(fail_fast=True)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


_SAMPLE = {
    "anyOf": [{"type": "string"}, {"type": "object"}],
    "description": 'a string, or an object with "prompt" and "completion" (strings or messages), "messages", '
    '"question" and "answer", or "text"; with messages also "tools" and "chat_template_kwargs", variables of the '
    "chat template. Other keys are ignored.",
    "examples": [{"prompt": "What is 2 + 2?\n", "completion": "It is 4."}],
}
#: A sample as for acqcore.score. Faults of samples are reported in ``errors`` of the response.
Sample = Annotated[Any, WithJsonSchema(_SAMPLE)]


def template_variables(sample: Any) -> None:
    """Checks the ``chat_template_kwargs`` of a sample: a chat template in a request would run on the server.

    Raises:
        ValueError: they hold anything but variables of its chat template.
    """
    given = sample.get("chat_template_kwargs") if isinstance(sample, dict) else None
    if given is None:
        return
    if not isinstance(given, dict) or not all(isinstance(value, bool | int | float | str) for value in given.values()):
        raise ValueError("chat_template_kwargs: expected names with text, numbers, true or false as values")
    for name in given:
        if not name.isidentifier() or len(name) > 64 or name in TAKEN:
            raise ValueError("chat_template_kwargs: expected names of variables of the chat template")


class Arguments(_Body):
    """Arguments of an acquisition, as in ``acquisition_args`` of ``acqcore.score``, without those that a request
    cannot carry."""

    parameters: Literal["head", "trainable", "all"] | Annotated[int, Field(ge=1)] | None = None
    loss: Literal["mean", "sum"] | None = None
    layers: Literal["all", "own"] | Annotated[int, Field(ge=0)] | None = None
    draws: int | None = Field(None, ge=2, le=32, description="each costs an additional pass")
    dropout: float | None = Field(None, ge=0, lt=1)
    form: Literal["element", "block", "linear"] | None = None
    posterior: Literal["dropout", "isotropic"] | None = None
    positions: Literal["all", "completion"] | None = None
    probes: int | None = Field(None, ge=1, le=32, description="each costs an additional backward pass")
    variance: float | None = Field(None, gt=0)
    block: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**63)


class ScoreRequest(_Body):
    samples: Many[Sample] = Field(description="samples as for acqcore.score, all of one kind")
    acquisitions: Names = Field(["entropy"], description="a list of names, or a single name")
    acquisition_args: dict[AcquisitionName, Arguments] = Field({}, description="name -> arguments")
    reduction: Reduction = "mean"
    max_length: int | None = Field(
        None, ge=2, description="truncate longer samples to this many tokens; by default they cannot be scored"
    )


class StudentInfo(BaseModel):
    name: str
    version: int
    fingerprint: str


class SampleError(BaseModel):
    index: int
    message: str


class ScoreResponse(BaseModel):
    student: StudentInfo = Field(description="the student that scored all samples of the request")
    values: dict[str, list[float | None]] = Field(description="acquisition -> one value per sample")
    stderr: dict[str, list[float | None]] = Field(
        {}, description="acquisition estimated by random draws -> the standard error of each value"
    )
    n_tokens: list[int] = Field(description="scored tokens of each sample")
    valid: list[bool] = Field(description="false if a value is null")
    errors: list[SampleError] = Field(description="samples that could not be scored at all")


class RewardRequest(_Body):
    """The wire format of OpenRLHF 0.11."""

    query: Many[str] = Field(description="prompts, each followed by its response")
    prompts: Many[str]
    labels: Many[Any] | None = Field(None, description="ignored")


class RewardResponse(BaseModel):
    rewards: list[float]
    scores: list[float] = Field(description="the logistic of the rewards, between 0 and 1")
    extra_logs: dict[str, list[float]]


class StudentRequest(_Body):
    path: str = Field(description="folder of a saved model, relative to the student root")


class Health(BaseModel):
    status: Literal["ok", "stopping"]


class ErrorDetail(BaseModel):
    type: str
    message: str


class ErrorBody(BaseModel):
    error: ErrorDetail
