"""The contract of OpenRLHF 0.11, exercised by an imitation of its caller."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fakes import written

from acqsynth.integrations.openrlhf import response_of, reward_func
from acqsynth.integrations.scorer import REWARD_VARIABLE

PROMPT = "<|im_start|>user\nLike this: <question>A?</question><answer>1</answer><|im_end|>\n<|im_start|>assistant\n"


def text(answer):
    return written("What is it?", answer) + "<|im_end|>"


def one(answer):
    """Calls the reward as OpenRLHF does for one response, with lists of length one."""
    return reward_func([PROMPT + text(answer)], [PROMPT], [""])


def checked(result, n):
    assert set(result) == {"rewards", "scores", "extra_logs"}
    assert {*result["extra_logs"]} >= {"masked", "gated"}
    for values in (result["rewards"], result["scores"], *result["extra_logs"].values()):
        assert values.shape == (n,)
        assert values.dtype == torch.float32
        assert values.isfinite().all()
    assert 0 <= result["scores"].min() <= result["scores"].max() <= 1
    return result


def test_16_threads_are_a_few_calls(built, number):
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(one, [i % 9 for i in range(16)]))
    assert [checked(result, 1)["rewards"].item() for result in results] == [i % 9 for i in range(16)]
    assert sum(number.sizes) == 16
    assert len(number.sizes) <= 3
    assert len(built) == 1


@pytest.mark.parametrize("built", ["raw", "quantile"], indirect=True)
def test_a_list_of_several(built):
    queries = [PROMPT + text(a) for a in (5, -5, 13, 7)] + [PROMPT + "broken"]
    result = checked(reward_func(queries, [PROMPT] * 5, [""] * 5), 5)
    rewards, logs = result["rewards"], result["extra_logs"]
    assert logs["masked"].tolist() == [0, 0, 1, 0, 0]
    assert logs["gated"].tolist() == [0, 1, 0, 0, 1]
    assert logs["number"].tolist() == [5, 0, 0, 7, 0]
    assert max(rewards[1], rewards[4]) < rewards[0] < rewards[3]
    assert result["scores"].argsort().tolist() == rewards.argsort().tolist()
    if built[0].fusion == "quantile":
        assert torch.equal(result["scores"], rewards)


def test_a_scorer_that_raises_masks(built, caplog):
    with caplog.at_level(logging.ERROR):
        result = checked(one(99), 1)
    assert result["extra_logs"]["masked"].tolist() == [1]
    assert "out of memory" in caplog.text
    assert one(3)["rewards"].tolist() == [3]
    built[0].score = lambda texts, groups: 1 / 0
    result = checked(one(4), 1)
    assert (result["rewards"].tolist(), result["extra_logs"]["masked"].tolist()) == ([3], [1])


@pytest.mark.parametrize("value", [None, "no.such:thing", "nonsense"])
def test_a_missing_reward_never_raises(monkeypatch, caplog, value):
    if value is None:
        monkeypatch.delenv(REWARD_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(REWARD_VARIABLE, value)
    with caplog.at_level(logging.ERROR):
        result = checked(one(4), 1)
    assert result["extra_logs"]["masked"].tolist() == [1]
    assert "the reward failed, 1 responses are masked" in caplog.text


def test_lists_of_different_length_never_raise(built):
    assert checked(reward_func([PROMPT + text(4)] * 2, [PROMPT], [""]), 2)["extra_logs"]["masked"].tolist() == [1, 1]
    empty = reward_func([], [], [])
    assert {len(v) for v in (empty["rewards"], empty["scores"], *empty["extra_logs"].values())} == {0}


@pytest.mark.parametrize(
    "query",
    [
        PROMPT + text(4),
        "<s>" + PROMPT + text(4),  # a leading special token
        PROMPT.replace("\n", "") + text(4),  # white space lost in decoding
        "<s> " + PROMPT.replace("\n", " \n") + text(4),
    ],
)
def test_the_prompt_is_stripped(built, query):
    """The prompt contains an example; unless it is stripped, the tags repeat and the response does not parse."""
    result = checked(reward_func([query], [PROMPT], [""]), 1)
    assert result["rewards"].tolist() == [4]
    assert response_of(query, PROMPT).strip() == text(4)


def test_a_prompt_that_is_not_there_masks(built, caplog):
    with caplog.at_level(logging.ERROR):
        queries = ["something else " + text(4), PROMPT + text(8), None]
        result = checked(reward_func(queries, [PROMPT] * 3, [""] * 3), 3)
    assert result["extra_logs"]["masked"].tolist() == [1, 0, 1]
    assert result["rewards"].tolist() == [8, 8, 8]  # the mean of this call, wherever a lost query stands
    assert "2 of 3 queries do not contain their prompt" in caplog.text
    assert response_of("a response", "") == "a response"
    assert response_of("a response", "  \n ") is not None
