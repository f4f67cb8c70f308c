"""Write prompts in verl's format; each shows the generator two seeds and asks for a new exercise.

python prompts.py prompts.parquet
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from datasets import Dataset

from acqsynth.domains import domain
from acqsynth.seeds import bundled


def main(arguments: Sequence[str] | None = None) -> None:
    (path,) = sys.argv[1:] if arguments is None else arguments
    maths, seeds = domain("math"), bundled("mathematics")
    rows = []
    for i in range(256):
        shown = [seeds[i % len(seeds)], seeds[(i * 7 + 1) % len(seeds)]]
        rows.append(
            {
                "data_source": "acqsynth",
                "prompt": maths.generator_prompt(shown),
                "reward_model": {"ground_truth": ""},
                "extra_info": {"index": i},  # groups the completions of a prompt
            }
        )
    Dataset.from_list(rows).to_parquet(path)


if __name__ == "__main__":
    main()
