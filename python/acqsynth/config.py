"""The recipe of a run: dataclasses read from YAML, with dotted ``key=value`` overrides.

Each field is documented where it is declared; ``acqsynth run --help-config`` prints them all. What a recipe says wrong
is reported in one sentence that names the key.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

BASELINES = ("no_rl", "random_real", "filtered_real", "error_driven")  #: where a recipe names none
BUNDLED = "bundled:"  #: a source that begins so is in the package


class ConfigError(ValueError):
    """A recipe that can not be run; its text is one sentence that names the key."""


def option(doc: str, default: Any = MISSING, *, factory: Any = MISSING) -> Any:
    """A documented field; without a default it must be given."""
    if factory is not MISSING:
        return field(default_factory=factory, metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Source:
    """Where rows come from."""

    source: str = option(
        "hub id (openai/gsm8k:main names a configuration), path of a .jsonl or .parquet, bundled:mathematics or "
        "bundled:word_problems for rows of the package, or world:<seed> in the domain arithmetic"
    )
    split: str = option("split of a hub data set; a local file has none", "train")
    columns: dict[str, str] | None = option("field of a sample (question, answer, reasoning) -> column", None)
    skip: int = option("leave out the first so many rows", 0)
    limit: int | None = option("at most so many rows after those skipped", None)


@dataclass(frozen=True)
class OtherSource(Source):
    """Rows that may be of another domain."""

    domain: str | None = option("domain of the rows, by default the recipe's", None)


@dataclass(frozen=True)
class DataConfig:
    """Real rows; no source may share rows with ``evaluation``."""

    seeds: Source = option("examples shown to the generator in training")
    evaluation: Source = option("rows that measure accuracy in distribution")
    held_out: Source | None = option("examples shown when the data set is written; by default the seeds", None)
    real: Source | None = option("pool of the real-data baselines; by default the seeds", None)
    replay: OtherSource | None = option("rows mixed in against forgetting; by default the real pool", None)


@dataclass(frozen=True)
class SamplingConfig:
    """How a generator's completions are drawn."""

    temperature: float = option("divides the logits", 1.0)
    top_p: float = option("least probability of the tokens drawn from", 1.0)
    max_tokens: int = option("most tokens of a completion", 1024)


@dataclass(frozen=True)
class EngineConfig:
    """What generates text: questions, labels, answers."""

    name: Literal["transformers", "vllm"] = option("the engine", "transformers")
    options: dict[str, Any] = option("passed to the engine", factory=dict)


@dataclass(frozen=True)
class GeneratorConfig:
    """The model that writes questions, and how it is taught."""

    model: str = option("hub id, path, or one of the names smollm2 and world:base")
    method: Literal["grpo", "dpo", "best_of_n", "none"] = option(
        "grpo: RL on the reward; dpo: pairs of the same scores; best_of_n: rejection sampling, no training; "
        "none: prompting",
        "grpo",
    )
    sampling: SamplingConfig = option("of the data set that is written", factory=SamplingConfig)
    prompts: int = option("training prompts, each showing its own draw of seeds", 500)
    shown: int = option("seed examples in a prompt", 2)
    turns: bool = option("show seeds as turns of the chat before the request, which small models follow better", False)
    questions: int | None = option(
        "questions written, of which labelling keeps a part; by default the largest of student.rows", None
    )
    candidates: int = option("completions of a prompt that best_of_n and dpo rank", 8)
    options: dict[str, Any] = option(
        "passed to TRL's GRPOConfig or DPOConfig as they are; lora: those of a LoRA", factory=dict
    )


@dataclass(frozen=True)
class LabellingConfig:
    """How answers of generated questions are decided."""

    method: Literal["majority", "teacher", "own", "computed"] = option(
        "majority of sampled answers; a teacher's sampled answers; own: the answer that the generator wrote; computed: "
        "by the domain (arithmetic)",
        "majority",
    )
    teacher: str | None = option("model of method teacher", None)
    k: int = option("answers sampled a question", 16)
    temperature: float = option("of these answers", 0.8)
    threshold: float = option("least share of the answers that agree; below it the question is dropped", 0.5)
    options: dict[str, Any] = option("passed to the labelling: max_tokens", factory=dict)


@dataclass(frozen=True)
class RewardConfig:
    """What a sample is worth to the student."""

    signals: dict[str, dict[str, Any]] | None = option(
        "signal -> its options; an acquisition of acqcore, confidence, answer_variance, semantic_entropy, "
        "learnability, proximity, diversity or gradient; by default those of the default reward",
        None,
    )
    weights: dict[str, float] = option("signal -> weight in the fusion, by default 1", factory=dict)
    labelling: LabellingConfig | None = option(
        "score a question with the label it gets by this, by default with the answer that the generator wrote", None
    )
    gates: list[str] | None = option("gates that multiply, by default all that the domain and the signals allow", None)
    fusion: Literal["raw", "z", "rank", "quantile", "gdpo"] = option(
        "how signals of a group become one; z and gdpo are advantages already, with scale_rewards none in TRL", "z"
    )
    paper_compat: bool = option("the released code's reward of one signal, its defects included", False)
    reference: int | None = option("seeds whose loss shall fall, for influence; by default all", None)
    embedder: str = option("of questions: ngram, minilm, or the model of an embedder", "ngram")
    answers: dict[str, Any] = option(
        "of the answers that the student samples: k, temperature, max_tokens", factory=dict
    )
    scoring: dict[str, Any] = option("of the student's forward passes: batch_tokens, max_length, device", factory=dict)
    student: str | None = option("the student that scores, by default student.model", None)
    refresh_steps: int = option("score with the newest checkpoint of the student every so many steps; 0 never", 0)
    refresh_from: str | None = option("folder with its checkpoints, by default those of the generator itself", None)


@dataclass(frozen=True)
class StudentConfig:
    """The model that learns from the rows."""

    model: str = option("hub id, path or name; answers, scores and learns")
    others: dict[str, str] = option("name -> model of further students fitted on the same rows", factory=dict)
    rows: list[int] = option("sizes of the training set; the largest is also what is generated", factory=lambda: [1000])
    seeds: list[int] = option("seeds of the fits: of row choice and order", factory=lambda: [0])
    replay: float = option("share of data.replay in all rows that are learnt, in [0, 1)", 0.0)
    options: dict[str, Any] = option("passed to TRL's SFTConfig as they are; lora: those of a LoRA", factory=dict)


@dataclass(frozen=True)
class ValidityConfig:
    """Small fits that measure whether a signal foretells what a student gains."""

    signals: list[str] = option("signals put to the test, by default those of the reward", factory=list)
    batches: int = option("held-out batches of real rows, each of which fits a student of its own; 0 skips this", 0)
    rows: int = option("rows of a batch", 32)
    options: dict[str, Any] = option("of these fits, over student.options", factory=dict)


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured, and how sure it is."""

    others: dict[str, OtherSource] = option("name -> rows out of distribution", factory=dict)
    rows: int | None = option("the first so many rows of each set", None)
    max_tokens: int | None = option("most tokens of an answer, by default the domain's", None)
    resamples: int = option("bootstrap resamples of rows and seeds", 2000)
    level: float = option("of the intervals", 0.95)
    validity: ValidityConfig = option("validity of signals", factory=ValidityConfig)


@dataclass(frozen=True)
class Config:
    """A whole run."""

    domain: str = option("math, medical, code or arithmetic")
    data: DataConfig = option("real rows")
    generator: GeneratorConfig = option("the model that writes questions")
    student: StudentConfig = option("the model that learns")
    engine: EngineConfig = option("what generates text", factory=EngineConfig)
    reward: RewardConfig = option("what a sample is worth", factory=RewardConfig)
    labelling: LabellingConfig = option("answers of generated questions", factory=LabellingConfig)
    evaluation: EvaluationConfig = option("what is measured", factory=EvaluationConfig)
    baselines: list[Literal["no_rl", "random_real", "filtered_real", "error_driven", "best_of_n"]] = option(
        "arms beside the base student and the taught generator, at equal rows", factory=lambda: list(BASELINES)
    )
    rounds: int = option("alternations: the student fitted in one round scores the next", 1)
    output: str = option("folder of the run's artefacts", "acqsynth-output")
    seed: int = option("of everything but the fits", 0)


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a recipe: a path, or the bare name of one shipped in the package.

    Args:
        recipe: path of a YAML file, or a name such as ``math`` or ``math.yaml``.
        overrides: ``dotted.key=value``, the value in YAML; ``key=null`` sets None. The last of equal keys counts.

    Raises:
        ConfigError: no such recipe, text that is not YAML, an unknown key, a value of the wrong type or out of range.
    """
    text, name = _read(recipe)
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not YAML: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: expected sections such as 'domain:' and 'data:', got {_described(values)}")
    for override in overrides:
        _override(values, override)
    try:
        return from_mapping(values)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def from_mapping(values: Mapping[str, Any]) -> Config:
    """The config of nested mappings, as YAML gives them.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or one out of range.
    """
    config: Config = _build(Config, values, "")
    _check(config)
    return config


def recipes() -> list[str]:
    """Names of the recipes in the package."""
    folder = resources.files("acqsynth") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def documented(section: type = Config, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """``(dotted key, type, default, doc)`` of every field, in order; a section comes before its fields."""
    hints = get_type_hints(section)
    for entry in fields(section):
        key, hint = prefix + entry.name, hints[entry.name]
        nested = next((part for part in (hint, *get_args(hint)) if isinstance(part, type) and is_dataclass(part)), None)
        place = f"{key}.<name>" if get_origin(hint) is dict and nested else key
        yield key, _expected(hint), _default(entry), entry.metadata["doc"]
        if nested is not None:
            yield from documented(nested, place + ".")


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-6 as the number it is, and does not let a repeated key win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r}: expected a text", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a point and a signed exponent in a float, and reads 1e-6 as a text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read(recipe: str | Path) -> tuple[str, str]:
    """Text and name of a recipe: a file's, else that of the package."""
    path = Path(recipe)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), str(recipe)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{recipe}: can not be read: {_one_line(error)}") from error
    name = str(recipe).removesuffix(".yaml")
    if name in recipes():
        return (resources.files("acqsynth") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"), name
    raise ConfigError(f"{recipe}: no such file, and no recipe of that name; the package has {', '.join(recipes())}")


def _override(values: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{text!r}: expected dotted.key=value")
    try:
        parsed = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}: not YAML: {_one_line(error)}") from error
    *sections, last = key.split(".")
    place = values
    for depth, section in enumerate(sections):
        inner = place.get(section)
        if inner is None:
            inner = place[section] = {}
        if not isinstance(inner, dict):
            name = ".".join(sections[: depth + 1])
            raise ConfigError(f"{key}: {name} is {_described(inner)}, which has no keys")
        place = inner
    place[last] = parsed


def _build(section: type, values: Any, path: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: expected a section with keys {_names(section)}, got {_described(values)}")
    hints = get_type_hints(section)
    prefix = f"{path}." if path else ""
    for key in values:
        if key not in hints:
            raise ConfigError(f"{prefix}{key}: unknown key{_hint(key, section, prefix)}")
    made = {}
    for entry in fields(section):
        if entry.name in values:
            made[entry.name] = _convert(values[entry.name], hints[entry.name], prefix + entry.name)
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise ConfigError(f"{prefix}{entry.name}: missing; {entry.metadata['doc']}")
    return section(**made)


def _hint(key: str, section: type, prefix: str) -> str:
    """The close match of an unknown key: in its section, else anywhere in the recipe, else the section's keys."""
    names = [entry.name for entry in fields(section)]
    if near := difflib.get_close_matches(key, names, 1):
        return f", did you mean {prefix}{near[0]}?"
    everywhere = [dotted for dotted, *_ in documented() if dotted.rsplit(".", 1)[-1] == key]
    if everywhere:
        return f", did you mean {min(everywhere, key=len)}?"
    return f", expected one of {', '.join(names)}"


def _convert(value: Any, hint: Any, path: str) -> Any:
    """``value`` as ``hint`` says, or a ConfigError that names ``path``."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if isinstance(hint, type) and is_dataclass(hint):
        return _build(hint, value, path)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _convert(value, next(part for part in inner if part is not type(None)), path)
    wrong = ConfigError(f"{path}: expected {_expected(hint)}, got {_described(value)}")
    if origin is Literal:
        if value not in inner:
            near = difflib.get_close_matches(str(value), inner, 1)
            raise ConfigError(f"{wrong}{f', did you mean {near[0]}?' if near else ''}")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise wrong
        return [_convert(part, inner[0], f"{path}[{i}]") for i, part in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong
        # A name without options, 'entropy:' in YAML, reads as null.
        empty = inner[1] == dict[str, Any]
        return {k: _convert({} if v is None and empty else v, inner[1], f"{path}.{k}") for k, v in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise wrong
    return value


def _check(config: Config) -> None:
    """Ranges and what belongs together."""
    generator, student, evaluation = config.generator, config.student, config.evaluation
    optional = {
        "generator.questions": generator.questions,
        "evaluation.rows": evaluation.rows,
        "reward.reference": config.reward.reference,
    }
    positive = {
        "generator.prompts": generator.prompts,
        "generator.candidates": generator.candidates,
        "generator.sampling.max_tokens": generator.sampling.max_tokens,
        **{f"{key}.k": labelling.k for key, labelling in _labellings(config).items()},
        "evaluation.resamples": evaluation.resamples,
        "evaluation.validity.rows": evaluation.validity.rows,
        "rounds": config.rounds,
        **{f"student.rows[{i}]": rows for i, rows in enumerate(student.rows)},
        **{key: number for key, number in optional.items() if number is not None},
        **{f"{key}.limit": source.limit for key, source in sources(config).items() if source.limit is not None},
    }
    for key, number in positive.items():
        if number < 1:
            raise ConfigError(f"{key}: expected at least 1, got {number}")
    for key, number in (
        ("generator.shown", generator.shown),
        ("reward.refresh_steps", config.reward.refresh_steps),
        ("evaluation.validity.batches", evaluation.validity.batches),
        *((f"{key}.skip", source.skip) for key, source in sources(config).items()),
    ):
        if number < 0:
            raise ConfigError(f"{key}: expected 0 or more, got {number}")
    if not 0 <= student.replay < 1:
        raise ConfigError(f"student.replay: expected a share in [0, 1), got {student.replay}")
    for key, labelling in _labellings(config).items():
        if not 0 < labelling.threshold <= 1:
            raise ConfigError(f"{key}.threshold: expected a share in (0, 1], got {labelling.threshold}")
        if (labelling.method == "teacher") != (labelling.teacher is not None):
            raise ConfigError(f"{key}.teacher: expected a model with {key}.method teacher, and none without")
    if not 0 < evaluation.level < 1:
        raise ConfigError(f"evaluation.level: expected a share in (0, 1), got {evaluation.level}")
    for key, values in (("student.rows", student.rows), ("student.seeds", student.seeds)):
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{key}: expected one or more different integers, got {values}")
    if len(set(config.baselines)) < len(config.baselines):
        raise ConfigError(f"baselines: expected different names, got {', '.join(config.baselines)}")
    if config.rounds > 1 and generator.method in ("none", "best_of_n"):
        raise ConfigError(f"rounds: expected 1 with generator.method {generator.method}, which trains no generator")
    if config.rounds > min(student.rows):
        raise ConfigError(f"rounds: expected no more rounds than student.rows {min(student.rows)}, got {config.rounds}")
    signals = config.reward.signals
    if signals is not None and not signals:
        raise ConfigError("reward.signals: expected at least one signal, or null for the default reward")
    for name in config.reward.weights:
        if signals is not None and name not in signals:
            raise ConfigError(
                f"reward.weights.{name}: no such signal in reward.signals, which has {', '.join(signals)}"
            )
    if config.reward.paper_compat and (signals is None or len(signals) != 1):
        raise ConfigError("reward.signals: expected one signal with reward.paper_compat, as the released code has")
    for key, names in (("student.others", student.others), ("evaluation.others", evaluation.others)):
        for name in names:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
                raise ConfigError(f"{key}.{name}: expected a name of letters, digits, '_', '.' and '-'")
    if not config.output:
        raise ConfigError("output: expected a folder, got an empty text")


def _labellings(config: Config) -> dict[str, LabellingConfig]:
    """Dotted key -> section, of every labelling the recipe names."""
    found = {"labelling": config.labelling}
    return found | ({"reward.labelling": config.reward.labelling} if config.reward.labelling else {})


def sources(config: Config) -> dict[str, Source]:
    """Dotted key -> source, of every source the recipe names."""
    data = config.data
    named = {"data.seeds": data.seeds, "data.evaluation": data.evaluation}
    named |= {"data.held_out": data.held_out} if data.held_out else {}
    named |= {"data.real": data.real} if data.real else {}
    named |= {"data.replay": data.replay} if data.replay else {}
    return named | {f"evaluation.others.{name}": other for name, other in config.evaluation.others.items()}


def _expected(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return "a section"
    if origin in (Union, types.UnionType):
        return f"{_expected(next(part for part in inner if part is not type(None)))} or null"
    if origin is Literal:
        return f"one of {', '.join(inner)}"
    if origin is list:
        return f"a list, each {_expected(inner[0])}"
    if origin is dict:
        return f"names, each with {_expected(inner[1])}" if inner[1] is not Any else "options by name"
    return {str: "a text", int: "an integer", float: "a number", bool: "true or false"}[hint]


def _described(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return "a list"
    return f"{value!r}" if not isinstance(value, bool) else str(value).lower()


def _default(entry: Any) -> str:
    if entry.default is not MISSING:
        value = entry.default
    elif entry.default_factory is not MISSING:
        value = entry.default_factory()
    else:
        return "required"
    return "" if is_dataclass(value) else yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _names(section: type) -> str:
    return ", ".join(entry.name for entry in fields(section))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
