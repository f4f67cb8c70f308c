#!/usr/bin/env bash
# GRPO in OpenRLHF 0.11 with the reward of reward.py, on one GPU. Run it in this folder.
# PROMPTS: a jsonl with a column "prompt" of chat messages, which ask for a new exercise.
set -euo pipefail
export PYTHONPATH=$PWD ACQSYNTH_REWARD=reward:build ACQSYNTH_STUDENT=${ACQSYNTH_STUDENT:-HuggingFaceTB/SmolLM2-135M-Instruct}
python -m openrlhf.cli.train_ppo_ray \
    --actor.model_name_or_path "${GENERATOR:-HuggingFaceTB/SmolLM2-135M-Instruct}" \
    --actor.num_gpus_per_node 1 --ref.num_gpus_per_node 1 \
    --train.colocate_all --train.batch_size 512 \
    --vllm.num_engines 1 --vllm.enable_sleep --vllm.gpu_memory_utilization 0.5 \
    --reward.remote_url "$PWD/reward.py" \
    --data.prompt_dataset "${PROMPTS:?a jsonl of prompts}" --data.input_key prompt --data.apply_chat_template \
    --rollout.batch_size 64 --rollout.n_samples_per_prompt 8 \
    --algo.advantage.estimator group_norm
