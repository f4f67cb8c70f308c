from __future__ import annotations

import json
import time
from collections import Counter
from itertools import compress
from typing import Any

import pytest

from acqsynth.domains import Sample
from acqsynth.domains.medical import Medical

OPTIONS = {"A": "Aspirin", "B": "Vitamin B", "C": "Rest", "D": "None of these"}
CHOICE = "Which drug thins the blood?\n" + "\n".join(f"{letter}) {text}" for letter, text in OPTIONS.items())
MCQA: dict[str, Any] = {
    "question": "Which drug thins the blood?",
    **{f"op{letter.lower()}": text for letter, text in OPTIONS.items()},
    "cop": 0,
    "exp": "It blocks platelets.",
}

medical = Medical()


def rows(path, *content):
    path.write_text("\n".join(map(json.dumps, content)))
    return str(path)


def letters(options, answer):
    """The letters of the options that an answer equals."""
    samples = [Sample("Which?", f"{letter}) {text}", extra={"options": options}) for letter, text in options.items()]
    return "".join(compress(options, medical.equivalent(samples, [answer] * 4)))


@pytest.mark.parametrize(
    ("completion", "answer", "canonical"),
    [
        ("The answer is B.", "B.", "B"),
        ("The answer is A, not B.", "A, not B.", "A"),
        ("The answer is A. Wait, no, the answer is B.", "B.", "B"),
        ("The answer is A. Correction: the answer is B.", "B.", "B"),
        ("The answer is A. The answer is not B.", "A. The answer is not B.", "A"),
        ("The answer is A. The answer is supported by two trials.", "A. The answer is supported by two trials.", "A"),
        ("The answer is yes. Wait, the answer is no.", "no.", "no"),
        ("The answer is most likely B", "most likely B", "B"),
        ("The answer is clearly B", "clearly B", "B"),
        ("The answer is probably no.", "probably no.", "no"),
        ("The answer is probably A or B", "probably A or B", "probably a or b"),
        ("The answer is 'B'.", "B", "B"),
        ("It thins. The answer is (c) Rest", "(c) Rest", "C"),
        ("Answer: A\nNo. Answer: D) None of these", "D) None of these", "D"),
        ("**Answer:** B", "B", "B"),
        ("The answer is **A**.", "A.", "A"),
        ("It is known.\n**B)** Vitamin B", "B) Vitamin B", "B"),
        ("\\boxed{\\textbf{A}}", "A", "A"),
        ("\\boxed{C} so the answer is D", "C", "C"),
        ("\\boxed{\\text{yes}}", "yes", "yes"),
        ("The answer is yes, because it does.", "yes, because it does.", "yes"),
        ("It does.\nMaybe.", "Maybe.", "maybe"),
        ("Long thought.\n\nB) Vitamin B", "B) Vitamin B", "B"),
        ("The answer is Vitamin B", "Vitamin B", "vitamin b"),
        ("The answer is A or B", "A or B", "a or b"),
        ("The answer is yes/no", "yes/no", "yes no"),
        ("The answer is A), B), C)", "A), B), C)", "a b c"),
    ],
)
def test_answers(completion, answer, canonical):
    assert medical.answer_of(completion) == answer
    assert medical.canonical(answer) == canonical


@pytest.mark.parametrize(
    "completion", ["", "A fever is common.", "A or B", "No fever is seen.", "Perhaps.", "B\nor so"]
)
def test_no_answer(completion):
    assert medical.answer_of(completion) is None


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("A", True), ("a", True), ("(A)", True), ("A) Aspirin", True), ("aspirin.", True), ("Aspirin", True),
        ("Aspirin [A]", True), ("[A] Aspirin", True), ("A [most likely]", True), ("\\text{A}", True), ("\\(A\\)", True),
        ("the correct option is A", True), ("Correct: A", True), ("just A", True), ("_A_", True), ("Ａ", True),
        ("also A", False), ("Aspirin [B]", False), ("the correct option is not A", False), ("A [or B]", False),
        ("B", False), ("A fever", False), ("A or B", False), ("Rest", False), ("yes", False), (None, False),
    ],
)  # fmt: skip
def test_options_are_right_by_letter_or_text(answer, right):
    for gold in ("A", "A) Aspirin", "Aspirin"):
        assert medical.equivalent([Sample(CHOICE, gold, extra={"options": OPTIONS})], [answer]) == [right]


GERMS = {"A": "C. difficile", "B": "B. anthracis", "C": "E. coli", "D": "A. fumigatus"}


@pytest.mark.parametrize("mark", ["{})", "{}.", "({})", "{}:"])
@pytest.mark.parametrize("gap", ["\n", " "])
def test_texts_that_begin_with_a_letter_and_a_mark(mark, gap):
    options = "".join(f"{gap}{mark.format(letter)} {text}" for letter, text in GERMS.items())
    question = f"Which one, in a patient with hepatitis A. and B. pertussis, causes colitis?{options}"
    sample = medical.parse(f"<question>{question}</question><answer>A) C. difficile</answer>")
    assert sample is not None
    assert (sample.extra, medical.fault(sample)) == ({"options": GERMS}, None)
    assert "the letter of the right option" in medical.student_prompt(question)[0]["content"]
    for letter, replies in {
        "A": ["C. difficile", "C. difficile as it does", "A. C. difficile", "A", "A, C. difficile", "c. difficile"],
        "B": ["B. anthracis", "B", "B) B. anthracis"],
        "C": ["E. coli", "C", "C) E. coli", "C."],
        "D": ["D", "A. fumigatus", "D. A. fumigatus"],
    }.items():
        assert [letters(GERMS, reply) for reply in replies] == [letter] * len(replies)


DRUGS = {"A": "Aspirin", "B": "Vitamin C", "C": "Morphine", "D": "Rest and aspirin since birth"}


@pytest.mark.parametrize(
    "statement",
    ["A. B. C. D.", "A) B) C) D)", "A)B)C)D)", "A) aspirin or C) morphine.", "A. or C.", "A) aspirin, C) morphine",
     "A) aspirin C) morphine", "A. aspirin C. morphine", "(A) (C)", "A) or possibly, C)", "A: aspirin; morphine",
     "aspirin or morphine", "option A or C", "Option A, option C", "A. or C. are possible", "A. B. C. D. are possible",
     "A) aspirin and/or C)",
     "A. C.", "A) the drug, or C) another", "A) aspirin (or morphine)", "C) or D) since both help",
     "D) rest and aspirin since birth or A) aspirin", "a) b) c) d)"],
)  # fmt: skip
def test_several_options_are_none(statement):
    for completion in (f"The answer is {statement}", f"\\boxed{{{statement}}}"):
        assert letters(DRUGS, medical.answer_of(completion)) == ""


@pytest.mark.parametrize("statement", ["A. B. C. D.", "A) aspirin, C) morphine", "A. or C.", "yes; no"])
def test_several_choices_have_no_common_canonical_form_with_one(statement):
    assert medical.canonical(statement) not in ("A", "yes")
    assert medical.answer_of(f"It is known.\n{statement}") is None


REMEDIES = {"A": "Aspirin", "B": "Warfarin", "C": "Heparin", "D": "Clopidogrel"}
SIGNS = {"A": "Fever", "B": "Cough", "C": "Both A and B", "D": "All of the above"}


@pytest.mark.parametrize(
    ("options", "statement", "letter"),
    [
        (DRUGS, "C because it is an opioid.", "C"),
        (DRUGS, "C since it is an opioid, unlike A) aspirin", "C"),
        (DRUGS, "C, as it is an opioid.", "C"),
        (DRUGS, "option C", "C"),
        (DRUGS, "Option (C).", "C"),
        (DRUGS, "choice C) morphine", "C"),
        (DRUGS, "the option C because A) and B) are weak", "C"),
        (DRUGS, "B) vitamin C", "B"),
        (DRUGS, "B. Vitamin C. It is a vitamin, as C. and D. are not", "B"),
        (DRUGS, "vitamin C because it is a vitamin", "B"),
        (DRUGS, "B) Vitamin C, A. fumigatus being a mould", "B"),
        (DRUGS, "C. A) is wrong.", "C"),
        (DRUGS, "C. A and B are wrong.", "C"),
        (DRUGS, "C) Morphine, A and B are wrong.", "C"),
        (DRUGS, "C. Option A is incorrect.", "C"),
        (DRUGS, "C) Morphine as A) and B) fail", "C"),
        (DRUGS, "C) Morphine; A, B, D are incorrect", "C"),
        (DRUGS, "C. A, B and D incorrect", "C"),
        (DRUGS, "C) Morphine (A and B are wrong)", "C"),
        (DRUGS, "C) morphine rather than A) aspirin or B) vitamin C", "C"),
        (DRUGS, "A) Aspirin, which, unlike C) morphine, or D), thins", "A"),
        (DRUGS, "C) Morphine. Aspirin thins the blood.", "C"),
        (DRUGS, "C) Morphine, not A) aspirin", "C"),
        (DRUGS, "C) Morphine. A fever is no sign.", "C"),
        (DRUGS, "C) morphine. No, not A.", "C"),
        (DRUGS, "C: Morphine (an opioid)", "C"),
        (DRUGS, "D) rest and aspirin since birth", "D"),
        (DRUGS, "Rest and aspirin since birth.", "D"),
        (DRUGS, "D) Rest and aspirin", "D"),
        (DRUGS, "C. C. C.", "C"),
        (DRUGS, "C) morphine, i.e. C", "C"),
        (REMEDIES, "A) Aspirin. B) Warfarin increases bleeding risk.", "A"),
        (REMEDIES, "A. B) Warfarin increases bleeding risk.", "A"),
        (REMEDIES, "A) Aspirin. B) Warfarin: This is wrong.", "A"),
        (REMEDIES, "A) Aspirin. B) Warfarin \u2013 incorrect. C) Heparin \u2013 incorrect.", "A"),
        (REMEDIES, "A) Aspirin. (B) is for atrial fibrillation, (C) needs injection.", "A"),
        (REMEDIES, "A) Aspirin, excluding (B), (C), and (D).", "A"),
        (REMEDIES, "A) Aspirin, which is preferred to (B), (C) and (D).", "A"),
        (REMEDIES, "A) Aspirin, and B) Warfarin is not indicated", "A"),
        (REMEDIES, "A) Aspirin, and B) Warfarin is indicated", ""),
        (REMEDIES, "A) Aspirin, and B) is not unlikely", ""),
        (REMEDIES, "A) Aspirin, and B) is also not wrong", ""),
        (REMEDIES, "A) Aspirin, and B) cannot be excluded", ""),
        (REMEDIES, "A) Aspirin, or B) Warfarin", ""),
        (REMEDIES, "A) Aspirin, (B) and (C)", ""),
        (REMEDIES, "A. B. C. D.", ""),
        (REMEDIES, "A) Aspirin. B) Warfarin.", ""),
        (REMEDIES, "B as well as C", ""),
        (REMEDIES, "A) Aspirin as well as B) Warfarin", ""),
        (REMEDIES, "A) Aspirin, but B) Warfarin is possible", ""),
        (REMEDIES, "A) Aspirin, B) Warfarin isn't incorrect", ""),
        (REMEDIES, "A) Aspirin; however, B) is acceptable", ""),
        (REMEDIES, "B) Aspirin", ""),
        (REMEDIES, "Aspirin (A)", "A"),
        (REMEDIES, "Aspirin (B)", ""),
        (REMEDIES, "A, B and C are wrong", "A"),
        (REMEDIES, "A, while B is false", "A"),
        (SIGNS, "D) All of the above (A, B, and C).", "D"),
        (SIGNS, "D) All of the above: fever and cough.", "D"),
        (SIGNS, "D. A, B and C are all true.", "D"),
        (SIGNS, "C) Both A and B", "C"),
        (SIGNS, "A and B", ""),
        (GERMS, "C. difficile, not E. coli", "A"),
        (GERMS, "C. difficile and not B. anthracis since it does", "A"),
        (GERMS, "C. difficile causes colitis. B. anthracis does not.", "A"),
        (GERMS, "C. E. coli. B. pertussis is another", "C"),
        (GERMS, "D) A. fumigatus", "D"),
        (GERMS, "C. difficile or E. coli", ""),
        (GERMS, "A. C. difficile or C. E. coli", ""),
        (GERMS, "C. difficile, B. anthracis", ""),
    ],
)
def test_an_option_with_more_words(options, statement, letter):
    assert letters(options, medical.answer_of(f"The answer is {statement}")) == letter


@pytest.mark.parametrize(
    "options", [{"A": "<5", "B": ">5", "C": "5", "D": "≥5"}, {"A": "1.2 g", "B": "1,2 g", "C": "12 g", "D": "1 2 g"}]
)
def test_options_told_apart_by_signs(options):
    question = "How much of it is given?\n" + "\n".join(f"{letter}) {text}" for letter, text in options.items())
    assert medical.fault(Sample(question, "A", extra={"options": options})) is None
    for letter, text in options.items():
        for statement in (text, f"{letter}) {text}", f"{text}, which is known", f"{letter} \u2014 {text}, which is so"):
            assert letters(options, statement) == letter


@pytest.mark.parametrize("line", ["B) A", "B", "B) A because it fits"])
def test_a_last_line_with_an_option_that_is_a_letter(line):
    assert letters({"A": "O", "B": "A", "C": "AB", "D": "B"}, medical.answer_of(f"So:\n{line}")) == "B"


@pytest.mark.parametrize(
    ("statement", "decision"),
    [
        ("yes; no", None),
        ("yes, or maybe no", None),
        ("no; maybe in children", None),
        ("yes. Maybe more trials are needed.", None),
        ("yes. maybe later", None),
        ("yes, although maybe not", None),
        ("yes. no or little effect", "yes"),
        ("yes. no. maybe.", None),
        ("yes (or no)", None),
        ("Yes, or no.", None),
        ("no - maybe", None),
        ("yes because it does, no doubt", "yes"),
        ("no since it fails", "no"),
        ("yes, as shown", "yes"),
        ("yes. No harm was seen.", "yes"),
        ("yes. Yes.", "yes"),
        ("no, there is no effect", "no"),
        ("maybe (it depends)", "maybe"),
        ("No, no significant difference was found.", "no"),
        ("no; no effect was seen", "no"),
        ("Yes, no adverse events were seen", "yes"),
        ("no, no", "no"),
        ("yes, no", None),
        ("yes, no, maybe", None),
        ("yes, no maybe", None),
        ("yes, no or slight", None),
        ("no, no yes", None),
        ("yes, maybe is right", None),
        ("No, a significant difference was not found", "no"),
        ("no fever because of rest", None),
    ],
)
def test_decisions_with_more_words(statement, decision):
    golds = [Sample("Does it?", gold) for gold in ("yes", "no", "maybe")]
    answer = medical.answer_of(f"The answer is {statement}")
    assert medical.equivalent(golds, [answer] * 3) == [gold.answer == decision for gold in golds]


@pytest.mark.parametrize(
    "part", ["A) ", "A, ", "yes. ", "or ", "( ", "aspirin, ", ", A", " ", "-", "because ", "option "]
)
def test_long_statements_are_read_in_linear_time(part):
    begin = time.process_time()
    medical.equivalent([Sample("Which?", "A", extra={"options": DRUGS})], ["A) " + part * (20_000 // len(part))])
    assert time.process_time() - begin < 5


def test_a_letter_alone_is_the_letter_of_an_option():
    options = {"A": "B", "B": "A", "C": "AB", "D": "0"}
    replies = ["A", "b.", "AB", "0", "A) B", "B) A", "(C) AB", "D: 0", "B", "D", "C"]
    assert [letters(options, reply) for reply in replies] == [*"ABCDABCDBDC"]


def test_decisions_are_right_by_the_word():
    golds = [Sample("Does it?", gold) for gold in ("yes", "no", "maybe")]
    assert medical.equivalent(golds, ["Yes", "No.", "maybe, it depends"]) == [True] * 3
    assert medical.equivalent(golds, ["no", "yes", "yes"]) == [False] * 3
    assert medical.equivalent(golds, ["yes or no", "yes, no", "nobody knows"]) == [False] * 3


def test_options_of_a_generated_question():
    text = f"<question>{CHOICE}</question><reasoning>It does.</reasoning><answer>A) Aspirin</answer>"
    sample = medical.parse(text)
    assert sample == Sample(CHOICE, "A) Aspirin", "It does.", {"options": OPTIONS})
    assert medical.fault(sample) is None
    inline = medical.parse(text.replace("\n", " "))
    assert inline is not None
    assert inline.extra["options"] == OPTIONS
    decision = medical.parse("<question>Does aspirin thin the blood?</question><answer>Yes</answer>")
    assert decision is not None
    assert (decision.extra, medical.fault(decision)) == ({}, None)
    assert medical.parse("<question>Why?</question>") is None


@pytest.mark.parametrize(
    ("question", "answer", "fault"),
    [
        ("Why?", "yes", "the question is too short"),
        ("Does aspirin thin the blood?", "it does", "neither options A) to D) nor an answer of yes, no or maybe"),
        ("Aspirin thins the blood a lot.", "yes", "nothing is asked"),
        (CHOICE, "yes", "the answer is none of the options"),
        (CHOICE, "Ibuprofen", "the answer is none of the options"),
        (CHOICE.replace("Rest", "aspirin"), "A", "two options are the same"),
        (CHOICE.replace("C) Rest\n", ""), "A", "neither options A) to D) nor an answer of yes, no or maybe"),
        (CHOICE.replace("Rest", ""), "A", "neither options A) to D) nor an answer of yes, no or maybe"),
    ],
)
def test_fault(question, answer, fault):
    sample = medical.parse(f"<question>{question}</question><answer>{answer}</answer>")
    assert sample is not None
    assert medical.fault(sample) == fault


def test_verify_knows_a_contradiction_and_no_more():
    extra = {"options": OPTIONS}
    samples = [
        Sample(CHOICE, "A) Aspirin", "So the answer is A.", extra),
        Sample(CHOICE, "A) Aspirin", "So the answer is B.", extra),
        Sample(CHOICE, "A) Aspirin", "It thins the blood.", extra),
        Sample("Does it?", "no", "It does. The answer is yes."),
    ]
    assert medical.verify(samples) == [None, False, None, False]


def test_a_solution_is_read_back():
    sample = Sample(CHOICE, "A) Aspirin", "It is known.", {"options": OPTIONS})
    assert medical.solution(sample) == "It is known.\nThe answer is A) Aspirin"
    assert medical.equivalent([sample], [medical.answer_of(medical.solution(sample))]) == [True]


def test_a_student_is_asked_for_the_form_of_the_question():
    assert "the letter of the right option" in medical.student_prompt(CHOICE)[0]["content"]
    assert "yes, no or maybe" in medical.student_prompt("Does it?")[0]["content"]


def test_medmcqa_rows(tmp_path):
    source = rows(tmp_path / "a.jsonl", MCQA, {**MCQA, "cop": 3.0, "exp": None})
    assert medical.load(source) == [
        Sample(CHOICE, "A) Aspirin", "It blocks platelets.", {"options": OPTIONS}),
        Sample(CHOICE, "D) None of these", "", {"options": OPTIONS}),
    ]
    (tmp_path / "c.csv").write_text(f"{','.join(MCQA)}\n{','.join(map(str, MCQA.values()))}\n")
    assert medical.load(str(tmp_path / "c.csv")) == [
        Sample(CHOICE, "A) Aspirin", "It blocks platelets.", {"options": OPTIONS})
    ]
    for cop in (-1, 4, None, "A", "", 0.5, True):
        with pytest.raises(ValueError, match=r"row 1: cop: expected 0 to 3, got"):
            medical.load(rows(tmp_path / "b.jsonl", {**MCQA, "cop": cop}))


def test_pubmedqa_rows_as_on_the_hub(tmp_path):
    row = {
        "question": "Does it?",
        "context": {"contexts": ["One.", "Two."], "labels": ["a", "b"]},
        "long_answer": "It does.",
        "final_decision": "yes",
    }
    assert medical.load(rows(tmp_path / "a.jsonl", row)) == [Sample("One.\n\nTwo.\n\nDoes it?", "yes", "It does.")]
    with pytest.raises(ValueError, match=r"row 2: contexts: expected a list of texts, got 'One\.'"):
        medical.load(rows(tmp_path / "b.jsonl", row, {**row, "context": "One."}))
    with pytest.raises(ValueError, match="row 1: final_decision: expected yes, no, maybe, got 'perhaps'"):
        medical.load(rows(tmp_path / "c.jsonl", {**row, "final_decision": "perhaps"}))


def test_pubmedqa_rows(shared_data):
    samples = medical.load(shared_data("medical/pubmedqa_train.jsonl"))
    assert Counter(sample.answer for sample in samples) == {"yes": 276, "no": 169, "maybe": 55}
    assert samples[0].question.endswith("Can tailored interventions increase mammography use among HMO women?")
    assert all(medical.equivalent(samples, [medical.answer_of(medical.solution(s)) for s in samples]))
    assert {medical.fault(sample) for sample in samples} <= {None, "nothing is asked"}
