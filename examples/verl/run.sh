#!/usr/bin/env bash
# GRPO in verl 0.9 with the reward of reward.py, on one GPU. Run it in this folder.
set -euo pipefail
export PYTHONPATH=$PWD ACQSYNTH_REWARD=reward:build ACQSYNTH_STUDENT=${ACQSYNTH_STUDENT:-HuggingFaceTB/SmolLM2-135M-Instruct}
python prompts.py prompts.parquet
python -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_files=prompts.parquet data.val_files=prompts.parquet \
    data.train_batch_size=64 data.max_prompt_length=512 data.max_response_length=512 \
    actor_rollout_ref.model.path="${GENERATOR:-HuggingFaceTB/SmolLM2-135M-Instruct}" \
    actor_rollout_ref.actor.ppo_mini_batch_size=64 actor_rollout_ref.actor.use_dynamic_bsz=true \
    actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    reward.custom_reward_function.path=pkg://acqsynth.integrations.verl \
    reward.custom_reward_function.name=compute_score \
    reward.num_workers=1 \
    trainer.n_gpus_per_node=1 trainer.total_epochs=1 trainer.logger=console trainer.val_before_train=false
