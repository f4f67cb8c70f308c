"""Near copies and contamination."""

from __future__ import annotations

import functools
import random
import re
import time
import tracemalloc
from collections.abc import Callable

import pytest

from acqsynth.normal_form import normal_form, numbers, readings, spelled
from acqsynth.rewards.texts import Contamination, NearCopies, _read, words

SHELLS = "Ada has 12 shells and finds 30 more on the beach. How many shells does she have now?"


def test_words():
    assert words("It's 3.5 km, x_1 = −2!") == ["it", "'", "s", "3", ".", "5", "km", ",", "x_1", "=", "−", "2", "!"]


@functools.cache
def shingles(text):
    plain = text.replace(" ", "")
    return frozenset(plain[i : i + 4] for i in range(len(plain) - 3))


def jaccard(a, b):
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def test_found_as_by_comparing_with_every_text():
    """Reading only the lists of the rarest shingles misses no near copy."""
    rng = random.Random(0)
    little = ("a", "an", "am", "as", "at", "i", "is", "it", "its")  # other content words make another question
    stock = [" ".join(rng.choices(little, k=14)) for _ in range(300)]
    held, asked = stock[:200], stock[200:] + [text[:-2] + "s a" for text in stock[:30]]
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


@functools.cache
def read(text):
    """The content words, the shingles, the numbers and their readings of a text."""
    form = normal_form(text)
    plain = "".join(spelled(form))
    cut = frozenset(plain[i : i + 4] for i in range(max(1, len(plain) - 3)))
    return _read(text, 4), cut, numbers(form), readings(form)


def by_comparing(stored, text, threshold, same_numbers):
    """The definition of ``find``, compared with each stored text."""
    content, cut, own, others = read(text)
    best, found = threshold, None
    for each in stored:
        its_content, its_cut, a, more = read(each)
        index = len(cut & its_cut) / len(cut | its_cut)
        better = index >= best if found is None else index > best
        replaced = bool(a - own - (others - more)) and bool(own - a - (more - others))  # other numbers in their place
        if better and not its_content.reworded(content) and not (same_numbers and replaced):
            best, found = index, each
    return found


@pytest.mark.parametrize("same_numbers", [True, False])
@pytest.mark.parametrize(("threshold", "most"), [(0.8, 9), (0.8, 99), (0.5, 5), (1.0, 3)])
def test_no_shortcut_changes_what_is_found(threshold, most, same_numbers):
    rng = random.Random(most)
    templates = [
        "A shop sells {} pens at {} cents and pears at {} cents. Tom buys {} apples. What does he pay?",
        "Pens cost {0} cent at {1} cents, or {2} cents. How much are {3}?",
        "A cat meets {0} fox, {0} dog and {1} geese behind the hills.",
        "It was {0} cat.",
    ]  # filled with numbers and function words: other content words make another question
    count = [lambda: "two", lambda: "3 dozen", lambda: "2k", lambda: "1 2", lambda: "", lambda: "10^3"]
    count += [lambda: str(rng.randint(0, most))] * 24

    def text():
        rest = [rng.choice(count)() for _ in range(3)]
        return rng.choice(templates).format(rng.choice(["a", "the", "this", "your", "12"]), *rest)

    copies, hits = NearCopies(threshold, capacity=80, same_numbers=same_numbers), 0
    for new in (text() for _ in range(250)):
        found = copies.find(new)
        assert found == by_comparing(copies.texts(), new, threshold, same_numbers)
        hits += found is not None
        if found is None or rng.random() < 0.5:
            copies.add([new])
    assert 20 < hits < 240
    assert len(copies) == 80


def test_an_archive_takes_little_more_than_its_index():
    """At the default capacity, 20,000 questions of 300 characters take 290 MiB; with the shingles of each, 670."""
    rng = random.Random(0)
    stock = ["".join(rng.choices("etaoinshrdlu", k=5)) for _ in range(300)]
    texts = [" ".join(rng.choices(stock, k=50)) for _ in range(1000)]
    copies = NearCopies()
    tracemalloc.start()
    try:
        copies.add(texts)
        assert tracemalloc.get_traced_memory()[0] / len(copies) < 24_000
    finally:
        tracemalloc.stop()


def test_a_copy_in_other_numbers_is_another_exercise():
    copies = NearCopies()
    copies.add([SHELLS])
    assert copies.find(SHELLS.upper().replace(" ", "  ")) == SHELLS
    assert copies.find(SHELLS.replace("the beach", "a beach")) == SHELLS
    assert copies.find(SHELLS.replace("12", "13")) is None
    assert copies.find("How many legs do 12 spiders and 30 ants have together?") is None
    strict = NearCopies(same_numbers=False)
    strict.add([SHELLS])
    assert strict.find(SHELLS.replace("12", "13")) == SHELLS


DISGUISES: dict[str, Callable[[str], str]] = {
    "zero width": lambda text: "\u200b".join(text),
    "a joiner every sixth word": lambda text: every_sixth(text, lambda word: word[:1] + "\u2060" + word[1:]),
    "soft hyphens": lambda text: text.replace("e", "e\u00ad"),
    "directions": lambda text: "\u202d" + text.replace(" ", " \u200e") + "\u202c",
    "selectors": lambda text: text.replace("a", "a\ufe0f").replace("s", "s\U000e0101"),
    "tags": lambda text: text + "\U000e0041\U000e0042",
    "Hangul filler": lambda text: text.replace(" ", " \u3164"),
    "no-break spaces": lambda text: text.replace(" ", "\u00a0\u2003"),
    "bold": lambda text: every_sixth(text, lambda word: f"**{word}**"),
    "all marks": lambda text: every_sixth(text, lambda word: f"__*`~~{word}~~`*__"),
    "bold inside words": lambda text: text.replace("she", "s**h**e"),
    "HTML": lambda text: every_sixth(text, lambda word: f"<b class='x'>{word}</b>"),
    "entities": lambda text: text.replace("s", "&#115;").replace(" ", "&nbsp;"),
    "LaTeX": lambda text: every_sixth(text, lambda word: rf"\textbf{{{word}}}"),
    "dollars": lambda text: re.sub(r"(\d+)", r"$\1$", text),
    "a quotation": lambda text: "> " + text,
    "full width": lambda text: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
    "bold letters": lambda text: "".join(chr(0x1D41A + ord(c) - 97) if "a" <= c <= "z" else c for c in text),
    "circled letters": lambda text: "".join(chr(0x24D0 + ord(c) - 97) if "a" <= c <= "z" else c for c in text),
    "small capitals": lambda text: text.translate(str.maketrans("aeo", "ᴀᴇᴏ")),
    "Cyrillic": lambda text: text.translate(str.maketrans("aeopcxyAHM", "аеорсхуАНМ")),
    "Greek": lambda text: text.translate(str.maketrans("oivAHM", "οινΑΗΜ")),
    "regional indicators": lambda text: "".join(chr(0x1F1E6 + ord(c) - 97) if "a" <= c <= "z" else c for c in text),
    "black squares": lambda text: "".join(chr(0x1F170 + ord(c) - 97) if "a" <= c <= "z" else c for c in text),
    "letters in brackets": lambda text: "".join(chr(0x249C + ord(c) - 97) if "a" <= c <= "z" else c for c in text),
    "a capital I for l": lambda text: re.sub("(?<=[a-z])l", "I", text),
    "letters in brackets, capital": lambda text: "".join(
        chr(0x1F110 + ord(c) - 65) if "A" <= c <= "Z" else c for c in text.upper()
    ),
    "small Cherokee": lambda text: text.translate(str.maketrans("aehs", "ꭺꭼꮋꮪ")),
    "Coptic": lambda text: text.translate(str.maketrans("acikmnoptyx", "ⲁⲥⲓⲕⲙⲛⲟⲣⲧⲩⲭ")),
    "turned letters": lambda text: text.translate(str.maketrans("aemrtvwy", "ɐǝɯɹʇʌʍʎ")),
    "a keycap": lambda text: "1\ufe0f\u20e3 " + text,
    "a number sign": lambda text: "#12 " + text,
    "Lisu": lambda text: text.upper().translate(str.maketrans("ABDEHILMNORSTVWY", "ꓮꓐꓓꓰꓧꓲꓡꓟꓠꓳꓣꓢꓔꓦꓪꓬ")),
    "strokes and hooks": lambda text: text.translate(str.maketrans("aetobdhn", "ⱥɛŧɵɓɗɦɲ")),
    "comments": lambda text: "<!-- x -->".join(text[i : i + 12] for i in range(0, len(text), 12)),
    "rare tags": lambda text: " ".join(f"<kbd>{word}</kbd>" for word in text.split()),
    "made-up tags": lambda text: " ".join(f"<q2 x='y'>{word}</q2><e/>" for word in text.split()),
    "links": lambda text: " ".join(f"[{word}](https://x.org/a?b=1)" for word in text.split()),
    "anchors": lambda text: " ".join(f"[{word}](#x)" for word in text.split()),
    "hosts": lambda text: " ".join(f"[{word}](x.org)" for word in text.split()),
    "negative circled digits": lambda text: text.translate(str.maketrans("123", "❶❷❸")),
    "dots": lambda text: re.sub(r"(\w)", r"\1.", text),
    "decomposed accents": lambda text: text.replace("e", "e\u0301"),
    "accents": lambda text: text.replace("e", "é").replace("o", "ö"),
    "Arabic digits": lambda text: text.translate(str.maketrans("0123", "٠١٢٣")),
    "full-width digits": lambda text: text.translate(str.maketrans("0123", "０１２３")),
    "raised digits": lambda text: text.translate(str.maketrans("0123", "⁰¹²³")),
    "LaTeX spaces": lambda text: text.replace(" ", "\\quad ", 3).replace("more", "\\textcolor{red}{more}"),
    "decimals": lambda text: re.sub(r"(\d+)", r"\1.0", text),
    "zeros before": lambda text: re.sub(r"(\d+)", r"00\1", text),
    "numbered": lambda text: "1. " + text,
    "numbered behind": lambda text: text + " (1)",
    "both, and a label": lambda text: "Question 17: 2) " + text + " [3]",
    "a label behind": lambda text: text + " Version 4",
    "a number more": lambda text: text.replace("beach", "beach at 9"),
    "a year": lambda text: "In 1999 " + text,
}  # fmt: skip


EGGS = (
    "A farmer collects 1000 eggs from his chickens in the morning and packs them carefully into 12 boxes of equal size "
    "before the market opens. How many eggs does every single box hold on average?"
)


@pytest.mark.parametrize(
    ("number", "other", "copy"),
    [
        *(("12", other, True) for other in ("twelve", "a dozen", "1 dozen", "XII", "1 2", "12th", "several")),
        *(("12", other, True) for other in ("0xc", "0XC", "0b1100", "(10+2)", "15 - 3", "3 × 4", r"(3\*4)", "(24/2)")),
        *(("1000", other, True) for other in ("1 000", "1,000", "1k", "1 thousand", "one thousand", "10 hundred")),
        *(("1000", other, True) for other in ("1e3", "10^3", "10**3", "10³", "1 × 10^3", "$10^{3}$", "1000.0")),
        *(("1000", other, True) for other in ("0x3e8", "0o1750", "(999 + 1)", "(999.5+.5)")),
        *(("12", other, False) for other in ("13", "2 1", "13 dozen", "1.2", "0xd", "(10+3)", "6/0")),
        *(("1000", other, False) for other in ("2k", "10^4", "2 000")),
    ],
)
def test_numbers_in_another_form_are_compared_by_value(number, other, copy):
    changed = EGGS.replace(number, other)
    for one, two in ((EGGS, changed), (changed, EGGS)):
        copies = NearCopies()
        copies.add([one])
        assert copies.find(two) == (one if copy else None)


HEART = "Does a treatment with drug X increase the survival of patients with chronic heart failure after surgery?"
LIST = "Write a function `rotate` to rotate a given list by the specified number of items to the left."
FEVER = "A 54-year-old man has fever and cough and a history of asthma. Which drug is contraindicated in this patient?"


@pytest.mark.parametrize(
    ("text", "part", "other", "copy"),
    [
        (HEART, "increase", "decrease", False),
        (LIST, "left", "right", False),
        (FEVER, "contraindicated", "indicated", False),
        (FEVER, "Which", "Ignoring the cough, which", True),
        (FEVER, "contraindicated", "not contraindicated", False),
        (FEVER, "fever and cough", "cough and fever", True),
        (FEVER, "has", "had", True),
        (HEART, "patients", "the patient", True),
        (HEART, "Does a treatment", "Please: does treatment", True),
        (LIST, "specified", "speci fied", True),
        (f"{EGGS} It is 12 + 34.", "+", "-", False),
        (HEART, "survival", "survjval", True),
        (HEART, "chronic", "chronicc", True),
        (FEVER, "asthma", "anaemia", False),
        (FEVER, "cough", "qcough", True),
        (FEVER, "54-year-old", "54/year/old", True),
        (LIST, "function", "fumction", True),
        (LIST, "the", "a", True),
        (f"{EGGS} Half of them break, and two are lost.", " ", "_", True),
        (EGGS, "chickens", "things", True),
        (EGGS, "farmer", "Zoltan", True),
        (EGGS, "morning", "evening", True),
        (EGGS, "before the market opens", "after the market opens", False),
        (EGGS, "equal", "unequal", False),
        (EGGS, "chickens in the morning", "geese in the evening", False),
    ],
)
def test_other_words_make_another_question(text, part, other, copy):
    changed = text.replace(part, other)
    for one, two in ((text, changed), (changed, text)):
        copies = NearCopies(0.7)
        copies.add([one])
        assert (copies.find(two) is not None) == copy
        assert two not in copies
        assert one.upper() in copies


def test_signs_of_a_script_without_spaces_are_words():
    text = "\u4e00\u4e2a\u519c\u6c11\u6709\u5f88\u591a\u7ea2\u82f9\u679c\u548c\u4e00\u4e9b\u68a8\u5b50"
    copies = NearCopies(0.5)
    copies.add([text])
    assert copies.find(text + "\u5440") == text
    assert copies.find(text.replace("\u7ea2", "\u9752")) is None


BAKER = "A baker sells {} loaves of bread and {} cakes in the morning. How many things does he sell in all before noon?"
TRAIN = "A train goes {} miles in 2 hours and then {} miles in 3 hours. What is its average speed on the whole way?"
DOZEN = "Ada buys {} eggs and {} boxes on the market in the morning. How many things does she carry home in the end?"


@pytest.mark.parametrize(
    ("text", "numbers", "others"),
    [
        (BAKER, (3, 3), (3, 5)),
        (BAKER, (3, 3), (4, 5)),
        (TRAIN, (60, 60), (60, 90)),
        (TRAIN, (2, 60), (3, 60)),
        (DOZEN, ("3 dozen", 36), ("3 dozen", 40)),
        (DOZEN, ("3 dozen", 36), ("4 dozen", 36)),
        (DOZEN, ("2k", 2000), ("2k", 2001)),
    ],
)
def test_a_changed_number_that_also_occurs_elsewhere(text, numbers, others):
    for one, other in ((numbers, others), (others, numbers)):
        copies = NearCopies(0.7)
        copies.add([text.format(*one)])
        assert copies.find(text.format(*other)) is None


@pytest.mark.parametrize("other", ["1 dozen", "a dozen", "twelve", "1 2", "12.0"])
def test_only_one_of_two_equal_numbers_in_another_form(other):
    for one, two in (((12, 12), (other, 12)), ((other, 12), (12, 12))):
        copies = NearCopies()
        copies.add([DOZEN.format(*one)])
        assert copies.find(DOZEN.format(*two))


def every_sixth(text, change):
    return " ".join(change(word) if i % 6 == 0 else word for i, word in enumerate(text.split(" ")))


@pytest.mark.parametrize("name", DISGUISES)
def test_a_text_that_only_looks_different_is_the_same(name):
    other = DISGUISES[name](SHELLS)
    assert other != SHELLS
    copies = NearCopies()
    copies.add([SHELLS])
    assert copies.find(other) == SHELLS
    if name not in ("a number more", "a year"):
        copies.add([other])
        assert len(copies) == 1
        assert other in Contamination([SHELLS])
        # A stored disguised copy still matches the original and other disguises.
        disguised = NearCopies()
        disguised.add([other])
        assert disguised.find(SHELLS) == other
        assert disguised.find("2. " + other + " (7)") == other
    changed = DISGUISES[name](SHELLS.replace("12", "13"))
    assert copies.find(changed) is None


@pytest.mark.parametrize(
    "separator", ["_", "-", " - ", " | ", "|", " / ", "\\ ", " 🙂 ", ", ", '" "', ") (", "; ", "", "\n\n"]
)
def test_other_signs_between_words_make_no_new_text(separator):
    other = separator.join(SHELLS.split(" "))
    assert_same(SHELLS, other)
    assert_same(SHELLS, "Well now, Ben: " + other, new=False)


@pytest.mark.parametrize("separator", [" ", "🙂", "_", "\t", " \n"])
def test_signs_within_words_make_no_new_text(separator):
    assert_same(SHELLS, separator.join(SHELLS))


def assert_same(text, other, new=True):
    for one, two in ((text, other), (other, text)):
        copies = NearCopies()
        copies.add([one])
        assert not new or copies.find(two) == one
        assert other in Contamination([text])
        assert copies.find(two.replace("3", "4")) is None


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("What is 3 - 5?", "What is 3 + 5?"),
        ("What is -3 + 5?", "What is 3 + 5?"),
        ("What is 1.5 + 5?", "What is 15 + 5?"),
        ("What is 8/2?", "What is 8-2?"),
        ("What is 5!?", "What is 5?"),
        ("Evaluate log 8 / log 2.", "Evaluate log 8 - log 2."),
        ("Evaluate sin(x)/cos(x).", "Evaluate sin(x)-cos(x)."),
        ("Evaluate 3 / \\theta.", "Evaluate 3 - \\theta."),
        ("Solve |x - 3| = 5.", "Solve x - 3 = 5."),
        ("Expand 2(x + 1).", "Expand 2x + 1."),
        ("Find f'(2).", "Find f(2)."),
        ("Is sin 30° more?", "Is sin 30 more?"),
        ("If width < height, why?", "If width > height, why?"),
        ("Is [3, 5] closed?", "Is (3, 5) closed?"),
        ("Is x <y and z> w?", "Is x w?"),
        ("Is it a List<int>?", "Is it a List<str>?"),
        ("Expand [x+1](x-2).", "Expand [x+1](x+5)."),
        ("Evaluate f[1](2.5).", "Evaluate f[1](3.5)."),
        ("What is 5 ➕ 3?", "What is 5 ➖ 3?"),
        ("What is 12 ✖ 3?", "What is 12 ➗ 3?"),
        ("What is ❺ + ❷?", "What is ❸ + ❷?"),
        ("What closes <h1>…</h1>?", "What closes <h2>…</h2>?"),
    ],
)
def test_signs_of_formulas_count(a, b):
    assert spelled(normal_form(a)) != spelled(normal_form(b))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("What is 7 * 8 to you?", "What is 78 to you?"),
        ("What is f(5) in the end?", "What is f(6) in the end?"),
        ("12 birds sit on a long wire.", "13 birds sit on a long wire."),
        ("He runs 1.5 km every day.", "He runs 15 km every day."),
        ("He owes 1,200 dollars to her.", "He owes 1.200 dollars to her."),
        ("Compute the power 2**3 for me.", "Compute the power 2**4 for me."),
        ("How many birds are left out of 5?", "How many birds are left out of 6?"),
        ("Is a < b and c > d where a is 5?", "Is a < b and c > d where a is 6?"),
    ],
)
def test_texts_that_differ_in_a_number_stay_apart(a, b):
    copies = NearCopies(0.1)
    copies.add([a])
    assert copies.find(b) is None
    assert copies.find(a) == a
    assert a in Contamination([a])
    assert b not in Contamination([a])


@pytest.mark.parametrize(
    "part",
    [
        "a*",
        " *",
        "(",
        "1",
        "#",
        "<b ",
        "1.",
        "\u200b",
        "(1",
        " 1",
        *("<!--", "<!---", "</b", "<b>", "<c></c>", "'", "[", "[a](", "[a](b.", "a.", "a/", "abc / ", "🙂", "a_"),
        "-",
        "1,111,",
        "\n>",
        "\\text",
        "&#x41;",
        "1 * ",
        "1 000 ",
        "1 x 10^",
        "é",
    ],
)
def test_the_normal_form_takes_linear_time(part):
    begin = time.process_time()
    readings(normal_form(part * (100_000 // len(part))))
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(("a", "b"), [("♠", "♥"), ("♔", "♕")])
def test_card_suits_and_chess_pieces_count(a, b):
    assert normal_form(f"What does {a} stand for?") != normal_form(f"What does {b} stand for?")


def test_the_oldest_make_room():
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


def test_short_texts():
    copies = NearCopies()
    copies.add(["ab", ""])
    assert copies.find("AB") == "ab"
    assert copies.find("ac") is None
    assert copies.find("") == ""


def test_thousands_of_texts_in_a_moment():
    """Guards against reading every list, which would take a minute; not a benchmark."""
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghijklmnop", k=5)) for _ in range(300)]
    stock = [" ".join(rng.choices(vocabulary, k=40)) for _ in range(3000)]
    copies = NearCopies()
    begin = time.process_time()
    copies.add(stock)
    assert [copies.find(text) for text in stock[::50]] == stock[::50]
    assert time.process_time() - begin < 20


def test_thousands_of_questions_from_one_template_in_a_moment():
    """Guards against comparing each with every other one, which would take minutes; not a benchmark."""
    rng = random.Random(0)
    copies, begin = NearCopies(), time.process_time()
    for _ in range(4000):
        a, b, n, m = (rng.randint(2, most) for most in (999, 999, 99, 99))
        text = f"A shop sells apples at {a} cents each and pears at {b} cents each. A customer buys {n} apples and {m} "
        assert copies.find(text + "pears. How many cents does the customer pay in total?") is None
        copies.add([text + "pears. How many cents does the customer pay in total?"])
    assert time.process_time() - begin < 15


def test_wrong_arguments():
    with pytest.raises(ValueError, match="threshold"):
        NearCopies(0)
    with pytest.raises(ValueError, match="capacity: expected an int >= 1"):
        NearCopies(capacity=0)
    with pytest.raises(ValueError, match="n: expected"):
        Contamination([], n=0)


class TestContamination:
    LONG = "A train leaves the station at nine and travels for three hours at a speed of 80 km per hour. How far?"

    def test_a_run_of_thirteen_words(self):
        found = Contamination([self.LONG])
        run = " ".join(self.LONG.split()[2:15])
        assert f"Suppose {run.upper()}, say" in found
        assert f"Suppose {' '.join(self.LONG.split()[2:14])}, say" not in found
        assert self.LONG in found

    def test_a_short_text_as_a_whole(self):
        found = Contamination(["What is 3 + 4?"])
        assert "what is 3 +  4 ?" in found
        assert "What is 3 + 5?" not in found
        assert "Well, what is 3 + 4?" not in found

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("My card has still not arrived, what can I do?", True),
            ("Hi! My card has still not arrived, what can I do?", True),
            ("Please help: my card has still not arrived; what can I do now?", True),
            ("My card has still not arrived, what can you do?", False),
            ("My new card has arrived, what can I do?", False),
            ("What is the sum of 3 and 4 then?", True),
            ("Tell me, what is the sum of 3 and 4?", True),
            ("What is the sum of 3 and 4 and 5?", False),
            ("What is the sum of 3 and 5?", False),
            ("Where is my card reader?", False),
        ],
    )
    def test_a_short_text_with_words_around_it(self, text, expected):
        rows = ["my card has still not arrived what can i do", "What is the sum of 3 and 4?", "Where is my card?"]
        assert (text in Contamination(rows)) == expected

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("What is the derivative of the function sin x cos x?", False),
            ("What is the derivative of the function sin x, cubed?", False),
            ("Well: what is the derivative of the function sin x?", True),
            ("What is the derivative of the function sin x, please?", True),
            ("What is the derivative of the function sin x? Give a formula.", True),
            ("Hello! What is the derivative of the function sin x. Thanks", True),
            ("If x = 3.5, what is the derivative of the function sin x?", False),
            ("What is the sum of the first three primes that end in seven?", False),
            ("Tell me, what is the sum of the first three primes?", True),
            ("What is the sum of the first three primes and twenty-two?", False),
            ("Tom earns ten dollars. How much money does Tom have after he buys a book for four dollars?", False),
            ("Tom earns ten dollars. How much money does Tom have after he buys a book?", False),
            ("I have one question: how much money does Tom have after he buys a book?", True),
            ("How much money does Tom have after he buys a book? He earns a dozen dollars.", False),
            ("Is 2.5 + 0.5 equal to 3, or is it 4.5?", False),
            ("So is 2.5 + 0.5 equal to 3 or not?", True),
        ],
    )
    def test_a_short_text_ends_with_a_sentence(self, text, expected):
        rows = [
            "What is the derivative of the function sin x",
            "What is the sum of the first three primes",
            "How much money does Tom have after he buys a book",
            "Is 2.5 + 0.5 equal to 3 or not?",
        ]
        assert (text in Contamination(rows)) == expected
        assert all(row in Contamination(rows) for row in rows)

    def test_phrases_of_the_genre_do_not_count(self):
        phrase = "Think step by step and give the final answer after four number signs on a line of its own."
        rows = [f"{name} asks a thing of {name}. {phrase}" for name in "ABCDEFGHIJK"]
        assert f"Something else altogether. {phrase}" not in Contamination(rows)
        assert f"Something else altogether. {phrase}" in Contamination(rows[:10])
