"""Synchronised ranks give the same rewards as one process that scores all completions."""

from __future__ import annotations

import multiprocessing

import torch
from fakes import PlainDomain

from acqsynth.rewards import ComposedReward, Diversity, NgramEmbedder
from acqsynth.rewards.batch import BrokenPartError
from acqsynth.rewards.gates import Check, New
from acqsynth.rewards.trl import warn_of_ranks

TOPICS = ("a saddle", "a violin", "iron ore", "copper", "a window", "gardens", "a rocket", "tunnels")
# Groups of four on ranks of six: the second group spans both ranks.
PROMPTS = [prompt for prompt in "pqr" for _ in range(4)]
CALLS = [[f"What is {TOPICS[(3 * i + shift) % 8]} worth in {i} years?" for i in range(12)] for shift in (0, 1)]


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


def on_rank(rank, store):
    """The calls of one of two ranks, each of which scores half of the completions."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = calls(slice(6 * rank, 6 * rank + 6), sync=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return found


def broken_on_first(rank, store):
    """The error that each of two ranks raises if a signal fails on the first one only."""

    def fails(samples):
        if rank == 0:
            raise OSError("no such student")
        return [1.0] * len(samples)

    fails.name = "fails"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    reward = ComposedReward(PlainDomain(), [fails], sync=True)
    try:
        reward(["p"] * 4, [f"<question>{question}</question><answer>7</answer>" for question in CALLS[0][:4]])
    except BrokenPartError as error:
        return str(error)
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_that_do_not_share_are_reported_once(monkeypatch, caplog):
    warn_of_ranks.cache_clear()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    calls(slice(6), sync=False)
    assert caplog.text.count("make the reward with sync=True") == 1


def test_all_ranks_raise_the_error_of_one(tmp_path):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        told = pool.starmap_async(broken_on_first, [(rank, tmp_path / "store") for rank in (0, 1)]).get(60)
    assert told == ["reward: 'fails' failed on each of the 3 samples tried: OSError: no such student"] * 2


def test_two_ranks_are_one(tmp_path):
    with multiprocessing.get_context("fork").Pool(2) as pool:  # forking avoids repeated imports
        first, second = pool.starmap_async(on_rank, [(rank, tmp_path / "store") for rank in (0, 1)]).get(120)
    whole = calls(slice(None), sync=False)
    for i in range(2):
        assert first[i] + second[i] == whole[i]
    assert len(set(whole[0])) > 6
    assert first[2:] == second[2:] == whole[2:]
    assert calls(slice(0, 6), sync=False)[0] != first[0]  # without sync, the first rank would split a group
