"""Score samples on a server, first directly and then through a reward as called by a trainer.

acqsynth serve --student HuggingFaceTB/SmolLM2-135M-Instruct --port 8000
python examples/remote_scorer/client.py --url http://127.0.0.1:8000
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Sequence

import httpx

from acqsynth.parsing import as_text
from acqsynth.rewards import AcquisitionReward

SAMPLES = [
    {"prompt": "The capital of France is", "completion": " Paris."},
    {"prompt": "The capital of Burkina Faso is", "completion": " Ouagadougou."},
]


def main(arguments: Sequence[str] | None = None) -> tuple[list[float], list[float | None]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--token", default=os.environ.get("ACQSYNTH_TOKEN"))
    options = parser.parse_args(arguments)
    headers = {"Authorization": f"Bearer {options.token}"} if options.token else {}

    body = {"samples": SAMPLES, "acquisitions": ["entropy"]}
    answer = httpx.post(f"{options.url}/score", json=body, headers=headers, timeout=60)
    answer.raise_for_status()
    scores = answer.json()["values"]["entropy"]
    print("POST /score:", scores)

    reward = AcquisitionReward(url=options.url, acquisition="entropy", parse=as_text, token=options.token)
    texts = ["".join(sample.values()) for sample in SAMPLES]
    rewards = asyncio.run(reward(prompts=[""] * len(texts), completions=texts))
    print("as a reward:", rewards)
    return scores, rewards


if __name__ == "__main__":
    main()
