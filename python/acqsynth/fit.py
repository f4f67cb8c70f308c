"""A student fine-tuned on generated samples, through TRL's SFTTrainer."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from acqsynth.domains.base import Domain, Messages, Sample
from acqsynth.training import configure, run, write_card

Row = dict[str, Messages]  #: ``{"prompt", "completion"}``

EFFECTIVE_BATCH = 16

#: The published recipe; ``gradient_accumulation_steps`` makes an effective batch of 16 of whatever
#: ``per_device_train_batch_size`` is. Rows above ``max_length`` tokens are cut.
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 5,
    "learning_rate": 2e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,  # below 1: a share of the steps
    "per_device_train_batch_size": 4,
    "max_length": 2048,
    "completion_only_loss": True,
    "save_strategy": "epoch",
}


def rows(domain: Domain, samples: Sequence[Sample]) -> list[Row]:
    """What a student learns of each sample: the domain's prompt, and its solution as the completion."""
    return [
        {
            "prompt": domain.student_prompt(sample.question),
            "completion": [{"role": "assistant", "content": domain.solution(sample)}],
        }
        for sample in samples
    ]


def fit(
    student: str,
    domain: Domain,
    samples: Sequence[Sample],
    output: str | Path,
    *,
    replay: Sequence[Row] = (),
    replay_share: float = 0.2,
    options: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Train ``student`` on the samples and leave the model in ``output``, see :mod:`acqsynth.training`. The loss is
    that of the completions alone.

    Args:
        student: path or hub id.
        domain: of the samples.
        samples: what it learns.
        output: folder; a run that was cut off there goes on.
        replay: :func:`rows` of other domains or general data, against forgetting.
        replay_share: of all rows trained on, where there is replay; so many are drawn, by ``seed`` of the options.
        options: fields of SFTConfig, over ``DEFAULTS``; ``lora``: fields of ``peft.LoraConfig``.
        callbacks: of the trainer.

    Raises:
        ValueError: no samples, a share outside [0, 1), fewer replay rows than the share needs, an unknown option, or
            values that TRL refuses.
    """
    if not samples:
        raise ValueError("samples: expected at least one")
    output = Path(output)
    options = dict(options or {})
    per_step = options.get("per_device_train_batch_size", DEFAULTS["per_device_train_batch_size"])
    per_step *= int(os.environ.get("WORLD_SIZE", "1"))
    defaults = {**DEFAULTS, "gradient_accumulation_steps": max(1, EFFECTIVE_BATCH // per_step)}
    config, peft_config, shown = configure(SFTConfig, options, output, defaults)
    mixed_in = _drawn(replay, replay_share, len(samples), config.seed) if replay else []
    trainer = SFTTrainer(
        model=student,
        args=config,
        train_dataset=datasets.Dataset.from_list([*rows(domain, samples), *mixed_in]),
        peft_config=peft_config,
        callbacks=list(callbacks),
    )
    run(trainer, output)
    if trainer.is_world_process_zero():
        data = f"{len(samples)} rows of the domain {domain.name} and {len(mixed_in)} rows of replay."
        write_card(output, f"Student of {domain.name}", student, data, shown, "SFTTrainer")
    return output


def _drawn(replay: Sequence[Row], share: float, n: int, seed: int) -> list[Row]:
    """So many rows that they are ``share`` of all when n others join them."""
    if not 0 <= share < 1:
        raise ValueError(f"replay_share: expected a share in [0, 1), got {share}")
    count = round(n * share / (1 - share))
    if count > len(replay):
        raise ValueError(f"replay: expected {count} rows for a share of {share} beside {n} samples, got {len(replay)}")
    return random.Random(seed).sample(list(replay), count)
