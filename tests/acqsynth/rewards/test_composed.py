"""The composed reward: order of its steps, contract with TRL, failures and state."""

from __future__ import annotations

import functools
import io
import logging
import pickle
import statistics
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import Log, Told, trained, written

import acqcore
from acqsynth.domains import Sample
from acqsynth.rewards import (
    ComposedReward,
    Diversity,
    Learnability,
    NgramEmbedder,
    SampledAnswers,
    acquisition_signals,
)
from acqsynth.rewards.batch import BrokenPartError
from acqsynth.rewards.fusion import BOUNDED, METHODS, fuse
from acqsynth.rewards.gates import Check, Labelled, New, sample_gates
from acqsynth.rewards.reward import DEFAULT_WEIGHTS
from acqsynth.write import passing

text = functools.partial(written, "What is it?")
TEXTS = [text(i) for i in range(6)]
GROUPS = ["p", "p", "p", "q", "q", "q"]
VALUES: dict[str, float | None] = {str(i): v for i, v in enumerate([1.0, 5.0, 2.0, 10.0, 30.0, 20.0])}


def plain(domain, *signals, **options):
    return ComposedReward(domain, signals, **({"length_normalised": False} | options))


@pytest.mark.parametrize("method", METHODS)
def test_totals_are_the_fused_signals(domain, method):
    other = {str(i): 0.1 * (i % 4) for i in range(6)}
    reward = plain(domain, Told("a", VALUES), Told("b", other), fusion=method, weights={"b": -2})
    rewards = reward.score(TEXTS, GROUPS)
    expected = fuse({"a": list(VALUES.values()), "b": list(other.values())}, GROUPS, method, {"a": 1, "b": -2})
    assert rewards.total == pytest.approx(expected)
    assert rewards.components == {"a": list(VALUES.values()), "b": list(other.values())}
    assert rewards.gates == {"parses": [True] * 6}
    assert [sample.answer for sample in rewards.samples if sample] == list("012345")
    assert rewards.lengths == [12] * 6
    assert rewards.passed == [True] * 6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_gated_sample_is_below_every_valid_one_of_its_group(domain, method, sign):
    values = {answer: value and sign * (value - 12) for answer, value in VALUES.items()}
    odd = Check("odd", lambda sample: sample.answer not in "14")
    signal = Told("a", values)
    reward = plain(domain, signal, gates=[odd], fusion=method)
    texts = [*TEXTS, "no sample", None]
    rewards = reward.score(texts, [*GROUPS, "p", "alone"])
    assert signal.asked == [["0", "2", "3", "5"]]  # gated samples are not scored
    assert rewards.passed == [True, False, True, True, False, True, False, False]
    assert rewards.gates["parses"] == [True] * 6 + [False] * 2
    assert rewards.gates["odd"] == [True, False, True, True, False, True, True, True]  # only the first gate counts
    total = rewards.total
    assert max(total[1], total[6]) < min(total[0], total[2])
    assert total[4] < min(total[3], total[5])
    assert total[7] < min(total[i] for i in (0, 2, 3, 5))
    if method in BOUNDED:
        assert {total[i] for i in (1, 4, 6, 7)} == {0.0}
    valid = fuse({"a": [values[a] for a in "0235"]}, ["p", "p", "q", "q"], method)
    assert [total[i] for i in (0, 2, 3, 5)] == pytest.approx(valid)  # gated samples enter no statistic
    assert rewards.components["a"][1] is None


def test_equal_valid_samples_stay_above_gated_ones(domain):
    for method in METHODS:
        reward = plain(domain, Told("a", dict.fromkeys("01", 3.0)), fusion=method)
        total = reward.score([text(0), text(1), "broken"], ["p"] * 3).total
        assert total[0] == total[1] > total[2], method


def test_nothing_valid_is_all_equal(domain):
    for method in METHODS:
        assert plain(domain, Told("a", {}), fusion=method).score(["broken", None], ["p", "p"]).total == [0.0, 0.0]
    assert plain(domain, Told("a", {})).score([], []).total == []


def test_without_signals_the_gates_are_the_reward(domain):
    reward = ComposedReward(domain, [], gates=[Check("odd", lambda sample: sample.answer in "13")])
    assert reward.score([*TEXTS[:4], "broken"], ["p"] * 5).total == [0, 1, 0, 1, 0]


def test_a_failed_sample_is_masked_and_left_out(domain):
    values = VALUES | {"1": None, "4": float("nan"), "5": float("inf")}
    reward = plain(domain, Told("a", values), fusion="z")
    rewards = reward.score(TEXTS, GROUPS)
    assert [i for i, value in enumerate(rewards.total) if value is None] == [1, 4, 5]
    expected = fuse({"a": [1.0, 2.0, 10.0]}, ["p", "p", "q"], "z")
    assert [rewards.total[i] for i in (0, 2, 3)] == pytest.approx(expected)
    assert rewards.components["a"] == [1.0, None, 2.0, 10.0, None, None]
    assert rewards.passed == [True] * 6  # no gate rejected them
    assert reward.masked == 3
    assert reward.failures == 0


def test_a_scorer_that_raises_masks_its_samples(domain, caplog):
    reward = plain(domain, Told("a", {"9": 1.0}), Told("b", VALUES | {"9": 1.0}))
    assert reward.score([text(9)], ["p"]).total == [0.5]
    with caplog.at_level(logging.ERROR):
        rewards = reward.score([*TEXTS, "broken"], [*GROUPS, "q"])
    assert rewards.total == [None] * 6 + [0.0]
    assert rewards.components == {"a": [None] * 7, "b": [*VALUES.values(), None]}
    assert (reward.masked, reward.failures) == (6, 1)
    assert "'a' failed on 6 samples" in caplog.text
    assert "KeyError" in caplog.text
    logged_only = plain(domain, Told("a", {}), Told("b", VALUES), weights={"a": 0})
    assert None not in logged_only.score(TEXTS, GROUPS).total


@pytest.mark.parametrize("bad", [0, 2, 5])
def test_a_sample_on_which_a_scorer_raises_masks_only_itself(domain, bad):
    """Holds for signals and gates; a signal that compares all samples is not retried on single ones."""
    values = {answer: value for answer, value in VALUES.items() if answer != str(bad)}
    rewards = (reward := plain(domain, Told("a", values))).score(TEXTS, GROUPS)
    assert [total is None for total in rewards.total] == [i == bad for i in range(6)]
    assert (reward.masked, reward.failures) == (1, 1)
    gate = Check("known", lambda sample: bool(values[sample.answer]))
    rewards = plain(domain, Told("a", VALUES), gates=[gate]).score(TEXTS, GROUPS)
    assert [total is None for total in rewards.total] == [i == bad for i in range(6)]
    compares = Told("a", values)
    compares.set_level = True
    reward = plain(domain, compares)
    worked = [text for i, text in enumerate(TEXTS) if i != bad]
    assert None not in reward.score(worked, ["p"] * 5).total
    assert reward.score(TEXTS, GROUPS).total == [None] * 6
    assert len(compares.asked) == 2
    for set_level, calls in ((True, 1), (False, 7)):
        errs = Told("a", VALUES, values)
        errs.set_level = set_level
        rewards = plain(domain, errs).score(TEXTS, GROUPS)
        assert None not in rewards.total
        assert errs.asked_errors == calls


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_failed_call_frees_its_memory_before_the_retry(domain, wrapped):
    held = []

    def allocate(n):
        array = np.zeros(n)
        held.append(weakref.ref(array))
        if n > 1:
            raise MemoryError
        return [1.0]

    def large(samples):
        assert all(reference() is None for reference in held)
        try:
            return allocate(len(samples))
        except MemoryError as error:
            raise RuntimeError("no memory") if wrapped else error from error

    large.name = "large"
    assert None not in plain(domain, large).score(TEXTS, GROUPS).total


BROKEN = r"reward: 'broken' failed on each of the {} samples tried: OSError: no such student"


@pytest.mark.parametrize("set_level", [False, True])
def test_a_part_that_has_never_worked_raises(domain, set_level):
    """It would mask every sample of the run. Three samples of one call or of several are enough to tell."""

    def broken(samples):
        raise OSError("no such student")

    broken.name, broken.set_level = "broken", set_level
    for options in ({"signals": [broken, Told("a", VALUES)]}, {"signals": [Told("a", VALUES)], "gates": [broken]}):
        with pytest.raises(BrokenPartError, match=BROKEN.format(6 if set_level else 3)):
            ComposedReward(domain, **options).score(TEXTS, GROUPS)
        reward = ComposedReward(domain, **options)
        for _ in range(3):
            assert reward.score(TEXTS, GROUPS, update=False).total == [None] * 6
        assert reward.score(TEXTS[:1], ["p"]).total == reward.score(["bad", *TEXTS[:1]], ["p"] * 2).total[1:] == [None]
        assert (reward.scored, reward.masked) == (3, 2)
        with nullcontext() if set_level else pytest.raises(BrokenPartError, match=BROKEN.format(3)):
            reward.score(TEXTS[:1], ["p"])  # a part that compares samples may need several
    logged_only = plain(domain, broken, Told("a", VALUES), weights={"broken": 0})
    assert None not in logged_only.score(TEXTS, GROUPS).total


@pytest.mark.parametrize(("failing", "unknown"), [("012", {}), ("05", {"3": None})])
def test_bad_samples_do_not_break_a_signal(domain, failing, unknown):
    """The first, the middle (3) and the last sample are tried first; one that is scored without a value worked."""
    known = {answer: value for answer, value in VALUES.items() if answer not in failing} | unknown
    reward = plain(domain, Told("a", known), fusion="raw")
    assert reward.score(TEXTS, GROUPS).total == [known.get(answer) for answer in VALUES]


def test_a_resumed_run_knows_what_has_worked(domain):
    reward, again = plain(domain, Told("a", VALUES)), plain(domain, Told("a", {}))
    reward.score(TEXTS, GROUPS)
    again.load_state_dict(reward.state_dict())
    assert again.score(TEXTS, GROUPS).total == [None] * 6
    assert again.scored == 12


def test_failures_before_a_part_worked_are_kept(domain):
    reward = plain(domain, Told("a", {}))
    reward.score(TEXTS[:2], GROUPS[:2])
    again = plain(domain, Told("a", {}))
    again.load_state_dict(reward.state_dict())
    with pytest.raises(BrokenPartError, match="failed on each of the 3 samples tried"):
        again.score(TEXTS[:1], ["p"])


def test_a_student_that_is_not_there_is_raised(domain):
    reward = ComposedReward.default(domain, "/no/such/student", seeds=[Sample("What is it?", "1")])
    texts = [written(f"How many shells of {i} kinds are in {i + 2} boxes?", i) for i in range(3, 6)]
    with pytest.raises(BrokenPartError, match=r"failed on each of the 3 samples tried: .*/no/such/student"):
        reward([[{"role": "user", "content": "p"}]] * 3, texts)


def test_a_student_that_is_gone_after_a_refresh_is_raised(domain, model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = plain(domain, *acquisition_signals(str(tmp_path), ["entropy"], domain))
    assert None not in reward.score(TEXTS, GROUPS).total
    with pytest.raises(ValueError, match="tokenizer: expected the student's tokenizer"):
        reward.refresh(model)
    assert None not in reward.score(TEXTS, GROUPS).total
    reward.refresh("/no/such/student")
    with pytest.raises(BrokenPartError, match=r"failed on each of the 3 samples tried: .*/no/such/student"):
        reward.score(TEXTS, GROUPS)


def test_the_raw_floor_is_below_the_samples_of_all_calls(domain):
    """Trainers such as verl send one sample a call, so the call of a gated sample has no valid one."""
    odd = Check("odd", lambda sample: sample.answer not in "14")
    reward = plain(domain, Told("a", {"0": -3.0, "2": -5.0, "3": 4.0}), gates=[odd], fusion="raw")
    totals = [reward.score([text(i)], [i]).total[0] for i in (1, 0, 1, 2, 3)]
    assert totals == [0.0, -3.0, -4.0, -5.0, 4.0]
    again = plain(domain, Told("a", {"3": 4.0}), gates=[odd], fusion="raw")
    again.load_state_dict(reward.state_dict())
    assert again.score([text(3), text(1)], ["p", "q"], update=False).total == [4.0, -6.0]
    assert (again.scored, reward.scored) == (5, 5)


class Picture:
    """Stands in for an image in the prompt of a vision model."""

    def __init__(self, content):
        self.content = content

    def tobytes(self):
        return self.content


def image(content):
    return torch.zeros(2000, dtype=torch.bfloat16).index_fill(0, torch.tensor([1000]), content[0])


@pytest.mark.parametrize("whole", [list, functools.partial(np.array, dtype=object)])
@pytest.mark.parametrize("kind", [Picture, image, bytes, object])
def test_prompts_of_any_object_make_groups(domain, kind, whole):
    """Prompts are grouped by content, whatever objects they contain."""
    pictures = [kind(), kind()] if kind is object else [kind(b"p"), kind(b"q")]
    parts = [[{"type": "image", "image": pictures[i // 3]}, {"type": "text", "text": "?"}] for i in range(6)]
    prompts = [whole([{"role": "user", "content": whole(part)}]) for part in parts]
    turns = [[{"role": "assistant", "content": t}] for t in TEXTS]
    reward = plain(domain, Told("a", VALUES), fusion="rank")
    assert Log().call(reward, turns, prompts) == pytest.approx(reward.score(TEXTS, GROUPS).total)


def test_texts_that_never_parse_are_reported_once(domain, caplog):
    reward = plain(domain, Told("a", VALUES))
    for _ in range(2):
        reward.score(["no tags", "none"], ["p", "p"])
    [record] = [r for r in caplog.records if "parses as a sample" in r.getMessage()]
    assert "Domain.generator_prompt" in record.getMessage()


@pytest.mark.parametrize("rows", ["seeds", "reference", "evaluation"])
def test_rows_that_are_not_samples_are_refused(domain, rows):
    given = {"seeds": [Sample("What is it?", "1")], rows: [{"question": "What is it?", "answer": "1"}]}
    with pytest.raises(TypeError, match=rf"{rows}\[0\]: expected acqsynth\.domains\.Sample"):
        ComposedReward.default(domain, "student", **given)


def test_a_gate_that_raises_or_cannot_tell_masks(domain):
    def broken(samples):
        if len(samples) < 3:
            return [True] * len(samples)
        raise OSError("the sandbox is gone")

    def unsure(samples):
        return [None if sample.answer == "2" else sample.answer != "1" for sample in samples]

    for gate, expected in ((broken, [None] * 3), (unsure, [0.5, 0.0, None])):
        gate.name = gate.__name__
        gate.set_level = True
        reward = plain(domain, Told("a", VALUES), gates=[gate])
        reward.score(TEXTS[:1], GROUPS[:1], update=False)
        assert reward.score(TEXTS[:3], GROUPS[:3]).total == expected
    domain.parse = lambda text: 1 / 0
    reward = plain(domain, Told("a", VALUES))
    assert reward.score(TEXTS[:2], GROUPS[:2]).total == [None] * 2
    assert reward.failures == 2
    with pytest.raises(BrokenPartError, match="'parse' failed on each of the 8 samples tried: ZeroDivisionError"):
        reward.score(TEXTS, GROUPS)


def test_signals_see_the_label_of_a_sample(domain):
    labels = {"0": Sample("What is it?", "5"), "1": None, "2": Sample("What is it?", "3")}
    told = Told("a", VALUES)
    reward = plain(domain, told, gates=[Labelled(lambda samples: [labels[sample.answer] for sample in samples])])
    rewards = reward.score(TEXTS[:3], ["p"] * 3)
    assert told.asked == [["5", "3"]]
    assert rewards.components["a"] == [20.0, None, 10.0]
    assert [sample and sample.answer for sample in rewards.samples] == ["5", "1", "3"]
    assert rewards.gates["labelled"] == [True, False, True]


@pytest.mark.parametrize("own", ["8", "7"])
def test_a_label_passes_the_gates_before_it(domain, own):
    def label(samples):
        return [replace(sample, answer="8") for sample in samples]

    gates = [*sample_gates(domain), New(), Labelled(label)]
    leak = "The answer is 8. Ann has 3 + 5 apples; how many?"
    texts = [written(leak, own), written("What is 3 + 5?", own)]
    rewards = ComposedReward(domain, [], gates=gates).score(texts, [0, 0])
    assert rewards.total == [0, 1]
    assert rewards.rejected_by == ["no_leak", ""]
    dropped = Counter()
    samples = [Sample("What is 4 + 4?", own), Sample(leak, own), Sample("What is 5 + 3?", own)]
    assert [sample.question for sample in passing(gates, samples, dropped)] == ["What is 4 + 4?", "What is 5 + 3?"]
    assert dropped == {"gate no_leak": 1}


def test_an_archive_that_fails_leaves_the_totals(domain):
    signal = Told("a", VALUES)
    signal.accept = lambda samples: 1 / 0
    reward = plain(domain, signal)
    assert None not in reward.score(TEXTS, GROUPS).total
    assert (reward.masked, reward.failures) == (0, 1)


def test_a_signal_of_the_wrong_length_is_a_failure(domain):
    def short(samples):
        return [1.0]

    short.name = "short"
    reward = plain(domain, short)
    assert None not in reward.score(TEXTS[:1], GROUPS[:1]).total
    assert reward.score(TEXTS, GROUPS).total == [None] * 6
    assert reward.failures == 1


def lengthy(answer, n):
    return written("What is it" + "." * n + "?", answer)


def test_length_is_taken_out_of_the_signals(domain):
    """If values mostly follow the length, the total is nearly uncorrelated with it."""
    sizes = [10, 20, 40, 80, 160, 320] * 8
    texts = [lengthy(i, size) for i, size in enumerate(sizes)]
    values = {str(i): size**0.5 + (5 * i) % 7 for i, size in enumerate(sizes)}
    raw = plain(domain, Told("a", values), fusion="raw")
    normalised = ComposedReward(domain, [Told("a", values)], fusion="raw")
    for reward, least, most in ((raw, 0.8, 1.0), (normalised, -0.2, 0.2)):
        rewards = reward.score(texts, ["p"] * len(texts))
        assert least <= statistics.correlation(rewards.total, rewards.lengths) <= most
        assert reward.metrics(rewards)["a/length_correlation"] > 0.8  # the raw signal is logged
        assert reward.metrics(rewards)["total/length_correlation"] <= most
    chosen = ComposedReward(domain, [Told("a", values), Told("b", values)], length_normalised=["b"])
    assert set(chosen.length_bins) == {"b"}


def test_consecutive_equal_prompts_are_a_group(domain):
    prompts = [[{"role": "user", "content": c}] for c in "ppqqpp"]
    turns = [[{"role": "assistant", "content": t}] for t in TEXTS]
    total = Log().call(plain(domain, Told("a", VALUES), fusion="rank"), turns, prompts)
    assert total == [0.25, 0.75, 0.25, 0.75, 0.75, 0.25]
    keyed = plain(domain, Told("a", VALUES), fusion="rank").score(TEXTS, list("ppqqpp"))
    assert keyed.total == pytest.approx([0.125, 0.375, 0.25, 0.75, 0.875, 0.625])  # equal keys form one group


def test_what_is_logged(domain):
    values = VALUES | {"5": None}
    reward = plain(domain, Told("a", values), gates=[Check("odd", lambda sample: sample.answer != "1"), New()])
    log = Log()
    completions = [lengthy(i, 30 * i) for i in range(6)] + ["broken", "broken"]
    total = log.call(reward, completions, [*GROUPS, "q", "q"])
    assert log.columns["reward_a"] == [1.0, None, 2.0, 10.0, 30.0, None, None, None]
    assert log.columns["reward_gate"] == ["", "odd", "", "", "", "", "parses", "parses"]
    metrics = log.metrics
    assert metrics["reward/gated/parses"] == 2 / 8
    assert metrics["reward/gated/odd"] == 1 / 8
    assert metrics["reward/masked"] == 1 / 8
    assert metrics["reward/a/mean"] == pytest.approx(43 / 4)
    lengths = [12, 72, 102, 132]
    assert metrics["reward/a/length_correlation"] == pytest.approx(statistics.correlation([1, 2, 10, 30], lengths))
    valid = [total[i] for i in (0, 2, 3, 4)]
    assert metrics["reward/total/mean"] == pytest.approx(statistics.fmean(valid))
    assert metrics["reward/total/length_correlation"] == pytest.approx(statistics.correlation(valid, lengths))
    assert metrics["reward/archive/new"] == 4  # the masked sample is not added
    log.call(reward, completions, [*GROUPS, "q", "q"])
    assert log.metrics["reward/gated/new"] == 5 / 8  # seen before, or different only in the number of dots
    assert Log().call(reward, [], []) == []
    assert reward.metrics(reward.score([], [])) == {}
    tiny, log = plain(domain, Told("a", {"0": 1e-174, "1": 1e-200})), Log()
    log.call(tiny, completions[:2])
    assert log.metrics["reward/a/mean"] == 5e-175
    assert "reward/a/length_correlation" not in log.metrics  # the squares of the deviations are 0


def novel(i):
    names = ("Saddle", "Violin", "Kernel", "Copper", "Window", "Garden", "Rocket", "Tunnel")
    return written(f"{names[i % 8]} number {i // 8}, what is it worth?", i % 6)


def stateful(domain):
    return ComposedReward(domain, [Told("a", VALUES), Diversity(NgramEmbedder(64))], gates=[New()])


def test_a_run_resumes_where_it_stood(domain):
    straight, killed, resumed = (stateful(domain) for _ in range(3))
    first, second = [novel(i) for i in range(24)], [novel(i) for i in range(12, 36)]
    groups = [i // 4 for i in range(24)]
    straight.score(first, groups)
    killed.score(first, groups)
    saved = io.BytesIO()
    torch.save(killed.state_dict(), saved)
    saved.seek(0)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    expected = straight.score(second, groups)
    assert expected.gates["new"].count(False) == 12
    assert resumed.score(second, groups) == expected
    assert resumed.state_dict().keys() == straight.state_dict().keys()
    with pytest.raises(ValueError, match=r"state: expected parts \['gate/new', 'signal/diversity'\], got \[\]"):
        resumed.load_state_dict(plain(domain, Told("a", VALUES)).state_dict())
    with pytest.raises(ValueError, match=r"state: expected parts \['gate/new', 'signal/diversity'\], got \[\]"):
        resumed.load_state_dict({})


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor, int, bool])
@pytest.mark.parametrize("whole", [list, np.array, torch.tensor])
def test_values_of_any_numeric_type_become_floats(domain, kind, whole):
    class Shown:
        name = "shown"

        def __call__(self, samples):
            return whole([kind(float(sample.answer)) for sample in samples])

        stderr = __call__

    reward = ComposedReward(domain, [Shown()])
    rewards = reward.score([text(0), text(1)], [0, 0])
    assert {
        type(value)
        for column in (rewards.components["shown"], rewards.stderr["shown"], rewards.total)
        for value in column
    } == {float}
    assert rewards.components["shown"] == rewards.stderr["shown"] == [0, 1]
    saved = io.BytesIO()
    torch.save(reward.state_dict(), saved)
    saved.seek(0)
    assert torch.load(saved, weights_only=True) == reward.state_dict()


@pytest.mark.parametrize("bad", ["high", [1.0], object()])
def test_a_value_that_is_not_a_number_is_a_failure(domain, bad):
    reward = plain(domain, Told("a", VALUES | {"1": bad}))
    rewards = reward.score(TEXTS, GROUPS)
    assert rewards.components["a"] == [None if i == 1 else VALUES[str(i)] for i in range(6)]
    assert (reward.masked, reward.failures) == (1, 1)


@pytest.mark.parametrize("fusion", METHODS)
def test_a_huge_value_does_not_overflow(domain, fusion):
    reward = ComposedReward(domain, [Told("a", VALUES | {"1": 1e300})], fusion=fusion)
    total = reward.score(TEXTS, GROUPS).total
    assert np.isfinite(np.array(total, dtype=float)).all()
    assert reward.score(TEXTS[1:2], GROUPS[1:2]).components["a"] == [torch.finfo(torch.float32).max]


@pytest.mark.parametrize("bad", [5, b"text", {"a": 1}, ["text"]])
def test_an_object_that_is_not_text_masks_only_itself(domain, bad):
    rewards = plain(domain, Told("a", VALUES)).score([bad, *TEXTS[1:]], GROUPS)
    assert (rewards.total[0], rewards.lengths[0]) == (None, 0)
    assert None not in rewards.total[1:]


def test_a_probe_leaves_everything_as_it_was(domain):
    reward = stateful(domain)
    reward.score([novel(i) for i in range(8)], [0] * 8)
    before = pickle.dumps(reward.state_dict())
    probe = [novel(i) for i in range(8, 16)]
    first = reward.score(probe, [0] * 8, update=False)
    assert reward.score(probe, [0] * 8, update=False) == first
    assert pickle.dumps(reward.state_dict()) == before


def test_pickles(domain, student_path, sample, scripted):
    reward = ComposedReward.default(domain, str(student_path), seeds=[sample(3, 4)], reference=[sample(5, 6)])
    texts = [written(sample(10, 20).question, 30), "broken"]
    copy = pickle.loads(pickle.dumps(reward))
    total = reward.score(texts, ["p", "p"]).total
    assert total[0] > total[1] == 0
    assert copy.score(texts, ["p", "p"]).total == total
    used = pickle.dumps(reward)
    assert len(used) < 200_000  # the student is not pickled
    assert pickle.loads(used).state_dict()["masked"] == 0


class TestDefault:
    def test_signals_depend_on_the_arguments(self, domain, student_path, sample, scripted):
        seeds, path = [sample(3, 4)], str(student_path)
        engine = scripted(lambda question: ["7", "8"])
        both = ComposedReward.default(domain, path, seeds=seeds, reference=seeds, engine=engine)
        assert both.weights == DEFAULT_WEIGHTS
        assert [gate.name for gate in both.gates][-1] == "answerable"
        without = ComposedReward.default(domain, path, seeds=seeds, reference=seeds)
        assert list(without.weights) == ["mutual_information", "influence", "diversity"]
        drawn = ComposedReward.default(domain, path, seeds=seeds, engine=engine, answers={"k": 4}, fusion="rank")
        assert list(drawn.weights) == ["mutual_information", "learnability", "diversity"]
        assert drawn.fusion == "rank"
        assert "0.1 diversity" in repr(drawn)
        lighter = ComposedReward.default(domain, path, seeds=seeds, engine=engine, weights={"learnability": 0.5})
        assert lighter.weights == {"mutual_information": 1.0, "learnability": 0.5, "diversity": 0.1}
        assert "gates parses, sound" in repr(drawn)
        alone = ComposedReward.default(domain, path, seeds=seeds)
        assert list(alone.weights) == ["mutual_information", "diversity"]

    def test_one_draw_a_call(self, domain, student_path, sample, scripted):
        engine = scripted(lambda question: ["30", "8"])
        reward = ComposedReward.default(domain, str(student_path), seeds=[sample(3, 4)], engine=engine)
        rewards = reward.score([written(sample(10, 20).question, 30)], ["p"])
        assert rewards.components["learnability"] == [0.25]
        assert len(engine.calls) == 1  # shared by the gate and the signal


def test_refresh_reaches_every_scorer(domain, sample, student_path):
    reward = ComposedReward.default(domain, str(student_path), seeds=[sample(3, 4)], reference=[sample(5, 6)])
    reward.refresh("elsewhere")
    scorers = [part.scorer for part in (*reward.signals, *reward.gates) if hasattr(part, "scorer")]
    assert len(scorers) == 4  # two signals share one scorer, two gates another
    assert len(set(map(id, scorers))) == 2
    assert {scorer.student for scorer in scorers} == {"elsewhere"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fusion": "mean"}, ValueError, "fusion: unknown 'mean'"),
        ({"weights": {"c": 1}}, ValueError, r"weights: unknown \['c'\]"),
        ({"length_normalised": ["c"]}, ValueError, r"length_normalised: unknown \['c'\]"),
        ({"signals": [Told("a", {}), Told("a", {})]}, ValueError, "signals: the name 'a' is duplicated"),
        ({"signals": [Told("total", {})]}, ValueError, "signals: the name 'total' is duplicated or reserved"),
        ({"signals": [lambda samples: []]}, TypeError, "signals: expected callable objects with a name"),
        ({"signals": ["entropy"]}, TypeError, "signals: expected callable objects with a name"),
        ({"signals": Told("a", {})}, TypeError, "signals: expected a list, got"),
        ({"gates": [Check("parses", bool)]}, ValueError, "gates: the name 'parses' is duplicated or reserved"),
        ({"gates": Told("a", {})}, TypeError, "gates: expected a list, got"),
        ({"length_normalised": "a"}, TypeError, "length_normalised: expected names or a bool, got 'a'"),
        ({"domain": "math"}, TypeError, "domain: expected a Domain"),
    ],
)
def test_wrong_configuration_raises_at_once(domain, options, error, message):
    with pytest.raises(error, match=message):
        ComposedReward(**({"domain": domain, "signals": [Told("a", {})]} | options))


@pytest.mark.parametrize(
    ("texts", "groups", "error", "message"),
    [
        *(
            (["a", "b"], [0, group], TypeError, r"groups\[1\]: expected a hashable key such as a string, got")
            for group in (["a"], {"uid": 1}, ("a", [1]), torch.tensor(1))
        ),
        (TEXTS, ["p"], ValueError, "groups: expected 6, one per text, got 1"),
        (text(1), text(1), TypeError, "texts: expected a list of texts, got a string"),
    ],
)
def test_wrong_texts_and_groups(domain, texts, groups, error, message):
    with pytest.raises(error, match=message):
        plain(domain).score(texts, groups)


def test_two_steps_of_grpo(domain, model, tokenizer, sample, scripted, tmp_path):
    """Runs real TRL. A random model writes no valid sample, so each text is parsed as a question about a known sum."""
    student = acqcore.Student.from_model(type(model)(model.config), tokenizer=tokenizer)
    domain.parse = lambda text: Sample(f"What is 3 + 4, {text!r}?", "7")
    engine = scripted(lambda question: ["7", "8"])
    reward = ComposedReward.default(
        domain, student, seeds=[sample(3, 4)], reference=[sample(5, 6)], engine=engine, gates=[], name="worth"
    )
    steps = trained(model, tokenizer, [reward], tmp_path)
    assert len(steps) == 2
    for step, row in enumerate(steps, 1):
        assert 0 < row["rewards/worth/mean"] < 1
        assert row["worth/gated/parses"] == row["worth/masked"] == 0
        assert row["worth/learnability/mean"] == pytest.approx(0.25)
        assert -1 <= row["worth/influence/mean"] <= 1
        assert 0 < row["worth/archive/diversity"] <= 4 * step


def test_answers_are_not_kept_for_the_next_call(domain, scripted):
    engine = scripted(lambda question: ["7"])
    reward = plain(domain, Learnability(SampledAnswers(engine, domain)))
    reward.score(TEXTS[:2], GROUPS[:2])
    reward.score(TEXTS[:2], GROUPS[:2])
    assert len(engine.calls) == 2  # the student may have changed
