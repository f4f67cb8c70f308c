"""verl's own ``RewardLoopManager`` on Ray calls the reward manager and the per-sample function, and verl accepts the
configuration of ``examples/verl/run.sh``.

Run by ``make test-trainers`` in an environment with verl 0.9.1.
"""

# ruff: noqa: E402  # the folder of this file comes first
from __future__ import annotations

import os
import shlex
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))

import numpy
import ray
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from student import TEXTS, make
from tensordict import TensorDict
from transformers import AutoTokenizer
from verl.experimental.reward_loop.reward_loop import RewardLoopManager
from verl.protocol import DataProto
from verl.utils.config import validate_config

SCRIPT = HERE.parent.parent / "examples" / "verl" / "run.sh"


def configuration(folder: Path, by_manager: bool) -> Any:
    module = "pkg://acqsynth.integrations.verl"
    ours = {"source": "importlib", "name": "AcquisitionRewardManager", "module": {"path": module, "name": None}}
    naive = {"source": "register", "name": "naive", "module": {"path": None, "name": None}}
    function = {"path": None, "name": None} if by_manager else {"path": module, "name": "compute_score"}
    return OmegaConf.create(
        {
            "actor_rollout_ref": {"model": {"path": str(folder), "tokenizer_path": None}},
            "reward": {
                "num_workers": 1,
                "reward_manager": ours if by_manager else naive,
                "custom_reward_function": function,
                "reward_model": {"enable": False},
                "reward_kwargs": {},
            },
            "data": {"reward_fn_key": "data_source"},
        }
    )


def batch(folder: Path) -> DataProto:
    """Prompts on the left, responses on the right, padded to one length."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("new")["input_ids"]
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]
    width = max(map(len, rows))
    responses = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * (len(prompt) + len(row)) + [0] * (width - len(row)) for row in rows])
    prompts = torch.tensor([prompt] * len(rows))
    others = {
        "uid": numpy.array(["a"] * len(rows), dtype=object),
        "raw_prompt": numpy.array([[{"role": "user", "content": "new"}]] * len(rows), dtype=object),
        "data_source": numpy.array(["acqsynth"] * len(rows), dtype=object),
        "reward_model": numpy.array([{"ground_truth": ""}] * len(rows), dtype=object),
        "extra_info": numpy.array([{"uid": "a"}] * len(rows), dtype=object),
    }
    tensors = {"prompts": prompts, "responses": responses, "attention_mask": mask}
    return DataProto(batch=TensorDict(tensors, batch_size=len(rows)), non_tensor_batch=others)


def check_script() -> None:
    """verl's own checks of the launch script's configuration."""
    call = SCRIPT.read_text().split("verl.trainer.main_ppo")[1]
    overrides = [word for word in shlex.split(call.replace("${GENERATOR:-", "").replace('}"', '"')) if "=" in word]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=overrides)
    assert config.trainer.n_gpus_per_node % config.actor_rollout_ref.rollout.tensor_model_parallel_size == 0
    validate_config(config, use_reference_policy=config.actor_rollout_ref.actor.use_kl_loss, use_critic=False)


def main() -> None:
    check_script()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "student"
        make(folder)
        os.chdir(temporary)  # Ray puts the current folder first on its workers' paths
        os.environ |= {"ACQSYNTH_STUDENT": str(folder), "ACQSYNTH_REWARD": "student:build"}
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=True, object_store_memory=1 << 27)
        for by_manager in (True, False):
            manager = RewardLoopManager(configuration(folder, by_manager))
            data = batch(folder)
            found = manager.compute_rm_score(data)
            scores = found.batch["rm_scores"]
            lengths = data.batch["attention_mask"][:, data.batch["prompts"].shape[1] :].sum(dim=1)
            totals = scores.sum(dim=1).tolist()
            gated = found.non_tensor_batch["gated"].tolist()
            masked = found.non_tensor_batch["masked"].tolist()
            print(f"verl {version('verl')}, {'reward manager' if by_manager else 'compute_score'}:")
            print("  keys", list(found.non_tensor_batch), "gated", gated, "masked", masked)
            print("  totals", [round(total, 4) for total in totals])
            assert scores.shape == data.batch["responses"].shape
            assert [int(row.nonzero()[0]) for row in scores if row.any()] == [
                int(length) - 1 for length, row in zip(lengths, scores, strict=True) if row.any()
            ]
            assert gated == [0, 0, 1, 0]
            assert masked == [0, 0, 0, 0]
            assert totals[2] == 0
            assert min(totals[:2] + totals[3:]) > 0
            for worker in manager.reward_loop_workers:
                ray.kill(worker)
        ray.shutdown()
    print("verl: ok")


if __name__ == "__main__":
    main()
