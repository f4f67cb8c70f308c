"""Training with TRL: a student learns rows (``sft``), a generator learns from a reward (``grpo``, ``dpo``).

Each function leaves a folder that ``from_pretrained`` reads, with the tokenizer, ``trainer_state.json`` (what was
logged, step by step), TRL's model card and, with LoRA, ``adapter/``. While training the folder holds checkpoints, each
with the state of the reward; a killed run resumes from the last complete one when it is called again with the same
arguments.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import get_callable_name, is_async_callable

from acqsynth import engines
from acqsynth.domains import Domain, Messages, Sample
from acqsynth.engines import Engine, Sampling
from acqsynth.evaluate import rank_correlation
from acqsynth.write import Candidate, Scorer, candidates

logger = logging.getLogger(__name__)

T = TypeVar("T")
Row = dict[str, Messages]  #: ``{"prompt", "completion"}``
Reward = Callable[..., Any]  #: of TRL's contract

CHECKPOINT = "checkpoint-"
REWARD_STATE = "reward_state.pt"  #: the last file written to a checkpoint: with it the checkpoint is complete

_DEFAULTS: dict[type, dict[str, Any]] = {
    # The published recipe. Rows above max_length tokens are cut.
    SFTConfig: {
        "num_train_epochs": 5,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,  # below 1: a share of the steps
        "per_device_train_batch_size": 4,
        "max_length": 2048,
        "completion_only_loss": True,
        "save_strategy": "epoch",
    },
    # The published learning rate (1e-6), its group size (8) and no KL term are TRL's own defaults.
    GRPOConfig: {
        "num_train_epochs": 1,
        "max_completion_length": 1024,
        "save_steps": 10,
        "log_completions": True,
        "num_completions_to_print": 0,
    },
    DPOConfig: {"num_train_epochs": 1, "max_length": 2048, "save_steps": 10},
}
_SHARED = {
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_total_limit": 2,  # the older checkpoint is deleted before the newer one is complete
}
EFFECTIVE_BATCH = 16  #: rows of an optimiser step of ``sft``, whatever ``per_device_train_batch_size`` is
METHODS = {"sft": SFTConfig, "grpo": GRPOConfig, "dpo": DPOConfig}


def configuration(method: str, options: Mapping[str, Any], output: str | Path) -> tuple[Any, Any]:
    """The trainer's configuration and that of LoRA, which is None without the option ``lora``.

    Args:
        method: a key of ``METHODS``.
        options: fields of TRL's configuration; ``lora``: fields of ``peft.LoraConfig``.
        output: the trainer's folder.

    Raises:
        ValueError: an unknown option, a value that TRL refuses, or ``output_dir``.
    """
    kind = METHODS[method]
    if "output_dir" in options:
        raise ValueError("options: output_dir is set by the argument output")
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not options.get("fp16")
    fields = {**_SHARED, "bf16": bf16, **_DEFAULTS[kind], **options}
    lora = fields.pop("lora", None)
    if method == "sft" and "gradient_accumulation_steps" not in options:
        per_device = fields["per_device_train_batch_size"]
        _check_range("options: per_device_train_batch_size", per_device, *_RANGES["per_device_train_batch_size"])
        per_step = per_device * int(os.environ.get("WORLD_SIZE", "1"))
        fields["gradient_accumulation_steps"] = max(1, EFFECTIVE_BATCH // per_step)
    config = _build(kind, {**fields, "output_dir": str(output)}, "options")
    if lora is None:
        return config, None
    from peft import LoraConfig

    return config, _build(LoraConfig, {"task_type": "CAUSAL_LM", **lora}, "options.lora")


# --- the student ------------------------------------------------------------------------------------------------------


def training_rows(domain: Domain, samples: Sequence[Sample]) -> list[Row]:
    """What a student learns of each sample: the domain's prompt, and the solution as its completion."""
    return [
        {
            "prompt": domain.student_prompt(sample.question),
            "completion": [{"role": "assistant", "content": domain.solution(sample)}],
        }
        for sample in samples
    ]


def sft(
    student: str,
    domain: Domain,
    samples: Sequence[Sample],
    output: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    replay: Sequence[Row] = (),
    replay_share: float = 0.2,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Trains ``student`` on the samples. The loss is that of the completions alone.

    Args:
        student: path or hub id.
        domain: of the samples.
        samples: what it learns.
        output: folder of the model.
        options: of :func:`configuration`.
        replay: :func:`training_rows` of other domains or general data, against forgetting.
        replay_share: share of replay among all rows; the rows are drawn by the option ``seed``.
        callbacks: of the trainer.

    Raises:
        ValueError: no samples, a share outside [0, 1), fewer replay rows than the share needs, or as
            :func:`configuration`.
    """
    if not samples:
        raise ValueError("samples: expected at least one")
    output = Path(output)
    config, lora = configuration("sft", options or {}, output)
    rows = training_rows(domain, samples)
    if replay:
        rows += sample_replay(replay, replay_share, len(samples), config.seed)
    trainer = SFTTrainer(
        model=student,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=lora,
        callbacks=list(callbacks),
    )
    _run(trainer, output)
    return output


def sample_replay(replay: Sequence[Row], share: float, n: int, seed: int) -> list[Row]:
    """As many rows as make up ``share`` of all beside n others."""
    if not 0 <= share < 1:
        raise ValueError(f"replay_share: expected a share in [0, 1), got {share}")
    count = round(n * share / (1 - share))
    if count > len(replay):
        raise ValueError(f"replay: expected {count} rows for a share of {share} beside {n} samples, got {len(replay)}")
    return random.Random(seed).sample(list(replay), count)


# --- the generator ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refresh:
    """Moves the student behind the reward during training.

    Args:
        every: steps between two moves.
        student: step -> None; makes the reward score with a newer student.
        probe: scores of a fixed set of samples by the reward as it stands. Their rank correlation before and after a
            move is logged as ``staleness``, that with the first scores of the run as ``staleness_since_start``; 1 means
            that the order did not change.

    Raises:
        ValueError: every is below 1.
    """

    every: int
    student: Callable[[int], None]
    probe: Callable[[], Sequence[float | None]] | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every: expected at least 1 step, got {self.every}")


def grpo(
    generator: str,
    prompts: Sequence[Messages],
    reward: Reward | Sequence[Reward],
    output: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    refresh: Refresh | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Trains ``generator`` on the reward by GRPO.

    Each logged step has what TRL and the reward log, and ``seconds``, ``reward_seconds`` and ``reward_share``.
    ``completions/completions_<step>.parquet`` has prompts, completions, rewards, advantages, and the columns that the
    reward logs.

    Args:
        generator: path or hub id.
        prompts: of :func:`acqsynth.write.prompts`.
        reward: a reward function of TRL's contract, or several, which TRL weights (``reward_weights``).
        output: folder of the model.
        options: of :func:`configuration`; TRL's vLLM modes too.
        refresh: of the student behind the reward.
        callbacks: of the trainer.

    Raises:
        ValueError: no prompts, or as :func:`configuration`.
    """
    if not prompts:
        raise ValueError("prompts: expected at least one")
    output = Path(output)
    config, lora = configuration("grpo", options or {}, output)
    rewards = list(reward) if isinstance(reward, Sequence) else [reward]
    clock = StepClock()
    moving = [] if refresh is None else [_Refreshing(refresh)]
    trainer = GRPOTrainer(
        model=generator,
        reward_funcs=[clock.timed(function) for function in rewards],
        args=config,
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        peft_config=lora,
        callbacks=list(callbacks),
    )
    # First: trackers read the log after them, with what they add to it.
    trainer.callback_handler.callbacks[:0] = [clock, *moving]
    _run(trainer, output, rewards)
    return output


def dpo(
    generator: str,
    prompts: Sequence[Messages],
    reward: Scorer,
    output: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    sampling: Sampling,
    margin: float = 0.0,
    engine: Callable[[], Engine] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Trains ``generator`` by DPO on pairs of its own candidates. ``pairs.parquet`` has the pairs; a resumed run reads
    them instead of drawing again.

    Args:
        generator: path or hub id.
        prompts: of :func:`acqsynth.write.prompts`.
        reward: scores candidates.
        output: folder of the model.
        options: of :func:`configuration`.
        sampling: its ``n`` is the number of candidates of a prompt.
        margin: as in :func:`pairs`.
        engine: makes an engine of the generator; by default transformers.
        callbacks: of the trainer.

    Raises:
        ValueError: no pair with the margin, or as :func:`configuration`.
    """
    output = Path(output)
    config, lora = configuration("dpo", options or {}, output)
    table = output / "pairs.parquet"
    if not table.is_file():
        drawing = engine() if engine is not None else engines.load("transformers", generator)
        rows = pairs(candidates(drawing, prompts, reward, sampling), margin)
        del drawing
        if not rows:
            raise ValueError(
                f"prompts: expected a prompt whose best candidate passes the gates and leads by {margin}, "
                f"found none of {len(prompts)}"
            )
        logger.info("%d pairs of %d prompts", len(rows), len(prompts))
        output.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(table.with_suffix(".part"))
        table.with_suffix(".part").rename(table)
    data = datasets.Dataset.from_parquet(str(table), keep_in_memory=True)
    trainer = DPOTrainer(
        model=generator,
        args=config,
        train_dataset=data.select_columns(["prompt", "chosen", "rejected"]),
        peft_config=lora,
        callbacks=list(callbacks),
    )
    _run(trainer, output)
    return output


def pairs(groups: Sequence[Sequence[Candidate]], margin: float = 0.0) -> list[dict[str, Any]]:
    """The best candidate of each group that passes the gates, against the worst, which need not pass.

    Args:
        groups: candidates of each prompt.
        margin: least difference of the two totals; equal totals never make a pair.

    Returns:
        Rows ``{"prompt", "chosen", "rejected"}`` in messages, with ``chosen_total`` and ``rejected_total``.
    """
    rows = []
    for group in groups:
        totals = [(candidate.total, candidate) for candidate in group if candidate.total is not None]
        passing = [(total, candidate) for total, candidate in totals if candidate.rejected_by is None]
        if not passing:
            continue
        best, chosen = max(passing, key=lambda entry: entry[0])
        worst, rejected = min(totals, key=lambda entry: entry[0])
        if best > worst and best - worst >= margin:
            rows.append(
                {
                    "prompt": chosen.prompt,
                    "chosen": [{"role": "assistant", "content": chosen.text}],
                    "rejected": [{"role": "assistant", "content": rejected.text}],
                    "chosen_total": best,
                    "rejected_total": worst,
                }
            )
    return rows


# --- what is logged, saved and resumed --------------------------------------------------------------------------------


def read_log(output: Path) -> list[dict[str, Any]]:
    """The logged steps of a finished training; numbers that are not finite are None."""
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    return [{key: _finite(value) for key, value in entry.items()} for entry in state["log_history"]]


def last_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint."""
    complete = [folder for folder in output.glob(f"{CHECKPOINT}*") if (folder / REWARD_STATE).is_file()]
    return max(complete, key=_step, default=None)


def newest_checkpoint(folder: Path, step: int) -> Path | None:
    """The last checkpoint of a trainer from before ``step``, so that a resumed run finds the same one."""
    found = [
        path
        for path in folder.glob(f"{CHECKPOINT}*")
        if path.name.removeprefix(CHECKPOINT).isdigit() and (path / "config.json").is_file() and _step(path) < step
    ]
    return max(found, key=_step, default=None)


class Progress(TrainerCallback):
    """Tells of each logged step.

    Args:
        say: prints a line; gets one for each tenth of the steps.
        status: shows a line until the next one; gets one for each step.
    """

    def __init__(self, say: Callable[[str], None], status: Callable[[str], None] = lambda line: None) -> None:
        self.say = say
        self.status = status
        self._said = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **rest: Any) -> None:
        shown = [f"{key} {logs[key]:.4g}" for key in ("reward", "loss") if isinstance(logs.get(key), float)]
        if not shown:
            return
        if isinstance(share := state.log_history[-1].get("reward_share"), float):
            shown.append(f"{share:.1%} of the time in the reward")
        line = f"step {state.global_step} of {state.max_steps}: {', '.join(shown)}"
        self.status(line)
        tenth = 10 * state.global_step // max(state.max_steps, 1)
        if tenth > self._said:
            self._said = tenth
            self.say(line)


class StepClock(TrainerCallback):
    """Adds the seconds of each step, and of the rewards within it, to what is logged."""

    def __init__(self) -> None:
        self.reward_seconds = 0.0
        self._begin = 0.0
        self._measured: dict[str, float] = {}

    def timed(self, reward: Reward) -> Reward:
        """The same reward under its own name, its seconds counted."""

        def function(*args: Any, **columns: Any) -> Any:
            begin = time.perf_counter()
            try:
                return reward(*args, **columns)
            finally:
                self.reward_seconds += time.perf_counter() - begin

        async def coroutine(*args: Any, **columns: Any) -> Any:
            begin = time.perf_counter()
            try:
                return await reward(*args, **columns)
            finally:
                self.reward_seconds += time.perf_counter() - begin

        timed: Any = coroutine if is_async_callable(reward) else function
        timed.__name__ = get_callable_name(reward)
        return timed

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._begin, self.reward_seconds = time.perf_counter(), 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        seconds = time.perf_counter() - self._begin
        self._measured = {
            "seconds": seconds,
            "reward_seconds": self.reward_seconds,
            "reward_share": self.reward_seconds / seconds,
        }

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **rest: Any) -> None:
        if "reward" in logs:  # not the summary at the end
            state.log_history[-1].update(self._measured)
            logs.update(self._measured)


class _Refreshing(TrainerCallback):
    """Carries out a :class:`Refresh`."""

    def __init__(self, refresh: Refresh) -> None:
        self.refresh = refresh
        self._first: Sequence[float | None] | None = None
        self._moved: dict[str, float] = {}  # for the next log

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if self.refresh.probe is not None:
            self._first = self.refresh.probe()
        # A resumed run begins with the student that it had.
        last = state.global_step - state.global_step % self.refresh.every
        if last:
            self.refresh.student(last)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        step = state.global_step
        if step % self.refresh.every or step >= state.max_steps:
            return
        probe = self.refresh.probe
        before = probe() if probe else None
        self.refresh.student(step)
        entry: dict[str, Any] = {"step": step, "student_refreshed": True}
        if probe and before is not None and self._first is not None:
            after = probe()
            entry["staleness"] = rank_correlation(before, after)
            entry["staleness_since_start"] = rank_correlation(self._first, after)
            self._moved = {key: entry[key] for key in ("staleness", "staleness_since_start")}
        state.log_history.append(entry)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **rest: Any) -> None:
        logs.update(self._moved)
        self._moved = {}


class RewardStates(TrainerCallback):
    """Saves the state of the rewards in each checkpoint."""

    def __init__(self, rewards: Sequence[Any]) -> None:
        self.rewards = [reward for reward in rewards if hasattr(reward, "state_dict")]

    def restore(self, checkpoint: Path) -> None:
        """Rewards continue from where they stood at the checkpoint."""
        states = torch.load(checkpoint / REWARD_STATE, weights_only=True)
        for reward, state in zip(self.rewards, states, strict=True):
            reward.load_state_dict(state)

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{CHECKPOINT}{state.global_step}"
            unfinished = folder / f"{REWARD_STATE}.part"
            torch.save([reward.state_dict() for reward in self.rewards], unfinished)
            unfinished.rename(folder / REWARD_STATE)


def _run(trainer: Any, output: Path, rewards: Sequence[Any] = ()) -> None:
    """Trains from the last complete checkpoint, if there is one, and leaves the model in ``output``."""
    states = RewardStates(rewards)
    trainer.add_callback(states)
    trainer.remove_callback(PrinterCallback)  # with disable_tqdm it prints every step
    checkpoint = last_checkpoint(output)
    if trainer.is_world_process_zero():
        for folder in output.glob(f"{CHECKPOINT}*"):
            if not (folder / REWARD_STATE).is_file():
                shutil.rmtree(folder)
    if checkpoint is not None:
        states.restore(checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    # Activation checkpointing turned the cache off, and whoever loads the model would generate without it.
    trainer.model.config.use_cache = True
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "merge_and_unload"):
        trainer.save_model(str(output))
    elif trainer.is_world_process_zero():
        model.save_pretrained(output / "adapter")
        model.merge_and_unload().save_pretrained(output)
        trainer.processing_class.save_pretrained(output)
    trainer.save_state()
    if trainer.is_world_process_zero():
        trainer.create_model_card()
        for folder in output.glob(f"{CHECKPOINT}*"):
            shutil.rmtree(folder)


def _build(kind: type[T], options: Mapping[str, Any], table: str) -> T:
    """``kind(**options)``, a dataclass; errors name ``table``, and the nearest field to an unknown one.

    Not HfArgumentParser.parse_dict: it fails on the annotations of LoraConfig and suggests no name.
    """
    names = [entry.name for entry in dataclasses.fields(kind) if entry.init]  # type: ignore[arg-type]
    for name, value in options.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{table}: {kind.__name__} has no field {name!r}{hint}")
        if name in _RANGES and value is not None:
            _check_range(f"{table}: {name}", value, *_RANGES[name])
    try:
        return kind(**options)
    except ValueError as error:
        raise ValueError(f"{table}: {error}") from error


#: Fields that no library checks before it uses them: type, least, most, whether the least itself is allowed.
_RANGES: dict[str, tuple[type, float, float, bool]] = {
    **dict.fromkeys(
        (
            *("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations", "num_iterations"),
            *("max_length", "max_completion_length", "max_prompt_length", "r", "lora_alpha", "steps_per_generation"),
        ),
        (int, 1, math.inf, True),
    ),
    **dict.fromkeys(("top_k", "seed", "data_seed", "dataloader_num_workers"), (int, 0, math.inf, True)),
    **dict.fromkeys(("num_train_epochs", "temperature", "repetition_penalty"), (float, 0, math.inf, False)),
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "beta", "epsilon"), (float, 0, math.inf, True)),
    "warmup_steps": (float, 0, math.inf, True),
    "warmup_ratio": (float, 0, 1, True),
    "top_p": (float, 0, 1, False),
    "min_p": (float, 0, 1, True),
    "lora_dropout": (float, 0, 1, True),
}


def _check_range(name: str, value: Any, kind: type, least: float, most: float, closed: bool) -> None:
    word = "an integer" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise ValueError(f"{name}: expected {word}, got {value!r}")
    if not (least <= value if closed else least < value) or value > most:
        low = f"{'at least' if closed else 'above'} {least:g}"
        high = "" if most == math.inf else f" and at most {most:g}"
        raise ValueError(f"{name}: expected {word} {low}{high}, got {value}")


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(CHECKPOINT))


def _finite(value: Any) -> Any:
    """JSON has no infinities and no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
