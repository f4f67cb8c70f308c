"""Finds mistakes before a run starts instead of hours later.

:func:`check` creates every object that a recipe configures, except models. :func:`on_this_machine` checks that this
machine has what the recipe needs: models, data, devices, packages and a writable folder.
"""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import acqcore
from acqsynth import engines, label, models
from acqsynth.config import Config, ConfigError, OtherSource, RewardConfig, Source, ValidityConfig
from acqsynth.domains import Domain, domain as find_domain
from acqsynth.domains.base import SUFFIXES, is_local
from acqsynth.report.metrics import IN_DISTRIBUTION, STUDENT
from acqsynth.seeds import BUNDLED, load_source


def check(config: Config) -> None:
    """Checks the options and values of a recipe. ConfigError names the key of an unknown option of a library, the
    domain or the reward, or of a value it rejects."""
    domain = _checked("domain", find_domain, config.domain)
    _checked("engine", engines.check, config.engine.name, config.engine.options)
    if config.evaluation.likelihood and config.engine.name != "transformers":
        raise ConfigError(f"evaluation.likelihood: expected engine.name transformers with it, got {config.engine.name}")
    for key, options in (("generator", config.generator.options), ("student", config.student.options)):
        if "seed" in options:
            raise ConfigError(f"{key}.options: seed is set by {key}.seeds")
    _check_generator(config)
    for key, labelling in (("labelling", config.labelling), ("reward.labelling", config.reward.labelling)):
        if labelling is not None and labelling.method != "own":
            _checked(key, label.Labeller, labelling, domain, lambda: None)
    _check_reward(config, domain)
    _check_sources(config, domain)


def _check_generator(config: Config) -> None:
    from acqsynth import train_options

    generator = config.generator
    if config.reward.refresh_steps and generator.method != "grpo":
        raise ConfigError(
            "reward.refresh_steps: expected 0, as only generator.method grpo scores while it trains, "
            f"got {config.reward.refresh_steps} with {generator.method}"
        )
    trainers = {key: trainer for key, (trainer, _) in _trainers(config).items()}
    learnt = round(min(config.student.rows) / (1 - config.student.replay))
    rows = {"student": learnt}
    if config.evaluation.validity.batches:
        rows["evaluation.validity"] = config.evaluation.validity.rows
    steps = {
        key: _checked(f"{key}.options", train_options.optimizer_steps, trainers[key], n) for key, n in rows.items()
    }
    if generator.method == "grpo":
        trainer = trainers["generator"]
        _checked("generator", train_options.check_prompts, trainer, generator.prompts)
        steps["generator"] = train_options.grpo_steps(trainer, generator.prompts)
        _check_refreshes(config.reward, trainer, steps["generator"])
    for key, n in steps.items():
        # Fits that test signals take fewer steps than those whose options they inherit; training then warns.
        inherited = key == "evaluation.validity" and "warmup_steps" not in config.evaluation.validity.options
        if (warmup := trainers[key].warmup_steps) >= n and not inherited:
            raise ConfigError(f"{key}.options: warmup_steps: expected fewer than all {n} steps, got {warmup}")
    weights = generator.options.get("reward_weights", [1])
    if weights is not None and not (isinstance(weights, list) and len(weights) == 1 and weights[0]):
        raise ConfigError(
            "generator.options: reward_weights: expected one weight other than 0, that of the composed reward"
        )
    if generator.method in ("best_of_n", "dpo") or "best_of_n" in config.baselines:
        if generator.candidates < 2:
            raise ConfigError(f"generator.candidates: expected at least 2 to choose from, got {generator.candidates}")
        if generator.sampling.temperature == 0:
            raise ConfigError(
                "generator.sampling.temperature: expected more than 0, as equal candidates leave no choice"
            )
    limit = config.data.seeds.limit
    if limit is not None and generator.shown > limit:
        raise ConfigError(f"generator.shown: expected at most data.seeds.limit = {limit}, got {generator.shown}")


def _check_refreshes(reward: RewardConfig, trainer: Any, steps: int) -> None:
    """Checks the refreshes of the reward's student against a trainer's configuration and number of steps."""
    if reward.refresh_steps >= steps:
        raise ConfigError(
            f"reward.refresh_steps: expected below the generator's {steps} steps, got {reward.refresh_steps}"
        )
    saved = {"no": False, "steps": 0 < trainer.save_steps < steps, "epoch": trainer.num_train_epochs > 1}
    if reward.refresh_steps and reward.refresh_from is None and not saved[trainer.save_strategy]:
        raise ConfigError(
            "reward.refresh_steps: expected 0 or generator.options that save a checkpoint before the last of "
            f"{steps} steps, as refreshes read the generator's checkpoints, got {reward.refresh_steps}"
        )


def _trainers(config: Config) -> dict[str, tuple[Any, Any]]:
    """The configurations of each trainer and of LoRA, by key."""
    from acqsynth.train_options import configuration

    generator, options = config.generator, config.student.options
    given = {
        "generator": (generator.method, generator.options),
        "student": ("sft", options),
        "evaluation.validity": ("sft", {"save_strategy": "no", **options, **config.evaluation.validity.options}),
    }
    if generator.method not in ("grpo", "dpo"):
        del given["generator"]
    return {key: _checked(key, configuration, *each, "unused") for key, each in given.items()}


def _check_reward(config: Config, domain: Domain) -> None:
    from acqsynth.rewards import build

    reward, validity = config.reward, config.evaluation.validity
    if reward.refresh_from and not reward.refresh_steps:
        raise ConfigError("reward.refresh_from: expected reward.refresh_steps of at least 1 with it, got 0")
    _checked("reward", build.check, reward, domain)
    if validity.batches:
        _checked("evaluation.validity", build.check, validity_reward(reward, validity), domain)


def _check_sources(config: Config, domain: Domain) -> None:
    for key, own, others in (
        ("student.others", STUDENT, config.student.others),
        ("student.others", "held-out", config.student.others),
        ("evaluation.others", IN_DISTRIBUTION, config.evaluation.others),
    ):
        if own in others:
            raise ConfigError(f"{key}.{own}: expected another name, as the recipe itself uses this one")
    for key, source in _sources(config):
        if isinstance(source, OtherSource):
            _checked(key, _domain_of, config, source)
        if source.source.startswith(BUNDLED):
            _checked(f"{key}.source", _bundled, _domain_of(config, source), source)
    validity, key = config.evaluation.validity, "data.real" if config.data.real else "data.seeds"
    real = config.data.real or config.data.seeds
    most = len(load_source(domain, real)) if real.source.startswith(BUNDLED) else real.limit
    if validity.batches and most is not None and validity.rows > most:
        raise ConfigError(f"evaluation.validity.rows: expected at most the {most} rows of {key}, got {validity.rows}")


def on_this_machine(config: Config) -> None:
    """Checks that this machine has what a recipe needs. ConfigError names the key of a device, package, model or file
    that is missing, or of an output that cannot be written."""
    from acqsynth.train_options import check_model, require

    engine = config.engine
    trains = config.generator.options.get("use_vllm")
    for key, uses in (("engine.name", engine.name == "vllm"), ("generator.options.use_vllm", trains)):
        if uses and importlib.util.find_spec("vllm") is None:
            raise ConfigError(f'{key}: vllm is not installed: run pip install "acqcore[vllm]"')
    trainers = _trainers(config)
    for key, (trainer, lora) in trainers.items():
        _checked(f"{key}.options", require, trainer, lora)
    device = engine.options.get("device")
    _checked("engine.options", acqcore.check_request, "entropy", device=None if device is None else str(device))
    for backend in acqcore.backends():
        if backend.name == config.reward.scoring.get("backend") and not backend.available:
            raise ConfigError(f"reward.scoring.backend: {backend.name} is not available: {backend.reason}")
    _checked("domain", find_domain(config.domain).require)
    for name, other in config.evaluation.others.items():
        _checked(f"evaluation.others.{name}.domain", _domain_of(config, other).require)
    for key, name in _models(config):
        _checked(key, models.find, name)
    student = config.student
    learners = {"generator": [config.generator.model], "student": [student.model, *student.others.values()]}
    for key, (trainer, lora) in trainers.items():
        read = [name for name in learners.get(key, [student.model]) if not name.startswith("world:")]  # made in the run
        lacking = [_checked(f"{key}.options", check_model, trainer, lora, name) for name in read]
        inherited = key == "evaluation.validity" and lora == trainers["student"][1]  # also for student.others
        for option, module in sorted(set.intersection(*lacking)) if lacking and not inherited else ():
            raise ConfigError(f"{key}.options.lora: {option}: {' and '.join(read)} has no {module!r}")
    for key, source in _sources(config):
        _checked(key, _first_row, _domain_of(config, source), source)
    folder = Path(config.output).absolute()
    # Unlike Path.exists, os.path.exists raises nothing for a name too long or a folder that may not be searched.
    existing = next(parent for parent in (folder, *folder.parents) if os.path.exists(parent))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"output: cannot write to {config.output}")


def validity_reward(reward: RewardConfig, validity: ValidityConfig) -> RewardConfig:
    """The reward whose signals are tested."""
    from acqsynth.rewards.build import DEFAULT_SIGNALS

    if not validity.signals:
        return reward
    signals = {name: (reward.signals or DEFAULT_SIGNALS).get(name, {}) for name in validity.signals}
    return reward.model_copy(update={"signals": signals, "weights": {}, "paper_compat": False})


def _domain_of(config: Config, source: Source) -> Domain:
    return find_domain((source.domain if isinstance(source, OtherSource) else None) or config.domain)


def _bundled(domain: Domain, source: Source) -> None:
    """Checks that the rows of a bundled source exist and are questions of the domain."""
    faults = [domain.fault(row) for row in load_source(domain, source)]
    if all(faults):
        raise ValueError(f"{source.source} has no rows of the domain {domain.name}: {faults[0]}")


def _first_row(domain: Domain, source: Source) -> None:
    """Reads one row if the source needs no network."""
    generated = domain.name.startswith("arithmetic") and source.source.partition(":")[0] == "world"
    if not source.source.startswith(BUNDLED) and (generated or is_local(source.source)):
        domain.load(source.source, source.split, source.columns, 1)


def _models(config: Config) -> Iterator[tuple[str, str]]:
    """Key and name of each model."""
    from acqsynth.rewards.build import embeds

    yield "student.model", config.student.model
    yield "generator.model", config.generator.model
    yield from ((f"student.others.{name}", model) for name, model in config.student.others.items())
    reward = config.reward
    validity = config.evaluation.validity
    embedded = embeds(reward) or (validity.batches and embeds(validity_reward(reward, validity)))
    given = {
        "reward.student": reward.student,
        "labelling.teacher": config.labelling.teacher,
        "reward.labelling.teacher": reward.labelling.teacher if reward.labelling else None,
        "reward.embedder": reward.embedder if embedded and reward.embedder not in ("ngram", "minilm") else None,
    }
    yield from ((key, name) for key, name in given.items() if name is not None)


def _sources(config: Config) -> Iterator[tuple[str, Source]]:
    yield from ((f"data.{name}", source) for name, source in config.data if source is not None)
    yield from ((f"evaluation.others.{name}", other) for name, other in config.evaluation.others.items())


def _checked(key: str, make: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Calls ``make(...)``; turns its errors into a ConfigError that names the key."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return make(*arguments, **options)
    except Exception as error:  # libraries raise arbitrary exceptions for invalid values
        message = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, (ValueError, TypeError, OSError, ImportError, RuntimeError)):
            message = f"{type(error).__name__}: {message}"
        # The message of a value's error may itself begin with a key.
        first = isinstance(error, (ValueError, TypeError)) and re.match(r"([a-z_]+(?:\.[a-z_]+)*): ", message)
        separator = "." if first and Path(first[1]).suffix not in SUFFIXES else ": "
        raise ConfigError(message if message.startswith(f"{key}:") else f"{key}{separator}{message}") from error
