"""A small arithmetic world with generated questions, computed answers and known skills.

A question is a skill's word and its numbers, ``add 47 5``. The world contains what a good acquisition function must
distinguish: a base model trained by :mod:`acqsynth.world` masters the *strong* skills and has seen little of the *weak*
ones, which a few hundred rows teach; ``lucky`` is answered by a *coin* (no truth exists), and ``code`` by a *table*
without a pattern (a keyed hash), which can be memorised but not understood. No question reveals its kind by its form.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

from acqsynth.domains.base import Domain, Messages, Sample, written

Kind = Literal["strong", "weak", "coin", "table"]
SPLITS = ("train", "test")
COIN = ("no", "yes")
ROWS = 1000  #: default number of rows of the source ``world``

_TEST_SHARE = 5  # one in this many questions belongs to the test split
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")
_WORLD = re.compile(r"world(?::([0-9]{1,18}))?")


@dataclass(frozen=True)
class Skill:
    """One kind of question.

    Args:
        name: the word its questions begin with.
        kind: its role in the world, see the module.
        operands: first and last value of each number.
        solve: maps the numbers to reasoning (empty if none is needed) and answer; None for the coin.
    """

    name: str
    kind: Kind
    operands: tuple[tuple[int, int], ...]
    solve: Callable[..., tuple[str, str]] | None

    @cached_property
    def questions(self) -> dict[str, list[str]]:
        """All questions by split; a hash of the question picks the split, so the splits never overlap."""
        found: dict[str, list[str]] = {split: [] for split in SPLITS}
        for numbers in itertools.product(*(range(first, last + 1) for first, last in self.operands)):
            question = " ".join((self.name, *map(str, numbers)))
            found["test" if _hash("split", question) % _TEST_SHARE == 0 else "train"].append(question)
        return found


def _hash(key: str, text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=key.encode()).digest(), "big")


def _direct(function: Callable[..., object]) -> Callable[..., tuple[str, str]]:
    """Solves a skill without reasoning."""
    return lambda *numbers: ("", str(function(*numbers)))


def _median(*digits: int) -> tuple[str, str]:
    """The middle one of three digits, found by sorting them."""
    ordered = sorted(digits)
    return " ".join(map(str, ordered)), str(ordered[1])


_TWO_DIGITS, _THREE_DIGITS, _FOUR_DIGITS = (10, 99), (100, 999), (1000, 9999)

SKILLS: dict[str, Skill] = {
    skill.name: skill
    for skill in (
        Skill("copy", "strong", (_THREE_DIGITS,), _direct(lambda a: a)),
        Skill("even", "strong", (_THREE_DIGITS,), _direct(lambda a: COIN[a % 2 == 0])),
        Skill("larger", "strong", (_TWO_DIGITS, _TWO_DIGITS), _direct(max)),
        Skill("add", "strong", (_TWO_DIGITS, (1, 9)), _direct(lambda a, b: a + b)),
        Skill("sort", "weak", (_THREE_DIGITS,), _direct(lambda a: "".join(sorted(str(a), reverse=True)))),
        Skill("median", "weak", ((0, 9), (0, 9), (0, 9)), _median),
        Skill("double", "weak", (_THREE_DIGITS,), _direct(lambda a: 2 * a)),
        Skill("lucky", "coin", (_FOUR_DIGITS,), None),
        Skill("code", "table", (_FOUR_DIGITS,), _direct(lambda a: _hash("code", str(a)) % 10)),
    )
}


class Arithmetic(Domain):
    """The arithmetic world; needs no data, but can load some."""

    name: ClassVar[str] = "arithmetic"
    answer_tokens: ClassVar[int] = 32

    def generator_prompt(self, shown: Sequence[Sample]) -> Messages:
        return [{"role": "user", "content": "\n".join(["new", *map(self.tagged, shown)])}]

    def student_prompt(self, question: str) -> Messages:
        return [{"role": "user", "content": question}]

    def answer_of(self, completion: str) -> str | None:
        """The last line, if it is an answer of this world: a number, yes or no."""
        lines = completion.strip().splitlines()
        answer = lines[-1].strip() if lines else ""
        return answer if answer in COIN or (answer.isascii() and answer.isdigit()) else None

    def canonical(self, answer: str) -> str:
        answer = answer.strip().lower()
        return answer.lstrip("0") or "0" if answer.isascii() and answer.isdigit() else answer

    def parse(self, text: str) -> Sample | None:
        sample = super().parse(text)
        return sample and _with_skill(sample)

    def fault(self, sample: Sample) -> str | None:
        return None if skill_of(sample.question) else "no question of a known skill"

    def verify(self, samples: Sequence[Sample]) -> list[bool | None]:
        """By computation; None for a coin's yes or no, which is undecidable; False for text that is not a question."""
        right: list[bool | None] = []
        for sample in samples:
            read, answer = _read(sample.question), self.canonical(sample.answer)
            tossed = read is not None and read[0].solve is None and answer in COIN
            right.append(None if tossed else answer == self.truth(sample.question))
        return right

    def truth(self, question: str) -> str | None:
        """The computed answer; None for a coin's question and for text that is not a question of this world."""
        read = _read(question)
        found = None if read is None else self.solve(*read)
        return None if found is None else found[1]

    def solve(self, skill: Skill, numbers: tuple[int, ...]) -> tuple[str, str] | None:
        """Reasoning and answer; None for the coin."""
        return None if skill.solve is None else skill.solve(*numbers)

    def toss(self, rng: random.Random) -> str:
        """The coin's answer."""
        return rng.choice(COIN)

    def computed(self, samples: Sequence[Sample], seed: int) -> list[Sample | None]:
        """As :meth:`Domain.computed`; the coin is tossed once per seed and question."""
        return [
            self.answered(sample.question, random.Random(f"{seed} {sample.question}"))
            if skill_of(sample.question)
            else None
            for sample in samples
        ]

    def tagged(self, sample: Sample) -> str:
        return written(sample, end="")

    def rows(self, n: int, seed: int, *, skills: Sequence[str] | None = None, split: str = "train") -> list[Sample]:
        """``n`` rows with distinct questions, evenly over the skills and shuffled; equal seeds give equal rows. A
        smaller ``n`` gives the first rows of a larger one.

        Args:
            skills: names from ``SKILLS``; by default all.
            split: ``train`` or ``test``; no question is in both.

        Raises:
            ValueError: an unknown skill or split, or more rows than a skill has questions (the message names it).
        """
        names = list(SKILLS) if skills is None else list(skills)
        if unknown := set(names) - set(SKILLS):
            raise ValueError(f"skills: unknown {sorted(unknown)}, expected some of {', '.join(SKILLS)}")
        if split not in SPLITS:
            raise ValueError(f"split: unknown {split!r}, expected one of {', '.join(SPLITS)}")
        if not names or n < 1:
            raise ValueError(f"n, skills: expected at least one row of one skill, got n={n}, skills={names}")
        rng = random.Random(f"{seed} {split}")
        left = {}
        for name in names:
            questions = SKILLS[name].questions[split]
            left[name] = rng.sample(questions, len(questions))
        found: list[Sample] = []
        while len(found) < n:
            for name in rng.sample(names, len(names))[: n - len(found)]:
                if not left[name]:
                    there, share = len(SKILLS[name].questions[split]), math.ceil(n / len(names))
                    raise ValueError(f"n: expected at most {there} rows of {name} in split {split}, got {share}")
                found.append(self.answered(left[name].pop(), rng))
        return found

    def answered(self, question: str, rng: random.Random) -> Sample:
        """The question with its solution, for which ``rng`` tosses the coin; ValueError for other text."""
        read = _read(question)
        if read is None:
            raise ValueError(f"question: expected the word of a skill and its numbers, got {question!r:.60}")
        skill, numbers = read
        reasoning, answer = self.solve(skill, numbers) or ("", self.toss(rng))
        return _with_skill(Sample(question, answer, reasoning))

    def load(
        self, source: str, split: str = "train", columns: Mapping[str, str] | None = None, limit: int | None = None
    ) -> list[Sample]:
        """As :meth:`Domain.load`. The sources ``world`` (seed 0) and ``world:7`` (seed 7) give generated rows of the
        split, 1000 without ``limit``."""
        if source.partition(":")[0] == "world" and not _WORLD.fullmatch(source):
            raise ValueError(f"source: expected world or world:<seed>, got {source!r}")
        if world := _WORLD.fullmatch(source):
            if columns:
                raise ValueError(f"columns: {source} has none, its rows are generated")
            return self.rows(ROWS if limit is None else limit, int(world[1] or 0), split=split)
        return [_with_skill(sample) for sample in super().load(source, split, columns, limit)]


class SkewedArithmetic(Arithmetic):
    """The arithmetic world with non-uniform traps: the coin says yes nine times out of ten, and each digit of the table
    is half as frequent as the one before it.

    Varentropy, the variance of the surprisal, is 0 for a uniform answer and large for these traps.
    """

    name: ClassVar[str] = "arithmetic-skewed"

    def solve(self, skill: Skill, numbers: tuple[int, ...]) -> tuple[str, str] | None:
        if skill.kind == "table":
            leading_zeros = 64 - _hash("code", str(numbers[0])).bit_length()
            return "", str(min(9, leading_zeros))
        return super().solve(skill, numbers)

    def toss(self, rng: random.Random) -> str:
        return COIN[rng.random() < 0.9]


def skill_of(question: str) -> str | None:
    """The skill that a question asks for; None if it is not a question of this world."""
    read = _read(question)
    return read and read[0].name


def _with_skill(sample: Sample) -> Sample:
    skill = skill_of(sample.question)
    return sample if skill is None else replace(sample, extra={"skill": skill})


def _read(question: str) -> tuple[Skill, tuple[int, ...]] | None:
    word, *numbers = question.split(" ")
    skill = SKILLS.get(word)
    if skill is None or len(numbers) != len(skill.operands) or not all(map(_NUMBER.fullmatch, numbers)):
        return None
    values = tuple(map(int, numbers))
    within = all(first <= value <= last for value, (first, last) in zip(values, skill.operands, strict=True))
    return (skill, values) if within else None
