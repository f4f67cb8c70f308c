"""A toy domain of sums and an engine that says what it is told to."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from acqsynth.domains import Domain, Sample
from acqsynth.engines import Completion, Engine, Sampling

_NUMBER = re.compile(r"-?\d+")
_SUM = re.compile(r"(\d+) \+ (\d+)")


class Sums(Domain):
    """Questions with ``a + b`` in them can be verified; the answer is the last number of a completion."""

    name = "sums"

    def generator_prompt(self, shown):
        return [{"role": "user", "content": "Write a sum."}]

    def student_prompt(self, question):
        return [{"role": "user", "content": question}]

    def answer_of(self, completion):
        numbers = _NUMBER.findall(completion)
        return numbers[-1] if numbers else None

    def canonical(self, answer):
        numbers = _NUMBER.findall(answer)
        return str(int(numbers[-1])) if numbers else answer.strip()

    def equivalent(self, gold, answers):
        pairs = zip(gold, answers, strict=True)
        return [a is not None and self.canonical(a) == self.canonical(sample.answer) for sample, a in pairs]

    def load(self, source, split="train", columns=None, limit=None):
        raise FileNotFoundError(source)

    def fault(self, sample):
        return None if "?" in sample.question else "no question mark"

    def verify(self, samples):
        found = [(_SUM.search(sample.question), sample) for sample in samples]
        return [
            None if match is None else self.canonical(sample.answer) == str(int(match[1]) + int(match[2]))
            for match, sample in found
        ]


class Scripted(Engine):
    """Completions by question; the last token's two probabilities are 0.6 and 0.4 unless the script says otherwise."""

    name = "scripted"

    def __init__(self, script, margins=None):
        self.script = script
        self.margins = margins or {}
        self.calls: list[tuple[list[Any], Sampling]] = []

    def generate(self, prompts, sampling):
        self.calls.append((list(prompts), sampling))
        return [[self._completion(q, text) for text in self._texts(q, sampling.n)] for q in map(_question, prompts)]

    def reload(self, weights):
        raise NotImplementedError

    def _texts(self, question, n):
        texts = list(self.script(question))
        return (texts * n)[:n]

    def _completion(self, question, text):
        # of each token: its own probability, then the two largest
        tokens = self.margins.get(question, [(0.6, 0.6, 0.4)])
        top2 = [(math.log(first), math.log(second)) for _, first, second in tokens]
        return Completion(text, list(range(len(tokens))), True, top2, [math.log(own) for own, _, _ in tokens])


def _question(prompt):
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


@pytest.fixture
def domain():
    return Sums()


@pytest.fixture
def scripted():
    return Scripted


@pytest.fixture
def sample():
    """``sample(a, b)``: a right sum in words; ``answer=`` makes it another."""

    def build(a, b, *, answer=None, reasoning=""):
        question = f"Ada has {a} shells and finds more, so that she has {a} + {b}. How many are that?"
        return Sample(question, str(a + b) if answer is None else answer, reasoning)

    return build
