"""The contract of verl 0.9, exercised by an imitation of its caller."""

from __future__ import annotations

import ast
import asyncio
import functools
import inspect
import logging
import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import written

from acqsynth.integrations import verl
from acqsynth.integrations.scorer import REWARD_VARIABLE, TextScorer
from acqsynth.rewards import AcquisitionReward

text = functools.partial(written, "What is it?")


async def batch(texts, infos=None):
    """Scores a batch as verl's reward worker does: one task per sample and a single gather."""
    calls = [
        verl.compute_score(
            data_source=infos[i].get("of", "acqsynth") if infos else "acqsynth",
            solution_str=solution,
            ground_truth="",
            extra_info=infos[i] if infos else {"index": i},
            reward_router_address=None,
        )
        for i, solution in enumerate(texts)
    ]
    return await asyncio.gather(*(asyncio.create_task(call) for call in calls))


def collated(results):
    """Collates results as verl does: columns from the first sample's keys, and scores that fit a float32 tensor."""
    torch.tensor([result["score"] for result in results], dtype=torch.float32)
    return {key: np.array([result[key] for result in results]) for key in results[0]}


def test_64_coroutines_are_a_few_calls(built, number):
    results = asyncio.run(batch([text(i % 9) for i in range(64)]))
    assert [result["score"] for result in results] == [float(i % 9) for i in range(64)]
    assert sum(number.sizes) == 64
    assert len(number.sizes) <= 3
    assert len(built) == 1


def test_a_fixed_set_of_keys(built):
    columns = collated(asyncio.run(batch([text(5), text(-5), "broken", text(13), text(7)])))
    assert list(columns) == ["score", "masked", "gated", "number"]
    assert columns["masked"].tolist() == [0, 0, 0, 1, 0]
    assert columns["gated"].tolist() == [0, 1, 1, 0, 0]
    assert columns["number"][[0, 4]].tolist() == [5, 7]
    assert np.isnan(columns["number"][[1, 2, 3]]).all()
    scores = columns["score"]
    assert max(scores[1], scores[2]) < min(scores[0], scores[4])
    assert np.isfinite(scores).all()


@pytest.mark.parametrize(
    "info",
    [
        lambda name: {"prompt": [{"role": "user", "content": name}]},
        lambda name: {"index": np.int64(0), "of": name},
        lambda name: {"index": 0, "of": [name]},
    ],
)
def test_a_masked_sample_gets_the_mean_of_its_group(built, info):
    infos = [info(name) for name in "aaabb"]
    scores = [r["score"] for r in asyncio.run(batch([text(a) for a in (2, 6, 13, 50, 60)], infos))]
    assert scores == [2, 6, 4, 50, 60]


def test_a_scorer_that_raises_masks(built, caplog):
    with caplog.at_level(logging.ERROR):
        columns = collated(asyncio.run(batch([text(99)] * 3)))
    assert columns["masked"].tolist() == [1, 1, 1]
    assert columns["score"].tolist() == [0.5, 0.5, 0.5]
    assert "out of memory" in caplog.text
    assert asyncio.run(batch([text(3), text(5)]))[1]["score"] == 5
    assert asyncio.run(batch([text(99)]))[0]["score"] == 4  # the mean of the most recent scores
    built[0].score = lambda texts, groups: 1 / 0
    columns = collated(asyncio.run(batch([text(1), text(2)])))
    assert columns["masked"].tolist() == [1, 1]


def test_verl_finds_a_coroutine_function():
    assert inspect.iscoroutinefunction(verl.compute_score)


class Items:
    """The part of a DataProto that a reward manager uses."""

    def __init__(self, *items):
        self.items = items

    def __getitem__(self, key):
        return Items(*self.items[key]) if isinstance(key, slice) else self.items[key]


class TestRewardManager:
    def data(self, tokenizer, response, **other):
        ids = tokenizer(response)["input_ids"]
        prompt, padding = [0, 0, 5, 6], 7
        return Items(
            types.SimpleNamespace(
                batch={
                    "prompts": torch.tensor(prompt),
                    "responses": torch.tensor(ids + [tokenizer.pad_token_id] * padding),
                    "attention_mask": torch.tensor([0, 0, 1, 1] + [1] * len(ids) + [0] * padding),
                },
                non_tensor_batch={"data_source": "acqsynth", "reward_model": {"ground_truth": ""}, **other},
            )
        )

    def run(self, manager, *data):
        async def every():
            return await asyncio.gather(*(asyncio.create_task(manager.run_single(d)) for d in data))

        return asyncio.run(every())

    def test_one_batch_of_tokens(self, built, number, tokenizer):
        manager = verl.AcquisitionRewardManager({}, tokenizer, verl.compute_score, None, None)
        data = [self.data(tokenizer, text(i) + "</s>", uid=f"u{i // 4}") for i in range(8)]
        results = self.run(manager, *data)
        assert [result["reward_score"] for result in results] == [float(i) for i in range(8)]
        assert results[3]["reward_extra_info"] == {"score": 3.0, "masked": 0.0, "gated": 0.0, "number": 3.0}
        assert len(number.sizes) <= 2

    @pytest.mark.parametrize("key", ["uid", "raw_prompt"])
    def test_groups(self, built, tokenizer, key):
        manager = verl.AcquisitionRewardManager({}, tokenizer)
        groups = {
            "uid": ["a", "a", "b"],
            "raw_prompt": [np.array([{"role": "user", "content": c}]) for c in "aab"],
        }[key]
        data = [self.data(tokenizer, text(a), **{key: g}) for a, g in zip((4, 13, 50), groups, strict=True)]
        assert [r["reward_score"] for r in self.run(manager, *data)] == [4, 4, 50]

    def test_nothing_but_padding(self, built, tokenizer):
        [result] = self.run(verl.AcquisitionRewardManager({}, tokenizer), self.data(tokenizer, ""))
        assert result["reward_extra_info"]["gated"] == 1
        assert math.isnan(result["reward_extra_info"]["number"])


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, RuntimeError, "ACQSYNTH_REWARD is not set: expected package.module:attribute"),
        ("acqsynth.rewards", ValueError, "ACQSYNTH_REWARD: expected package.module:attribute, got 'acqsynth.rewards'"),
        ("acqsynth.nowhere:build", ModuleNotFoundError, "acqsynth.nowhere"),
        ("acqsynth.rewards:nothing", AttributeError, "nothing"),
        ("acqsynth.domains:__all__", TypeError, "to give a ComposedReward, got list"),
    ],
)
def test_a_missing_reward_raises(monkeypatch, value, error, message):
    if value is None:
        monkeypatch.delenv(REWARD_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(REWARD_VARIABLE, value)
    with pytest.raises(error, match=message):
        asyncio.run(batch([text(1)]))


def test_another_kind_of_reward_is_named():
    with pytest.raises(TypeError, match=r"reward: expected a ComposedReward or None, got AcquisitionReward\('entropy'"):
        TextScorer(AcquisitionReward("student"))


def test_no_trainer_is_imported():
    folder = Path(verl.__file__).parent
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & {"verl", "openrlhf", "trl", "ray"}, path
