from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from acqsynth import fit
from acqsynth.domains import Domain, Sample
from acqsynth.engines import Sampling
from acqsynth.engines.transformers import TransformersEngine
from acqsynth.training import read_log

SAMPLES = [Sample(f"{a}+{b}", str(a + b), f"{a} and {b}") for a in range(4) for b in range(4)]
QUICK: dict[str, Any] = {"gradient_checkpointing": False, "use_cpu": True, "disable_tqdm": True}
REPLAY = [
    {"prompt": [{"role": "user", "content": f"greet {i}"}], "completion": [{"role": "assistant", "content": "hello"}]}
    for i in range(9)
]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def test_rows_are_what_a_student_is_asked_and_says(sums: Domain) -> None:
    assert fit.rows(sums, SAMPLES[5:6]) == [
        {
            "prompt": [{"role": "user", "content": "1+1"}],
            "completion": [{"role": "assistant", "content": "1 and 1\n2"}],
        }
    ]


def test_the_published_settings_by_default(
    sums: Domain, student_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Stop(Exception):  # noqa: N818
        pass

    def trainer(**given: Any) -> None:
        seen.append(given)
        raise Stop

    monkeypatch.setattr(fit, "SFTTrainer", trainer)
    for options in ({}, {"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 2, "seed": 1}):
        with pytest.raises(Stop):
            fit.fit(str(student_path), sums, SAMPLES, tmp_path, options=options, replay=REPLAY, replay_share=0.2)
    config = seen[0]["args"]
    assert (config.num_train_epochs, config.learning_rate, config.lr_scheduler_type) == (5, 2e-5, "cosine")
    assert config.get_warmup_steps(1000) == 50
    assert config.completion_only_loss
    sizes = [g["args"].per_device_train_batch_size * g["args"].gradient_accumulation_steps for g in seen]
    assert sizes == [16, 16, 16]
    data = [given["train_dataset"].to_list() for given in seen]
    assert [len(rows) for rows in data] == [20] * 3  # 4 of 20 are replay
    assert data[0] == data[1]
    assert data[0][:16] == data[2][:16] == fit.rows(sums, SAMPLES)
    assert data[0][16:] != data[2][16:]
    assert all(row in REPLAY for row in data[0][16:])


def test_a_student_learns_and_its_folder_is_a_model(sums: Domain, student_path: Path, tmp_path: Path) -> None:
    options = QUICK | {"num_train_epochs": 80, "learning_rate": 1e-2, "save_strategy": "no"}
    output = tmp_path / "out"
    assert fit.fit(str(student_path), sums, SAMPLES, output, options=options) == output
    losses = [row["loss"] for row in read_log(output) if "loss" in row]
    assert losses[-1] < 0.1 < 4 < losses[0]
    engine = TransformersEngine(output)
    asked = [sums.student_prompt(sample.question) for sample in SAMPLES]
    answers = [sums.answer_of(g[0].text) for g in engine.generate(asked, Sampling(temperature=0, max_tokens=16))]
    assert sums.equivalent(SAMPLES, answers).count(True) >= 14
    card = (output / "README.md").read_text()
    assert f'base_model: "{student_path}"' in card
    assert "16 rows of the domain sums and 0 rows of replay." in card
    assert "| num_train_epochs | 80 |" in card


def test_the_loss_is_that_of_the_completion(sums: Domain, student_path: Path, tmp_path: Path) -> None:
    options = QUICK | {"max_steps": 1, "save_strategy": "no"}
    fit.fit(str(student_path), sums, SAMPLES[:1], tmp_path, options=options)
    tokenizer, model = AutoTokenizer.from_pretrained(student_path), AutoModelForCausalLM.from_pretrained(student_path)
    [row] = fit.rows(sums, SAMPLES[:1])
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
    first = len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"])
    with torch.no_grad():
        logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    expected = -torch.stack([logprobs[t - 1, whole[t]] for t in range(first, len(whole))]).mean()
    assert read_log(tmp_path)[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert whole[-1] == tokenizer.eos_token_id  # learnt too


class KillAt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_a_killed_run_ends_as_if_it_had_not_been(sums: Domain, student_path: Path, tmp_path: Path) -> None:
    options = QUICK | {"num_train_epochs": 3, "learning_rate": 1e-2, "gradient_accumulation_steps": 2}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit.fit(str(student_path), sums, SAMPLES, whole, options=options)
    with pytest.raises(KeyboardInterrupt):
        fit.fit(str(student_path), sums, SAMPLES, cut, options=options, callbacks=[KillAt()])
    assert [folder.name for folder in sorted(cut.glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-4"]
    fit.fit(str(student_path), sums, SAMPLES, cut, options=options)
    before, after = weights(whole), weights(cut)
    assert all(before[name].equal(after[name]) for name in before)
    assert [row["step"] for row in read_log(cut)] == [row["step"] for row in read_log(whole)] == [1, 2, 3, 4, 5, 6, 6]


def test_lora(sums: Domain, student_path: Path, tmp_path: Path) -> None:
    options = QUICK | {"max_steps": 1, "learning_rate": 1e-2, "lora": {"r": 2, "target_modules": ["up_proj"]}}
    fit.fit(str(student_path), sums, SAMPLES, tmp_path, options=options)
    before, after = weights(student_path), weights(tmp_path)
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed <= {f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)}
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": []}, "samples: expected at least one"),
        ({"options": {"learning_rates": 1}}, "got 'learning_rates'; did you mean 'learning_rate'"),
        ({"replay": REPLAY, "replay_share": 1.0}, r"replay_share: expected a share in \[0, 1\), got 1.0"),
        (
            {"replay": REPLAY, "replay_share": 0.5},
            "replay: expected 16 rows for a share of 0.5 beside 16 samples, got 9",
        ),
    ],
)
def test_wrong_arguments(
    sums: Domain, student_path: Path, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = {"samples": SAMPLES} | arguments
    with pytest.raises(ValueError, match=message):
        fit.fit(str(student_path), sums, output=tmp_path, **given)
