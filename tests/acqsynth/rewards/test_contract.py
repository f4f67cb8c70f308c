"""The contract between reward and trainer beyond the values: evaluation, several ranks, several rewards."""

from __future__ import annotations

import asyncio
import copy
import logging
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from fakes import PlainDomain, Told

import acqcore
from acqsynth.domains import Sample
from acqsynth.rewards import AcquisitionReward, ComposedReward, combined, scoring
from acqsynth.rewards.gates import New
from acqsynth.rewards.scoring import Scored
from acqsynth.rewards.trl import warn_of_mask


class Words(PlainDomain):
    """Parses any text as a sample with the text as its question."""

    def parse(self, text):
        return Sample(question=text, answer="1") if text else None


WORDS = Words()


class Trainer:
    """The part of TRL's trainer that a reward can see."""

    def __init__(self, reward_funcs, training=True):
        self.model = torch.nn.Linear(1, 1).train(training)
        self.reward_funcs = reward_funcs
        self.metrics = {}

    def log_metric(self, name, value):
        self.metrics[name] = value

    def rewards(self, completions):
        [function] = self.reward_funcs[:1]
        return function(prompts=["p"] * len(completions), completions=completions, log_metric=self.log_metric)


TEXTS = ["name a large prime number below one hundred", "which of these two rivers is the longer one by far"]


class TestEvaluation:
    def test_leaves_archives_and_histories_as_they_are(self):
        reward = ComposedReward(WORDS, [], gates=[New()])
        evaluation = Trainer([reward], training=False)
        before = reward.state_dict() | {"worked": ["new", "parse"]}
        assert evaluation.rewards(TEXTS) == evaluation.rewards(TEXTS) == [1.0, 1.0]
        assert reward.state_dict() == before
        assert Trainer([reward]).rewards(TEXTS) == [1.0, 1.0]
        assert evaluation.rewards(TEXTS) == [0.0, 0.0]
        assert len(reward.gates[0]) == 2

    def test_a_call_without_a_trainer_counts(self):
        reward = ComposedReward(WORDS, [], gates=[New()])
        assert [reward(["p"] * 2, TEXTS, log_metric={}.__setitem__) for _ in range(2)] == [[1.0, 1.0], [0.0, 0.0]]

    def test_counts_in_no_statistic_of_a_single_acquisition(self, caplog):
        reward = AcquisitionReward("a path", "mutual_information", parse=lambda text: text or None)
        reward.scorer = Given(Scored({"mutual_information": [None, 1.0, 1.1] * 9}, [3] * 27, {}))
        reward.scorer.scored.stderr["mutual_information"] = [1.0] * 27
        for training, masked in ((False, 0), (True, 9)):
            Trainer([reward], training).rewards(["a"] * 27)
            assert reward.masked == masked
            assert ("estimation noise" in caplog.text) is training


class Slow(Told):
    """Waits, so that other threads run, and counts those that are in a call with it."""

    inside = most = 0

    def __call__(self, samples):
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.02)
        self.inside -= 1
        return [1.0 for _ in samples]

    def refresh(self, student):
        self([])


class TestThreads:
    @pytest.mark.parametrize("copied", [False, True])
    def test_take_turns(self, copied):
        """Otherwise copies written at the same time would all be new."""
        reward = ComposedReward(WORDS, [Slow("slow", {})], gates=[New()], fusion="raw", length_normalised=False)
        reward = copy.deepcopy(reward) if copied else reward
        with ThreadPoolExecutor(6) as pool:
            calls = [pool.submit(reward, ["p"] * 2, TEXTS) for _ in range(4)]
            calls += [pool.submit(reward.refresh, "another"), pool.submit(reward.score, TEXTS, ["p"] * 2)]
        totals = [found if isinstance(found, list) else found.total for call in calls if (found := call.result())]
        assert sorted(totals) == [[0.0, 0.0]] * 4 + [[1.0, 1.0]]
        assert (reward.signals[0].most, reward.scored, len(reward.gates[0])) == (1, 10, 2)

    def test_a_refresh_outlasts_a_load_of_the_student_before(self, monkeypatch):
        loading, refreshed = threading.Event(), threading.Event()

        def load(path, device):
            loading.set()
            refreshed.wait(0.2)
            return SimpleNamespace(student=path)

        monkeypatch.setattr(scoring, "load_student", load)
        scorer = scoring.Scorer("before", ["entropy"])
        with ThreadPoolExecutor(1) as pool:
            checked = pool.submit(scorer.check)
            loading.wait()
            scorer.refresh("after")
            refreshed.set()
            checked.result()
        assert scorer._student() == "after"


class Given:
    """A scorer with given values."""

    def __init__(self, scored):
        self.scored = scored

    def __call__(self, samples):
        return self.scored

    def check(self):
        """Passes, as no student is needed."""


class TestText:
    """Text that does not parse never outranks a sample, not even one scored on another rank."""

    @staticmethod
    def reward(monkeypatch, values, world, **options):
        reward = AcquisitionReward("a path", parse=lambda text: text or None, **options)
        scored = Scored({reward.acquisition: values}, [3] * len(values), {})
        reward.scorer = Given(scored)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: world > 1)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
        return reward

    REFERENCE = ("a",)

    @pytest.mark.parametrize("world", [1, 2])
    def test_of_a_cosine_gets_its_bound(self, world, monkeypatch):
        given = {"arguments": {"reference": self.REFERENCE}}
        for values in ([-0.0098], [0.5], []):
            reward = self.reward(monkeypatch, values, world, acquisition="influence", **given)
            found = reward(["p"] * (1 + len(values)), ["", *["a"] * len(values)])
            assert found == [-1.0, *values]

    @pytest.mark.parametrize("world", [1, 2])
    def test_of_values_above_zero_gets_zero(self, world, monkeypatch):
        reward = self.reward(monkeypatch, [0.3], world, acquisition="entropy")
        assert reward(["p", "p"], ["", "a"]) == [0.0, 0.3]

    EPIG_REFERENCE = acqcore.EpigReference(torch.zeros(2, 1, 4), "all", 0, {})

    @pytest.mark.parametrize(
        ("acquisition", "arguments"),
        [("influence", {"reference": REFERENCE, "similarity": "dot"}), ("epig", {"reference": EPIG_REFERENCE})],
    )
    def test_of_values_without_a_bound_needs_all_ranks(self, acquisition, arguments, monkeypatch):
        options = {"acquisition": acquisition, "arguments": arguments}
        message = f"{acquisition} have no lower bound, .* make the reward with sync=True"
        assert self.reward(monkeypatch, [-7.0], 1, **options)(["p", "p"], ["", "a"]) == [-7.0, -7.0]
        for values in ([-7.0], [7.0]):  # raises on every rank, as a single one would leave the others waiting
            with pytest.raises(RuntimeError, match=message):
                self.reward(monkeypatch, values, 2, **options)(["p", "p"], ["", "a"])

        def gather(found, own):
            found[:] = [own, -9.0]

        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        synced = self.reward(monkeypatch, [-7.0], 2, sync=True, **options)
        assert synced(["p", "p"], ["", "a"]) == [-9.0, -7.0]


def first(prompts, completions, **_):
    return [None if text == "?" else 1.0 for text in completions]


def second(prompts, completions, **_):
    return [-1.5 for _ in completions]


async def third(prompts, completions, **_):
    return [None if text == "!" else 10.0 for text in completions]


class TestSeveralRewards:
    def test_a_sample_masked_by_one_is_masked_by_all(self):
        function = combined([first, second], [1.0, 2.0], name="both")
        assert function.__name__ == "both"
        for each in (function, pickle.loads(pickle.dumps(function))):
            assert each(prompts=["p"] * 2, completions=["a", "?"]) == [-2.0, None]

    def test_with_a_coroutine(self):
        from trl.trainer.utils import is_async_callable

        function = combined([first, third])
        assert is_async_callable(function)
        assert not is_async_callable(combined([first, second]))
        assert asyncio.run(function(prompts=["p"] * 3, completions=["a", "?", "!"])) == [11.0, None, None]

    def test_coroutines_run_together(self):
        meet = asyncio.Barrier(2)

        async def waits(prompts, completions, **_):
            async with asyncio.timeout(5):
                await meet.wait()
            return [1.0]

        assert asyncio.run(combined([waits, waits])(prompts=["p"], completions=["a"])) == [2.0]

    @pytest.mark.parametrize(
        ("rewards", "weights", "message"),
        [
            ([], None, "rewards: expected at least one"),
            ([first], [1.0, 2.0], "weights: expected 1, one per reward, got 2"),
            ([first], ["1"], "weights: expected finite numbers, got '1'"),
            ([first], [None], "weights: expected finite numbers, got None"),
            ([first], [float("nan")], "weights: expected finite numbers, got nan"),
            *(
                (rewards, None, "rewards: expected a list of reward functions, got")
                for rewards in (first, "org/model", [first, "org/model"], [first, None])
            ),
        ],
    )
    def test_wrong_rewards_and_weights(self, rewards, weights, message):
        with pytest.raises((TypeError, ValueError), match=message):
            combined(rewards, weights)

    def test_one_value_a_completion(self):
        def single(prompts, completions, **_):
            return [1.0]

        with pytest.raises(ValueError, match="combined: single returned 1 rewards, expected 2"):
            combined([first, single])(prompts=["p"] * 2, completions=["a", "b"])

    def test_state_of_the_rewards(self):
        def made():
            return combined([first, combined([ComposedReward(WORDS, [], gates=[New()]), second])])

        saved, restored = made(), made()
        copied = copy.deepcopy(saved)
        assert saved(prompts=["p"], completions=["a long text"]) == [0.5]
        assert saved(prompts=["p"], completions=["a long text"]) == [-0.5]  # no longer new
        restored.load_state_dict(saved.state_dict())
        assert [made(prompts=["p"], completions=["a long text"]) for made in (saved, restored)] == [[-0.5]] * 2
        assert restored.state_dict() == saved.state_dict()
        assert copied(prompts=["p"], completions=["a long text"]) == [0.5]  # shares no state
        with pytest.raises(ValueError, match=r"state: expected that of rewards \['0'\], got \[\]"):
            combined([made(), third]).load_state_dict(combined([first, third]).state_dict())

    @pytest.mark.parametrize(("others", "warns"), [([second], True), ([], False)])
    def test_a_mask_beside_other_rewards_is_reported_once(self, others, warns, caplog):
        warn_of_mask.cache_clear()
        reward = ComposedReward(WORDS, [Told("fails", {"1": None})])
        trainer = Trainer([reward, *others])
        with caplog.at_level(logging.WARNING):
            assert trainer.rewards(TEXTS) == trainer.rewards(TEXTS) == [None, None]
        told = [record for record in caplog.records if "acqsynth.rewards.combined" in record.getMessage()]
        assert len(told) == int(warns)
