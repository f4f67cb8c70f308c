from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from trl import SFTConfig

from acqsynth.training import REWARD_STATE, Log, configure, last_checkpoint, read_log, write_card


def checkpoint(folder: Path, step: int, whole: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    if whole:
        torch.save([], path / REWARD_STATE)
    return path


def test_the_last_whole_checkpoint(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "none") is None
    checkpoint(tmp_path, 9)
    newest = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 11, whole=False)
    assert last_checkpoint(tmp_path) == newest


def test_options_win_over_defaults(tmp_path: Path) -> None:
    given = {"learning_rate": 3.0, "use_cpu": True, "lora": {"r": 3}}
    config, lora, shown = configure(SFTConfig, given, tmp_path, {"learning_rate": 1.0, "max_length": 7})
    assert (config.learning_rate, config.max_length, config.output_dir) == (3.0, 7, str(tmp_path))
    assert (config.report_to, config.logging_steps, lora.r, lora.task_type) == ([], 1, 3, "CAUSAL_LM")
    assert shown["learning_rate"] == 3.0
    assert shown["lora"] == {"r": 3}
    assert given == {"learning_rate": 3.0, "use_cpu": True, "lora": {"r": 3}}
    assert configure(SFTConfig, {"use_cpu": True}, tmp_path, {})[1] is None


def test_the_log_is_json_and_forgets_what_was_undone(tmp_path: Path) -> None:
    log, state = Log(tmp_path, []), SimpleNamespace(log_history=[], is_world_process_zero=True)
    log.on_train_begin(None, state, None)
    for step, value in ((1, 0.5), (2, math.nan), (3, math.inf)):
        state.log_history.append({"step": step, "reward": value})
        log.on_log(None, state, None)
    assert read_log(tmp_path) == [{"step": 1, "reward": 0.5}, {"step": 2, "reward": None}, {"step": 3, "reward": None}]
    again, resumed = Log(tmp_path, []), SimpleNamespace(log_history=state.log_history[:2], is_world_process_zero=True)
    again.on_train_begin(None, resumed, None)
    resumed.log_history.append({"step": 3, "reward": 1.0})
    again.on_log(None, resumed, None)
    assert [row["reward"] for row in read_log(tmp_path)] == [0.5, None, 1.0]


def test_rewards_with_a_state_are_restored(tmp_path: Path, answer_reward: Any) -> None:
    answer_reward.calls = 7
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    log = Log(tmp_path, [print, answer_reward])
    log.on_save(SimpleNamespace(output_dir=tmp_path), SimpleNamespace(is_world_process_zero=True, global_step=1), None)
    assert last_checkpoint(tmp_path) == folder
    fresh = type(answer_reward)()
    Log(tmp_path, [print, fresh]).restore(folder)
    assert fresh.calls == 7


def test_the_card_names_the_base_and_the_data(tmp_path: Path) -> None:
    write_card(tmp_path, "Student", "base/model", "3 rows.", {"b": 2, "a": 1}, "SFTTrainer")
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nbase_model: " + json.dumps("base/model"))
    assert "# Student\n\nTrained from `base/model` by TRL's SFTTrainer.\n\n## Data\n\n3 rows." in text
    assert text.endswith("| setting | value |\n| --- | --- |\n| a | 1 |\n| b | 2 |\n")
