"""Synchronised ranks give the same rewards as one process that scores all completions."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

from fakes import PlainDomain

from acqsynth.rewards import ComposedReward, Diversity, NgramEmbedder
from acqsynth.rewards.gates import Check, New

TOPICS = ("a saddle", "a violin", "iron ore", "copper", "a window", "gardens", "a rocket", "tunnels")
# Groups of four on ranks of six: the second group spans both ranks.
PROMPTS = [prompt for prompt in "pqr" for _ in range(4)]
CALLS = [[f"What is {TOPICS[(3 * i + shift) % 8]} worth in {i} years?" for i in range(12)] for shift in (0, 1)]

RANK = """
import pickle, sys, torch.distributed as dist
rank, store, result, *sources = int(sys.argv[1]), *sys.argv[2:]
sys.path[:0] = sources
from test_sync import calls
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
pickle.dump(calls(slice(6 * rank, 6 * rank + 6), sync=True), open(result, "wb"))
dist.barrier()
dist.destroy_process_group()
"""


def worth(samples):
    return [float(sum(map(ord, sample.question)) % 13) for sample in samples]


worth.name = "worth"


def calls(part, sync):
    """Totals and state after two calls on a slice of the completions."""
    reward = ComposedReward(
        PlainDomain(),
        [worth, Diversity(NgramEmbedder(64))],
        gates=[New(), Check("odd", lambda sample: "copper" not in sample.question)],
        fusion="rank",
        sync=sync,
    )
    found = []
    for questions in CALLS:
        texts = [f"<question>{question}</question><answer>7</answer>" for question in questions]
        texts[7] = "broken"
        found.append(reward(PROMPTS[part], texts[part]))
    state = reward.state_dict()
    archive = state["parts"]["signal/diversity"]["archive"]["vectors"]
    return [*found, archive.tolist(), state["parts"]["gate/new"], state["history"], state["length_bins"]]


def test_two_ranks_are_one(tmp_path):
    here = Path(__file__).parent
    sources = [str(here), str(here.parent / "support")]
    results = [tmp_path / f"rank{rank}" for rank in range(2)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store"), str(result), *sources],
            stderr=subprocess.PIPE,
        )
        for rank, result in enumerate(results)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    first, second = (pickle.loads(result.read_bytes()) for result in results)
    whole = calls(slice(None), sync=False)
    for i in range(2):
        assert first[i] + second[i] == whole[i]
    assert len(set(whole[0])) > 6
    assert first[2:] == second[2:] == whole[2:]
    assert calls(slice(0, 6), sync=False)[0] != first[0]  # without sync, the first rank would split a group
