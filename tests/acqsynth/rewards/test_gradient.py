"""The gradient norm signal."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from fakes import teach, written

from acqsynth.rewards import ComposedReward, Gradient, default_gates


@pytest.fixture
def samples(sample):
    return [sample(3, 4, reasoning="One " * n) for n in (1, 4, 16, 40)]


def norms(model, tokenizer, domain, samples, chat):
    """``|| grad of the mean loss ||`` and the number of tokens, by autograd on one sample at a time."""
    found, counts = [], []
    for s in samples:
        prompt = domain.student_prompt(s.question) if chat else s.question + "\n"
        if chat:
            prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        solution = domain.solution(s) + (tokenizer.eos_token if chat else "")
        before, after = tokenizer(prompt)["input_ids"], tokenizer(solution)["input_ids"]
        labels = torch.tensor([[-100] * len(before) + after])
        model.zero_grad()
        model(input_ids=torch.tensor([before + after]), labels=labels).loss.backward()
        found.append(math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters())))
        counts.append(len(after))
    model.zero_grad()
    return found, counts


def test_root_of_length_times_the_norm_of_the_mean(domain, samples, model, tokenizer):
    signal = Gradient(model, domain, samples, tokenizer=tokenizer)
    values, counts = norms(model, tokenizer, domain, samples, chat=True)
    expected = [value * math.sqrt(count) for value, count in zip(values, counts, strict=True)]
    assert signal(samples) == pytest.approx(expected, rel=1e-4)
    assert signal.limit() == pytest.approx(max(expected), rel=1e-4)


def test_no_more_than_the_seeds(domain, sample, model, tokenizer):
    seeds = [sample(3, 4), sample(5, 6)]
    signal = Gradient(model, domain, seeds, tokenizer=tokenizer)
    absurd = [sample(3, 4, answer="~}{|^`"), sample(8, 9, answer="\x7f\x7f\x7f")]
    released = Gradient(model, domain, paper_compat=True, tokenizer=tokenizer)
    assert max(signal(absurd)) == pytest.approx(signal.limit(), rel=1e-6)
    assert max(released(absurd)) > max(released(seeds))
    limit = signal.limit()
    signal.refresh(type(model)(model.config))
    assert signal.limit() != limit


def test_released_is_a_loop_of_single_backwards_without_template(domain, samples, model, tokenizer, counted):
    values = Gradient(model, domain, paper_compat=True, tokenizer=tokenizer)(samples)
    assert counted == [(("grad_norm",), 1)] * 4
    assert values == pytest.approx(norms(model, tokenizer, domain, samples, chat=False)[0], rel=1e-4)
    counted.clear()
    Gradient(model, domain, samples, tokenizer=tokenizer)(samples)
    assert counted == [(("grad_norm",), 4)] * 2  # the samples, then the seeds once


def test_released_falls_with_length(domain, sample, model, tokenizer):
    """The gradient of a mean over more tokens is shorter; the root of the length compensates for that."""
    generator = torch.Generator().manual_seed(0)
    texts = [
        "".join(chr(97 + int(i)) for i in torch.randint(26, (n,), generator=generator))
        for n in (8, 16, 32, 64, 128, 256)
    ]
    varied = [sample(3, 4, reasoning=text) for text in texts]
    lengths = [math.log(len(text)) for text in texts]
    released = Gradient(model, domain, paper_compat=True, tokenizer=tokenizer)(varied)
    corrected = Gradient(model, domain, varied, tokenizer=tokenizer)(varied)

    def slope(values):
        return statistics.linear_regression(lengths, [math.log(value) for value in values]).slope

    assert slope(released) < -0.2
    assert abs(slope(corrected)) < abs(slope(released))


def test_released_rises_with_the_error_of_the_answer(domain, sample, model, tokenizer):
    """A student trained on 3 + 4 = 7 has a larger gradient on a wrong answer. The corrected form is protected by gates,
    which reject wrong answers."""
    right, wrong = sample(3, 4), sample(3, 4, answer="9")
    prompt = tokenizer.apply_chat_template(
        domain.student_prompt(right.question), add_generation_prompt=True, tokenize=False
    )
    chat, plain = (torch.tensor([tokenizer(t)["input_ids"]]) for t in (prompt + "7</s>", right.question + "\n7"))
    teach(model, [chat] * 40 + [plain] * 40)
    released = Gradient(model, domain, paper_compat=True, tokenizer=tokenizer)
    low, high = released([right, wrong])
    assert high > 2 * low
    texts = [written(s.question, s.answer) for s in (right, wrong)]
    seeds = [sample(90, 5)]
    signal = Gradient(model, domain, seeds, tokenizer=tokenizer)
    reward = ComposedReward(domain, [signal], gates=default_gates(domain, seeds=seeds))
    rewards = reward.score(texts, ["p", "p"])
    assert rewards.gates["verified"] == [True, False]
    assert rewards.total[0] > rewards.total[1]


def test_seeds_are_needed(domain, model, tokenizer):
    with pytest.raises(ValueError, match="seeds: expected at least one sample"):
        Gradient(model, domain, tokenizer=tokenizer)
