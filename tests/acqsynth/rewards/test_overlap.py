"""Near copies and contamination."""

from __future__ import annotations

import random
import time

import pytest

from acqsynth.rewards.overlap import Contamination, NearCopies, words

SHELLS = "Ada has 12 shells and finds 30 more on the beach. How many shells does she have now?"


def test_words() -> None:
    assert words("It's 3.5 km, x_1 = −2!") == ["it", "'", "s", "3", ".", "5", "km", ",", "x_1", "=", "−", "2", "!"]


def jaccard(a: str, b: str, n: int = 5) -> float:
    cut = [{t[i : i + n] for i in range(len(t) - n + 1)} for t in (a.lower(), b.lower())]
    return len(cut[0] & cut[1]) / len(cut[0] | cut[1])


def test_found_as_by_comparing_with_every_text() -> None:
    """The lists that are not read hold nothing that would have been found."""
    rng = random.Random(0)
    stock = [" ".join(rng.choices("abc", k=1)[0] * rng.randint(1, 3) for _ in range(14)) for _ in range(300)]
    held, asked = stock[:200], stock[200:] + [text[:-2] + "b a" for text in stock[:30]]
    copies = NearCopies(0.5)
    copies.add(held)
    hits = 0
    for text in asked:
        best = max(held, key=lambda other: jaccard(text, other))
        found = copies.find(text)
        assert (found is not None) == (jaccard(text, best) >= 0.5)
        if found is not None:
            hits += 1
            assert jaccard(text, found) == jaccard(text, best)
    assert 30 <= hits < len(asked)


def test_a_copy_in_other_numbers_is_another_exercise() -> None:
    copies = NearCopies()
    copies.add([SHELLS])
    assert copies.find(SHELLS.upper().replace(" ", "  ")) == SHELLS
    assert copies.find(SHELLS.replace("the beach", "a beach")) == SHELLS
    assert copies.find(SHELLS.replace("12", "13")) is None
    assert copies.find("How many legs do 12 spiders and 30 ants have together?") is None
    strict = NearCopies(same_numbers=False)
    strict.add([SHELLS])
    assert strict.find(SHELLS.replace("12", "13")) == SHELLS


def test_the_oldest_make_room() -> None:
    copies = NearCopies(capacity=3)
    texts = [f"{word} is a word of its own" for word in ("Saddle", "Violin", "Kernel", "Copper")]
    copies.add(texts[:3])
    copies.add(texts[:3])
    assert copies.texts() == texts[:3]
    copies.add(texts[3:])
    assert copies.texts() == texts[1:]
    assert len(copies) == 3
    assert copies.find(texts[0]) is None
    assert copies.find(texts[1]) == texts[1]


def test_short_texts() -> None:
    copies = NearCopies()
    copies.add(["ab", ""])
    assert copies.find("AB") == "ab"
    assert copies.find("ac") is None
    assert copies.find("") == ""


def test_thousands_of_texts_in_a_moment() -> None:
    """A guard against reading every list, not a measurement: that would take a minute."""
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghijklmnop", k=5)) for _ in range(300)]
    stock = [" ".join(rng.choices(vocabulary, k=40)) for _ in range(3000)]
    copies = NearCopies()
    begin = time.perf_counter()
    copies.add(stock)
    assert [copies.find(text) for text in stock[::50]] == stock[::50]
    assert time.perf_counter() - begin < 20


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="threshold"):
        NearCopies(0)
    with pytest.raises(ValueError, match="n, capacity"):
        NearCopies(capacity=0)
    with pytest.raises(ValueError, match="n: expected"):
        Contamination([], n=0)


class TestContamination:
    LONG = "A train leaves the station at nine and travels for three hours at a speed of 80 km per hour. How far?"

    def test_a_run_of_thirteen_words(self) -> None:
        found = Contamination([self.LONG])
        run = " ".join(self.LONG.split()[2:15])
        assert f"Suppose {run.upper()}, say" in found
        assert f"Suppose {' '.join(self.LONG.split()[2:14])}, say" not in found
        assert self.LONG in found

    def test_a_short_text_as_a_whole(self) -> None:
        found = Contamination(["What is 3 + 4?"])
        assert "what is 3 +  4 ?" in found
        assert "What is 3 + 5?" not in found
        assert "Well, what is 3 + 4?" not in found

    def test_phrases_of_the_genre_do_not_count(self) -> None:
        phrase = "Think step by step and give the final answer after four number signs on a line of its own."
        rows = [f"{name} asks a thing of {name}. {phrase}" for name in "ABCDEFGHIJK"]
        assert f"Something else altogether. {phrase}" not in Contamination(rows)
        assert f"Something else altogether. {phrase}" in Contamination(rows[:10])
