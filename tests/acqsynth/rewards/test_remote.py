"""``AcquisitionReward(url=...)`` returns the same values as in process and honours TRL's contract."""

from __future__ import annotations

import asyncio
import copy
import functools
import pickle
import sys

import httpx
import pytest
from fakes import GOOD, LONGER, trained
from trl.trainer.utils import get_callable_name, is_async_callable

import acqcore
from acqsynth.rewards import AcquisitionReward
from acqsynth.rewards.acquisition import RemoteAcquisitionReward
from acqsynth.serve.app import Service, create_app
from acqsynth.serve.client import ScorerError
from acqsynth.serve.students import Students

COMPLETIONS = [GOOD, "<question>What is 6 * 7?</question> It is 42.", LONGER, [{"role": "assistant", "content": GOOD}]]
URL = "http://scorer:8000"


@pytest.fixture
def url(model, tokenizer, on_socket):
    """URL of a server with a copy of the model."""
    student = acqcore.Student.from_model(copy.deepcopy(model).eval(), tokenizer=tokenizer)
    return on_socket(create_app(Service(Students(student, "first"))))


def call(reward, completions=COMPLETIONS, **log):
    n = len(completions)
    return reward(prompts=["Write."] * n, completions=completions, completion_ids=[[0]] * n, subject=["x"] * n, **log)


@pytest.mark.parametrize(
    "options",
    [
        {"acquisition": "entropy"},
        {"acquisition": "loss", "reduction": "sum", "max_length": 20},
        {"acquisition": "mutual_information", "arguments": {"layers": 1, "draws": 3}},
        {"acquisition": "mutual_information", "arguments": {"form": "linear", "layers": 1, "probes": 3}},
        {"acquisition": "entropy", "parse": str},
    ],
)
def test_the_numbers_are_those_of_process(url, model, tokenizer, options):
    local, remote = AcquisitionReward(model, tokenizer=tokenizer, **options), AcquisitionReward(url=url, **options)
    logs = [{}, {}]
    expected = call(local, log_extra=logs[0].__setitem__, log_metric=logs[0].__setitem__)
    found = asyncio.run(call(remote, log_extra=logs[1].__setitem__, log_metric=logs[1].__setitem__))
    assert found == expected
    assert all(isinstance(value, float) for value in found)
    assert logs[0] == logs[1]


def test_unscorable_samples_are_masked_as_in_process(url, model, tokenizer):
    local = AcquisitionReward(model, tokenizer=tokenizer, parse=str)
    remote = AcquisitionReward(url=url, parse=str)
    expected = call(local, ["a fox", "x"])
    assert asyncio.run(call(remote, ["a fox", "x"])) == expected
    assert expected[1] is None
    assert local.masked == remote.masked == 1
    assert asyncio.run(call(remote, [])) == []


def test_called_without_a_trainer_it_waits(url, model, tokenizer):
    """Works in scripts and in notebooks, whose cells run inside an event loop."""
    local, remote = AcquisitionReward(model, tokenizer=tokenizer), AcquisitionReward(url=url)
    prompts = ["Write."] * len(COMPLETIONS)
    expected = local.rewards(prompts, COMPLETIONS)
    assert expected == local(prompts, COMPLETIONS)

    async def cell():
        return remote.rewards(prompts, COMPLETIONS)

    assert remote.rewards(prompts, COMPLETIONS) == asyncio.run(cell()) == expected


def test_a_server_that_is_down_masks_and_counts(monkeypatch):
    def refuse(request):
        raise httpx.ConnectError("refused")

    client = functools.partial(httpx.AsyncClient, transport=httpx.MockTransport(refuse))
    monkeypatch.setattr(httpx, "AsyncClient", client)
    reward = AcquisitionReward(url=URL, client={"attempts": 2, "backoff": 0.001})
    metrics = {}
    assert asyncio.run(call(reward, log_metric=metrics.__setitem__)) == [None, 0.0, None, None]
    assert reward.masked == 3
    assert metrics["acquisition_entropy/masked"] == 0.75


@pytest.mark.parametrize(("prompts", "completions"), [("a", [GOOD]), (["a"], GOOD)])
def test_a_string_is_not_a_list(prompts, completions):
    with pytest.raises(TypeError, match="expected a list with one entry for each completion, got a string"):
        AcquisitionReward(url=URL).rewards(prompts, completions)


def test_an_acquisition_that_the_server_does_not_know_is_raised(url):
    with pytest.raises(ScorerError, match=r"422 acquisitions\.0: .*unknown 'influence', expected one of loss"):
        asyncio.run(call(AcquisitionReward(url=url, acquisition="influence")))


def test_trl_sees_a_coroutine_and_a_name():
    remote, local = AcquisitionReward(url=URL, acquisition="loss"), AcquisitionReward(None, "loss")
    assert isinstance(remote, RemoteAcquisitionReward)
    assert (is_async_callable(remote), is_async_callable(local)) == (True, False)
    assert get_callable_name(remote) == get_callable_name(local) == "acquisition_loss"
    pickled = pickle.loads(pickle.dumps(remote))
    assert isinstance(pickled, RemoteAcquisitionReward)
    assert pickled.client.url == URL
    assert repr(pickled) == "RemoteAcquisitionReward('loss', name='acquisition_loss')"


def test_grpo_awaits_two_at_once(url, model, tokenizer, tmp_path):
    together = []

    class Counted(RemoteAcquisitionReward):
        now = 0

        async def __call__(self, **columns):
            Counted.now += 1
            together.append(Counted.now)
            await asyncio.sleep(0.05)
            rewards = await super().__call__(**columns)
            Counted.now -= 1
            return rewards

    rewards = [Counted(acquisition=name, url=url, parse=str) for name in ("entropy", "loss")]
    options = {"num_generations": 4, "max_completion_length": 6, "max_steps": 1}
    [log] = trained(model, tokenizer, rewards, tmp_path, **options)
    assert log["rewards/acquisition_loss/mean"] > 0
    assert log["rewards/acquisition_entropy/mean"] > 0
    assert max(together) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"url": "scorer"}, ValueError, "url: expected http://host:port"),
        ({"url": URL, "student": "path"}, ValueError, "student: expected None with url"),
        ({"url": URL, "max_length": 1}, ValueError, "max_length: expected at least 2 tokens, got 1"),
        ({"url": URL, "max_length": None}, ValueError, "max_length: expected at least 2 tokens, got None"),
        ({"url": URL, "parse": 3}, TypeError, "parse: expected a function of a text, got int"),
        ({"url": URL, "device": "cuda"}, TypeError, "device"),
        ({"url": URL, "client": {"attempts": 0}}, ValueError, "attempts: expected an int >= 1, got 0"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        AcquisitionReward(**options)


def test_without_httpx_it_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "acqsynth.serve.client", raising=False)
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ModuleNotFoundError, match=r'needs httpx, .*run pip install "acqcore\[serve\]"'):
        AcquisitionReward(url=URL)
