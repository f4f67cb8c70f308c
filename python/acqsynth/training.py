"""What every trainer here does alike: its configuration, the log, resuming, and the folder it leaves behind.

The folder is a model that ``from_pretrained`` reads, with its tokenizer, and beside it ``log.jsonl`` (one line a
logged step), ``README.md`` (the model card), and ``adapter/`` where LoRA was trained. While training it also holds
checkpoints; a run that was killed goes on from the last whole one when it is called again with the same arguments.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from acqsynth.options import build

CHECKPOINT = "checkpoint-"
#: written into a checkpoint last of all, and holds the state of the reward
REWARD_STATE = "reward_state.pt"

_SHARED = {
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "steps",
    # Two, because the older one is deleted before the newer one has its last file.
    "save_total_limit": 2,
}


def configure(
    kind: type[Any], options: Mapping[str, Any], output: Path, defaults: Mapping[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """The trainer's configuration, that of LoRA or None, and what was set by name.

    Args:
        kind: the configuration class of a trainer of TRL.
        options: its fields, and ``lora``: the fields of ``peft.LoraConfig``.
        output: where the trainer writes.
        defaults: fields that differ from the trainer's own defaults where options do not name them.

    Raises:
        ValueError: an unknown name, or ``output_dir``.
    """
    options = dict(options)
    if "output_dir" in options:
        raise ValueError("options: output_dir is the argument output, and no option")
    lora = options.pop("lora", None)
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not options.get("fp16")
    table = {**_SHARED, "bf16": bf16, **defaults, **options}
    config = build(kind, {**table, "output_dir": str(output)})
    if lora is None:
        return config, None, table
    from peft import LoraConfig

    return config, build(LoraConfig, {"task_type": "CAUSAL_LM", **lora}, table="options.lora"), {**table, "lora": lora}


def run(trainer: Any, output: Path, *, rewards: Sequence[Any] = ()) -> Any:
    """Train, from the last whole checkpoint where there is one, and leave the model in ``output``.

    Args:
        trainer: of TRL, its output folder ``output``.
        rewards: those with ``state_dict`` and ``load_state_dict`` are saved in checkpoints and restored from them.

    Returns:
        The state of the trainer.
    """
    log = Log(output, rewards)
    trainer.add_callback(log)
    trainer.remove_callback(PrinterCallback)  # with ``disable_tqdm`` it would print what the log has
    checkpoint = last_checkpoint(output)
    if trainer.is_world_process_zero():
        for folder in output.glob(f"{CHECKPOINT}*"):
            if not (folder / REWARD_STATE).is_file():
                shutil.rmtree(folder)
    if checkpoint is not None:
        log.restore(checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    # Checkpointing of activations turned it off, and whoever loads the model next would generate without a cache.
    trainer.model.config.use_cache = True
    _save(trainer, output)
    if trainer.is_world_process_zero():
        for folder in output.glob(f"{CHECKPOINT}*"):
            shutil.rmtree(folder)
    return trainer.state


def _save(trainer: Any, output: Path) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "merge_and_unload"):
        trainer.save_model(str(output))
    elif trainer.is_world_process_zero():
        model.save_pretrained(output / "adapter")
        model.merge_and_unload().save_pretrained(output)
        trainer.processing_class.save_pretrained(output)


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    whole = [folder for folder in output.glob(f"{CHECKPOINT}*") if (folder / REWARD_STATE).is_file()]
    return max(whole, key=lambda folder: int(folder.name.removeprefix(CHECKPOINT)), default=None)


class Log(TrainerCallback):
    """Writes ``log.jsonl``, and the state of the rewards into each checkpoint."""

    def __init__(self, output: Path, rewards: Sequence[Any]) -> None:
        self.path = output / "log.jsonl"
        self.rewards = [reward for reward in rewards if hasattr(reward, "state_dict")]
        self._written = 0

    def restore(self, checkpoint: Path) -> None:
        """Rewards go on where they stood at the checkpoint."""
        states = torch.load(checkpoint / REWARD_STATE, weights_only=False)
        for reward, state in zip(self.rewards, states, strict=True):
            reward.load_state_dict(state)

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._written = 0  # anew: of a run that was cut off, the lines behind the checkpoint are not part of this one
        self._write(state, "w")

    def on_log(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._write(state, "a")

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{CHECKPOINT}{state.global_step}"
            unfinished = folder / f"{REWARD_STATE}.part"
            torch.save([reward.state_dict() for reward in self.rewards], unfinished)
            unfinished.rename(folder / REWARD_STATE)

    def _write(self, state: Any, mode: str) -> None:
        if state.is_world_process_zero:
            with self.path.open(mode, encoding="utf-8") as file:
                for entry in state.log_history[self._written :]:
                    file.write(json.dumps({key: _finite(value) for key, value in entry.items()}) + "\n")
            self._written = len(state.log_history)


def read_log(output: Path) -> list[dict[str, Any]]:
    """The entries of ``log.jsonl``."""
    return [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def _finite(value: Any) -> Any:
    """JSON has no infinities and no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_card(output: Path, title: str, base: str, data: str, settings: Mapping[str, Any], trainer: str) -> None:
    """``README.md``, the card of the model in ``output``.

    Args:
        output: the model's folder.
        title: its heading.
        base: path or hub id of the model it was trained from.
        data: what it was trained on, in sentences.
        settings: the options of the trainer that were set.
        trainer: the class that trained it.
    """
    rows = "\n".join(f"| {name} | {value} |" for name, value in sorted(settings.items()))
    front = f"---\nbase_model: {json.dumps(base)}\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n"
    (output / "README.md").write_text(
        f"{front}\n# {title}\n\nTrained from `{base}` by TRL's {trainer}.\n\n## Data\n\n{data}\n\n"
        "## Settings\n\nThe other settings are the trainer's own defaults.\n\n"
        f"| setting | value |\n| --- | --- |\n{rows}\n",
        encoding="utf-8",
    )
