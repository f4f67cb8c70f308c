"""Trainer callbacks: progress, time spent in the reward, student refreshes and reward checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from trl.trainer.utils import get_callable_name, is_async_callable

from acqsynth.evaluate import rank_correlation

CHECKPOINT = "checkpoint-"
REWARD_STATE = "reward_state.pt"  #: written last to a checkpoint, so its presence means the checkpoint is complete


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
    """Logs the duration of each step and the time spent in the rewards."""

    def __init__(self) -> None:
        self.reward_seconds = 0.0
        self._begin = 0.0
        self._measured: dict[str, float] = {}

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


class Refresh(TrainerCallback):
    """Refreshes the student behind the reward during training.

    Args:
        every: steps between refreshes.
        student: step -> None; makes the reward score with a newer student.
        probe: scores a fixed set of samples with the current reward. The rank correlation of the scores before and
            after a refresh is logged as ``staleness``, that of the first and the latest scores of the run as
            ``staleness_since_start``; 1 means that the order did not change.

    Raises:
        ValueError: every is below 1.
    """

    def __init__(
        self, every: int, student: Callable[[int], None], probe: Callable[[], Sequence[float | None]] | None = None
    ) -> None:
        if every < 1:
            raise ValueError(f"every: expected at least 1 step, got {every}")
        self.every = every
        self.student = student
        self.probe = probe
        self._first: Sequence[float | None] | None = None
        self._moved: dict[str, float] = {}  # for the next log

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if self.probe is not None:
            self._first = self.probe()
        # A resumed run must continue with the student it had.
        last = state.global_step - state.global_step % self.every
        if last:
            self.student(last)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        step = state.global_step
        if step % self.every or step >= state.max_steps:
            return
        before = self.probe() if self.probe else None
        self.student(step)
        entry: dict[str, Any] = {"step": step, "student_refreshed": True}
        if self.probe and before is not None and self._first is not None:
            after = self.probe()
            entry["staleness"] = rank_correlation(before, after)
            entry["staleness_since_start"] = rank_correlation(self._first, after)
            self._moved = {key: entry[key] for key in ("staleness", "staleness_since_start")}
        state.log_history.append(entry)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **rest: Any) -> None:
        logs.update(self._moved)
        self._moved = {}


class RewardStates(TrainerCallback):
    """Saves the state of the rewards with each checkpoint."""

    def __init__(self, rewards: Sequence[Any]) -> None:
        self.rewards = [reward for reward in rewards if hasattr(reward, "state_dict")]

    def restore(self, checkpoint: Path) -> None:
        """Restores the rewards to their state at the checkpoint."""
        states = torch.load(checkpoint / REWARD_STATE, weights_only=True)
        for reward, state in zip(self.rewards, states, strict=True):
            reward.load_state_dict(state)

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{CHECKPOINT}{state.global_step}"
            unfinished = folder / f"{REWARD_STATE}.part"
            torch.save([reward.state_dict() for reward in self.rewards], unfinished)
            unfinished.rename(folder / REWARD_STATE)


def last_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint."""
    complete = [folder for folder in output.glob(f"{CHECKPOINT}*") if (folder / REWARD_STATE).is_file()]
    return max(complete, key=_step, default=None)


def newest_checkpoint(folder: Path, step: int) -> Path | None:
    """The last checkpoint of a trainer before ``step``, so that a resumed run finds the same one."""
    found = [
        path
        for path in folder.glob(f"{CHECKPOINT}*")
        if path.name.removeprefix(CHECKPOINT).isdigit() and (path / "config.json").is_file() and _step(path) < step
    ]
    return max(found, key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(CHECKPOINT))
