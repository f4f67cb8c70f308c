"""The published total, its defects, and the composed reward without them."""

from __future__ import annotations

import pytest
from fakes import Told

from acqsynth.rewards import ComposedReward, PaperReward
from acqsynth.rewards.gates import Length, Sound

QUESTION = "<question>What is it?</question>"


@pytest.fixture
def constant():
    return Told("constant", {"7": 2.0})


def test_signal_and_bonus(domain, constant):
    reward = PaperReward(domain, constant)
    texts = [QUESTION + "<answer>7</answer>", "no sample"]
    rewards = reward.score(texts, ["p", "p"])
    assert rewards.total == pytest.approx([2 + 1 - 0.018, 0])
    assert rewards.components == {"constant": [2.0, None]}
    assert rewards.passed == [True, False]
    assert reward(["p", "p"], texts) == rewards.total


def test_long_reasoning_swamps_the_signal(domain, constant):
    short = QUESTION + "<answer>7</answer>"
    long = QUESTION + f"<reasoning>{'It is so. ' * 400}</reasoning><answer>7</answer>"
    released = PaperReward(domain, constant).score([short, long, "no sample"], ["p"] * 3).total
    assert released[0] > 2.9
    assert released[1] < 0  # below text that does not parse
    assert released[1] < released[2]
    corrected = ComposedReward(domain, [constant], fusion="raw").score([short, long, "no sample"], ["p"] * 3).total
    assert corrected[0] == pytest.approx(corrected[1], abs=1e-9)
    assert corrected[2] < corrected[1]


def test_the_bonus_can_be_traded_for_the_signal(domain):
    """A large signal outweighs a failed check in the published total, but not a gate in the composed reward."""
    bad, good = "<question>What.</question><answer>7</answer>", QUESTION + "<answer>7</answer>"

    def large(samples):
        return [1e3 if "?" not in sample.question else 1.0 for sample in samples]

    large.name = "large"
    released = PaperReward(domain, large).score([bad, good], ["p", "p"]).total
    assert released[0] > 900 > released[1]
    corrected = ComposedReward(domain, [large], gates=[Sound(domain)]).score([bad, good], ["p", "p"]).total
    assert corrected[0] < corrected[1]


def test_every_exception_is_minus_five(domain, constant):
    texts = [QUESTION + "<answer>7</answer>", QUESTION + "<answer>8</answer>"]
    for update in (True, False):
        released = PaperReward(domain, constant)
        assert released.score(texts, ["p", "p"], update=update).total == [pytest.approx(2.982), -5]
        assert released.scored == 2 * update
    corrected = ComposedReward(domain, [constant])
    assert corrected.score(texts, ["p", "p"]).total == [0.5, None]
    assert corrected.masked == 1


def test_format_only_is_a_constant(domain):
    texts = [QUESTION + "<answer>7</answer>", "no sample", QUESTION * 2]
    released = PaperReward(domain, None).score(texts, ["p"] * 3).total
    assert len(set(released)) == 1
    corrected = ComposedReward(domain, [], gates=[Length()]).score(texts, ["p"] * 3).total
    assert corrected == [1, 0, 0]
