"""Texts that share wording: near copies by Jaccard, and runs of words shared with an evaluation set."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable

_WORD = re.compile(r"\w+|[^\w\s]")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def words(text: str) -> list[str]:
    """Words, numbers and signs in lower case."""
    return _WORD.findall(text.lower())


class NearCopies:
    """A bounded set of texts that finds one whose shingles overlap with a new text's.

    Shingles are runs of ``n`` characters of the text in lower case, white space as single blanks. Two texts are near
    copies if the Jaccard index of their shingles is at least ``threshold`` and their numbers are the same: an exercise
    in other numbers is another exercise.

    Args:
        threshold: in (0, 1].
        n: characters of a shingle.
        capacity: most texts held; the oldest make room.
        same_numbers: False counts texts that differ in their numbers too.

    Raises:
        ValueError: a threshold, n or capacity out of range.

    Sources: Broder 1997 (shingles); Chaudhuri, Ganti & Kaushik 2006 (a set that overlaps enough holds one of the
    rarest elements: only few lists are read).
    """

    def __init__(
        self, threshold: float = 0.8, *, n: int = 5, capacity: int = 20_000, same_numbers: bool = True
    ) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold: expected a Jaccard index in (0, 1], got {threshold}")
        if n < 1 or capacity < 1:
            raise ValueError(f"n, capacity: expected at least 1, got {n} and {capacity}")
        self.threshold = threshold
        self.n = n
        self.capacity = capacity
        self.same_numbers = same_numbers
        self._texts: dict[int, str] = {}
        self._shingles: dict[int, frozenset[str]] = {}
        self._holders: dict[str, set[int]] = {}  # shingle -> texts
        self._order: deque[int] = deque()
        self._next = 0

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, texts: Iterable[str]) -> None:
        """Take in texts; one that is there already is not held twice."""
        for text in texts:
            shingles = self._cut(text)
            if any(self._texts[i] == text for i in self._holders.get(next(iter(shingles)), ())):
                continue
            if len(self._order) == self.capacity:
                self._drop(self._order.popleft())
            self._texts[self._next], self._shingles[self._next] = text, shingles
            for shingle in shingles:
                self._holders.setdefault(shingle, set()).add(self._next)
            self._order.append(self._next)
            self._next += 1

    def find(self, text: str) -> str | None:
        """A text held that the given one is a near copy of, the most similar, or None."""
        shingles = self._cut(text)
        # Overlap of at least t |S| leaves room for so many misses; one of any more shingles must be a hit.
        asked = len(shingles) - int(self.threshold * len(shingles)) + 1
        rarest = sorted(shingles, key=lambda shingle: len(self._holders.get(shingle, ())))[:asked]
        candidates = {i for shingle in rarest for i in self._holders.get(shingle, ())}
        numbers = Counter(_NUMBER.findall(text))
        best, found = self.threshold, None
        for i in sorted(candidates):
            common = len(shingles & self._shingles[i])
            jaccard = common / (len(shingles) + len(self._shingles[i]) - common)
            if jaccard < best or (found is not None and jaccard == best):
                continue
            if self.same_numbers and Counter(_NUMBER.findall(self._texts[i])) != numbers:
                continue
            best, found = jaccard, self._texts[i]
        return found

    def texts(self) -> list[str]:
        """Those held, the oldest first."""
        return [self._texts[i] for i in self._order]

    def _cut(self, text: str) -> frozenset[str]:
        plain = " ".join(text.lower().split())
        return frozenset(plain[i : i + self.n] for i in range(max(1, len(plain) - self.n + 1)))

    def _drop(self, i: int) -> None:
        for shingle in self._shingles.pop(i):
            holders = self._holders[shingle]
            holders.discard(i)
            if not holders:
                del self._holders[shingle]
        del self._texts[i]


class Contamination:
    """Whether a text holds a run of ``n`` words of an evaluation set, or the whole of one of its shorter texts.

    Runs that stand in more than ``common`` of the texts are phrases of the genre, and are not counted.

    Args:
        texts: of the evaluation set.
        n: words of a run.
        common: as above.

    Source: Brown et al. 2020, appendix C (13-grams; those of more than ten documents left out).
    """

    def __init__(self, texts: Iterable[str], *, n: int = 13, common: int = 10) -> None:
        if n < 1:
            raise ValueError(f"n: expected at least 1 word, got {n}")
        self.n = n
        counts: Counter[tuple[str, ...]] = Counter()
        self._short: set[tuple[str, ...]] = set()
        for text in texts:
            found = words(text)
            if len(found) < n:
                self._short.add(tuple(found))
            counts.update(set(_runs(found, n)))
        self._runs = {run for run, count in counts.items() if count <= common}

    def __contains__(self, text: object) -> bool:
        found = words(str(text))
        return tuple(found) in self._short or any(run in self._runs for run in _runs(found, self.n))


def _runs(found: list[str], n: int) -> Iterable[tuple[str, ...]]:
    return (tuple(found[i : i + n]) for i in range(len(found) - n + 1))
