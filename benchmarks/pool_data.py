"""Pools of intent messages: as published, or with four kinds of junk rows.

Pool B keeps 55 % of its rows unchanged and corrupts the others in place:

=================  =====  ==========================================================================================
kind               share  corruption
=================  =====  ==========================================================================================
``random label``   15 %   labelled with another intent, drawn uniformly
``ambiguous``      10 %   keeps its intent with probability 0.8, otherwise gets the intent most easily confused with it
``near duplicate`` 10 %   replaced by a light edit of a clean row of the pool, with that row's intent
``out of scope``   10 %   replaced by a message without intent: half labelled at random, half with the nearest intent
=================  =====  ==========================================================================================

Intents are compared by the TF-IDF centroids of their messages, so confusability does not depend on a student.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

CLEAN, RANDOM_LABEL, AMBIGUOUS, NEAR_DUPLICATE, OUT_OF_SCOPE = KINDS = (
    "clean", "random label", "ambiguous", "near duplicate", "out of scope",
)  # fmt: skip
SHARES = {RANDOM_LABEL: 0.15, AMBIGUOUS: 0.10, NEAR_DUPLICATE: 0.10, OUT_OF_SCOPE: 0.10}
OWN_INTENT = 0.8  #: probability that an ambiguous row keeps its intent


@dataclass(frozen=True)
class Message:
    """A message and its assigned intent; ``kind`` is only for the evaluation and hidden from all signals."""

    text: str
    intent: str
    kind: str = CLEAN


@dataclass(frozen=True)
class Sizes:
    """Sizes of a seed's data; ``intents`` is the number of intents, ``warm`` the number of rows per intent that the
    student starts with."""

    intents: int = 77
    warm: int = 2
    development: int = 96
    pool: int = 3000
    test: int = 1000


@dataclass(frozen=True)
class Task:
    """The data of one seed. ``pools`` maps ``A`` and ``B`` to equally many rows."""

    intents: tuple[str, ...]
    warm: tuple[Message, ...]
    development: tuple[Message, ...]
    pools: dict[str, tuple[Message, ...]]
    test: tuple[Message, ...]


def read(path: Path) -> list[Message]:
    """The rows of a file, without those that repeat an earlier row's words."""
    if not path.is_file():
        raise SystemExit(f"{path}: no such file. Name the folder that holds the intent files with --data")
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    first = {" ".join(words(row["text"])): Message(row["text"], row["intent"]) for row in reversed(rows)}
    return list(first.values())[::-1]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def load(folder: Path, name: str) -> tuple[list[Message], list[Message], list[Message]]:
    """Training rows, test rows and out-of-scope messages; no training row repeats a test row.

    Args:
        name: ``banking77`` or ``clinc150``. Both use the out-of-scope messages of CLINC150.
    """
    train, test = read(folder / f"{name}_train.jsonl"), read(folder / f"{name}_test.jsonl")
    tested = {" ".join(words(row.text)) for row in test}
    stray = [row for part in ("train", "val", "test") for row in read(folder / f"clinc150_oos_{part}.jsonl")]
    return [row for row in train if " ".join(words(row.text)) not in tested], test, stray


def task(train: Sequence[Message], test: Sequence[Message], stray: Sequence[Message], sizes: Sizes, seed: int) -> Task:
    """Splits and corrupts the rows of one seed.

    Raises:
        ValueError: there are fewer rows than ``sizes`` requires.
    """
    rng = random.Random(seed)
    every = sorted({row.intent for row in train})
    intents = tuple(sorted(rng.sample(every, min(sizes.intents, len(every)))))
    rows = [row for row in train if row.intent in intents]
    rng.shuffle(rows)
    warm: list[Message] = []
    rest: list[Message] = []
    held: Counter[str] = Counter()
    for row in rows:
        part = warm if held[row.intent] < sizes.warm else rest
        held[row.intent] += 1
        part.append(row)
    tested = [row for row in test if row.intent in intents]
    wanted = sizes.development + sizes.pool
    if len(rest) < wanted or len(tested) < sizes.test:
        raise ValueError(
            f"sizes: {wanted} rows beyond the warm start and {sizes.test} test rows are required, "
            f"got {len(rest)} and {len(tested)}"
        )
    development, pool = rest[: sizes.development], rest[sizes.development : wanted]
    nearest = Nearest(warm + rest)
    return Task(
        intents,
        tuple(warm),
        tuple(development),
        {"A": tuple(pool), "B": tuple(corrupted(pool, stray, nearest, rng))},
        tuple(rng.sample(tested, sizes.test)),
    )


def corrupted(pool: Sequence[Message], stray: Sequence[Message], nearest: Nearest, rng: random.Random) -> list[Message]:
    """The pool with clean rows replaced by the four kinds of junk in ``SHARES``."""
    places = list(range(len(pool)))
    rng.shuffle(places)
    rows = list(pool)
    intents = nearest.intents
    kinds: dict[str, list[int]] = {}
    begin = 0
    for kind, share in SHARES.items():
        kinds[kind] = places[begin : begin + round(share * len(pool))]
        begin += len(kinds[kind])
    clean = places[begin:]
    for i in kinds[RANDOM_LABEL]:
        other = rng.choice([intent for intent in intents if intent != rows[i].intent])
        rows[i] = replace(rows[i], intent=other, kind=RANDOM_LABEL)
    for i in kinds[AMBIGUOUS]:
        own = rows[i].intent
        rows[i] = replace(rows[i], intent=own if rng.random() < OWN_INTENT else nearest.confusable(own), kind=AMBIGUOUS)
    sources = rng.sample(clean, min(len(kinds[NEAR_DUPLICATE]), len(clean)))
    for i, source in zip(kinds[NEAR_DUPLICATE], sources, strict=True):
        rows[i] = Message(edited(rows[source].text, rng), rows[source].intent, NEAR_DUPLICATE)
    drawn = rng.sample(list(stray), len(kinds[OUT_OF_SCOPE]))
    for turn, (i, row) in enumerate(zip(kinds[OUT_OF_SCOPE], drawn, strict=True)):
        intent = nearest.of_text(row.text) if turn % 2 else None
        rows[i] = Message(row.text, intent or rng.choice(intents), OUT_OF_SCOPE)
    return rows


def edited(text: str, rng: random.Random) -> str:
    """The message as another person might have typed it."""
    stripped = text.strip()
    edits = (
        f"hi, {stripped}",
        f"{stripped.rstrip('?.!')} please",
        re.sub(r"[^\w\s']", "", stripped).lower(),
        f"{stripped} thanks",
        f"hello. {stripped[:1].upper()}{stripped[1:]}",
    )
    return rng.choice([edit for edit in edits if edit != text])


class Nearest:
    """Cosines between messages and intents under TF-IDF; an intent is the centroid of its messages."""

    def __init__(self, rows: Sequence[Message]) -> None:
        count = Counter(word for row in rows for word in set(words(row.text)))
        self._weight = {word: math.log(len(rows) / n) for word, n in count.items()}
        centroids: dict[str, Counter[str]] = defaultdict(Counter)
        for row in rows:
            for word, value in self._vector(row.text).items():
                centroids[row.intent][word] += value  # type: ignore[assignment]
        self._centroids = {intent: _unit(centroids[intent]) for intent in sorted(centroids)}
        self.intents = tuple(self._centroids)

    def confusable(self, intent: str) -> str:
        """The other intent whose centroid is nearest."""
        others = [other for other in self.intents if other != intent]
        return max(others, key=lambda other: _dot(self._centroids[intent], self._centroids[other]))

    def of_text(self, text: str) -> str | None:
        """The nearest intent, or None if the message shares no word with any."""
        vector = self._vector(text)
        best = max(self.intents, key=lambda intent: _dot(vector, self._centroids[intent]))
        return best if _dot(vector, self._centroids[best]) > 0 else None

    def _vector(self, text: str) -> dict[str, float]:
        return _unit({word: n * self._weight.get(word, 0.0) for word, n in Counter(words(text)).items()})


def _unit(vector: dict[str, float] | Counter[str]) -> dict[str, float]:
    norm = math.sqrt(sum(value * value for value in vector.values()))
    return {word: value / norm for word, value in vector.items()} if norm else dict(vector)


def _dot(a: dict[str, float], b: dict[str, float]) -> float:
    return sum(value * b[word] for word, value in a.items() if word in b)
