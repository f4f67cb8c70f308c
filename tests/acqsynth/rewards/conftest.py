"""A toy domain of sums and an engine with scripted completions."""

from __future__ import annotations

import math
import re

import pytest
from fakes import FakeEngine, PlainDomain

import acqcore
from acqsynth.domains import Sample
from acqsynth.engines import Completion
from acqsynth.rewards import SentenceEmbedder

_NUMBER = re.compile(r"-?\d+")
_SUM = re.compile(r"(\d+) \+ (\d+)")


class Sums(PlainDomain):
    """Questions with ``a + b`` in them can be verified; the answer is the last number of a completion."""

    name = "sums"

    def answer_of(self, completion):
        numbers = _NUMBER.findall(completion)
        return numbers[-1] if numbers else None

    def canonical(self, answer):
        numbers = _NUMBER.findall(answer)
        return str(int(numbers[-1])) if numbers else answer.strip()

    def fault(self, sample):
        return None if "?" in sample.question else "no question mark"

    def verify(self, samples):
        found = [(_SUM.search(sample.question), sample) for sample in samples]
        return [
            None if match is None else self.canonical(sample.answer) == str(int(match[1]) + int(match[2]))
            for match, sample in found
        ]


class Scripted(FakeEngine):
    """Cycles through the completions of each question; by default one token with top-2 probabilities 0.6 and 0.4."""

    def __init__(self, script, margins=None):
        super().__init__()
        self.script = script
        self.margins = margins or {}

    def draw(self, prompt, i, sampling):
        question = _question(prompt)
        texts = list(self.script(question))
        # per token: its own probability, then the two largest
        tokens = self.margins.get(question, [(0.6, 0.6, 0.4)])
        top2 = [(math.log(first), math.log(second)) for _, first, second in tokens]
        own = [math.log(drawn) for drawn, _, _ in tokens]
        return Completion(texts[i % len(texts)], list(range(len(tokens))), True, top2, own)


def _question(prompt):
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


@pytest.fixture(scope="session")
def minilm():
    """The sentence embedder; skips the test if its package is not installed."""
    try:
        return SentenceEmbedder()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def domain():
    return Sums()


@pytest.fixture
def scripted():
    return Scripted


@pytest.fixture
def counted(monkeypatch):
    """The acquisitions and the number of samples of each call of ``acqcore.score``."""
    calls = []
    score = acqcore.score

    def counting(student, samples, acquisitions, **options):
        calls.append((tuple(acquisitions), len(samples)))
        return score(student, samples, acquisitions, **options)

    monkeypatch.setattr(acqcore, "score", counting)
    return calls


@pytest.fixture
def sample():
    """``sample(a, b)`` is a word problem on a + b with the right answer, or with ``answer`` if given."""

    def build(a, b, *, answer=None, reasoning=""):
        question = f"Ada has {a} shells and finds more, so that she has {a} + {b}. How many are that?"
        return Sample(question, str(a + b) if answer is None else answer, reasoning)

    return build
