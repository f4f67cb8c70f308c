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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import PrinterCallback, TrainerCallback
from trl import DPOTrainer, GRPOTrainer, SFTTrainer

from acqsynth import engines
from acqsynth.callbacks import (
    CHECKPOINT,
    REWARD_STATE,
    Progress as Progress,
    Refresh as Refresh,
    RewardStates,
    StepClock,
    last_checkpoint,
)
from acqsynth.domains import Domain, Messages, Sample
from acqsynth.engines import Engine, Sampling
from acqsynth.train_options import configuration as configuration
from acqsynth.write import Candidate, Scorer, candidates

logger = logging.getLogger(__name__)

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
    """Draws enough rows to make up ``share`` of the total, given n other rows."""
    if not 0 <= share < 1:
        raise ValueError(f"replay_share: expected a share in [0, 1), got {share}")
    count = round(n * share / (1 - share))
    if count > len(replay):
        raise ValueError(f"replay: expected {count} rows for a share of {share} beside {n} samples, got {len(replay)}")
    return random.Random(seed).sample(list(replay), count)


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
        ValueError: no prompts, or as :func:`configuration`.
    """
    if not prompts:
        raise ValueError("prompts: expected at least one")
    output = Path(output)
    config, lora = configuration("grpo", options or {}, output)
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
    # These run first, so that trackers see the entries they add to the log.
    trainer.callback_handler.callbacks[:0] = [clock, *([refresh] if refresh is not None else [])]
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
    engine: Callable[[], Engine] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Trains ``generator`` by DPO on pairs of its own candidates. ``pairs.parquet`` stores the pairs; a resumed run
    reads them instead of drawing again.

    Args:
        generator: path or hub id.
        prompts: from :func:`acqsynth.write.prompts`.
        reward: scores candidates.
        output: folder of the model.
        options: as in :func:`configuration`.
        sampling: its ``n`` is the number of candidates per prompt.
        engine: creates an engine for the generator; by default transformers.

    Raises:
        ValueError: no pair was found, or as :func:`configuration`.
    """
    output = Path(output)
    config, lora = configuration("dpo", options or {}, output)
    table = output / "pairs.parquet"
    if not table.is_file():
        drawing = engine() if engine is not None else engines.load("transformers", generator)
        rows = pairs(candidates(drawing, prompts, reward, sampling))
        del drawing
        if not rows:
            raise ValueError(
                "prompts: expected a prompt whose best candidate passes the gates and beats the worst, "
                f"found none among {len(prompts)}"
            )
        logger.info("%d pairs from %d prompts", len(rows), len(prompts))
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


# --- logging, saving and resuming -------------------------------------------------------------------------------------


def read_log(output: Path) -> list[dict[str, Any]]:
    """The logged steps of a finished training run; non-finite numbers become None."""
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    return [{key: _finite(value) for key, value in entry.items()} for entry in state["log_history"]]


def _run(trainer: Any, output: Path, rewards: Sequence[Any] = ()) -> None:
    """Trains from the last complete checkpoint, if any, and saves the model in ``output``."""
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
