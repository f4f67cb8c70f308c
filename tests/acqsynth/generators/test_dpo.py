from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from transformers import AutoModelForCausalLM, TrainerCallback

from acqsynth.domains import Sample
from acqsynth.engines import Sampling
from acqsynth.generators import dpo
from acqsynth.generators.candidates import Scored
from acqsynth.training import read_log

ASK = [[{"role": "user", "content": f"prompt {i}"}] for i in range(4)]
OPTIONS: dict[str, Any] = {
    "max_steps": 2,
    "save_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "disable_tqdm": True,
}


def scored(total: float | None, passes: bool = True, sample: bool = True) -> Scored:
    return Scored(ASK[0], f"text {total}", Sample("1+1", "2") if sample else None, total, {}, {"good": passes})


def test_pairs_of_best_and_worst() -> None:
    groups = [
        [scored(1.0), scored(3.0), scored(2.0), scored(None)],
        [scored(4.0, passes=False), scored(1.0), scored(0.0, sample=False)],  # the best is gated, the worst no sample
        [scored(1.0), scored(1.0)],
        [scored(5.0, passes=False), scored(0.0, sample=False)],
        [scored(None), scored(2.0)],
        [scored(1.0), scored(1.25)],
    ]
    totals = [(row["chosen_total"], row["rejected_total"]) for row in dpo.pairs(groups)]
    assert totals == [(3.0, 1.0), (1.0, 0.0), (1.25, 1.0)]
    assert [row["chosen_total"] for row in dpo.pairs(groups, margin=0.5)] == [3.0, 1.0]
    assert dpo.pairs(groups)[0] == {
        "prompt": ASK[0],
        "chosen": [{"role": "assistant", "content": "text 3.0"}],
        "rejected": [{"role": "assistant", "content": "text 1.0"}],
        "chosen_total": 3.0,
        "rejected_total": 1.0,
    }


@pytest.fixture
def engine(scripted: Any, written: Callable[..., str]) -> Any:
    return scripted(lambda prompt, i, seed: written(f"{i}+{prompt[0]['content'][-1]}", i) if i else "no sample")


def test_two_steps_and_what_they_leave(student_path: Path, engine: Any, answer_reward: Any, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = OPTIONS | {"lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]}}
    found = dpo.train(str(student_path), ASK, answer_reward, output, options, sampling=Sampling(n=3), engine=engine)
    assert found == output
    table = pandas.read_parquet(output / "pairs.parquet")
    assert table["chosen_total"].tolist() == [2.0] * 4
    assert table["rejected_total"].tolist() == [0.0] * 4
    assert table["rejected"][0][0]["content"] == "no sample"
    assert [row["step"] for row in read_log(output) if "rewards/margins" in row] == [1, 2]
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (student_path, output))
    assert {name for name in before if not before[name].equal(after[name])} == {
        f"model.layers.{i}.self_attn.{m}_proj.weight" for i in range(2) for m in "qv"
    }
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    assert not list(output.glob("checkpoint-*"))
    card = (output / "README.md").read_text()
    assert "4 pairs of candidates of 4 prompts" in card
    assert "| learning_rate | 0.01 |" in card


class Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        raise KeyboardInterrupt


def test_a_killed_run_keeps_its_pairs(student_path: Path, engine: Any, answer_reward: Any, tmp_path: Path) -> None:
    arguments: Any = (str(student_path), ASK, answer_reward, tmp_path / "out", OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        dpo.train(*arguments, sampling=Sampling(n=3), engine=engine, callbacks=[Kill()])
    dpo.train(*arguments, sampling=Sampling(n=3), engine=engine)
    assert len(engine.calls) == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_no_pairs(student_path: Path, scripted: Any, answer_reward: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prompts: expected a prompt whose best candidate .* found none of 4"):
        dpo.train(
            str(student_path),
            ASK,
            answer_reward,
            tmp_path,
            OPTIONS,
            sampling=Sampling(n=2),
            engine=scripted(lambda *_: "no sample"),
        )
    with pytest.raises(ValueError, match="options: expected fields of DPOConfig, got 'bet'; did you mean 'beta'"):
        dpo.train(str(student_path), ASK, answer_reward, tmp_path, {"bet": 1}, sampling=Sampling(n=2))
