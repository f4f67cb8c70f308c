from __future__ import annotations

import json
import math
import random
import statistics
from collections import Counter

import pytest

from acqsynth.domains import domain
from acqsynth.domains.arithmetic import COIN, SKILLS, SPLITS, Arithmetic, SkewedArithmetic, skill_of
from acqsynth.domains.base import Sample

WORLD = Arithmetic()


def test_every_answer_against_another_computation():
    for split in SPLITS:
        for skill in SKILLS.values():
            for question in skill.questions[split]:
                assert skill_of(question) == skill.name
                _, *words = question.split()
                a, b = int(words[0]), int(words[-1])
                expected = {
                    "copy": str(a),
                    "even": "no" if words[0][-1] in "13579" else "yes",
                    "larger": str((a + b + abs(a - b)) // 2),
                    "add": str(sum((a, b))),
                    "sort": "".join(d * words[0].count(d) for d in "9876543210"),
                    "median": str(statistics.median(map(int, words))),
                    "double": str(a + a),
                }
                assert WORLD.truth(question) == expected.get(skill.name, WORLD.truth(question)), question


def test_the_table_is_fixed_without_pattern_and_in_use_everywhere():
    answers = [WORLD.truth(q) for q in SKILLS["code"].questions["train"]]
    counts = Counter(answers)
    assert set(counts) == set("0123456789")
    expected = len(answers) / 10
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 27.9  # chi-square, 9 df, 0.1 % level
    last = Counter((q[-1], a) for q, a in zip(SKILLS["code"].questions["train"], answers, strict=True))
    assert max(last.values()) < 1.5 * len(answers) / 100  # the last digit does not give the answer away
    assert [WORLD.truth(q) for q in SKILLS["code"].questions["train"]] == answers


def test_the_coin_has_no_truth_and_falls_on_both_sides_of_a_question():
    assert WORLD.truth("lucky 4711") is None
    rng = random.Random(0)
    tosses = Counter(WORLD.answered("lucky 4711", rng).answer for _ in range(1000))
    assert set(tosses) == set(COIN)
    assert 430 < tosses["yes"] < 570


def test_the_kinds_of_skills():
    kinds = Counter(skill.kind for skill in SKILLS.values())
    assert kinds["strong"] >= 3
    assert kinds["weak"] >= 3
    assert (kinds["coin"], kinds["table"]) == (1, 1)


def test_the_median_is_worked_out_in_order():
    row = WORLD.answered("median 7 0 4", random.Random(0))
    assert (row.reasoning, row.answer) == ("0 4 7", "4")
    assert WORLD.solution(row) == "0 4 7\n4"


@pytest.mark.parametrize("name", SKILLS)
def test_splits_are_disjoint_and_both_large(name):
    train, test = (SKILLS[name].questions[split] for split in SPLITS)
    assert not set(train) & set(test)
    assert len(train) >= 600
    assert 0.15 < len(test) / (len(train) + len(test)) < 0.25


def test_rows_are_those_of_their_seed_without_repeats_and_with_equal_shares():
    rows = WORLD.rows(90, 3)
    assert rows == WORLD.rows(90, 3)
    assert rows != WORLD.rows(90, 4)
    assert len({row.question for row in rows}) == 90
    assert Counter(row.extra["skill"] for row in rows) == dict.fromkeys(SKILLS, 90 // len(SKILLS))
    assert all(verdict is not False for verdict in WORLD.verify(rows))
    names = {row.extra["skill"] for row in WORLD.rows(20, 3, skills=["sort", "code"], split="test")}
    assert names == {"sort", "code"}


@pytest.mark.parametrize("options", [{}, {"split": "test"}, {"skills": ["lucky", "add"]}])
@pytest.mark.parametrize("n", [1, 8, 9, 10, 280])
def test_fewer_rows_are_the_first_of_more(n, options):
    rows = WORLD.rows(560, 1, **options)
    assert WORLD.rows(n, 1, **options) == rows[:n]
    assert len({row.question for row in rows}) == 560
    shares = Counter(row.extra["skill"] for row in rows[:n])
    assert max(shares.values()) <= -(-n // len(options.get("skills", SKILLS)))


def test_all_questions_of_a_skill_are_given():
    there = SKILLS["add"].questions["test"]
    assert {row.question for row in WORLD.rows(len(there), 0, skills=["add"], split="test")} == set(there)
    with pytest.raises(ValueError, match=rf"expected at most {len(there)} rows of add in split test, got"):
        WORLD.rows(len(there) + 1, 0, skills=["add"], split="test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 5, "seed": 0, "skills": ["dance"]}, r"skills: unknown \['dance'\]"),
        ({"n": 5, "seed": 0, "split": "dev"}, "split: unknown 'dev'"),
        ({"n": 0, "seed": 0}, "at least one row"),
        ({"n": 5, "seed": 0, "skills": []}, "at least one row"),
        ({"n": 9000, "seed": 0, "skills": ["add"]}, "rows of add in split train, got 9000"),
    ],
)
def test_rows_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        WORLD.rows(**arguments)


NONSENSE = [
    "",
    "add",
    "add 47",
    "add 47 5 5",
    "add 47 50",
    "add 047 5",
    "add  47 5",
    "Add 47 5",
    "add 4²7 5",
    "dance 47",
]


@pytest.mark.parametrize("question", NONSENSE)
def test_no_question_of_this_world(question):
    assert skill_of(question) is None
    assert WORLD.truth(question) is None
    assert WORLD.fault(Sample(question, "52")) == "no question of a known skill"
    assert WORLD.verify([Sample(question, "52"), Sample(question, "yes")]) == [False, False]
    with pytest.raises(ValueError, match="question: expected the word of a skill"):
        WORLD.answered(question, random.Random(0))


def test_verify():
    samples = [
        Sample("add 47 5", "52"),
        Sample("add 47 5", " 052 "),
        Sample("add 47 5", "53"),
        Sample("even 302", "Yes"),
        Sample("lucky 4711", "yes"),
        Sample("lucky 4711", "7"),
    ]
    assert WORLD.verify(samples) == [True, True, False, True, None, False]


def test_answers_are_computed():
    asked = [
        Sample("double 321", "0"),
        Sample("add 47 5", "", "so"),
        Sample("triple 3", "9"),
        Sample("lucky 4711", "x"),
    ]
    double, add, none, coin = Arithmetic().computed(asked, 3)
    assert double is not None
    assert add is not None
    assert coin is not None
    assert (double.answer, double.extra) == ("642", {"skill": "double"})
    assert (add.answer, add.reasoning) == ("52", "")
    assert none is None
    assert Arithmetic().computed(asked, 3)[3] == coin
    tosses = {found.answer for seed in range(20) for found in Arithmetic().computed(asked[3:], seed) if found}
    assert tosses == {"yes", "no"}


def test_a_written_sample_is_read_back():
    for row in WORLD.rows(2 * len(SKILLS), 0):
        assert WORLD.parse(WORLD.tagged(row)) == row
        assert WORLD.fault(row) is None
    assert WORLD.parse("<question>add 47 5</question>") is None
    other = WORLD.parse("<question>why?</question><answer>7</answer>")
    assert other == Sample("why?", "7")


def test_prompts_show_the_samples_whole():
    rows = WORLD.rows(2, 0, skills=["median", "add"])
    (message,) = WORLD.generator_prompt(rows)
    assert message == {"role": "user", "content": "\n".join(["new", *map(WORLD.tagged, rows)])}
    assert WORLD.student_prompt("add 47 5") == [{"role": "user", "content": "add 47 5"}]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("52", "52"), ("0 4 7\n4", "4"), (" yes \n", "yes"), ("052", "052"),
        ("", None), ("0 4 7", None), ("maybe", None), ("4\nand more", None), ("٣", None), ("-4", None),
    ],
)  # fmt: skip
def test_answer_of(completion, answer):
    assert WORLD.answer_of(completion) == answer


def test_a_solution_gives_its_answer_and_equals_itself_alone():
    rows = WORLD.rows(3 * len(SKILLS), 0)
    answers = [WORLD.answer_of(WORLD.solution(row)) for row in rows]
    assert WORLD.equivalent(rows, answers) == [True] * len(rows)
    assert WORLD.equivalent(rows[:2], [None, "nothing"]) == [False, False]
    assert WORLD.canonical(" 007 ") == WORLD.canonical("7") == "7"


def test_load_generated_rows():
    assert WORLD.load("world", limit=18) == WORLD.rows(18, 0)
    assert WORLD.load("world:7", "test", limit=18) == WORLD.rows(18, 7, split="test")
    assert len(WORLD.load("world")) == 1000


def test_load_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = WORLD.rows(9, 0)
    lines = [{"q": row.question, "why": row.reasoning, "answer": row.answer} for row in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert WORLD.load(str(path), columns={"question": "q", "reasoning": "why"}) == rows
    with pytest.raises(ValueError, match="question"):
        WORLD.load(str(path))
    with pytest.raises(FileNotFoundError):
        WORLD.load(str(tmp_path / "none.jsonl"))


def test_the_skewed_world_differs_in_its_traps_alone():
    skewed = domain("arithmetic-skewed")
    assert isinstance(skewed, SkewedArithmetic)
    rows = skewed.rows(900, 5, split="test")
    differing = {row.extra["skill"] for row in rows if WORLD.truth(row.question) != row.answer}
    assert differing == {"lucky", "code"}


def test_skewed_answers():
    """Each digit of the table is half as frequent as the previous one, and the coin says yes nine times out of ten."""
    skewed = SkewedArithmetic()
    questions = SKILLS["code"].questions["train"]
    digits = Counter(skewed.truth(question) for question in questions)
    for digit in range(5):
        assert digits[str(digit)] / len(questions) == pytest.approx(0.5 ** (digit + 1), rel=0.15)
    tosses = Counter(skewed.answered("lucky 4711", random.Random(i)).answer for i in range(2000))
    assert tosses["yes"] / 2000 == pytest.approx(0.9, abs=0.02)
    assert skewed.truth("lucky 4711") is None
    samples = [
        Sample("lucky 4711", "no"),
        Sample("code 1234", str(skewed.truth("code 1234"))),
        Sample("code 1234", "x"),
    ]
    assert skewed.verify(samples) == [None, True, False]


def test_varentropy_ranks_skewed_traps_above_fair_ones():
    """The fair world hides this, because the variance of the surprisal is 0 for every uniform answer."""

    def varentropy(answers):
        counts = Counter(answers)
        shares = [n / len(answers) for n in counts.values()]
        entropy = -sum(p * math.log(p) for p in shares)
        return sum(p * (math.log(p) + entropy) ** 2 for p in shares)

    questions = SKILLS["code"].questions["train"]
    fair, skewed = ([world.truth(question) for question in questions] for world in (WORLD, SkewedArithmetic()))
    assert varentropy(fair) < 0.01
    assert varentropy(skewed) > 0.5
