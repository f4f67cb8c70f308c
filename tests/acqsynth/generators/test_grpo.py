from __future__ import annotations

import asyncio
import importlib.util
import json
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from acqsynth.generators import grpo
from acqsynth.parsing import as_text
from acqsynth.rewards import AcquisitionReward
from acqsynth.training import read_log

ASK = [[{"role": "user", "content": f"prompt {i}"}] for i in range(8)]
OPTIONS: dict[str, Any] = {
    "max_steps": 4,
    "save_steps": 2,
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "max_completion_length": 6,
    "learning_rate": 1e-2,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "disable_tqdm": True,
}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(a[name].equal(b[name]) for name in a)


def test_two_steps_and_what_they_leave(
    student_path: Path, tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    """With two rewards of this package, activation checkpointing as TRL has it, and batches accumulated."""
    entropy = AcquisitionReward(model, tokenizer=tokenizer, parse=as_text)
    rewards = [entropy, AcquisitionReward(model, "loss", tokenizer=tokenizer)]
    options = OPTIONS | {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    options["gradient_checkpointing"] = True
    output = tmp_path / "out"
    assert grpo.train(str(student_path), ASK, rewards, output, options) == output
    steps = [row for row in read_log(output) if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        assert row["rewards/acquisition_entropy/mean"] == pytest.approx(row["reward"])  # nothing parses as a sample
        assert row["acquisition_loss/parsed"] == 0
        assert 0 < row["reward_seconds"] < row["seconds"]
        assert row["reward_share"] == pytest.approx(row["reward_seconds"] / row["seconds"])
        assert row["completions/mean_length"] <= 6
    table = pandas.read_parquet(output / "completions" / "completions_00002.parquet")
    assert len(table) == 4
    assert {"prompt", "completion", "advantage", "acquisition_entropy", "acquisition_entropy_value"} <= set(table)
    assert table["acquisition_entropy"].tolist() == pytest.approx(table["acquisition_entropy_value"].tolist())
    assert not same(weights(student_path), weights(output))
    assert json.loads((output / "config.json").read_text())["use_cache"] is True
    assert AutoTokenizer.from_pretrained(output).chat_template == tokenizer.chat_template
    card = (output / "README.md").read_text()
    assert f'base_model: "{student_path}"' in card
    assert "8 prompts, 2 steps; rewards: `acquisition_entropy`, `acquisition_loss`." in card
    assert "| max_completion_length | 6 |" in card
    assert not list(output.glob("checkpoint-*"))


class KillAt(TrainerCallback):
    """Ends the run after a step as a signal would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_killed_run_ends_as_if_it_had_not_been(student_path: Path, answer_reward: Any, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    grpo.train(str(student_path), ASK, answer_reward, whole, OPTIONS)
    reward = type(answer_reward)()
    with pytest.raises(KeyboardInterrupt):
        grpo.train(str(student_path), ASK, reward, cut, OPTIONS, callbacks=[KillAt(3)])
    assert [folder.name for folder in cut.glob("checkpoint-*")] == ["checkpoint-2"]
    assert [row["step"] for row in read_log(cut)] == [1, 2]
    (cut / "checkpoint-3").mkdir()  # cut off while it was written
    (cut / "checkpoint-3" / "model.safetensors").write_text("half")
    reward = type(answer_reward)()  # another process
    grpo.train(str(student_path), ASK, reward, cut, OPTIONS)
    assert reward.calls == 4  # its state came from the checkpoint, two steps followed
    assert same(weights(whole), weights(cut))
    logs = [
        [{key: row[key] for key in ("step", "reward", "calls", "loss")} for row in read_log(path) if "reward" in row]
        for path in (whole, cut)
    ]
    assert logs[0] == logs[1]
    assert [row["calls"] for row in logs[0]] == [1, 2, 3, 4]
    for step in range(1, 5):
        name = f"completions/completions_{step:05d}.parquet"
        assert pandas.read_parquet(whole / name).equals(pandas.read_parquet(cut / name))


def test_lora_is_trained_and_merged(student_path: Path, answer_reward: Any, tmp_path: Path) -> None:
    options = OPTIONS | {"max_steps": 1, "lora": {"r": 2, "target_modules": ["q_proj"]}}
    grpo.train(str(student_path), ASK, answer_reward, tmp_path, options)
    before, after = weights(student_path), weights(tmp_path)
    assert {name for name in before if not before[name].equal(after[name])} == {
        f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)
    }
    base = AutoModelForCausalLM.from_pretrained(student_path)
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    assert all(merged[name].allclose(after[name], atol=1e-6) for name in after)
    assert "| lora | {'r': 2, 'target_modules': ['q_proj']} |" in (tmp_path / "README.md").read_text()


def test_the_student_is_refreshed_and_its_staleness_logged(
    student_path: Path, answer_reward: Any, tmp_path: Path
) -> None:
    students: list[int] = []

    def probe() -> list[float | None]:
        order = {0: [1.0, 2.0, 3.0, 4.0], 1: [2.0, 1.0, 3.0, 4.0], 2: [2.0, 1.0, 4.0, 3.0]}[len(students)]
        return [*order, None]

    refresh = grpo.Refresh(every=1, student=students.append, probe=probe)
    grpo.train(str(student_path), ASK, answer_reward, tmp_path, OPTIONS | {"max_steps": 3}, refresh=refresh)
    assert students == [1, 2]  # after the last step there is nothing left to score
    entries = [row for row in read_log(tmp_path) if "student_refreshed" in row]
    assert [(row["step"], row["staleness"]) for row in entries] == [(1, pytest.approx(0.8)), (2, pytest.approx(0.8))]
    assert [row["staleness_since_start"] for row in entries] == [pytest.approx(0.8), pytest.approx(0.6)]


def test_a_run_that_goes_on_begins_with_the_student_it_had(
    student_path: Path, answer_reward: Any, tmp_path: Path
) -> None:
    students: list[int] = []
    arguments: Any = (str(student_path), ASK, answer_reward, tmp_path, OPTIONS | {"save_steps": 3})
    refresh = grpo.Refresh(every=2, student=students.append)
    with pytest.raises(KeyboardInterrupt):
        grpo.train(*arguments, refresh=refresh, callbacks=[KillAt(4)])
    assert students == [2]
    grpo.train(*arguments, refresh=refresh)
    assert students == [2, 2]


def test_an_async_reward_is_timed_too(student_path: Path, tmp_path: Path) -> None:
    class Slow:
        async def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
            await asyncio.sleep(0.05)
            return [float(i) for i in range(len(completions))]

    grpo.train(str(student_path), ASK, Slow(), tmp_path, OPTIONS | {"max_steps": 1})
    [row] = [row for row in read_log(tmp_path) if "reward" in row]
    assert row["rewards/Slow/mean"] == pytest.approx(1.5)
    assert 0.05 <= row["reward_seconds"] < row["seconds"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generation": 2}, "options: expected fields of GRPOConfig, got 'num_generation'; did you mean 'num_gen"),
        ({"lora": {"rank": 2}}, "options.lora: expected fields of LoraConfig, got 'rank'"),
        ({"output_dir": "x"}, "options: output_dir is the argument output"),
        ({"num_generations": 3}, r"generation_batch_size \(4\) must be divisible by num_generations \(3\)"),
    ],
)
def test_wrong_options(
    student_path: Path, answer_reward: Any, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        grpo.train(str(student_path), ASK, answer_reward, tmp_path, OPTIONS | options)


def test_wrong_arguments(student_path: Path, answer_reward: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompts: expected at least one"):
        grpo.train(str(student_path), [], answer_reward, tmp_path)
    with pytest.raises(ValueError, match="every: expected at least 1 step, got 0"):
        grpo.Refresh(0, print)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="it would start vllm")
def test_vllm_modes_pass_through(student_path: Path, answer_reward: Any, tmp_path: Path) -> None:
    options = OPTIONS | {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.2}
    with pytest.raises(ImportError, match="vLLM is not available"):
        grpo.train(str(student_path), ASK, answer_reward, tmp_path, options)
