"""A generator trained by TRL's DPO on pairs of its own candidates: the best of a prompt against the worst."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from acqsynth import engines
from acqsynth.domains.base import Messages
from acqsynth.engines.base import Engine, Sampling
from acqsynth.generators.candidates import Scored, Scorer, candidates
from acqsynth.training import configure, run, write_card

logger = logging.getLogger(__name__)

#: Where these differ from DPOConfig's own.
DEFAULTS: dict[str, Any] = {"num_train_epochs": 1, "max_length": 2048, "save_steps": 10}


def pairs(groups: Sequence[Sequence[Scored]], margin: float = 0.0) -> list[dict[str, Any]]:
    """Of each group its best candidate that passes the gates, against its worst, which may be one that does not.

    Args:
        groups: candidates of each prompt.
        margin: least difference of the two totals; equal totals never make a pair.

    Returns:
        Rows ``{"prompt", "chosen", "rejected"}`` in messages, with ``chosen_total`` and ``rejected_total``.
    """
    rows = []
    for group in groups:
        totals = [(scored.total, scored) for scored in group if scored.total is not None]
        passing = [(total, scored) for total, scored in totals if scored.rejected_by is None]
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


def train(
    generator: str,
    prompts: Sequence[Messages],
    reward: Scorer,
    output: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    sampling: Sampling,
    margin: float = 0.0,
    engine: Engine | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Train ``generator`` on pairs of its own candidates and leave the model in ``output``, see
    :mod:`acqsynth.training`; ``pairs.parquet`` has the pairs, which a run that goes on reads instead of drawing anew.

    Args:
        generator: path or hub id.
        prompts: of :func:`acqsynth.generate.prompts`.
        reward: scores candidates.
        output: folder; a run that was cut off there goes on.
        options: fields of DPOConfig, over ``DEFAULTS``; ``lora``: fields of ``peft.LoraConfig``.
        sampling: its ``n`` is the candidates of a prompt.
        margin: as in :func:`pairs`.
        engine: of the generator; by default transformers.
        callbacks: of the trainer.

    Raises:
        ValueError: no pair with the margin, an unknown option, or values that TRL refuses.
    """
    output = Path(output)
    config, peft_config, shown = configure(DPOConfig, options or {}, output, DEFAULTS)
    table = output / "pairs.parquet"
    if not table.is_file():
        drawing = engine or engines.load("transformers", generator)
        rows = pairs(candidates(drawing, prompts, reward, sampling), margin)
        del drawing
        if not rows:
            raise ValueError(
                f"prompts: expected a prompt whose best candidate passes the gates and leads by {margin}, "
                f"found none of {len(prompts)}"
            )
        logger.info("%d pairs of %d prompts", len(rows), len(prompts))
        output.mkdir(parents=True, exist_ok=True)
        unfinished = table.with_suffix(".part")
        datasets.Dataset.from_list(rows).to_parquet(unfinished)
        unfinished.rename(table)
    data = datasets.Dataset.from_parquet(str(table), keep_in_memory=True)
    trainer = DPOTrainer(
        model=generator,
        args=config,
        train_dataset=data.select_columns(["prompt", "chosen", "rejected"]),
        peft_config=peft_config,
        callbacks=list(callbacks),
    )
    run(trainer, output)
    if trainer.is_world_process_zero():
        sentence = f"{len(data)} pairs of candidates of {len(prompts)} prompts; {json.dumps(sampling.__dict__)}."
        write_card(output, "Generator", generator, sentence, shown, "DPOTrainer")
    return output
