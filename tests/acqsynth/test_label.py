from __future__ import annotations

import pytest

from acqsynth.config import LabellingConfig
from acqsynth.domains import Sample, domain
from acqsynth.domains.math import Math
from acqsynth.label import Label, Labeller, cluster, label, label_by_domain

QUESTION = Sample("3+4", "99", "the generator's own")


def labelled(sums, scripted, texts, **options):
    engine = scripted(lambda prompt, i, seed: texts[i])
    [found] = label(engine, sums, [QUESTION], k=len(texts), **options)
    return found


def test_the_majority_is_the_label(sums, scripted):
    texts = ["so\n7", "3 and 4\nmake\n7.0", "8", "think\nlonger here\n 7", "no idea"]
    found = labelled(sums, scripted, texts)
    # 7, " 7" and 7.0 are one answer; the second of its three completions has the median length.
    assert found == Label(Sample("3+4", "7.0", "3 and 4\nmake\n7.0"), 3 / 5, ["7", "7.0", "8", " 7", None])


def test_the_domain_computes_labels(sums):
    answers = {"3+4": Sample("3+4", "7")}
    sums.computed = lambda samples, seed: [answers.get(s.question) for s in samples]
    right, unknown = label_by_domain(sums, [QUESTION, Sample("what?", "1")])
    assert right == Label(Sample("3+4", "7"), 1.0, ["7"])
    assert unknown == Label(None, 0.0, [], "the domain cannot compute it")


VITAMIN = Sample(
    "Which vitamin?\nA) A\nB) B\nC) C\nD) D", "A", extra={"options": dict(zip("ABCD", "ABCD", strict=True))}
)
PROGRAM = "def f(x):\n    return x + 1"
TESTS = {"tests": "assert f(1) == 2", "names": ["f"], "context": "", "preamble": ""}


@pytest.mark.parametrize(
    ("name", "sample", "texts", "added"),
    [
        (
            "math",
            Sample("What is 3 + 4?", "7"),
            [
                *("3 + 4 = 7. The answer is 7", "3 + 4 = 7\n#### 7", "Final answer: **7**", "We add.\n\nAnswer:\n7"),
                *("3 + 4 = 7", "so **7**", "7", "The answer is:\nThe answer is 7."),
            ],
            "\n\\boxed{7}",
        ),
        ("math", Sample("What is 3 + 4?", "7"), [r"So \boxed{7}", r"\[\boxed{7}\] is it."], ""),
        (
            "medical",
            VITAMIN,
            [
                *("It is acid. The answer is C", "It is acid.\n\nThe answer is: C.", "It is acid.\nC) C", "It is\n(c)"),
                *("**The answer is C**", "Answer: C", "C", "**Answer:**\nC", "Answer:\n\nThe answer is C\nYes."),
                r"So \boxed{C}.",
            ],
            "",
        ),
        ("medical", Sample("Does it help?", "no"), ["It helps. The answer is yes", "The answer is Yes.", "yes"], ""),
        (
            "code",
            Sample("Write f.", "", extra=TESTS),
            [
                *(f"Here:\n```{kind}\n{PROGRAM}\n\n```\nIt works." for kind in ("python", "py", "")),
                *(f"Here:\n```\n{PROGRAM}\n```", PROGRAM, f"```\nf(0)\n```\n```\n{PROGRAM}\n```"),
            ],
            "",
        ),
        ("arithmetic", Sample("median 1 3 2", "1"), ["1 2 3\n2", "2", " 2 \n"], ""),
    ],
)
def test_what_is_learnt_is_the_completion_and_is_read_as_the_label(scripted, name, sample, texts, added):
    asked = domain(name)
    for text in texts:
        [found] = label(scripted(lambda prompt, i, seed, text=text: text), asked, [sample], k=2)
        learnt = asked.solution(found.sample)
        assert learnt == text.strip() + added
        assert asked.answer_of(learnt) == found.sample.answer
        assert asked.verify([found.sample]) != [False]


@pytest.mark.parametrize(
    "text", ["card arrival", "Card_Arrival.", "**card arrival**", '"card arrival"', "Category: card arrival"]
)
def test_a_label_is_learnt_as_in_the_seeds(scripted, text):
    asked = domain("classification", labels=["card_arrival", "lost_card"])
    [found] = label(
        scripted(lambda prompt, i, seed: f"{text}\nIt asks where it is."), asked, [Sample("Where?", "lost_card")]
    )
    assert found.sample == Sample("Where?", "card_arrival", extra={"skill": "card_arrival"})
    assert asked.solution(found.sample) == "card arrival"


@pytest.mark.parametrize("text", ["\\boxed{the answer is 5}", "#### the answer is 5", "The answer is: #### 5"])
def test_an_answer_that_is_marked_twice_is_labelled(scripted, text):
    asked = domain("math")
    [found] = label(scripted(lambda prompt, i, seed: text), asked, [Sample("What is 2 + 3?", "7")], k=2)
    assert (found.sample.answer, found.sample.reasoning) == ("5", text)
    assert asked.verify([found.sample]) == [None]


def test_it_abstains_from_an_answer_that_is_not_read_back(scripted):
    text = "The answer is 7}"  # which no box can hold
    [found] = label(scripted(lambda prompt, i, seed: text), domain("math"), [Sample("What is 3 + 4?", "7")], k=2)
    assert found == Label(None, 1.0, ["7}", "7}"], "the answer cannot be read back from the text to learn")


@pytest.mark.parametrize("name", ["math", "medical"])
@pytest.mark.parametrize("end", [":", " is:", " is ...", ": -", " is", " is **", " is $", r" is \boxed{}", " is ____"])
def test_it_abstains_where_completions_end_before_the_answer(scripted, name, end):
    text = f"We add. The answer{end}"
    [found] = label(scripted(lambda prompt, i, seed: text), domain(name), [Sample("What is it?", "7")], k=2)
    assert found == Label(None, 0.0, [None, None], "no completion gives an answer")


@pytest.mark.parametrize(
    ("texts", "agreement", "why"),
    [
        (["no", "idea"], 0.0, "no completion gives an answer"),
        (["7", "8", "9", "7", "6"], 0.4, "agreement 0.40 is below 0.50"),
        (["7", "no", "idea"], 1 / 3, "agreement 0.33 is below 0.50"),
        (["7...", "7...", "8"], 2 / 3, "every completion that agrees was cut off"),
        (["7", "8", "8", "7"], 0.5, "2 completions agree on each of two answers"),
    ],
)
def test_it_abstains(sums, scripted, texts, agreement, why):
    found = labelled(sums, scripted, texts, threshold=0.5)
    assert (found.sample, found.agreement, found.abstained_why) == (None, pytest.approx(agreement), why)


def test_what_was_cut_off_counts_but_does_not_stand_for_the_rest(sums, scripted):
    found = labelled(sums, scripted, ["a\n7...", "bb\n7", "ccc\n7..."])
    assert found.sample == Sample("3+4", "7", "bb\n7")
    assert found.agreement == 1


def test_how_answers_are_drawn(sums, scripted):
    engine = scripted(lambda prompt, i, seed: "7")
    labels = label(engine, sums, [QUESTION, Sample("1+1", "")], k=3, temperature=0.4, seed=9)
    [(prompts, sampling)] = engine.calls
    assert prompts == [sums.student_prompt("3+4"), sums.student_prompt("1+1")]
    assert (sampling.n, sampling.temperature, sampling.seed, sampling.max_tokens) == (3, 0.4, 9, 8)
    assert [found.sample.question for found in labels if found.sample] == ["3+4", "1+1"]
    assert label(engine, sums, []) == []
    label(engine, sums, [QUESTION], k=2, max_tokens=3)  # instead of the domain's 8
    assert engine.calls[-1][1].max_tokens == 3


def test_representatives_alone_are_compared(sums, monkeypatch):
    compared = []
    equivalent = sums.equivalent

    def counted(gold, answers):
        compared.extend((sample.answer, answer) for sample, answer in zip(gold, answers, strict=True))
        return equivalent(gold, answers)

    monkeypatch.setattr(sums, "equivalent", counted)
    answers = ["7", " 7", "7 ", "8", "7.0", None, "8"]
    assert cluster(sums, [QUESTION], [answers]) == [[[0, 1, 2, 4], [3, 6]]]
    assert compared == [(" 7", "8"), (" 7", "7.0"), ("8", "7.0"), ("7.0", " 7")]  # the last pair is the reverse check


def test_equivalence_of_one_direction_joins_nothing(sums, monkeypatch):
    """With tests instead of a gold answer, 8 is right whatever it is compared with, but no other answer equals it."""
    monkeypatch.setattr(sums, "equivalent", lambda gold, answers: [answer == "8" for answer in answers])
    assert cluster(sums, [QUESTION], [["7", "8", "9"]]) == [[[0], [1], [2]]]


def test_no_cluster_is_joined_through_a_third(sums, monkeypatch):
    near = lambda gold, answers: [abs(float(g.answer) - float(a)) < 1.5 for g, a in zip(gold, answers, strict=True)]  # noqa: E731
    monkeypatch.setattr(sums, "equivalent", near)
    assert cluster(sums, [QUESTION] * 2, [["1", "3", "2", "9"], []]) == [[[0], [1], [2], [3]], []]
    assert cluster(sums, [QUESTION], [["1", "2", "2.0", "9", "1.0", "9.5"]]) == [[[0, 1, 2, 4], [3, 5]]]
    # Three different votes and a fourth that is near one of them; then a pair that lies between two pairs.
    assert cluster(sums, [QUESTION], [["1", "4", "7", "8"]]) == [[[2, 3], [0], [1]]]
    assert cluster(sums, [QUESTION], [["1", "1", "3", "3", "2", "2"]]) == [[[0, 1], [2, 3], [4, 5]]]


def test_a_percentage_does_not_join_its_two_readings():
    math = Math()
    answers = ["0.5"] * 3 + ["50"] * 3 + ["50\\%"]
    assert cluster(math, [QUESTION], [answers]) == [[[0, 1, 2], [3, 4, 5], [6]]]
    assert cluster(math, [QUESTION], [["50%", "50", "50 percent"]]) == [[[0, 1, 2]]]
    assert cluster(math, [QUESTION], [["3 km", "3", "3 m", "3 km"]]) == [[[0, 3], [1], [2]]]
    math.checker.close()


@pytest.mark.parametrize("answers", [["5", "$5", "5 euros"], ["45", "45°", "45 radians"]])
def test_a_missing_unit_joins_no_two_units(answers):
    math = Math()
    assert cluster(math, [QUESTION], [answers]) == [[[0, 1], [2]]]
    assert cluster(math, [QUESTION], [answers[::-1]]) == [[[1, 2], [0]]]
    math.checker.close()


def test_wrong_arguments(sums, scripted):
    with pytest.raises(ValueError, match=r"threshold: expected a share in \(0, 1\], got 0"):
        labelled(sums, scripted, ["7"], threshold=0)
    with pytest.raises(ValueError, match="n: expected at least 1, got 0"):
        label(scripted(str), sums, [QUESTION], k=0)
    with pytest.raises(ValueError, match="temperature: expected more than 0, as equal answers always agree, or k of 1"):
        label(scripted(str), sums, [QUESTION], k=2, temperature=0)


def test_a_labeller_asks_the_student_or_the_teacher(sums, scripted):
    engine = scripted(lambda prompt, i, seed: "7" if i < 3 else "8")
    engine.reload = moved = [].append
    for method, teacher in (("majority", None), ("teacher", "a/teacher")):
        labeller = Labeller(LabellingConfig(method=method, teacher=teacher, k=4), sums, lambda: engine)
        [found] = labeller([Sample("3+4", "9")], 5)
        assert (found.sample, found.agreement) == (Sample("3+4", "7", "7"), 0.75)
        assert engine.calls[-1][1].seed == 5
        labeller.refresh("a/newer/student")
    assert moved.__self__ == ["a/newer/student"]  # a teacher is not refreshed
    with pytest.raises(ValueError, match="options: unknown 'kk', expected max_tokens"):
        Labeller(LabellingConfig(options={"kk": 1}), sums, lambda: engine)


def test_a_labeller_of_the_domain_needs_no_engine(sums):
    sums.computed = lambda samples, seed: [Sample("3+4", "7")]
    [found] = Labeller(LabellingConfig(method="computed"), sums, pytest.fail)([QUESTION])
    assert found.sample == Sample("3+4", "7")
