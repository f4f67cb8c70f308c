"""GRPO in TRL, rewarded by how much the student can still learn.

    python examples/grpo_reward.py --steps 20

The generator writes ``<question>...</question> <answer>...</answer>``. A single signal without gates makes the shortest
example but is easily hacked; train with ``grpo_composed.py`` instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import common
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from acqsynth.rewards import AcquisitionReward

ASK = (
    "Write a new exercise in arithmetic, in this format:\n"
    "<question>What is 12 + 30?</question>\n<answer>42</answer>"
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    parser = common.parser(__doc__)
    parser.add_argument("--acquisition", default="mutual_information")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=96, help="maximum tokens per completion")
    parser.add_argument("--output", default="grpo-output")
    options = parser.parse_args(arguments)

    arguments_of = {"mutual_information": common.LINEAR}
    reward = AcquisitionReward(options.student, options.acquisition, arguments=arguments_of.get(options.acquisition))
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": ASK}]}] * 2 * options.steps)
    trainer = GRPOTrainer(
        model=options.student,
        reward_funcs=[reward],
        train_dataset=prompts,
        args=GRPOConfig(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=options.tokens,
            learning_rate=1e-5,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=torch.cuda.is_available(),
            gradient_checkpointing=False,
        ),
    )
    trainer.train()
    steps = [row for row in trainer.state.log_history if "reward" in row]
    for row in steps:
        print(f"step {row['step']}: reward {row['reward']:.3f}, parsed {row[f'{reward.__name__}/parsed']:.0%}")
    return steps


if __name__ == "__main__":
    main()
