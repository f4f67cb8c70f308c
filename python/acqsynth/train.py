"""Training with TRL: a student learns rows (``sft``), a generator learns from a reward (``grpo``, ``dpo``).

Each function writes a folder for ``from_pretrained``, with the tokenizer, ``trainer_state.json`` (the log of all
steps), TRL's model card and, with LoRA, ``adapter/``. During training the folder holds checkpoints, each with the state
of the reward. A killed run resumes from the last complete checkpoint when called again with the same arguments.
"""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback, TrainerCallback
from trl import DPOTrainer, GRPOTrainer, SFTTrainer
from trl.trainer.utils import get_callable_name, is_async_callable

from acqsynth.domains import Domain, Messages, Sample
from acqsynth.engines import Engine, Sampling
from acqsynth.evaluate import rank_correlation
from acqsynth.steps import load_state, save_state, write_json
from acqsynth.train_options import check_prompts, configuration as configuration
from acqsynth.write import Candidate, Scorer, candidates

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint-"
ROWS = "rows.json"  #: of a student: the numbers of samples learnt, dropped as too long, and cut
PAIRS = "pairs.json"  #: of a generator trained by DPO: the numbers of pairs and of candidates without a score
REWARD_STATE = "reward_state.pt"  #: written last to a checkpoint, so its presence means the checkpoint is complete

Row = dict[str, Messages]  #: ``{"prompt", "completion"}``
Reward = Callable[..., Any]  #: a TRL reward function

# --- the student ------------------------------------------------------------------------------------------------------


def training_rows(domain: Domain, samples: Sequence[Sample]) -> list[Row]:
    """Training rows for the student: the domain's prompt, with the solution as its completion."""
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
    """Trains ``student`` on the samples. Only completions count towards the loss.

    Args:
        student: path or hub id.
        output: folder of the model.
        options: as in :func:`configuration`.
        replay: :func:`training_rows` of other domains or general data, to prevent forgetting.
        replay_share: share of replay among all rows; the option ``seed`` determines which rows are drawn.

    Raises:
        ValueError: no samples, a share outside [0, 1), too few replay rows for the share, or as
            :func:`configuration`; every prompt fills ``max_length``, which is at most the student's positions.
    """
    if not samples:
        raise ValueError("samples: expected at least one")
    output = Path(output)
    config, lora = configuration("sft", options or {}, output)
    positions = getattr(AutoConfig.from_pretrained(student).get_text_config(), "max_position_embeddings", None)
    if positions and (config.max_length is None or config.max_length > positions):
        logger.warning("max_length is %d instead of %s, the student's positions", positions, config.max_length)
        config.max_length = positions
    rows = training_rows(domain, samples)
    if replay:
        rows += sample_replay(replay, replay_share, rows, config.seed)
    own = [i < len(samples) for i in range(len(rows))]
    trainer = SFTTrainer(
        model=student,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows).add_column("own", own),
        peft_config=lora,
        callbacks=list(callbacks),
    )
    learnt = _learnt(trainer.train_dataset, rows[: len(samples)], trainer.processing_class, config)
    _run(trainer, output)
    if trainer.is_world_process_zero():
        write_json(output / ROWS, learnt)
    return output


def _learnt(prepared: Any, rows: Sequence[Row], tokenizer: Any, config: Any) -> dict[str, int | None]:
    """The numbers of the samples' rows that TRL kept, dropped or may have cut."""
    most = config.max_length
    if "own" in prepared.column_names:
        lengths = [len(ids) for ids, own in zip(prepared["input_ids"], prepared["own"], strict=True) if own]
    elif config.packing_strategy == "bfd":  # packs do not tell rows apart; a completion past max_length is not learnt
        lengths = [
            min(most, len(_tokens(tokenizer, [*row["prompt"], *row["completion"]])))
            for row in rows
            if len(_tokens(tokenizer, row["prompt"], add_generation_prompt=True)) < most
        ]
    else:  # other packs continue a row in the next
        return {"learnt": len(rows), "dropped": 0, "cut": 0, "max_length": most}
    if not lengths:
        raise ValueError(f"samples: expected a prompt that leaves room in max_length = {most} tokens")
    cut = sum(length == most for length in lengths)
    return {"learnt": len(lengths), "dropped": len(rows) - len(lengths), "cut": cut, "max_length": most}


def _tokens(tokenizer: Any, messages: Messages, **options: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])


def sample_replay(replay: Sequence[Row], share: float, rows: Sequence[Row], seed: int) -> list[Row]:
    """Draws rows to make up ``share`` of the total beside ``rows``, which are repeated only if others run out."""
    count = replay_count(len(replay), share, len(rows))
    learnt = {json.dumps(row) for row in rows}
    drawn = random.Random(seed).sample(list(replay), len(replay))
    return sorted(drawn, key=lambda row: json.dumps(row) in learnt)[:count]


def replay_count(available: int, share: float, n: int) -> int:
    """The number of rows that make up ``share`` of the total beside n other rows; ValueError if too few are there."""
    if not 0 <= share < 1:
        raise ValueError(f"replay_share: expected a share in [0, 1), got {share}")
    count = round(n * share / (1 - share))
    if count > available:
        raise ValueError(f"replay: expected {count} rows for a share of {share} beside {n} samples, got {available}")
    return count


# --- the generator ----------------------------------------------------------------------------------------------------


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

    Each logged step has the entries of TRL and the reward, ``seconds``, ``reward_seconds`` and ``reward_share``.
    ``completions/completions_<step>.parquet`` has prompts, completions, rewards, advantages and the reward's logged
    columns.

    Args:
        generator: path or hub id.
        prompts: from :func:`acqsynth.write.prompts`.
        reward: one TRL reward function, or several, which TRL weights (``reward_weights``).
        output: folder of the model.
        options: as in :func:`configuration`, including TRL's vLLM modes.
        refresh: refreshes the student behind the reward.

    Raises:
        ValueError: fewer prompts than a generation takes, or as :func:`configuration`.
    """
    output = Path(output)
    config, lora = configuration("grpo", options or {}, output)
    check_prompts(config, len(prompts))
    rewards = list(reward) if isinstance(reward, Sequence) else [reward]
    clock = StepClock()
    trainer = GRPOTrainer(
        model=generator,
        reward_funcs=[clock.timed(function) for function in rewards],
        args=config,
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        peft_config=lora,
        callbacks=list(callbacks),
    )
    trainer.add_callback(WholeGenerations(trainer))
    # These run first, so that trackers see the entries they add to the log.
    trainer.callback_handler.callbacks[:0] = [clock, *([refresh] if refresh is not None else [])]
    # Refreshed first, as a new student may reset the state of a reward.
    _run(trainer, output, [refresh, *rewards])
    return output


def dpo(
    generator: str,
    prompts: Sequence[Messages],
    reward: Scorer,
    output: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    sampling: Sampling,
    engine: Callable[[], Engine],
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Trains ``generator`` by DPO on pairs of its own candidates. ``pairs.parquet`` stores the pairs, ``PAIRS`` their
    number; a resumed run reads them instead of drawing again.

    Args:
        generator: path or hub id.
        prompts: from :func:`acqsynth.write.prompts`.
        reward: scores candidates.
        output: folder of the model.
        options: as in :func:`configuration`.
        sampling: its ``n`` is the number of candidates per prompt.
        engine: creates an engine for the generator.

    Raises:
        ValueError: no pair was found, or as :func:`configuration`.
    """
    output = Path(output)
    config, lora = configuration("dpo", options or {}, output)
    table = output / "pairs.parquet"
    if not (output / PAIRS).is_file():
        groups = candidates(engine(), prompts, reward, sampling)
        rows = pairs(groups)
        if not rows:
            raise ValueError(
                "prompts: expected a prompt whose best candidate passes the gates and beats the worst, "
                f"found none among {len(prompts)}"
            )
        logger.info("%d pairs from %d prompts", len(rows), len(prompts))
        output.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(table)
        masked = sum(candidate.total is None for group in groups for candidate in group)
        write_json(output / PAIRS, {"pairs": len(rows), "masked": masked})  # last: the table is complete
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


def pairs(groups: Sequence[Sequence[Candidate]]) -> list[dict[str, Any]]:
    """Pairs the best candidate of each group that passes the gates with the worst, which need not pass. Equal totals
    give no pair.

    Returns:
        Rows ``{"prompt", "chosen", "rejected"}`` as messages, with ``chosen_total`` and ``rejected_total``.
    """
    rows = []
    for group in groups:
        totals = [(candidate.total, candidate) for candidate in group if candidate.total is not None]
        passing = [(total, candidate) for total, candidate in totals if candidate.rejected_by is None]
        if not passing:
            continue
        best, chosen = max(passing, key=lambda entry: entry[0])
        worst, rejected = min(totals, key=lambda entry: entry[0])
        if best > worst:
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


# --- callbacks --------------------------------------------------------------------------------------------------------


class Progress(TrainerCallback):
    """Reports each logged step.

    Args:
        say: prints a line; called once per tenth of the steps.
        status: shows a line until the next one; called at each step.
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
    """Logs the mean duration of the steps since the last log and the time spent in the rewards."""

    def __init__(self) -> None:
        self.reward_seconds = 0.0
        self._begin = 0.0
        self._steps: list[tuple[float, float]] = []  # seconds, those in the rewards

    def timed(self, reward: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a reward, keeping its name, and counts the seconds spent in it."""

        def function(*args: Any, **columns: Any) -> Any:
            with self._counted():
                return reward(*args, **columns)

        async def coroutine(*args: Any, **columns: Any) -> Any:
            with self._counted():
                return await reward(*args, **columns)

        timed: Any = coroutine if is_async_callable(reward) else function
        timed.__name__ = get_callable_name(reward)
        return timed

    @contextmanager
    def _counted(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.reward_seconds += time.perf_counter() - begin

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._begin, self.reward_seconds = time.perf_counter(), 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._steps.append((time.perf_counter() - self._begin, self.reward_seconds))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **rest: Any) -> None:
        if "loss" in logs:  # of steps; those that generate nothing log no reward
            seconds, rewards = map(fmean, zip(*self._steps, strict=True))
            self._steps = []
            measured = {"seconds": seconds, "reward_seconds": rewards, "reward_share": rewards / seconds}
            state.log_history[-1].update(measured)
            logs.update(measured)


class WholeGenerations(TrainerCallback):
    """Postpones a save until every completion of a generation is learnt: a resumed trainer begins with new ones."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._due = False

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._due |= control.should_save
        whole = self.trainer._step % (args.steps_per_generation * self.trainer.num_iterations) == 0
        control.should_save = self._due and whole
        self._due &= not whole


class Refresh(TrainerCallback):
    """Refreshes the student behind the reward during training with a trainer's newest checkpoint.

    The reward scores with a copy, into which LoRA is merged: trainers delete old checkpoints, and a resumed run
    continues with the student it had.

    Args:
        every: steps between refreshes.
        checkpoints: folder of the checkpoints.
        copies: folder for the copies. Those of the current student and of the last checkpoint's are kept.
        student: path of a model -> None; makes the reward score with that model.
        probe: scores a fixed set of samples with the current reward. The rank correlation of the scores before and
            after a refresh is logged as ``staleness``, that of the first and the latest scores of the run as
            ``staleness_since_start``; 1 means that the order did not change.

    Raises:
        ValueError: every is below 1.
    """

    def __init__(
        self,
        every: int,
        checkpoints: Path,
        copies: Path,
        student: Callable[[Path], None],
        probe: Callable[[], Sequence[float | None]],
    ) -> None:
        if every < 1:
            raise ValueError(f"every: expected at least 1 step, got {every}")
        self.every = every
        self.checkpoints = checkpoints
        self.copies = copies
        self.student = student
        self.probe = probe
        self._current: str | None = None  # name of the student's checkpoint; None for the initial student
        self._saved: str | None = None  # the same, at the last save
        self._first: Sequence[float | None] = ()
        self._moved: dict[str, float | None] = {}  # for the next log

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if not self._first:
            self._first = self.probe()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        step = state.global_step
        if step % self.every or step >= state.max_steps:
            return
        # Another trainer may be writing to the folder, so one process decides.
        [newest] = broadcast_object_list([newest_checkpoint(self.checkpoints, "trainer_state.json", before=step)])
        if newest is None or newest.name == self._current:
            return
        before = self.probe()
        if state.is_world_process_zero:
            _copy_model(newest, self.copies / newest.name)
        PartialState().wait_for_everyone()
        self._use(newest.name)
        if state.is_world_process_zero:
            for folder in self.copies.iterdir():
                if folder.name not in (self._current, self._saved):
                    shutil.rmtree(folder)
        after = self.probe()
        self._moved = {
            "staleness": rank_correlation(before, after),
            "staleness_since_start": rank_correlation(self._first, after),
        }
        state.log_history.append({"step": step, "student_refreshed": True, **self._moved})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **rest: Any) -> None:
        logs.update(self._moved)
        self._moved = {}

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._saved = self._current

    def state_dict(self) -> dict[str, Any]:
        """The name of the student's checkpoint and the first scores of the probe."""
        return {
            "student": self._current,
            "first": [None if score is None else float(score) for score in self._first],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Makes the reward score with the student of :meth:`state_dict`.

        Raises:
            FileNotFoundError: its copy is missing.
        """
        self._first = state["first"]
        self._saved = state["student"]
        if self._saved is not None:
            self._use(self._saved)

    def _use(self, name: str) -> None:
        path = self.copies / name
        if not path.is_dir():
            raise FileNotFoundError(
                f"{path}: the student that the interrupted run scored with is missing; remove the run's checkpoints to "
                "start again"
            )
        self.student(path)
        self._current = name


class RewardStates(TrainerCallback):
    """Saves the state of the rewards, and of a refresh of their student, with each checkpoint."""

    def __init__(self, rewards: Sequence[Any]) -> None:
        self.rewards = [reward for reward in rewards if hasattr(reward, "state_dict")]

    def restore(self, checkpoint: Path) -> None:
        """Restores the rewards to their state at the checkpoint.

        Raises:
            ValueError: it holds the states of other rewards.
        """
        states = load_state(checkpoint / REWARD_STATE)
        if len(states) != len(self.rewards):
            raise ValueError(
                f"{checkpoint}: expected the state of {len(self.rewards)} rewards and refreshes, got {len(states)}, "
                "from an older version or another reward; remove the run's checkpoints to start again"
            )
        for reward, state in zip(self.rewards, states, strict=True):
            reward.load_state_dict(state)

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{CHECKPOINT}{state.global_step}"
            save_state(folder / REWARD_STATE, [reward.state_dict() for reward in self.rewards])


# --- logging, saving and resuming -------------------------------------------------------------------------------------


def read_log(output: Path) -> list[dict[str, Any]]:
    """The logged steps of a finished training run; non-finite numbers become None."""
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    return [{key: _finite(value) for key, value in entry.items()} for entry in state["log_history"]]


def newest_checkpoint(folder: Path, file: str, before: float = math.inf) -> Path | None:
    """The newest of a trainer's checkpoints that hold ``file``, of those before a step."""
    found = {}
    for path in folder.glob(f"{CHECKPOINT}*"):
        step = path.name.removeprefix(CHECKPOINT)
        if step.isdigit() and int(step) < before and (path / file).is_file():
            found[int(step)] = path
    return found[max(found)] if found else None


def _copy_model(checkpoint: Path, target: Path) -> None:
    """Copies the model of a checkpoint, with LoRA merged, completely or not at all."""
    unfinished = target.with_name(f"{target.name}.part")
    for folder in (unfinished, target):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoint, unfinished, ignore=shutil.ignore_patterns("optimizer*", "global_step*", "adapter_*"))
    if (checkpoint / "adapter_config.json").is_file():
        from peft import PeftConfig, PeftModel

        base = PeftConfig.from_pretrained(checkpoint).base_model_name_or_path
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        PeftModel.from_pretrained(model, checkpoint).merge_and_unload().save_pretrained(unfinished)
    unfinished.rename(target)


def _run(trainer: Any, output: Path, rewards: Sequence[Any] = ()) -> None:
    """Trains from the last complete checkpoint, if any, and saves the model in ``output``."""
    states = RewardStates(rewards)
    trainer.add_callback(states)
    trainer.remove_callback(PrinterCallback)  # with disable_tqdm it prints every step
    checkpoint = newest_checkpoint(output, REWARD_STATE)
    if trainer.is_world_process_zero():
        for folder in output.glob(f"{CHECKPOINT}*"):
            if not (folder / REWARD_STATE).is_file():
                shutil.rmtree(folder)
    if checkpoint is not None:
        states.restore(checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    # Activation checkpointing disabled the cache; the saved model would generate without it.
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


def _finite(value: Any) -> Any:
    """JSON has no infinities and no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
