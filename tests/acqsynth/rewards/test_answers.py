"""Signals over the student's sampled answers."""

from __future__ import annotations

import math

import pytest
import torch

from acqsynth import domains
from acqsynth.domains import Sample
from acqsynth.domains.math import Math
from acqsynth.domains.medical import Medical
from acqsynth.rewards import AnswerVariance, Confidence, Learnability, SampledAnswers, SemanticEntropy
from acqsynth.rewards.batch import Batch

SCRIPT = {
    "sure": ["It is 7."] * 8,
    "torn": ["It is 7.", "So 8.", "Thus 7", "7", "8", "9", "7", "no idea"],
    "lost": ["no idea"] * 8,
}


@pytest.fixture
def samples():
    return [Sample("sure", "7"), Sample("torn", "7"), Sample("torn", "8"), Sample("lost", "7")]


@pytest.fixture
def answers(domain, scripted):
    return SampledAnswers(scripted(SCRIPT.__getitem__), domain)


def test_answer_variance_counts_parsed_answers(answers, samples):
    assert AnswerVariance(answers)(samples) == [1 / 8, 3 / 8, 3 / 8, 0]


def test_semantic_entropy_in_nats(answers, samples):
    torn = -sum(p * math.log(p) for p in (4 / 7, 2 / 7, 1 / 7))
    assert SemanticEntropy(answers)(samples) == [0, pytest.approx(torn), pytest.approx(torn), None]


def test_learnability_is_of_the_samples_own_answer(answers, samples):
    assert Learnability(answers)(samples) == [0, 1 / 4, 3 / 16, 0]
    assert answers.shares(samples) == [1, 1 / 2, 1 / 4, 0]


def test_equal_learnability_is_equal_to_the_last_bit(domain, scripted, monkeypatch):
    """However many forms an answer has: 0.7 + 0.1 + 0.2 is not 1, and 0.7 * (1 - 0.7) is not 0.3 * (1 - 0.3)."""
    monkeypatch.setattr(domain, "canonical", str)
    monkeypatch.setattr(domain, "equivalent", lambda gold, answers: [int(answer) == 7 for answer in answers])
    drawn = {"all": [7, 1, 2], "few": [3, 0, 0], "split": [0, 1, 2], "many": [7, 0, 0]}

    def script(question):
        texts = [text for text, n in zip(("7", "07", "007"), drawn[question], strict=True) for _ in range(n)]
        return texts + ["8"] * (10 - len(texts))

    ten = SampledAnswers(scripted(script), domain, k=10)
    assert Learnability(ten)([Sample(question, "7") for question in drawn]) == [0, 0.21, 0.21, 0.21]


def test_learnability_of_verified_answers(answers, samples, domain, monkeypatch):
    """An answer that is wrong or cannot be checked gets 0 instead of p (1 - p)."""
    monkeypatch.setattr(type(domain), "verify", lambda self, asked: [True, None, True, False])
    assert Learnability(answers, verified=True)(samples) == [0, 0, 3 / 16, 0]


def test_the_majority_decides_where_nothing_proves_an_answer(scripted, domain, monkeypatch):
    """p (1 - p) if the sample's answer is that of the majority; 0 if it is not, is refuted or there is no majority."""
    # Like mathematics, this domain can refute answers but not prove them.
    monkeypatch.setattr(type(domain), "proves", False)
    monkeypatch.setattr(
        type(domain), "verify", lambda self, asked: [False if s.answer == "13" else None for s in asked]
    )
    script = SCRIPT | {"tied": ["7", "8"] * 4, "wrong": ["13"] * 5 + ["7"] * 3}
    learnability = Learnability(SampledAnswers(scripted(script.__getitem__), domain), verified=True)
    asked = [("torn", "7"), ("torn", "8"), ("tied", "7"), ("wrong", "13"), ("wrong", "7"), ("sure", "7"), ("lost", "7")]
    assert learnability([Sample(*pair) for pair in asked]) == [1 / 4, 0, 0, 0, 0, 0, 0]
    assert learnability.logged == {"by_majority": 1.0}


@pytest.mark.parametrize("domain", [Math(), Medical()], ids=lambda domain: domain.name)
def test_domains_that_only_refute_answers_ask_the_majority(domain, scripted):
    script = ["\\boxed{yes}"] * 6 + ["\\boxed{no}"] * 2
    learnability = Learnability(SampledAnswers(scripted(lambda question: script), domain), verified=True)
    assert learnability([Sample("Does it?", "yes"), Sample("Does it?", "no")]) == [3 / 16, 0]
    assert learnability.logged == {"by_majority": 1.0}


def test_domains_that_prove_answers_do_not_ask_the_majority(answers):
    assert Learnability(answers, verified=True).logged == {"by_majority": 0.0}
    assert Learnability(answers).logged == {}


@pytest.mark.parametrize(
    ("texts", "sizes"),
    [
        (["18 eggs", "18", "18 eggs.", "19"], [3, 1]),
        (["$5$ million", "5000000", "5,000,000"], [3]),
        (["2 dozen", "24", "2"], [2, 1]),
        (["3 km", "3 m"], [1, 1]),
        (["20 minutes", "20 hours", "20 min"], [2, 1]),
        (["0.5", "0.5", "1/2", "50"], [3, 1]),
        (["3 km", "3", "3 m"], [1, 1, 1]),
    ],
)
def test_answers_are_grouped_by_all_that_was_written(texts, sizes, scripted):
    """Units and number words are part of an answer, a missing unit is tolerated, and no answer joins two others."""
    boxed = [f"\\boxed{{{text}}}" for text in texts]
    answers = SampledAnswers(scripted(lambda question: boxed), Math(), k=len(texts))
    sample = Sample("q", "18")
    assert answers.clusters([sample]) == [sizes]
    assert AnswerVariance(answers)([sample]) == [len(sizes) / len(texts)]
    n = sum(sizes)
    assert SemanticEntropy(answers)([sample]) == [pytest.approx(-sum(s / n * math.log(s / n) for s in sizes))]


def test_one_draw_serves_every_signal_of_a_call(domain, scripted, samples):
    engine = scripted(SCRIPT.__getitem__)
    answers = SampledAnswers(engine, domain, k=4, temperature=0.7, max_tokens=9, top2=True, seed=5)
    signals = [Confidence(answers), AnswerVariance(answers), SemanticEntropy(answers), Learnability(answers)]
    batch = Batch(samples)
    for signal in signals:
        signal(batch)
        signal(batch.part(samples[1:]))
    [(prompts, sampling)] = engine.calls
    assert prompts == [[{"role": "user", "content": q}] for q in ("sure", "torn", "lost")]  # each question once
    assert (sampling.n, sampling.temperature, sampling.max_tokens, sampling.top2) == (4, 0.7, 9, True)


def test_samples_that_differ_only_in_their_tests_have_values_of_their_own(scripted):
    """The other program passes the weak tests alone."""
    code, question = (
        domains.domain("code"),
        "Write a function last that returns the last item, or None if there is none.",
    )
    right, half = ("def last(xs):\n    return xs[-1]" + more for more in (" if xs else None", ""))
    tests = {"weak": "assert last([1]) == 1", "strict": "assert last([]) is None"}
    weak, strict = (
        Sample(question, f"```python\n{right}\n```", "", {"tests": each, "names": ["last"]}) for each in tests.values()
    )
    engine = scripted(lambda prompt: [f"```python\n{text}\n```" for text in (right, half)])
    signal = Learnability(SampledAnswers(engine, code, k=2), verified=False)
    alone = [signal([sample])[0] for sample in (weak, strict)]
    assert alone == [0.0, 0.25]
    assert signal([weak, strict]) == alone
    assert signal([strict, weak]) == alone[::-1]


def test_other_questions_draw_otherwise(domain, scripted, samples):
    engine = scripted(SCRIPT.__getitem__)
    for seed in (0, 1):
        answers = SampledAnswers(engine, domain, seed=seed)
        for asked in (samples, samples[1:], samples):
            AnswerVariance(answers)(asked)
    seeds = [sampling.seed for _, sampling in engine.calls]
    assert len(set(seeds)) == 4
    assert seeds[0] == seeds[2] != seeds[3] == seeds[5]


def test_a_failed_comparison_is_not_remembered_as_zero(answers, samples):
    equivalent, calls = answers.domain.equivalent, []

    def fails_once(gold, texts):
        calls.append(len(gold))
        if len(calls) == 1:
            raise OSError("the sandbox is gone")
        return equivalent(gold, texts)

    answers.domain.equivalent = fails_once
    batch = Batch(samples)
    with pytest.raises(OSError, match="sandbox"):
        Learnability(answers)(batch)
    assert Learnability(answers)(batch) == [0, 1 / 4, 3 / 16, 0]
    assert calls == [7, 7]  # one comparison per distinct answer: 1 + 3 + 3 + 0


class TestConfidence:
    #: per token: its own probability, then the two largest
    MARGINS = {  # noqa: RUF012
        "sharp": [(0.9, 0.9, 0.05), (0.9, 0.9, 0.05)],
        "even": [(0.45, 0.45, 0.4)],
        "medium": [(0.65, 0.65, 0.25)],
        "unlucky": [(0.05, 0.9, 0.05)],  # a token of probability 0.05 was drawn
        "silent": [],
    }

    def signal(self, domain, scripted, **options):
        engine = scripted(lambda question: ["7"], self.MARGINS)
        return Confidence(SampledAnswers(engine, domain, k=2, top2=True), **options)

    def values(self, signal, *names):
        return signal([Sample(name, "7") for name in names])

    def test_mean_of_one_minus_the_margin(self, domain, scripted):
        values = self.values(self.signal(domain, scripted), *self.MARGINS)
        assert values == [pytest.approx(value) for value in (0.15, 0.95, 0.6, 0.15)] + [None]

    def test_released_values(self, domain, scripted):
        """They grow from 1 as the student gets less sure and saturate at a margin of a half. A drawn token counts as
        the top one, so the margin of an unlucky draw is 0.05 - 0.9 < 0, clipped to 0: below a confident answer."""
        values = self.values(self.signal(domain, scripted, paper_compat=True), *self.MARGINS)
        assert values == [pytest.approx(1 / 0.85), 2, 2, 0, None]

    def test_released_asks_without_chat_template(self, domain, scripted):
        released, corrected = self.signal(domain, scripted, paper_compat=True), self.signal(domain, scripted)
        self.values(released, "sharp")
        self.values(corrected, "sharp")
        [(prompts, sampling)] = released.answers.engine.calls
        assert prompts == ["sharp"]
        assert sampling.max_tokens == 512
        assert corrected.answers.engine.calls[0][0] == [[{"role": "user", "content": "sharp"}]]


class TestReleasedAnswerVariance:
    def embed(self, texts):
        """Embeds a text that contains ``at x y`` as (x, y)."""
        return torch.tensor([[float(part) for part in text.split("at ")[1].split()[:2]] for text in texts])

    def both(self, domain, scripted, texts):
        answers = SampledAnswers(scripted(lambda question: texts), domain, k=len(texts))
        [released] = AnswerVariance(answers, paper_compat=True, embed=self.embed)([Sample("q", "7")])
        [corrected] = AnswerVariance(answers)([Sample("q", "7")])
        return released, corrected

    def test_noise_is_a_cluster(self, domain, scripted):
        near = [f"at 0 0.0{i} so 7" for i in range(5)] + [f"at 9 0.0{i} so 8" for i in range(5)]
        far = ["at 40 60 hmm", "at -50 90 hmm"]  # if parsed, these would yield meaningless numbers
        answers = SampledAnswers(scripted(lambda question: near + far), domain, k=12)
        assert AnswerVariance(answers, paper_compat=True, embed=self.embed)([Sample("q", "7")]) == [3 / 12]
        domain.answer_of = lambda text: text[-1] if "so" in text else None
        assert AnswerVariance(answers)([Sample("q", "7")]) == [2 / 12]

    def test_reasoning_is_embedded_and_the_answer_is_not(self, domain, scripted):
        ways = [f"at 0 0.0{i} so 7" for i in range(4)] + [f"at 9 0.0{i} so 7" for i in range(4)]
        assert self.both(domain, scripted, ways) == (2 / 8, 1 / 8)
        same = [f"at 0 0.0{i} so {i % 2}" for i in range(4)] * 2
        released, corrected = self.both(domain, scripted, same)
        assert corrected == 2 / 8
        assert released != corrected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda answers: SampledAnswers(answers.engine, answers.domain, k=0), "k: expected an int >= 1, got 0"),
        (Confidence, "answers: expected SampledAnswers with top2=True"),
        (lambda answers: AnswerVariance(answers, paper_compat=True), "embed: expected a sentence embedder"),
    ],
    ids=["k", "top2", "embed"],
)
def test_wrong_arguments(make, message, answers):
    with pytest.raises(ValueError, match=message):
        make(answers)
