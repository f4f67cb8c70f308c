"""Trainer callbacks: progress, timing, refreshes of the student behind a reward, the saved state of rewards."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.trainer.utils import get_callable_name, is_async_callable

from acqsynth import checks
from acqsynth.artefacts import load_state, save_state
from acqsynth.evaluate import rank_correlation

CHECKPOINT = "checkpoint-"
REWARD_STATE = "reward_state.pt"  #: written last to a checkpoint, so its presence means that a run can resume from it


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
    """Postpones a save until every completion of a generation has been learnt, as a resumed trainer generates anew."""

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
    continues with the student it had. The rank correlation of the probe's scores before and after a refresh is logged
    as ``staleness``, that of the first and the latest of the run as ``staleness_since_start``.

    Args:
        every: steps between refreshes.
        checkpoints: folder of the checkpoints.
        copies: folder for the copies. Those of the current student and of the last checkpoint's are kept.
        student: path of a model -> None; makes the reward score with that model.
        probe: scores a fixed set of samples with the current reward.

    Raises:
        ValueError: every is not an int >= 1.
    """

    def __init__(
        self,
        every: int,
        checkpoints: Path,
        copies: Path,
        student: Callable[[Path], None],
        probe: Callable[[], Sequence[float | None]],
    ) -> None:
        checks.positive_int("every", every)
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
        [newest] = broadcast_object_list([newest_checkpoint(self.checkpoints, "trainer_state.json")])
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
        """The student's checkpoint and the first scores of the probe."""
        return {"student": self._current, "first": [None if score is None else float(score) for score in self._first]}

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
        # Without its optimizer, a resumed run would begin its schedule of learning rates again.
        if state.is_world_process_zero and not args.save_only_model:
            folder = Path(args.output_dir) / f"{CHECKPOINT}{state.global_step}"
            save_state(folder / REWARD_STATE, [reward.state_dict() for reward in self.rewards])


def newest_checkpoint(folder: Path, file: str) -> Path | None:
    """A trainer's newest checkpoint that holds ``file``; None if there is none."""
    steps = {path: path.name.removeprefix(CHECKPOINT) for path in folder.glob(f"{CHECKPOINT}*")}
    found = [path for path, step in steps.items() if step.isdigit() and (path / file).is_file()]
    return max(found, key=lambda path: int(steps[path]), default=None)


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
