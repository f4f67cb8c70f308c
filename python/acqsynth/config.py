"""The recipe of a run: YAML read into pydantic models, with ``dotted.key=value`` overrides.

Each key is documented where it is declared; ``acqsynth run --help-config`` prints them all. Errors are one sentence
that names the key.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

from acqsynth.recipes import recipes

try:
    import yaml
    from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
except ModuleNotFoundError as error:  # rewards import this module, so a bare install fails here first
    raise ModuleNotFoundError(
        f'acqsynth needs {error.name}: run pip install "acqcore[train]"', name=error.name
    ) from None


def _different(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise ValueError(f"expected distinct entries, got {', '.join(map(str, values))}")
    return values


def _folder(path: str) -> str:
    try:
        os.fsencode(path)
        if "\0" not in path:
            return str(Path(path).expanduser())
    except (UnicodeEncodeError, RuntimeError):  # RuntimeError: the home of an unknown user
        pass
    raise ValueError(f"expected the path of a folder, got {path!r}")


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(options, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected text, finite numbers, true or false, lists and sections: {error}") from None
    return options


Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, le=10**9)]  # NumPy seeds have 32 bits, and rounds count up from here
Temperature = Annotated[float, Field(ge=0)]
Folder = Annotated[str, Field(min_length=1), AfterValidator(_folder)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
#: A key without a value, such as ``entropy:``, reads as null in YAML.
Options = Annotated[
    dict[str, Any], BeforeValidator(lambda value: {} if value is None else value), AfterValidator(_plain)
]
Different = AfterValidator(_different)


class ConfigError(ValueError):
    """The recipe cannot run; the message is one sentence that names the key."""


class Section(BaseModel):
    """A section of a recipe; unknown keys and values of the wrong type are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Source(Section):
    """A source of rows."""

    source: str = Field(min_length=1)
    """hub id (openai/gsm8k:main names a configuration), path of a .jsonl, .csv or .parquet file, bundled:mathematics or
    bundled:word_problems for packaged rows, world:<seed> in the arithmetic domains, or intents:<name> in the domain
    classification"""
    split: str = "train"
    """split of a hub data set, train or test in the arithmetic domains; a local file has none"""
    columns: dict[str, str] | None = None
    """sample field (question, answer, reasoning; text, label) -> column name"""
    skip: int = Field(default=0, ge=0)
    """rows to skip at the start"""
    limit: Count | None = None
    """maximum number of rows to read after skipping"""
    per_label: Count | None = None
    """maximum rows per answer; skip then applies per answer, and limit to the remaining rows"""


class OtherSource(Source):
    """Rows that may belong to another domain."""

    domain: str | None = None
    """domain of the rows; by default the recipe's"""


class DataConfig(Section):
    """Real rows. Rows that also appear in an evaluation set are left out of the other sets."""

    seeds: Source
    """examples shown to the generator in training"""
    evaluation: Source
    """rows for in-distribution accuracy"""
    held_out: Source | None = None
    """examples shown when the training set is written; by default seeds"""
    real: Source | None = None
    """pool for the baselines on real rows; by default seeds"""
    replay: OtherSource | None = None
    """rows mixed in to prevent forgetting; by default real"""
    reference: Source | None = None
    """development rows whose loss should fall, for influence: a separate set without rows of seeds or evaluation; by
    default seeds, which the generator sees and can repeat"""


class SamplingConfig(Section):
    """How a generator's completions are drawn."""

    temperature: Temperature = 1.0
    """divides the logits; 0 decodes greedily"""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """probability mass of nucleus sampling"""
    max_tokens: Count = 1024
    """maximum tokens per completion"""


class EngineConfig(Section):
    """The engine that generates questions, labels and answers."""

    name: Literal["transformers", "vllm"] = "transformers"
    """name of the engine"""
    options: Options = {}
    """options passed to the engine"""


class GeneratorConfig(Section):
    """The model that writes questions, and its training."""

    model: str
    """hub id, path, or one of the names smollm2, world:base and world:skewed"""
    method: Literal["grpo", "dpo", "best_of_n", "none"] = "grpo"
    """grpo: RL on the reward; dpo: preference pairs ranked by the reward; best_of_n: rejection sampling without
    training; none: prompting only"""
    sampling: SamplingConfig = SamplingConfig()
    """how the training set is sampled"""
    prompts: Count = 500
    """training prompts, each with its own draw of seeds"""
    shown: int = Field(default=2, ge=0)
    """seed examples per prompt"""
    turns: bool = False
    """show seeds as earlier chat turns, which small models follow better"""
    questions: Count | None = None
    """questions to write before labelling drops some; by default the largest of student.rows"""
    candidates: Count = 8
    """completions per prompt that best_of_n and dpo rank"""
    seeds: Annotated[list[Annotated[int, Field(ge=0, le=10**6)]], Different] = Field(default=[0], min_length=1)
    """generator seeds, each with its own training, writing, labelling and fits by student.seeds"""
    options: Options = {}
    """fields of TRL's GRPOConfig or DPOConfig; lora: fields of peft's LoraConfig"""


class LabellingConfig(Section):
    """Labelling of generated questions."""

    method: Literal["majority", "teacher", "own", "computed"] = "majority"
    """majority: most frequent of the student's sampled answers; teacher: of a teacher's; own: the generator's own
    answer; computed: by the domain (arithmetic)"""
    teacher: str | None = None
    """model for method teacher"""
    k: Count = 16
    """answers sampled per question"""
    temperature: Temperature = 0.8
    """sampling temperature of these answers"""
    threshold: float = Field(default=0.5, gt=0, le=1)
    """minimum share of answers that agree; below it the question is dropped"""
    options: Options = {}
    """further labelling options: max_tokens"""

    @model_validator(mode="after")
    def _teacher_and_method(self) -> Self:
        if (self.method == "teacher") != (self.teacher is not None):
            raise ValueError("expected a teacher with method teacher, and none with any other method")
        return self


class RewardConfig(Section):
    """The reward: how much a sample is worth to the student."""

    signals: dict[str, Options] | None = Field(default=None, min_length=1)
    """signal -> its options; an acqcore acquisition, confidence, answer_variance, semantic_entropy, learnability,
    proximity, diversity or gradient; null: the signals of the default reward"""
    weights: dict[str, float] = {}
    """signal -> weight in the fusion; by default 1, or with signals null its weight in the default reward"""
    labelling: LabellingConfig | None = None
    """labels to score questions with; by default the answers that the generator wrote"""
    gates: list[str] | None = None
    """gates to use; by default all that the domain and the signals allow"""
    fusion: Literal["raw", "z", "rank", "quantile", "gdpo"] = "z"
    """how the signals of a group are combined; z and gdpo already yield advantages, so set scale_rewards to none in
    TRL"""
    paper_compat: bool = False
    """reproduce the released code's single-signal reward, defects included"""
    reference: Count | None = None
    """number of rows of data.reference (or seeds) used for influence; by default all"""
    embedder: str = "ngram"
    """question embedder: ngram, minilm, or a sentence model"""
    answers: Options = {}
    """how the student's answers are sampled: k, temperature, max_tokens"""
    scoring: Options = {}
    """options of the student's forward passes: batch_tokens, max_length, device"""
    student: str | None = None
    """the student that scores; by default student.model"""
    refresh_steps: int = Field(default=0, ge=0)
    """steps between refreshes of the student from its newest checkpoint; 0 disables refreshing"""
    refresh_from: Folder | None = None
    """folder of those checkpoints; by default the generator's own"""

    @model_validator(mode="after")
    def _weights_and_signals(self) -> Self:
        for name in self.weights:
            if self.signals is not None and name not in self.signals:
                raise ValueError(f"weights.{name}: no such signal, expected one of {', '.join(self.signals)}")
        if self.paper_compat and (self.signals is None or len(self.signals) != 1):
            raise ValueError("paper_compat needs exactly one signal, as in the released code")
        if self.paper_compat and (self.weights or self.gates is not None or self.fusion != "z" or self.labelling):
            raise ValueError("paper_compat has no weights, gates, fusion or labelling, as in the released code")
        return self


class StudentConfig(Section):
    """The model that learns from the rows."""

    model: str
    """hub id, path or name; this model answers, scores and learns"""
    others: dict[Name, str] = {}
    """name -> model of additional students fitted on the same rows"""
    rows: Annotated[list[Count], Different] = Field(default=[1000], min_length=1)
    """training-set sizes; the largest determines how much is generated"""
    seeds: Annotated[list[Seed], Different] = Field(default=[0], min_length=1)
    """seeds of the fits, for the choice and order of rows"""
    replay: float = Field(default=0.0, ge=0, lt=1)
    """share of data.replay among all rows learnt"""
    options: Options = {}
    """fields of TRL's SFTConfig; lora: fields of peft's LoraConfig"""


class ValidityConfig(Section):
    """Small fits that test whether a signal predicts a student's gain."""

    signals: list[str] = []
    """signals to test; by default the reward's"""
    batches: int = Field(default=0, ge=0)
    """batches of real rows, each learnt by a separate student; 0 skips the test"""
    rows: Count = 32
    """rows per batch"""
    options: Options = {}
    """options of these fits, which override student.options"""


class EvaluationConfig(Section):
    """Evaluation sets and confidence levels."""

    others: dict[Name, OtherSource] = {}
    """name -> out-of-distribution rows"""
    rows: Count | None = None
    """maximum rows per set"""
    max_tokens: Count | None = None
    """maximum tokens per answer; by default the domain's"""
    likelihood: bool = False
    """also measure accuracy with the most likely of the set's labels as the answer (classification, engine
    transformers)"""
    resamples: Count = 2000
    """bootstrap resamples for the validity of signals"""
    level: float = Field(default=0.95, gt=0, lt=1)
    """confidence level of the intervals"""
    validity: ValidityConfig = ValidityConfig()
    """validity of signals"""


class Config(Section):
    """A complete run."""

    domain: str
    """math, medical, code, classification, arithmetic or arithmetic-skewed"""
    data: DataConfig
    """real rows"""
    generator: GeneratorConfig
    """the model that writes questions"""
    student: StudentConfig
    """the model that learns"""
    engine: EngineConfig = EngineConfig()
    """text generation"""
    reward: RewardConfig = RewardConfig()
    """reward of a sample"""
    labelling: LabellingConfig = LabellingConfig()
    """labels of generated questions"""
    evaluation: EvaluationConfig = EvaluationConfig()
    """evaluation of the students"""
    baselines: Annotated[
        list[Literal["no_rl", "random_real", "filtered_real", "error_driven", "best_of_n"]], Different
    ] = ["no_rl", "random_real", "filtered_real", "error_driven"]
    """arms besides the base student and the recipe's own, at equal rows"""
    rounds: Count = 1
    """rounds of generator and student: the student fitted in one round scores the next"""
    output: Folder = "acqsynth-output"
    """folder of the run's artefacts"""
    seed: Seed = 0
    """base random seed; the generator's seeds count up from it, fits use student.seeds"""

    @model_validator(mode="after")
    def _rounds_and_rows(self) -> Self:
        if self.rounds > 1 and self.generator.method in ("none", "best_of_n"):
            raise ValueError(f"rounds: expected 1, as generator.method {self.generator.method} trains no generator")
        if self.rounds > min(self.student.rows):
            raise ValueError(f"rounds: expected at most student.rows = {min(self.student.rows)}, got {self.rounds}")
        if self.data.replay is not None and not self.student.replay:
            raise ValueError("data.replay: these rows are not used without student.replay, their share")
        return self


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Loads a recipe from a path, or by its name in the package.

    Args:
        recipe: path of a YAML file, or a name such as ``math`` or ``math.yaml``.
        overrides: ``dotted.key=value`` with the value in YAML; ``key=null`` sets None. The last of equal keys wins.

    Raises:
        ConfigError: no such recipe, invalid YAML, an unknown key, a value of the wrong type or out of range.
    """
    text, name = _read(recipe)
    values = _parsed(text, name)
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: expected sections such as 'domain:' and 'data:', got {_described(values)}")
    for override in overrides:
        _override(values, override)
    try:
        return from_mapping(values)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def from_mapping(values: Mapping[str, Any]) -> Config:
    """Validates nested mappings, as read from YAML; ConfigError as in :func:`load`."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from None


def documented(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """``(dotted key, type, default, description)`` of every key, sections before their keys."""
    for name, field in section.model_fields.items():
        default = "required" if field.is_required() else field.default
        if isinstance(default, Section):
            default = ""
        elif not field.is_required():
            default = yaml.safe_dump(default, default_flow_style=True).removesuffix("...\n").strip()
        yield prefix + name, _type_name(field.annotation), default, " ".join((field.description or "").split())
        if inner := _section_in(field.annotation):
            place = f"{prefix}{name}.<name>" if get_origin(field.annotation) is dict else prefix + name
            yield from documented(inner, f"{place}.")


class _Loader(yaml.SafeLoader):
    """Safe YAML loader that reads words and numbers by YAML 1.2 and rejects repeated and non-text keys.

    YAML 1.1 reads ``no`` as false, ``1:30`` as 90, 1e-6 as text and 2026-01-01 as a date. Unlike YAML 1.2, 1_000 is a
    number, and integers with leading zeros (8 or 10, by version) and ``0o17`` are text.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                problem = f"key {key.value}: expected text, such as '{key.value}' in quotes"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is repeated", key.start_mark)
            seen.add(key.value)
        return node


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.?[0-9]+(?=[eE])|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("merge", "<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))


def _read(recipe: str | Path) -> tuple[str, str]:
    """The text and the name of a recipe."""
    if os.path.isfile(recipe):  # unlike Path.is_file, False for a name too long
        try:
            return Path(recipe).read_text(encoding="utf-8"), str(recipe)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{recipe}: cannot be read: {_one_line(error)}") from error
    name = str(recipe).removesuffix(".yaml")
    if name in recipes():
        return (resources.files("acqsynth") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"), name
    raise ConfigError(f"{recipe}: no such file or recipe; the package has {', '.join(recipes())}")


def _parsed(text: str, name: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:  # !!int x, !!bool x, !!timestamp x
        problem = _one_line(error).replace('in "<unicode string>", ', "in ")
        raise ConfigError(f"{name}: not YAML: {problem}") from error
    except RecursionError as error:
        raise ConfigError(f"{name}: nested too deeply") from error


def _override(values: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{text!r}: expected dotted.key=value")
    *sections, last = key.split(".")
    for depth, section in enumerate(sections, 1):
        below = values.get(section)
        if not isinstance(below, dict | None):
            raise ConfigError(f"{key}: {'.'.join(sections[:depth])} is {_described(below)}, which has no keys")
        values[section] = dict(below or {})  # a copy, as a YAML alias may share the section
        values = values[section]
    values[last] = _parsed(value, key)


#: pydantic error type -> sentence, formatted with the error's context.
_SENTENCES = {
    "int_type": "expected an integer",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "string_type": "expected text",
    "string_too_short": "expected a name or path",
    "string_pattern_mismatch": "expected a name of letters, digits, '_', '.' and '-'",
    "bool_type": "expected true or false",
    "list_type": "expected a list",
    "dict_type": "expected a mapping",
    "model_type": "expected a section",
    "literal_error": "expected {expected}",
    "too_short": "expected at least one entry",
    "greater_than": "expected more than {gt:g}",
    "greater_than_equal": "expected at least {ge:g}",
    "less_than": "expected less than {lt:g}",
    "less_than_equal": "expected at most {le:g}",
}


def _sentence(error: ValidationError) -> str:
    """The first error with its key, and the nearest match for an unknown key or word."""
    fault = error.errors(include_url=False)[0]
    where = [part for part in fault["loc"] if part != "[key]"]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).removeprefix(".")
    context = fault.get("ctx", {})
    match fault["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key{_nearest_key(where)}"
        case "missing":
            meaning = next(doc for known, _, _, doc in documented() if known == _generic(where))
            return f"{key}: missing; {meaning}"
        case "value_error":
            return f"{key}: {context['error']}" if key else str(context["error"])
    said = _SENTENCES.get(fault["type"], fault["msg"]).format(**context)
    near = ""
    if fault["type"] == "literal_error":
        known = re.findall(r"'([^']*)'", context["expected"])
        found = difflib.get_close_matches(str(fault["input"]), known, 1)
        near = f", did you mean {found[0]}?" if found else ""
    return f"{key}: {said}, got {_described(fault['input'])}{near}"


def _nearest_key(where: Sequence[Any]) -> str:
    """A close match in the section of an unknown key, else the same name elsewhere, else the section's keys."""
    *section, name = where
    known = [dotted for dotted, *_ in documented()]
    beside = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == _generic(section)]
    if near := difflib.get_close_matches(name, beside, 1):
        return f", did you mean {'.'.join([*section, near[0]])}?"
    if elsewhere := [dotted for dotted in known if dotted.rpartition(".")[2] == name]:
        return f", did you mean {min(elsewhere, key=len)}?"
    return f", expected one of {', '.join(beside)}"


def _generic(where: Sequence[Any]) -> str:
    """The key as in :func:`documented`, with names replaced, which may contain dots."""
    named = where[:2] == ["evaluation", "others"]
    return ".".join([*where[:2], "<name>", *where[3:]] if named else where)


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


def _type_name(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(inner[0])
    if origin in (Union, types.UnionType):
        return f"{_type_name(next(part for part in inner if part is not type(None)))} or null"
    if origin is Literal:
        return f"one of {', '.join(inner)}"
    if origin is list:
        return f"a list, each {_type_name(inner[0])}"
    if origin is dict:
        return "options by name" if inner[1] is Any else f"names, each with {_type_name(inner[1])}"
    if issubclass(annotation, Section):
        return "a section"
    return {str: "text", int: "an integer", float: "a number", bool: "true or false"}[annotation]


def _described(value: Any) -> str:
    """Describes a recipe value in an error message."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a section"
    return "a list" if isinstance(value, list) else repr(value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
