"""verifiers scores its own traces with the function named in a task's configuration.

Run by ``make test-trainers`` in an environment with verifiers 0.4.0.
"""

# the folder of this file comes first
from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import verifiers.v1 as vf
from student import TEXTS, make

from acqsynth.integrations.scorer import scorer_from_environment
from acqsynth.integrations.verifiers import acquisition

NAMED = {"acquisition": {"fn": "acqsynth.integrations.verifiers:acquisition"}}


class Decorated(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    """A reward as a method."""

    @vf.reward(weight=0.5)
    async def worth(self, trace: vf.Trace) -> float:
        return await acquisition(self.data, trace)


def traces(task: Any) -> list[Any]:
    """One trace per text, as a finished rollout leaves it."""
    found = []
    for text in TEXTS:
        trace = vf.Trace(task={"type": type(task).__name__, "data": task.data}, agent={"name": "policy", "config": {}})
        trace.root_reply = text
        found.append(trace)
    return found


async def scored(task: Any) -> list[Any]:
    made = traces(task)
    await asyncio.gather(*(task.score(trace) for trace in made))
    return made


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        os.environ |= {"ACQSYNTH_STUDENT": folder, "ACQSYNTH_REWARD": "student:build"}
        scorer = scorer_from_environment()
        sizes: list[int] = []
        function = scorer.batcher.function
        scorer.batcher.function = lambda lane, items: sizes.append(len(items)) or function(lane, items)
        data = vf.TaskData(idx=0, prompt="new")
        for task, name, weight in (
            (vf.Task(data, vf.TaskConfig(rewards=NAMED)), "acquisition", 1.0),
            (Decorated(data, vf.TaskConfig()), "worth", 0.5),
        ):
            sizes.clear()
            made = asyncio.run(scored(task))
            rewards = [trace.rewards[name].score for trace in made]
            print(f"verifiers {version('verifiers')}, {name}: {[round(r, 4) for r in rewards]}, batches of {sizes}")
            assert sizes == [len(TEXTS)]
            assert rewards[2] == 0
            assert min(rewards[:2] + rewards[3:]) > 0
            assert [trace.reward for trace in made] == [weight * reward for reward in rewards]
    print("verifiers: ok")


if __name__ == "__main__":
    main()
