"""Each gate on samples that it must reject and on samples that it must pass."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes import teach

import acqcore
from acqsynth.domains import Sample, domain as find_domain
from acqsynth.rewards import SampledAnswers, Scorer
from acqsynth.rewards.batch import Batch
from acqsynth.rewards.gates import (
    Answerable,
    Check,
    Fluent,
    Gate,
    Length,
    New,
    NoLeak,
    NoRepetition,
    NotInEvaluation,
    Sound,
    Verified,
    default_gates,
    repetition,
)


def passes(gate, question, answer="7", reasoning=""):
    [verdict] = gate([Sample(question, answer, reasoning)])
    return verdict


def test_sound(domain):
    assert passes(Sound(domain), "What is 3 + 4?")
    assert not passes(Sound(domain), "Three and four.")


@pytest.mark.parametrize(
    "token",
    ["<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<|fim_prefix|>", "</s>", "<s>", "<eos>", "<end_of_turn>",
     "<turn|>", "<\uff5cUser\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<end_of_utterance>", "[/INST]",
     "<<SYS>>", "[/SYSTEM_PROMPT]", "[|endofturn|]", "<EOS_TOKEN>", "<seed:eos>", "<SPECIAL_11>", "<extra_id_1>"],
)  # fmt: skip
@pytest.mark.parametrize("field", ["question", "answer", "reasoning"])
def test_a_control_token_is_not_sound(domain, token, field):
    honest = Sample("What is 3 + 4?", "7", "3 + 4 is 7")
    assert Sound(domain)([honest]) == [True]
    text = getattr(honest, field)
    assert Sound(domain)([replace(honest, **{field: f"{text}{token}7"})]) == [False]


def test_text_like_a_control_token_is_sound():
    text = "If <|x|> is 3, a <| f |> b, x<s and s>y, [1] and <b>bold</b>, how much is |x|<|y|>2?"
    assert passes(Sound(find_domain("math")), text)


def test_the_students_own_special_tokens_are_not_sound(model, tokenizer):
    domain = find_domain("math")
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"additional_special_tokens": ["<file_sep>", "[gMASK]", "!"]})
    of_student = Sound(domain, Scorer(model, ["loss"], tokenizer=own))
    questions = ["What is 3 + 4? <file_sep>", "[gMASK]What is 3 + 4?", "<s>Old price, what is 3! + 4?"]
    assert [passes(of_student, question) for question in questions] == [False, False, True]
    assert [passes(Sound(domain), question) for question in questions] == [True, True, False]
    assert not passes(of_student, "What is 3 + 4?<|im_end|>")  # of a teacher or another student
    own.add_special_tokens({"bos_token": "<s>"})
    of_student.refresh(model)
    assert not passes(of_student, questions[2])


def test_special_tokens_take_a_tokenizer_but_no_student(model, student_path, monkeypatch):
    monkeypatch.setattr(Scorer, "_student", lambda self: pytest.fail("loaded the student"))
    assert Scorer(student_path, ["loss"]).special_tokens() == {"</s>", "<pad>"}
    with pytest.raises(ValueError, match="tokenizer: expected one, as the student has none"):
        Scorer(acqcore.Student.from_model(model), ["loss"]).special_tokens()


@pytest.mark.parametrize(
    "make", [New, NotInEvaluation, lambda rows: Fluent(None, rows)], ids=["new", "evaluation", "fluent"]
)
def test_rows_are_samples(make):
    message = r"(seeds|rows)\[1\]: expected acqsynth.domains.Sample\(question, answer\), got"
    with pytest.raises(TypeError, match=message):
        make([Sample("What is 3 + 4?", "7"), {"question": "a", "answer": "b"}])


def test_length():
    gate = Length(question=(8, 20), whole=(10, 30))
    assert passes(gate, "x" * 8, "77")
    assert not passes(gate, "x" * 7, "777")
    assert not passes(gate, "x" * 21)
    assert passes(gate, "x" * 20, "7", "r" * 9)
    assert not passes(gate, "x" * 20, "7", "r" * 10)
    with pytest.raises(ValueError, match="whole: expected"):
        Length(whole=(5, 1))


@pytest.mark.parametrize("blank", ["\u200b", "\u00ad", "\u2060 ", "\ufeff", "\u3164", "\U000e0020", "\u202e", "\x00"])
def test_characters_that_show_nothing_have_no_length(blank):
    gate = Length(question=(4, 20), whole=(6, 60))
    assert not passes(gate, blank * 10)
    assert not passes(gate, f"abc{blank * 10}")
    assert passes(gate, f"abcd{blank.strip() * 100}", "77")
    assert repetition("the th" + blank) == 0


@pytest.mark.parametrize(
    "disguised",
    [
        "What is 3 + 4? The ans\u200bwer is **7**.",
        "Ｗｈａｔ ｉｓ ３ ＋ ４？ Ｔｈｅ ａｎｓｗｅｒ ｉｓ ７．",
        "3 + 4? Thе аnswer is 7.0",
        "3 + 4? The answer is 07",
    ],
)
def test_a_disguised_leak_is_one(domain, disguised):
    assert not passes(NoLeak(domain), disguised)


@pytest.mark.parametrize(
    "disguised",
    ["the t\u200bhe **the** th\u00ade the the", "ｔｈｅ the ｔｈｅ the ｔｈｅ the", "thе the thе the thе the"],
)
def test_disguised_repetition_is_one(disguised):
    assert not passes(NoRepetition(), disguised)


class TestNoRepetition:
    @pytest.mark.parametrize(
        "text",
        [
            "the the the the the",
            "a" * 20,
            "12 12 12 12 12 12 12",
            "What? What? What? What? What?",
            "数数数数数数数数数数数数数数数数数数",
        ],
    )
    def test_repeated_text(self, text):
        assert not passes(NoRepetition(), text)
        assert not passes(NoRepetition(), "What is 3 + 4?", text)
        assert not passes(NoRepetition(), "What is 3 + 4?", "7", text)

    @pytest.mark.parametrize(
        "text",
        [
            "What is 2 * 2 * 2 * 2 * 2?",
            "1000000000000",
            "ha ha ha",
            "List the squares: 1, 4, 9, 16, 25, 36, 49, 64, 81.",
        ],
    )
    def test_honest_text(self, text):
        assert passes(NoRepetition(), text)

    def test_share_of_runs(self):
        assert repetition("abcdefgh" * 2) == pytest.approx(1 / 9)
        assert repetition("abcdefgh" * 20) == pytest.approx(1 - 8 / 153)
        assert repetition("a" * 15) == 0

    def test_real_data_passes(self, shared_data):
        lines = Path(shared_data("math/gsm8k_train.jsonl")).read_text().splitlines()
        rows = [json.loads(line) for line in lines[::4]]
        assert all(NoRepetition()([Sample(row["question"], row["answer"]) for row in rows]))

    def test_wrong_limit(self):
        with pytest.raises(ValueError, match="limit"):
            NoRepetition(0)


class TestNoLeak:
    @pytest.mark.parametrize(
        ("question", "answer"),
        [
            ("What is 3 + 4? The answer is 7.", "7"),
            ("What is 3 + 4? (Answer: 7)", "7"),
            ("Show that the solution = 7 solves x - 3 = 4?", "It is 7."),
            ("Does aspirin help? Answer: yes", "yes"),
            ("Which is it? A) iron B) zinc. The answer is B", "B"),
            ("Since it is due to low iron in blood, what is it?", "low iron in blood"),
        ],
    )
    def test_leaks(self, domain, question, answer):
        assert not passes(NoLeak(domain), question, answer)

    @pytest.mark.parametrize(
        ("question", "answer"),
        [
            ("Tom has 3 red, 4 blue and 3 green pens. How many colours has he?", "3"),  # an unrelated number
            ("Solve x + 7 = 14. Give the answer as a number.", "7"),
            ("Is the answer 7 or 8 when 3 + 4 is computed?", "7"),
            ("What is the result of 7 + 0?", "7"),
            ("What is the result: 7 + 0?", "7"),
            ("Does aspirin help, yes or no?", "yes"),
            ("Which metal? A) iron B) zinc C) tin", "B"),
            ("Which cause? A) low iron in blood B) low zinc in blood", "low iron in blood"),
            ("Which cause?\n(a) low iron in blood\n(b) low zinc in blood", "low iron in blood"),
            ("Which city is the capital of France, Paris or Lyon?", "Paris"),
            ("What is 3 + 4?", "7"),
        ],
    )
    def test_honest_questions(self, domain, question, answer):
        assert passes(NoLeak(domain), question, answer)

    @pytest.mark.parametrize(
        ("stated", "answer"),
        [
            ("The answer is 5.", r"\boxed{5}"),
            ("The answer is 5.", "5 eggs"),
            ("The answer is 5.", "The answer is 5"),
            ("The solution = 60.", "5 dozen eggs"),
            (r"The answer is $\boxed{5}$.", "5"),
            ("The answer is 0.5.", "1/2"),
            ("Answer: 12.50 dollars.", "$12.5"),
            ("The answer is 50%.", "0.5"),
        ],
    )
    def test_the_same_value_in_another_form_leaks(self, stated, answer):
        assert not passes(NoLeak(find_domain("math")), f"{stated} What is it in the end?", answer)

    @pytest.mark.parametrize(
        ("stated", "answer"),
        [
            ("The answer is 15.", "5 eggs"),
            ("The result is 10.", "x^2 + 10"),
            ("The answer is 5.", "(3, 5)"),
            ("Is the answer 5 or 6?", r"\boxed{5}"),
            ("There are 5 hens.", "5 eggs"),
            ("The answer is a whole number.", r"\boxed{5}"),
        ],
    )
    def test_another_value_is_not_a_leak(self, stated, answer):
        assert passes(NoLeak(find_domain("math")), f"{stated} What is it in the end?", answer)

    @pytest.mark.parametrize(
        "marked",
        [
            r"\boxed{372}",
            r"\boxed{372.0}",
            r"$\boxed{\frac{744}{2}}$",
            r"It is 12 * 31 = \boxed{372}.",
            "\n#### 372",
            "\n####372 eggs\nShow it.",
            "Answer - 372",
            "(Answer \u2013 372)",
            "\nanswer => 372.0",
            "\nFinal answer \u2014 372",
            "The correct answer = 372 points",
            "Correct answer = 372",
            r"Write it as \boxed{372}.",
            r"\boxed{372} is the result.",
            "Correct answer: 372 points",
            r"The answer \boxed{372} is shown here.",
            "How many decimals has it? The answer is 372 decimals.",
            "Correct answer: 372 significant.",
        ],
    )
    def test_the_marks_of_a_final_answer_leak(self, marked):
        gate = NoLeak(find_domain("math"))
        assert not passes(gate, f"What is 12 * 31? {marked}", "372")

    @pytest.mark.parametrize(
        ("question", "answer"),
        [
            (r"What is 12 * \boxed{31}?", "372"),
            (r"What is \boxed{} + 360 if it is 12?", "360"),
            (r"Fill in: 12 + \boxed{\phantom{0}} = 384", "384"),
            ("#### Problem 372\nWhat is 12 * 31?", "372"),
            ("#### 1\nWhat is 12 * 31?", "372"),
            ("#### 3\nTom has some apples and eats none. How many has he?", "3"),
            (r"Find x with \boxed{5} + x = 10.", "5"),
            (r"Find the box: 3 + \boxed{\phantom{5}} = 8", "5"),
            ("What is 744 / 2 if 372 * 2 is 744?", "372"),
            ("Subtract 2 from my answer - 372 - to get 370. What is it over 2?", "186"),
            ("If the answer - 372 = 0, what is it?", "372"),
            ("What is 12 * 31? Answer - as a number.", "372"),
            ("What is 12 * 31? Answer - 371", "372"),
            (r"Give the answer as \boxed{n} where n is a number: 12 * 31?", "372"),
            ("Find the radius of a circle of area 13. (Answer - 2 decimal places)", "2"),
            ("Find the radius of a circle of area 13. Answer: 3 significant figures.", "3"),
            (r"The number \boxed{144} is drawn in a box. How many dozen eggs make so many eggs?", "12"),
            ("Correct answer = 5 points\nWrong answer = -2 points\nAnn had 3 right. What is her score?", "15"),
        ],
    )
    def test_other_marks_are_not_a_leak(self, question, answer):
        assert passes(NoLeak(find_domain("math")), question, answer)

    def test_a_marked_decision_leaks(self):
        gate = NoLeak(find_domain("medical"))
        assert not passes(gate, "Does aspirin thin the blood? Answer - yes", "yes")
        assert not passes(gate, "Does aspirin thin the blood? \\boxed{yes}", "yes")
        assert not passes(gate, "Which drug thins blood? Write \\boxed{C}.\nA) zinc\nB) iron\nC) heparin", "C) heparin")
        assert passes(gate, "Does aspirin thin the blood? Answer - yes or no.", "yes")

    @pytest.mark.parametrize("part", ["\\boxed{", "\\boxed{1}", "{", "#### ", "Answer - ", ". ", "write "])
    def test_long_questions_are_read_in_linear_time(self, domain, part):
        begin = time.process_time()
        passes(NoLeak(domain), part * (100_000 // len(part)))
        assert time.process_time() - begin < 5

    @pytest.mark.parametrize("name", ["medical", "math"])
    @pytest.mark.parametrize(
        "options",
        [
            "\nA) 7\nB) 8",
            "\n\nA. 7\nB. 8\nC. 9",
            "\n(a) 7\n(b) 8",
            "\na) 7\nb) 8",
            " A) 7 B) 8",
            " (A) 7 (B) 8",
            "\nA: 7\nB: 8",
        ],
    )
    def test_the_answer_before_a_list_of_options_is_none(self, name, options):
        gate = NoLeak(find_domain(name))
        for before in ("Choose the best answer:", "The most likely answer is:", "The result is", "Answer:"):
            question = f"What is 3 + 4? {before}{options}"
            for answer in ("A", "7", "B", "8"):
                assert passes(gate, question, answer)
            assert not passes(gate, f"{question}\nThe answer is B.", "B")
            assert not passes(gate, f"{question}\nThe answer is:\nA", "A")
            assert not passes(gate, f"The answer is A. {question}", "A")

    @pytest.mark.parametrize(
        ("question", "answer"),
        [
            ("What is 3 + 4?\nA) 7\nB) 8\nAnswer: A) 7", "A"),
            ("What is 3 + 4? A) 7 B) 8. Answer: B) 8", "B"),
            ("Choose the best answer:\nA) iron\nB) zinc\nThe answer is iron.", "iron"),
        ],
    )
    def test_an_option_named_after_the_list_leaks(self, question, answer):
        assert not passes(NoLeak(find_domain("medical")), question, answer)

    def test_the_whole_solution_in_the_question(self, domain):
        reasoning = "Three shells and four shells make seven shells in all."
        assert not passes(NoLeak(domain), f"What is 3 + 4? {reasoning}", "7", reasoning)
        assert passes(NoLeak(domain), "What is 3 + 4?", "7", reasoning)

    def test_one_label_is_not_a_list_of_options(self, domain):
        assert not passes(NoLeak(domain), "Vitamin A. The answer is 7. What is 3 + 4?", "7")
        assert not passes(NoLeak(domain), "Vitamin A. It is low iron in blood. What is it?", "low iron in blood")

    def test_real_data_passes(self, domain, shared_data):
        rows = [json.loads(line) for line in Path(shared_data("math/gsm8k_train.jsonl")).read_text().splitlines()]
        samples = [Sample(row["question"], *reversed(row["answer"].split("\n#### "))) for row in rows]
        assert NoLeak(domain)(samples).count(False) <= 3  # of 3,000


def test_new(sample):
    gate = New([sample(3, 4)])
    assert gate([sample(3, 4), sample(30, 40), sample(30, 40)]) == [False, True, True]  # copies in a call may pass
    assert len(gate) == 0
    gate.accept([sample(30, 40)])
    assert gate([sample(30, 40), sample(31, 40)]) == [False, True]
    other = New([sample(3, 4)])
    other.load_state_dict(gate.state_dict())
    assert len(other) == 1
    assert other([sample(3, 4), sample(30, 40), sample(31, 40)]) == [False, False, True]


def test_not_in_evaluation(sample):
    gate = NotInEvaluation([sample(3, 4)])
    assert gate([sample(3, 4), sample(5, 4)]) == [False, True]


def test_verified(domain, sample):
    unknown = Sample("Who was it?", "Ada")
    assert Verified(domain)([sample(3, 4), sample(3, 4, answer="8"), unknown]) == [True, False, True]


def test_answerable(domain, scripted):
    script = {"weak?": ["7", "8", "9", "7"], "lost?": ["1", "2", "3", "no"], "once?": ["7", "8", "8", "8"]}
    answers = SampledAnswers(scripted(script.__getitem__), domain, k=4)
    samples = [Sample(question, "7") for question in script]
    assert Answerable(answers)(samples) == [True, False, False]  # one in four may be chance
    assert Answerable(answers, least=0.25)(samples) == [True, False, True]
    assert Answerable(answers, least=0.5)(samples) == [True, False, False]
    with pytest.raises(ValueError, match="least"):
        Answerable(answers, least=0.0)


def test_an_answer_known_to_be_right_needs_no_student(domain, scripted, sample):
    engine = scripted(lambda question: ["no idea"])
    gate = Answerable(SampledAnswers(engine, domain))
    assert gate([sample(3, 4), Sample("Who?", "7"), sample(3, 4, answer="9")]) == [True, False, False]
    [(prompts, _)] = engine.calls
    assert len(prompts) == 2


def test_a_sample_is_verified_once_a_call(domain, scripted, sample, monkeypatch):
    monkeypatch.setattr(type(domain), "__hash__", None)  # as of a dataclass
    verify, asked = domain.verify, []
    domain.verify = lambda samples: asked.append(len(samples)) or verify(samples)
    gates = Verified(domain), Answerable(SampledAnswers(scripted(lambda question: ["7"]), domain))
    samples = Batch([sample(3, 4), sample(5, 6)])
    assert [gate(samples) for gate in gates] == [[True, True]] * 2
    assert asked == [2]


def test_check():
    gate = Check("short", lambda sample: len(sample.question) < 5)
    assert isinstance(gate, Gate)
    assert gate([Sample("Who?", "7"), Sample("Whoever?", "7")]) == [True, False]


class TestFluent:
    @pytest.fixture
    def student(self, model, tokenizer, sample):
        """A student trained for a few steps on similar questions."""
        rows = [tokenizer(sample(a, 50 - a).question)["input_ids"] for a in range(10, 40)]
        teach(model, [torch.tensor(rows[step % 3 :: 3]) for step in range(60)])
        return model

    def test_random_tokens_and_salad(self, student, tokenizer, sample):
        gate = Fluent(student, [sample(a, 60 - a) for a in range(10, 20)], tokenizer=tokenizer)
        words = sample(11, 12).question.split()
        gibberish = ["~{ q#v|Z@ x!0 )_ kW^ ?=;: jJ$ 3~ &", " ".join(sorted(words)), " ".join(reversed(words))]
        questions = [sample(11, 12).question, sample(37, 22).question, *gibberish]
        assert gate([Sample(q, "7") for q in questions]) == [True, True, False, False, False]
        assert gate([sample(11, 12, reasoning=gibberish[0])]) == [False]  # the question's limit: no seed has reasoning
        assert gate([sample(11, 12, reasoning="~~")]) == [True]  # too short to be judged
        assert gate([]) == []

    def test_the_limit(self, model, tokenizer, sample):
        seeds = [sample(3, 4), sample(50, 6, reasoning="Fifty and six are fifty-six, as one counts.")]
        gate = Fluent(model, seeds, tokenizer=tokenizer, deviations=2)
        texts = [seeds[0].question, seeds[1].question]
        losses = acqcore.score(model, texts, ("loss",), tokenizer=tokenizer)["loss"]
        mean = losses.mean().item()
        spread = max(losses.std(correction=0).item(), 0.1 * mean)
        assert gate.limits()["question"] == pytest.approx(mean + 2 * spread, rel=1e-5)
        assert set(gate.limits()) == {"question", "reasoning"}
        before = gate.limits()
        gate.refresh(type(model)(model.config))
        assert gate.limits() != before

    def test_it_uses_the_mean_whatever_the_reduction(self, model, tokenizer, sample):
        one, other = (
            Fluent(model, [sample(3, 4), sample(5, 6)], tokenizer=tokenizer, reduction=reduction).limits()
            for reduction in ("mean", "sum")
        )
        assert one == other

    def test_seeds_are_needed(self, model, tokenizer):
        with pytest.raises(ValueError, match="seeds: expected at least one"):
            Fluent(model, [], tokenizer=tokenizer)


def test_default_gates_depend_on_the_arguments(domain, scripted, sample, model, tokenizer):
    def names(**options):
        return [gate.name for gate in default_gates(domain, seeds=[sample(3, 4)], **options)]

    first = ["sound", "length", "no_repetition", "no_leak", "new"]
    assert names() == [*first, "verified"]
    answers = SampledAnswers(scripted(lambda question: ["7"]), domain)
    every = names(evaluation=[sample(5, 6)], student=model, tokenizer=tokenizer, answers=answers)
    assert every == [*first, "not_in_evaluation", "fluent", "verified", "answerable"]
    assert names(evaluation=[sample(5, 6)], label=list) == [*first, "not_in_evaluation", "labelled", "verified"]
