"""Reliability of a signal within groups: its value, its log entry and the warning."""

from __future__ import annotations

import asyncio
import functools
import logging
import statistics

import numpy as np
import pytest
from fakes import Told, written

import acqcore
from acqsynth.parsing import parse_sample
from acqsynth.rewards import AcquisitionReward, ComposedReward
from acqsynth.rewards.batch import ENOUGH, Spread
from acqsynth.rewards.scoring import Scored

GROUPS, MEMBERS = 400, 8


text = functools.partial(written, "What is it?")


def composed(domain, values, stderr):
    return ComposedReward(domain, [Told("noisy", values, stderr)], length_normalised=False)


def logged(reward, n, group=MEMBERS):
    metrics = {}
    prompts = [f"p{i // group}" for i in range(n)]
    reward(prompts, [text(i) for i in range(n)], log_metric=metrics.__setitem__)
    return metrics


@pytest.mark.parametrize("noise", [0.25, 1.0, 3.0])
def test_reliability_is_the_correlation_of_two_measurements(noise):
    rng = np.random.default_rng(0)
    level = 10 * rng.standard_normal((GROUPS, 1))  # variation between groups, which must not count
    true = level + rng.standard_normal((GROUPS, MEMBERS))
    sizes = noise**0.5 * rng.uniform(0.5, 1.5, true.shape)  # per-sample errors
    first, second = (true + sizes * rng.standard_normal(true.shape) for _ in range(2))
    groups = np.repeat(np.arange(GROUPS), MEMBERS).tolist()
    found = Spread.within(first.flatten().tolist(), sizes.flatten().tolist(), groups).reliability
    centred = [(x - x.mean(axis=1, keepdims=True)).flatten() for x in (first, second)]
    assert found == pytest.approx(1 / (1 + (sizes**2).mean()), abs=0.03)
    assert found == pytest.approx(np.corrcoef(*centred)[0, 1], abs=0.04)


def test_pools_variances_before_the_ratio():
    values = [1.0, 3.0, 10.0, 10.0, 14.0, 7.0]
    stderr = [0.5, 0.5, 1.0, 2.0, 1.0, 9.0]
    spread = Spread.within(values, stderr, ["a", "a", "b", "b", "b", "alone"])
    total = 1 * statistics.variance(values[:2]) + 2 * statistics.variance(values[2:5])
    noise = 1 * 0.25 + 2 * (1 + 4 + 1) / 3
    assert spread == Spread(pytest.approx(noise), pytest.approx(total), 3)
    assert spread.reliability == pytest.approx(1 - noise / total)
    assert (spread + spread).reliability == spread.reliability


def test_samples_without_a_value_or_an_error_are_left_out():
    whole = Spread.within([1.0, 2.0, 5.0], [0.1, 0.2, 0.3], "ppp")
    holes = Spread.within([1.0, None, 2.0, 9.0, 5.0], [0.1, 0.1, 0.2, None, 0.3], "ppppp")
    assert holes == whole


@pytest.mark.parametrize(
    ("values", "stderr", "expected"),
    [
        ([1.0, 2.0], [50.0, 50.0], 0.0),  # closer together than their errors, by chance
        ([1.0, 2.0], [0.0, 0.0], 1.0),
        ([2.0, 2.0], [0.1, 0.1], None),  # nothing to rank
        ([1.0], [0.1], None),
        ([], [], None),
    ],
)
def test_stays_between_0_and_1(values, stderr, expected):
    assert Spread.within(values, stderr, ["p"] * len(values)).reliability == expected


def test_a_composed_reward_logs_it(domain):
    values = {str(i): float(i % MEMBERS) for i in range(16)}
    metrics = logged(composed(domain, values, dict.fromkeys(values, 0.5)), 16)
    assert metrics["reward/noisy/reliability"] == pytest.approx(1 - 0.25 / statistics.variance(range(MEMBERS)))
    rewards = composed(domain, values, dict.fromkeys(values, 0.5)).score([text(0), "broken"], ["p", "p"])
    assert rewards.stderr == {"noisy": [0.5, None]}
    assert rewards.groups == ["p", "p"]
    assert "reward/noisy/reliability" not in logged(composed(domain, values, None), 16)


def test_a_failed_signal_is_not_asked_for_its_errors(domain):
    reward = composed(domain, {}, {})
    assert reward.score([text(0), text(1)], ["p", "p"]).total == [None, None]
    assert reward.signals[0].asked_errors == 0
    assert reward.failures == 1


def test_warns_once_of_a_signal_that_is_mostly_noise(domain, caplog):
    values = {str(i): float(i % MEMBERS) for i in range(64)}  # variance 6
    reward = composed(domain, values, dict.fromkeys(values, 2.1))
    with caplog.at_level(logging.WARNING):
        logged(reward, MEMBERS)
        assert MEMBERS - 1 < ENOUGH
        assert not caplog.records  # too few to warn
        for _ in range(4):
            logged(reward, 32)
    [record] = caplog.records
    expected = 1 - 2.1**2 / 6
    assert record.getMessage() == (
        f"reward: reliability of 'noisy' within groups is {expected:.2f}: {100 * (1 - expected):.0f} % of its spread "
        "there is estimation noise. Raise its probes or draws; for mutual_information, form='linear' with more "
        "probes costs least"
    )


@pytest.mark.parametrize(("error", "update"), [(1.7, True), (3.0, False)])
def test_does_not_warn_of_a_reliable_signal_or_in_a_probe(domain, caplog, error, update):
    values = {str(i): float(i % MEMBERS) for i in range(64)}
    reward = composed(domain, values, dict.fromkeys(values, error))  # of 1.7: reliability 0.52
    with caplog.at_level(logging.WARNING):
        reward.score([text(i) for i in range(64)], [i // MEMBERS for i in range(64)], update=update)
    assert not caplog.records


def test_an_acquisition_reward_logs_it(model, tokenizer):
    arguments = {"form": "linear", "probes": 4, "layers": 1}
    reward = AcquisitionReward(model, "mutual_information", arguments=arguments, tokenizer=tokenizer)
    texts = [f"<question>What is {i} + {7 * i}?</question><answer>{8 * i}</answer>" for i in range(8)]
    metrics = {}
    columns = {}
    values = reward(
        ["p"] * 4 + ["q"] * 5, [*texts, "broken"], log_metric=metrics.__setitem__, log_extra=columns.__setitem__
    )
    samples = [parse_sample(t) for t in texts]
    asked = {"mutual_information": arguments}
    scores = acqcore.score(model, samples, "mutual_information", acquisition_args=asked, tokenizer=tokenizer)
    stderr = scores.stderr["mutual_information"].tolist()
    shown = columns["acquisition_mutual_information_stderr"]
    assert shown[:8] == pytest.approx(stderr, rel=1e-4)
    assert shown[8] is None
    expected = Spread.within(values[:8], stderr, ["p"] * 4 + ["q"] * 4).reliability
    assert metrics["acquisition_mutual_information/reliability"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("remote", [False, True])
def test_every_call_logs_the_column_of_standard_errors(model, tokenizer, remote):
    """Otherwise TRL's table shows those of an earlier call, or has columns of different lengths."""
    options = {"arguments": {"form": "linear", "probes": 2, "layers": 1}}
    options |= {"url": "http://scorer:8000"} if remote else {"student": model, "tokenizer": tokenizer}
    reward = AcquisitionReward(acquisition="mutual_information", **options)
    if remote:
        answers = iter([Scored({"mutual_information": [2.0]}, [3], {"mutual_information": [0.5]})])

        async def score(samples, acquisitions, **spec):
            return next(answers, Scored({"mutual_information": [None] * len(samples)}, [0] * len(samples), {}))

        reward.client.score = score
    logs = []
    for completions in ([text(1)], ["broken"]) if remote else (["broken"], [text(1)]):
        logs.append(columns := {})
        values = reward(["p"], completions, log_extra=columns.__setitem__)
        assert (asyncio.run(values) if remote else values)[0] is not None
    given, broken = logs if remote else reversed(logs)
    assert broken["acquisition_mutual_information_stderr"] == [None]
    assert given["acquisition_mutual_information_stderr"][0] > 0


def test_an_exact_acquisition_has_none(model, tokenizer):
    metrics = {}
    reward = AcquisitionReward(model, "entropy", tokenizer=tokenizer)
    reward(["p", "p"], [text(1), text(2)], log_metric=metrics.__setitem__)
    assert "acquisition_entropy/mean" in metrics
    assert "acquisition_entropy/reliability" not in metrics
