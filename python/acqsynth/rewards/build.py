"""Builds the reward that a recipe describes."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

import acqcore
from acqsynth import engines, models
from acqsynth.config import EngineConfig, RewardConfig
from acqsynth.domains import Domain, Sample
from acqsynth.engines import Engine
from acqsynth.engines.transformers import TransformersEngine
from acqsynth.label import Labeller
from acqsynth.rewards.answers import AnswerVariance, Confidence, Learnability, SampledAnswers, SemanticEntropy
from acqsynth.rewards.gates import Gate, default_gates
from acqsynth.rewards.paper import PaperReward
from acqsynth.rewards.reward import DEFAULT_WEIGHTS, INFORMATION, ComposedReward
from acqsynth.rewards.scoring import load_student
from acqsynth.rewards.signals import Diversity, Gradient, Proximity, Signal, acquisition_signals
from acqsynth.rewards.texts import NgramEmbedder, SentenceEmbedder

ANSWER_SIGNALS = ("confidence", "answer_variance", "semantic_entropy", "learnability")
SCORING = ("reduction", "backend", "batch_tokens", "max_length", "device")
DEFAULT_SIGNALS: dict[str, dict[str, Any]] = {
    "mutual_information": INFORMATION,
    "influence": {},
    "learnability": {"verified": True},
    "diversity": {},
}


def build(
    config: RewardConfig,
    domain: Domain,
    student: str,
    engine: EngineConfig | None,
    *,
    seeds: Sequence[Sample],
    evaluation: Sequence[Sample],
    reference: Sequence[Sample] | None = None,
    shown: Sequence[Sample] = (),
) -> ComposedReward:
    """Builds the composed reward of a recipe.

    Args:
        student: path or hub id of the scoring student.
        engine: samples the student's answers; None for a reward that is only checked, never called.
        seeds, evaluation, reference: as in :meth:`ComposedReward.default`; the reference defaults to the seeds.
        shown: rows besides the seeds that prompts show, for the gate ``new``.

    Raises:
        ValueError, TypeError: an unknown signal, gate or option, or a value out of range; the message names the key.
    """
    domain = domain.with_seeds(seeds)
    wanted = DEFAULT_SIGNALS if config.signals is None else config.signals
    weights = (DEFAULT_WEIGHTS if config.signals is None else {}) | config.weights
    scoring = dict(config.scoring)
    if unknown := [name for name in scoring if name not in SCORING]:
        raise ValueError(f"scoring: unknown {unknown[0]!r}, expected some of {', '.join(SCORING)}")
    majority = config.labelling is not None and config.labelling.method == "majority"
    sampled = [name for name in ANSWER_SIGNALS if name in wanted]
    answering: Engine | None = None
    if engine is not None and (sampled or majority):
        answering = student_engine(engine, student, scoring)
    options = {"top2": "confidence" in wanted, **config.answers}
    drawn = _named("answers", SampledAnswers, answering, domain, **options)
    if drawn.sampling.temperature == 0 and drawn.k > 1 and sampled not in ([], ["confidence"]):
        raise ValueError("answers: temperature: expected more than 0, as equal answers always agree, or k of 1")
    aim = seeds if reference is None else reference
    signals = _signals(config, wanted, domain, student, drawn, seeds, aim, scoring)
    if config.paper_compat:
        return PaperReward(domain, signals[0])
    gates = _named(
        "scoring",
        default_gates,
        domain,
        seeds=seeds,
        shown=shown,
        evaluation=evaluation,
        label=_label(config, domain, engine, student, answering),
        student=student,
        answers=drawn if sampled else None,
        **scoring,
    )
    return ComposedReward(domain, signals, gates=_picked(gates, config.gates), fusion=config.fusion, weights=weights)


def check(config: RewardConfig, domain: Domain) -> None:
    """Builds the reward without loading a model, to catch invalid keys before a run."""
    row = [Sample("question", "answer")]
    build(config, domain, "student", None, seeds=row, evaluation=row)


def embeds(config: RewardConfig) -> bool:
    """Whether a signal uses the embedder."""
    wanted = DEFAULT_SIGNALS if config.signals is None else config.signals
    return bool({"proximity", "diversity", *(["answer_variance"] if config.paper_compat else [])} & wanted.keys())


class StudentEngine(TransformersEngine):
    """Generates with the copy of the student that the reward uses for scoring."""

    def __init__(self, path: str, device: str | None, **options: Any) -> None:
        self._device = device
        self._shared = load_student(path, device)
        super().__init__(self._shared.model, self._shared.student.tokenizer, **options)

    def reload(self, weights: Any) -> None:
        """Switches to the student at another path, again shared with scoring."""
        self._shared = load_student(str(weights), self._device)
        self.model = self._shared.model


def student_engine(config: EngineConfig, student: str, scoring: dict[str, Any]) -> Engine:
    """An engine for the student. With transformers, scoring and answering share one copy of the weights, so
    ``scoring`` gets the engine's device."""
    if config.name != "transformers" or "dtype" in config.options:
        return engines.load(config.name, student, **config.options)
    options = dict(config.options)
    device = options.pop("device", None) or scoring.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if scoring.setdefault("device", device) != device:
        return engines.load(config.name, student, **config.options)
    return StudentEngine(student, device, **options)


class _Label:
    """Labels a reward's samples."""

    def __init__(self, labeller: Labeller) -> None:
        self.labeller = labeller
        self.refresh = labeller.refresh

    def __call__(self, samples: Sequence[Sample]) -> list[Sample | None]:
        return [label.sample for label in self.labeller(samples)]


def _label(
    config: RewardConfig, domain: Domain, engine: EngineConfig | None, student: str, answering: Engine | None
) -> _Label | None:
    labelling = config.labelling
    if labelling is None or labelling.method == "own":
        return None

    def load() -> Any:
        if engine is None or labelling.teacher is None:
            return answering
        return engines.load(engine.name, models.resolve(labelling.teacher), **engine.options)

    return _Label(_named("labelling", Labeller, labelling, domain, load))


def _signals(
    config: RewardConfig,
    wanted: Mapping[str, dict[str, Any]],
    domain: Domain,
    student: str,
    drawn: Any,
    seeds: Sequence[Sample],
    aim: Sequence[Sample],
    scoring: Mapping[str, Any],
) -> list[Signal]:
    """The signals in recipe order; acquisitions share one pass."""
    released: dict[str, Any] = {"paper_compat": True} if config.paper_compat else {}
    embed: Any = _embedder(config.embedder) if embeds(config) else None
    embedded = {**released, "embed": embed} if released else {}
    kinds: dict[str, Callable[..., Signal]] = {
        "confidence": partial(Confidence, drawn, **released),
        "answer_variance": partial(AnswerVariance, drawn, **embedded),
        "semantic_entropy": partial(SemanticEntropy, drawn),
        "learnability": partial(Learnability, drawn),
        "proximity": partial(Proximity, embed, seeds, **released),
        "diversity": partial(Diversity, embed, **released),
        "gradient": partial(Gradient, student, domain, seeds, **released, **scoring),
    }
    acquisitions: dict[str, dict[str, Any]] = {}
    made: dict[str, Signal] = {}
    for name, options in wanted.items():
        if name in kinds:
            made[name] = _named(f"signals.{name}", kinds[name], **options)
        elif name in acqcore.acquisitions():
            reference = {"reference": list(aim[: config.reference])} if name == "influence" else {}
            acquisitions[name] = reference | options
        else:
            known = ", ".join((*kinds, *acqcore.acquisitions()))
            raise ValueError(f"signals: unknown {name!r}, expected one of {known}")
    if acquisitions:
        for signal in _named("scoring", acquisition_signals, student, acquisitions, domain, **scoring):
            made[signal.name] = signal
    return [made[name] for name in wanted]


def _embedder(name: str) -> Any:
    if name == "ngram":
        return NgramEmbedder()
    path = os.path.expanduser(name)
    if name != "minilm" and "/" not in name and not os.path.exists(path):
        for known in difflib.get_close_matches(name.lower(), ("ngram", "minilm"), 1, cutoff=0.9):
            raise ValueError(f"embedder: unknown {name!r}, did you mean {known}?")
    try:
        return SentenceEmbedder(None if name == "minilm" else path)
    except FileNotFoundError as error:
        raise ValueError(f"embedder: {error}") from error


def _picked(gates: Sequence[Gate], names: Sequence[str] | None) -> list[Gate]:
    """The named gates in default order, cheap ones first."""
    known = [gate.name for gate in gates]
    for name in names or ():
        if name not in known:
            needs = "; answerable needs a signal of sampled answers, labelled needs reward.labelling"
            raise ValueError(f"gates: unknown {name!r}, expected one of {', '.join(known)}{needs}")
    return [gate for gate in gates if names is None or gate.name in names]


def _named(key: str, make: Callable[..., Any], /, *arguments: Any, **options: Any) -> Any:
    """Calls ``make``; prefixes its errors with the recipe key."""
    try:
        return make(*arguments, **options)
    except (TypeError, ValueError) as error:
        message = str(error).partition("__init__() ")[2] or str(error)
        raise type(error)(f"{key}: {message}") from error
