"""What a recipe names, made: the one place where stages reach the domains, engines, rewards and trainers.

All of it is imported here, inside the functions, so that reading a recipe and a dry run need no model library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from acqsynth.config import EngineConfig, LabellingConfig, RewardConfig
from acqsynth.domains.base import Domain, Messages, Sample
from acqsynth.engines.base import Engine, Sampling
from acqsynth.stages.unit import StageError

Labeller = Callable[[Sequence[Sample], int], Sequence[Any]]

_ANSWER_SIGNALS = ("confidence", "answer_variance", "semantic_entropy", "learnability")


def domain(name: str) -> Domain:
    """The domain of that name.

    Raises:
        ValueError: an unknown name.
    """
    import acqsynth.domains

    return acqsynth.domains.domain(name)


def model(name: str) -> str:
    """What ``from_pretrained`` takes for a model of a recipe.

    Raises:
        StageError: a path that is no model, or a packaged model that is not installed.
    """
    from acqsynth import models

    try:
        return str(models.resolve(name))
    except FileNotFoundError as error:
        raise StageError(f"model: {error}") from error


def engine(config: EngineConfig, path: str) -> Engine:
    """An engine over a model."""
    from acqsynth import engines

    return engines.load(config.name, path, **config.options)


def reward(
    config: RewardConfig,
    domain: Domain,
    student: str,
    engine_config: EngineConfig,
    *,
    seeds: Sequence[Sample],
    evaluation: Sequence[Sample],
) -> Any:
    """The composed reward of a recipe.

    Args:
        config: its signals, gates and fusion.
        domain: of the samples.
        student: path or hub id of the student that scores.
        engine_config: what samples the student's answers.
        seeds: rows that the generator is shown, and the reference of influence.
        evaluation: rows that no sample may repeat.

    Raises:
        ValueError: an unknown signal or gate, or options that do not fit.
    """
    from acqsynth import rewards

    reference = list(seeds[: config.reference])
    options: dict[str, Any] = {"fusion": config.fusion} | ({"weights": config.weights} if config.weights else {})
    signals = config.signals
    relabels = config.labelling is not None and config.labelling.method == "majority"
    asked = signals is None or relabels or any(name in _ANSWER_SIGNALS for name in signals)
    answering = engine(engine_config, student) if asked else None
    label = _label(config, domain, engine_config, student, answering)
    if signals is None:
        composed = rewards.ComposedReward.default(
            domain,
            student,
            seeds=seeds,
            reference=reference,
            engine=answering,
            evaluation=evaluation,
            embed=_embedder(config.embedder),
            answers=config.answers,
            label=label,
            scoring=config.scoring,
            **options,
        )
        composed.gates = _picked(composed.gates, config.gates)
        return composed
    drawn = None
    if any(name in _ANSWER_SIGNALS for name in signals):
        answers = {"top2": "confidence" in signals} | config.answers
        assert answering is not None
        drawn = rewards.SampledAnswers(answering, domain, **answers)
    made = _signals(config, domain, student, drawn, seeds, reference)
    if config.paper_compat:
        return rewards.PaperReward(domain, made[0])
    gates = rewards.default_gates(
        domain,
        seeds=seeds,
        evaluation=evaluation,
        label=label,
        student=student,
        answers=drawn,
        **config.scoring,
    )
    return rewards.ComposedReward(domain, made, gates=_picked(gates, config.gates), **options)


def fuse(columns: Mapping[str, Sequence[float | None]], reward: Any) -> list[float | None]:
    """The signals' values of n samples, as one group, fused as the reward does."""
    from acqsynth.rewards.fusion import fuse

    n = len(next(iter(columns.values())))
    return fuse(columns, [0] * n, reward.fusion, reward.weights)


def train(
    method: str,
    generator: str,
    prompts: list[Messages],
    reward: Any,
    output: Path,
    options: Mapping[str, Any],
    *,
    sampling: Sampling,
    engine: EngineConfig,
    refresh: tuple[int, Path] | None,
    probe: Sequence[Sample],
    say: Callable[[str], None],
) -> None:
    """Leaves in ``output`` the generator that ``method`` taught; goes on from what a killed call left there.

    Args:
        method: grpo or dpo.
        generator, prompts, reward, output, options: as the trainers of ``acqsynth.generators``.
        sampling: of the candidates that dpo makes pairs of.
        engine: what draws them.
        refresh: every so many steps of grpo, and the folder with the checkpoints of the student.
        probe: samples whose order by the reward before and after a refresh is compared.
        say: takes a line for the user.
    """
    if method == "dpo":
        from acqsynth.generators import dpo

        drawing = None if (output / "pairs.parquet").is_file() else _engine(engine, generator)
        dpo.train(
            generator,
            prompts,
            reward,
            output,
            {"disable_tqdm": True, **options},
            sampling=sampling,
            engine=drawing,
            callbacks=[_narrator(say)],
        )
        return
    from acqsynth.generators import grpo

    moving = None
    if refresh is not None:
        every, folder = refresh

        def newer(step: int) -> None:
            if (path := newest_checkpoint(folder, step)) is not None:
                say(f"step {step}: the reward scores with {path}")
                _refresh(reward, path)

        moving = grpo.Refresh(every, newer, lambda: fuse({s.name: s(probe) for s in reward.signals}, reward))
    grpo.train(
        generator,
        prompts,
        reward,
        output,
        {"disable_tqdm": True, **options},
        refresh=moving,
        callbacks=[_narrator(say)],
    )


def newest_checkpoint(folder: Path, step: int) -> Path | None:
    """The last ``checkpoint-<number>`` of a trainer before ``step``, so that a run that goes on finds the same one."""
    found = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit() and (path / "config.json").is_file()
    ]
    return max(((number, path) for number, path in found if number < step), default=(0, None))[1]


def prompts(domain: Domain, seeds: Sequence[Sample], n: int, *, shown: int, turns: bool, seed: int) -> list[Messages]:
    """Prompts that ask a generator for a new sample, each with its own draw of seeds.

    Args:
        domain: asks.
        seeds: the pool.
        n: prompts.
        shown: seeds of a prompt.
        turns: they are shown as earlier answers to the same request, not within it.
        seed: of the draws.
    """
    from acqsynth import generate

    asking: Any = _Turns(domain) if turns else domain
    return generate.prompts(asking, seeds, n, shown=shown, seed=seed)


def write(
    engine: Engine, domain: Domain, prompts: Sequence[Messages], sampling: Sampling, *, rows: int, gates: Sequence[Any]
) -> Any:
    """Samples that parse and pass the gates, as ``acqsynth.generate.Collected``."""
    from acqsynth import generate

    return generate.generate(engine, domain, prompts, sampling, rows=rows, gates=gates)


def select(engine: Engine, prompts: Sequence[Messages], reward: Any, *, rows: int, sampling: Sampling) -> Any:
    """The best of ``sampling.n`` candidates of each prompt, ``Collected`` of ``Scored``."""
    from acqsynth.generators import best_of_n

    return best_of_n.select(engine, prompts, reward, rows=rows, sampling=sampling)


def labeller(
    config: LabellingConfig, domain: Domain, engine: EngineConfig, student: str, answering: Engine | None = None
) -> Labeller:
    """What labels samples by a method of the recipe: ``samples, seed`` -> a ``Label`` of each.

    Args:
        config: of any method but ``own``.
        domain: of the samples.
        engine: what samples the answers.
        student: path or hub id of the model that answers, where there is no teacher.
        answering: an engine of the student that is there already.
    """
    from acqsynth import labelling

    if config.method == "computed":
        return lambda samples, seed: labelling.computed(domain, samples, seed=seed)
    if config.teacher is not None:
        answering = _engine(engine, model(config.teacher))
    elif answering is None:
        answering = _engine(engine, student)
    options = {"k": config.k, "temperature": config.temperature, "threshold": config.threshold, **config.options}
    return lambda samples, seed: labelling.label(answering, domain, samples, seed=seed, **options)


def fit(
    student: str,
    domain: Domain,
    samples: Sequence[Sample],
    output: Path,
    options: Mapping[str, Any],
    *,
    replay: tuple[Domain, Sequence[Sample]] | None,
    replay_share: float,
    say: Callable[[str], None],
) -> None:
    """Leaves in ``output`` the student that learnt the samples; goes on from what a killed call left there.

    Args:
        student, domain, samples, output, options: as ``acqsynth.fit.fit``.
        replay: a domain and rows of it, of which so many are mixed in that they are ``replay_share`` of all.
        say: takes a line for the user.
    """
    from acqsynth import fit as fitting

    fitting.fit(
        student,
        domain,
        samples,
        output,
        replay=[] if replay is None else fitting.rows(*replay),
        replay_share=replay_share,
        options={"disable_tqdm": True, **options},
        callbacks=[_narrator(say)],
    )


class _Turns:
    """A domain's request, each sample shown as an answer to it."""

    def __init__(self, domain: Domain) -> None:
        self.request = domain.generator_prompt([])

    def generator_prompt(self, shown: Sequence[Sample]) -> Messages:
        from acqsynth.domains.prompts import written

        earlier = [[*self.request, {"role": "assistant", "content": written(sample)}] for sample in shown]
        return [message for turn in [*earlier, self.request] for message in turn]


def _narrator(say: Callable[[str], None]) -> Any:
    """A callback of transformers' trainers that tells of each logged step in a line."""
    from transformers import TrainerCallback

    class Narrator(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **rest: Any) -> None:
            shown = [f"{key} {logs[key]:.4g}" for key in ("reward", "loss") if isinstance(logs.get(key), float)]
            if isinstance(share := state.log_history[-1].get("reward_share"), float):
                shown.append(f"reward's share of the time {share:.1%}")
            if shown:
                say(f"step {state.global_step} of {state.max_steps}: {', '.join(shown)}")

    return Narrator()


_engine = engine  #: under a name that no argument hides


def _refresh(reward: Any, path: Path) -> None:
    """Every part of the reward moves to another student: those that score, and the engine that samples answers."""
    reward.refresh(str(path))
    parts = (*reward.signals, *reward.gates)
    found = [part.answers.engine for part in parts if hasattr(part, "answers")]
    found += [part.label.engine for part in parts if isinstance(getattr(part, "label", None), _Labels)]
    for each in {id(engine): engine for engine in found if engine is not None}.values():
        each.reload(str(path))


def _signals(
    config: RewardConfig,
    domain: Domain,
    student: str,
    drawn: Any,
    seeds: Sequence[Sample],
    reference: Sequence[Sample],
) -> list[Any]:
    """The signals in the order of the recipe; acquisitions share one forward pass."""
    import acqcore
    from acqsynth import rewards

    wanted = config.signals or {}
    compat: dict[str, Any] = {"paper_compat": True} if config.paper_compat else {}
    embedded = {"embed": _embedder(config.embedder)} if config.paper_compat and "answer_variance" in wanted else {}
    answering = {
        "confidence": lambda **options: rewards.Confidence(drawn, **compat, **options),
        "answer_variance": lambda **options: rewards.AnswerVariance(drawn, **compat, **embedded, **options),
        "semantic_entropy": lambda **options: rewards.SemanticEntropy(drawn, **options),
        "learnability": lambda **options: rewards.Learnability(drawn, **options),
    }
    acquisitions: dict[str, dict[str, Any]] = {}
    made: dict[str, Any] = {}
    for name, options in wanted.items():
        if name in answering:
            made[name] = answering[name](**options)
        elif name == "proximity":
            made[name] = rewards.Proximity(_embedder(config.embedder), seeds, **compat, **options)
        elif name == "diversity":
            made[name] = rewards.Diversity(_embedder(config.embedder), **compat, **options)
        elif name == "gradient":
            made[name] = rewards.Gradient(student, domain, seeds, **compat, **config.scoring, **options)
        elif name in acqcore.acquisitions():
            acquisitions[name] = {"reference": reference, **options} if name == "influence" else options
        else:
            known = (*answering, "proximity", "diversity", "gradient", *acqcore.acquisitions())
            raise ValueError(f"reward.signals: unknown {name!r}, expected of {', '.join(known)}")
    if acquisitions:
        for signal in rewards.acquisition_signals(student, acquisitions, domain, **config.scoring):
            made[signal.name] = signal
    return [made[name] for name in wanted]


def _label(
    config: RewardConfig, domain: Domain, engine_config: EngineConfig, student: str, answering: Engine | None
) -> Any:
    """Samples -> what they are with their labels, None where there is none; None without a labelling of the reward."""
    if config.labelling is None or config.labelling.method == "own":
        return None
    return _Labels(
        labeller(config.labelling, domain, engine_config, student, answering),
        answering if config.labelling.method == "majority" else None,
    )


class _Labels:
    """Labels of a reward, and the engine of the student that gives them, which a refresh has to reach."""

    def __init__(self, label: Labeller, engine: Engine | None) -> None:
        self.label = label
        self.engine = engine

    def __call__(self, samples: Sequence[Sample]) -> list[Sample | None]:
        return [found.sample for found in self.label(samples, 0)]


def _embedder(name: str) -> Any:
    from acqsynth import rewards

    if name == "ngram":
        return rewards.NgramEmbedder()
    return rewards.SentenceEmbedder(None if name == "minilm" else name)


def _picked(gates: Sequence[Any], names: Sequence[str] | None) -> list[Any]:
    """The gates named, in their own order, which has the cheap ones first."""
    if names is None:
        return list(gates)
    known = [gate.name for gate in gates]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"reward.gates: unknown {', '.join(unknown)}, expected of {', '.join(known)}")
    return [gate for gate in gates if gate.name in names]
