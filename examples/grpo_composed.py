"""GRPO with a composed reward: gates, then several signals fused within each group.

    python examples/grpo_composed.py --steps 20

Questions that do not parse, copy a seed, give their answer away or cannot be answered are rejected. The others are
scored by mutual information and novelty. If the domain can verify answers, add ``Learnability``.
"""

from __future__ import annotations

from collections.abc import Sequence

import common
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from acqsynth import write
from acqsynth.domains import domain
from acqsynth.rewards import ComposedReward, Diversity, NgramEmbedder, acquisition_signals, default_gates
from acqsynth.seeds import bundled


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    parser = common.parser(__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=96, help="maximum tokens per completion")
    parser.add_argument("--output", default="grpo-output")
    options = parser.parse_args(arguments)

    maths, seeds = domain("math"), bundled("mathematics")
    information = acquisition_signals(options.student, {"mutual_information": common.LINEAR}, maths)
    reward = ComposedReward(
        maths,
        [*information, Diversity(NgramEmbedder())],
        gates=default_gates(maths, seeds=seeds),
        fusion="z",
        weights={"mutual_information": 1.0, "diversity": 0.1},
    )
    # As earlier turns of the chat: shown within the request, small models seldom follow the format.
    prompts = write.prompts(maths, seeds, 2 * options.steps, shown=2, turns=True, seed=0)
    trainer = GRPOTrainer(
        model=options.student,
        reward_funcs=[reward],
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        args=GRPOConfig(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=options.tokens,
            learning_rate=1e-5,
            scale_rewards="none",  # fusion z already scales rewards
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
        rejected = {key.rpartition("/")[2]: value for key, value in row.items() if "/gated/" in key and value}
        print(f"step {row['step']}: reward {row['reward']:.3f}, rejected by gate {rejected}")
    return steps


if __name__ == "__main__":
    main()
