"""An adversary that writes gibberish in the right format never outranks valid samples."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from fakes import teach, written

import acqcore
from acqsynth.domains import Sample
from acqsynth.rewards import ComposedReward, acquisition_signals
from acqsynth.rewards.gates import New

RNG = random.Random(0)
SYMBOLS = "".join(chr(code) for code in range(33, 127) if chr(code) not in "<>")


def shells(a, b):
    return f"Ada has {a} shells and finds {b} more on the beach. How many shells has she now?"


def right(a, b):
    return Sample(shells(a, b), str(a + b), f"She has {a} and finds {b}, that makes {a + b} in all.")


def scrambled():
    return "".join(RNG.choices(SYMBOLS, k=5))


VALID = [right(a, b) for a, b in ((12, 30), (45, 27), (8, 81), (33, 16), (70, 19), (26, 26))]
GIBBERISH = {
    "random tokens": [
        Sample(" ".join(scrambled() for _ in range(n)) + "?", scrambled(), " ".join(scrambled() for _ in range(8)))
        for n in (4, 8, 16, 32)
    ],
    "random words": [
        Sample(" ".join(RNG.sample(words := shells(12, 30).split(), len(words))) + "?", "42") for _ in range(4)
    ],
    "a random answer": [
        Sample(shells(12, 31), scrambled()),
        Sample(shells(45, 28), "!! 7777", " ".join(scrambled() for _ in range(9))),
    ],
    "repeated tokens": [
        Sample("What? " * 12, "What"),
        Sample("a" * 60 + "?", "a"),
        Sample(shells(12, 33), "2 " * 30),
        Sample(shells(12, 34), "46", "and then " * 20),
        Sample("Ada has shells. " * 6 + "How many?", "42"),
    ],
    "unsolvable": [
        Sample(f"Ada has some shells and finds {n} more on the beach. How many shells has she now?", str(3 * n))
        for n in (14, 23, 35, 42)  # no seed's numbers, which would make it a copy
    ],
    "wrong": [Sample(s.question.replace("Ada", "Eva"), str(int(s.answer) + 1), s.reasoning) for s in VALID[:2]],
    "leaked": [Sample(right(a, 9).question + f" The answer is {a + 9}.", str(a + 9)) for a in (14, 21)],
    "copied": [right(2, 3)],
}
SEEDS = [right(a, b) for a, b in ((2, 3), (51, 22), (17, 64), (90, 8), (40, 41), (63, 25), (11, 11), (7, 77))]


TAUGHT = {}
TEXTS = [
    written(s.question, s.answer, s.reasoning) for s in [*VALID, *(s for kind in GIBBERISH.values() for s in kind)]
]


def answers(question):
    """Answers of a student that gets every other sum right and guesses on other questions."""
    numbers = [int(word) for word in question.split() if word.isdigit()]
    rng = random.Random(question)
    if len(numbers) == 2:
        return [str(sum(numbers)) if i % 2 else str(rng.randint(1, 150)) for i in range(8)]
    return [str(rng.randint(1, 150)) for _ in range(8)]


@pytest.fixture
def student(model, tokenizer):
    """A student trained once for all tests, on similar questions and answers, with and without chat format. Some have
    another name or lack a number, so that on any machine it finds such questions fluent."""
    if not TAUGHT:
        rng = random.Random(1)
        rows = []
        for _ in range(120):
            s = right(rng.randint(10, 99), rng.randint(10, 99))
            s = replace(s, question=s.question.replace("Ada", rng.choice(("Ada", "Eva"))))
            if rng.random() < 0.25:
                s = replace(s, question=s.question.replace(s.question.split()[2], "some", 1))
            chat = f"<|user|>{s.question}</s><|assistant|>{s.reasoning}\n{s.answer}</s>"
            rows += [s.question + " " + s.reasoning, chat]
        teach(model, [torch.tensor([tokenizer(row)["input_ids"]]) for row in rows])
        TAUGHT.update({name: value.clone() for name, value in model.state_dict().items()})
    model.load_state_dict(TAUGHT)
    return model.eval()


@pytest.fixture
def default(student, tokenizer, domain, scripted):
    """The default reward; the domain cannot verify anything."""
    domain.verify = lambda samples: [None] * len(samples)
    engine, scoring = scripted(answers), {"tokenizer": tokenizer}
    return ComposedReward.default(domain, student, seeds=SEEDS, reference=SEEDS, engine=engine, scoring=scoring)


def ranked(rewards):
    """Totals of the valid samples and of the gibberish."""
    assert None not in rewards.total
    return rewards.total[: len(VALID)], rewards.total[len(VALID) :]


def test_every_acquisition_behind_the_default_gates(default, domain, student, tokenizer):
    epig = acqcore.epig_reference(student, ["1 + 1 = 2"], tokenizer=tokenizer)

    def scored(acquisition, gates):
        archive = {"archive": acqcore.Archive(64)}
        needed = {"influence": {"reference": SEEDS}, "epig": {"reference": epig}, "archive_novelty": archive}
        signals = acquisition_signals(student, {acquisition: needed.get(acquisition, {})}, domain, tokenizer=tokenizer)
        if acquisition == "archive_novelty":
            signals[0].accept(SEEDS)  # with an empty archive everything is novel
        return ranked(ComposedReward(domain, signals, gates=gates).score(TEXTS, ["p"] * len(TEXTS)))

    for acquisition in acqcore.acquisitions():
        gates = [New(SEEDS) if gate.name == "new" else gate for gate in default.gates]  # with an archive of its own
        valid, gibberish = scored(acquisition, gates)
        assert max(gibberish) < min(valid), acquisition
        assert len(set(valid)) > 1, acquisition
    for acquisition in ("loss", "perplexity", "entropy", "grad_norm", "el2n", "margin"):
        valid, gibberish = scored(acquisition, [])
        assert max(gibberish) > max(valid), acquisition  # ungated, the attack works


def test_the_default_reward_and_which_gate_stops_what(default):
    rewards = default.score(TEXTS, ["p"] * len(TEXTS))
    valid, gibberish = ranked(rewards)
    assert max(gibberish) < min(valid)
    assert len(set(valid)) > 1  # valid samples still get different rewards
    stopped = [next((name for name, ok in rewards.gates.items() if not ok[i]), "") for i in range(len(TEXTS))]
    assert stopped[: len(VALID)] == [""] * len(VALID)
    by_kind, begin = {}, len(VALID)
    for kind, members in GIBBERISH.items():
        by_kind[kind] = set(stopped[begin : begin + len(members)])
        begin += len(members)
    assert by_kind == {
        "random tokens": {"fluent"},
        "random words": {"fluent"},
        "a random answer": {"fluent", "answerable"},
        "repeated tokens": {"no_repetition"},
        "unsolvable": {"answerable"},
        "wrong": {"answerable"},
        "leaked": {"no_leak"},
        "copied": {"new"},
    }
