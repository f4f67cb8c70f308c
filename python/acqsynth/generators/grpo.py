"""A generator trained by TRL's GRPO on any reward of its contract."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import get_callable_name, is_async_callable

from acqsynth.domains.base import Messages
from acqsynth.staleness import rank_correlation
from acqsynth.training import configure, run, write_card

Reward = Callable[..., list[float | None]]

#: Where these differ from GRPOConfig's own: responses as long as the published recipe's; its learning rate (1e-6)
#: and no KL are those of GRPOConfig already, and 8 completions a prompt are what ranks in a group need.
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 1,
    "max_completion_length": 1024,
    "save_steps": 10,
    "log_completions": True,
    "num_completions_to_print": 0,
}


@dataclass(frozen=True)
class Refresh:
    """The student behind the reward moves on during training.

    Args:
        every: steps between two refreshes.
        student: step -> None; makes the reward score with a newer student.
        probe: scores of a fixed set of samples by the reward as it stands. Their rank correlation before and after a
            refresh is logged as ``staleness``, with the first scores of the run as ``staleness_since_start``: 1 is no
            change of order.

    Raises:
        ValueError: every is below 1.
    """

    every: int
    student: Callable[[int], None]
    probe: Callable[[], Sequence[float | None]] | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every: expected at least 1 step, got {self.every}")


def train(
    generator: str,
    prompts: Sequence[Messages],
    reward: Reward | Sequence[Reward],
    output: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    refresh: Refresh | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Train ``generator`` on the prompts and leave the model in ``output``, see :mod:`acqsynth.training`.

    ``log.jsonl`` has for each step what TRL and the reward log, and ``seconds``, ``reward_seconds`` and
    ``reward_share`` of the step. ``completions/completions_<step>.parquet`` has the prompts, completions, rewards,
    advantages, and the columns that the reward logs.

    Args:
        generator: path or hub id.
        prompts: of :func:`acqsynth.generate.prompts`.
        reward: a reward function of TRL's contract, or several, which TRL weighs (``reward_weights``).
        output: folder; a run that was cut off there goes on.
        options: fields of GRPOConfig (``use_vllm`` and the rest of its vLLM modes too), over ``DEFAULTS``; ``lora``:
            fields of ``peft.LoraConfig``.
        refresh: of the student.
        callbacks: of the trainer.

    Raises:
        ValueError: no prompts, an unknown option, or values that TRL refuses.
    """
    if not prompts:
        raise ValueError("prompts: expected at least one")
    output = Path(output)
    config, peft_config, shown = configure(GRPOConfig, options or {}, output, DEFAULTS)
    rewards = list(reward) if isinstance(reward, Sequence) else [reward]
    clock = StepClock()
    own: list[TrainerCallback] = [clock]
    if refresh is not None:
        own.append(_Refreshing(refresh))
    trainer = GRPOTrainer(
        model=generator,
        reward_funcs=[clock.timed(function) for function in rewards],
        args=config,
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        peft_config=peft_config,
        callbacks=[*own, *callbacks],
    )
    state = run(trainer, output, rewards=rewards)
    if trainer.is_world_process_zero():
        names = ", ".join(f"`{name}`" for name in trainer.reward_func_names)
        data = f"{len(prompts)} prompts, {state.global_step} steps; rewards: {names}."
        write_card(output, "Generator", generator, data, shown, "GRPOTrainer")
    return output


class StepClock(TrainerCallback):
    """Seconds of each step and of the rewards in it, added to what is logged."""

    def __init__(self) -> None:
        self.reward_seconds = 0.0
        self._begin = 0.0
        self._measured: dict[str, float] = {}

    def timed(self, reward: Reward) -> Reward:
        """The same reward under its name, its seconds counted."""

        def function(*args: Any, **columns: Any) -> list[float | None]:
            begin = time.perf_counter()
            try:
                return reward(*args, **columns)
            finally:
                self.reward_seconds += time.perf_counter() - begin

        async def coroutine(*args: Any, **columns: Any) -> list[float | None]:
            begin = time.perf_counter()
            try:
                return await reward(*args, **columns)  # type: ignore[misc]
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


class _Refreshing(TrainerCallback):
    def __init__(self, refresh: Refresh) -> None:
        self.refresh = refresh
        self._first: Sequence[float | None] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if self.refresh.probe is not None:
            self._first = self.refresh.probe()
        # A run that goes on begins with the student it had.
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
        state.log_history.append(entry)
