"""The world with skewed traps: a coin that says no nine times of ten, and a table in which half of the digits are 0.

Of the world's own traps, which are uniform, ``varentropy`` is 0 where nothing can be learnt; here it is large.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest import mock

from acqsynth import world
from acqsynth.domains.arithmetic import COIN, SKILLS, Arithmetic
from acqsynth.domains.base import Sample

TOSSES = (9, 1)  #: how often the coin says no, and yes
DIGITS = (50, 20, 10, 5, 5, 2, 2, 2, 2, 2)  #: of a hundred numbers, those with the code 0, 1, ...


@contextmanager
def skewed_traps() -> Iterator[None]:
    """Context in which the world's coin and table are skewed; its base models are others, and cached apart."""
    fair = Arithmetic.answered
    table = [digit for digit, count in enumerate(DIGITS) for _ in range(count)]

    def code(number: int) -> tuple[str, str]:
        digest = hashlib.blake2b(str(number).encode(), digest_size=8, key=b"skewed").digest()
        return "", str(table[int.from_bytes(digest, "big") % len(table)])

    def answered(self: Arithmetic, question: str, rng: random.Random) -> Sample:
        sample = fair(self, question, rng)
        if SKILLS[sample.extra["skill"]].solve is not None:
            return sample
        return replace(sample, answer=rng.choices(COIN, TOSSES)[0])

    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(SKILLS, code=replace(SKILLS["code"], solve=code)))
        stack.enter_context(mock.patch.object(Arithmetic, "answered", answered))
        stack.enter_context(mock.patch.object(world, "VERSION", f"{world.VERSION}, skewed traps"))
        yield
