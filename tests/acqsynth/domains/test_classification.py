from __future__ import annotations

import json
import time
from collections import Counter

import datasets
import pandas
import pytest

from acqsynth import write
from acqsynth.artefacts import read_rows
from acqsynth.config import DataConfig
from acqsynth.domains import Sample, domain
from acqsynth.domains.classification import Classification
from acqsynth.rewards.gates import default_gates
from acqsynth.stages.rows import collect_rows
from acqsynth.steps import StepContext

LABELS = ["card", "card_arrival", 'say "hi", then go', "Refund_not_showing_up", "reverted_card_payment?"]

classification = Classification(LABELS)


def row(text, label):
    return Sample(text, label, extra={"skill": label})


@pytest.mark.parametrize(
    ("completion", "label", "right"),
    [
        ("card arrival", "card_arrival", True),
        ("Card  Arrival\nis it", "card_arrival", True),
        ("card_arrival", "card_arrival", True),
        ("card", "card_arrival", False),  # a prefix of the label
        ("card arrival", "card", False),
        ("card arrival late", "card_arrival", False),
        ('say "hi", then go', 'say "hi", then go', True),
        ("say hi, then go", 'say "hi", then go', False),
        ("reverted card payment?", "reverted_card_payment?", True),
        ("Answer: card arrival", "card_arrival", True),
        ("- **Card arrival**", "card_arrival", True),
        ("The category is: card arrival.", "card_arrival", True),
        ("The correct answer is card", "card", True),
        ("Category：card", "card", True),
        ("The category is not card", "card", False),
        ("category island card", "card", False),
        ("cafe\u0301", "caf\u00e9", True),
        ("reverted card payment", "reverted_card_payment?", False),
        ("refund not showing up", "Refund_not_showing_up", True),
        *(
            (text, "card_arrival", True)
            for text in (
                "card arrival.",
                "**card arrival**",
                "`card arrival`",
                "*card arrival*",
                '"card arrival"',
                "'Card arrival'.",
            )
        ),
        *(
            (f"{marker} card arrival", "card_arrival", True)
            for marker in ("Category:", "label:", "**Intent:**", "Class :")
        ),
        ("card arrival, card", "card_arrival", False),
        ("category: card", "card_arrival", False),
        *((text, "Acme Inc.", True) for text in ("Acme Inc.", '"Acme Inc.".', "acme inc", "Category: Acme Inc.")),
        *((text, '"other"', True) for text in ('"other"', "other.", "**other**")),
        *((text, "...", text == "...") for text in ("...", ".", "card")),
        ("", "card", False),
        (" \n ", "card", False),
    ],
)
def test_the_name_has_to_be_exact(completion, label, right):
    answer = classification.answer_of(completion)
    assert classification.equivalent([row("Where is it?", label)], [answer]) == [right]


def test_solutions_are_read_back():
    samples = [row("Where is it?", label) for label in LABELS]
    answers = [classification.answer_of(classification.solution(sample)) for sample in samples]
    assert answers == ["card", "card arrival", 'say "hi", then go', "Refund not showing up", "reverted card payment?"]
    assert classification.equivalent(samples, answers) == [True] * 5
    # Each label matches only itself.
    for i, sample in enumerate(samples):
        assert classification.equivalent([sample] * 5, answers) == [j == i for j in range(5)]


def test_what_is_written_is_parsed_with_the_seeds_spelling():
    for label in LABELS:
        sample = row('Where is it, "please"?', label)
        assert classification.parse(classification.tagged(sample)) == sample
        assert classification.fault(sample) is None
    unknown = classification.parse("<question>Where?</question><answer>card arrivals</answer>")
    assert unknown == row("Where?", "card arrivals")
    assert classification.fault(unknown) == "unknown label"
    assert Classification().fault(unknown) is None  # without known labels, any name is valid
    assert classification.parse("<question> </question><answer>card</answer>") is None
    assert classification.parse("<question>Where?</question><answer></answer>") is None


def test_an_answer_becomes_the_label_with_the_seeds_spelling():
    asked = row("Where?", "card")
    assert classification.labelled(asked, "Card arrival", "") == row("Where?", "card_arrival")
    assert classification.labelled(asked, "an unknown one", "") == row("Where?", "an unknown one")


@pytest.mark.parametrize(
    ("text", "leaks"),
    [
        ("When will my card arrival be?", False),  # an honest text may use these words
        ("card arrival", True),
        ("Card arrival!", True),
        ("It is about card_arrival", True),
        ("Category: card arrival. Where is it?", True),
        ('The intent is "card arrival" here', True),
        ("a card arrival category message", True),
        ("Which category of card arrivals?", False),
        ("Where is my new card?", False),
    ],
)
def test_a_text_may_not_name_its_label(text, leaks):
    assert classification.fault(row(text, "card_arrival")) == ("the text names its label" if leaks else None)


def test_labels_come_from_the_seeds():
    seeds = [row(f"text {i}", f"intent_{i % 150}") for i in range(300)]
    found = Classification().with_seeds(seeds)
    assert found.labels == [f"intent_{i}" for i in range(150)]
    assert found.fault(row("A text", "intent_149")) is None
    assert found.fault(row("A text", "intent_150")) == "unknown label"
    assert found.fault(row("A text", "intent_14")) is None  # a prefix of other labels


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a_b", "A b"], "labels: 'a_b' and 'A b' are the same name"),
        (["a", " "], "labels: expected names of one line, got ' '"),
        (["a\nb"], "labels: expected names of one line"),
    ],
)
def test_labels_that_cannot_be_told_apart(labels, message):
    with pytest.raises(ValueError, match=message):
        Classification(labels)


@pytest.mark.parametrize("turns", [False, True])
def test_a_prompt_asks_for_a_text_of_one_label(turns):
    seeds = [row(f"text {i} of {label}", label) for label in LABELS for i in range(2)]
    prompts = write.prompts(classification, seeds, 10, shown=2, turns=turns, seed=0)
    asked = Counter[str]()
    for prompt in prompts:
        words = "\n".join(message["content"] for message in prompt)
        [label] = [label for label in LABELS if f"text 0 of {label}\n" in words]
        assert f"text 1 of {label}\n" in words
        name = label.replace("_", " ")
        assert f'category "{name}"' in prompt[-1]["content"]
        assert f"<answer>\n{name}\n</answer>" in prompt[-1]["content"]
        assert len(prompt) == (5 if turns else 1)
        assert all(classification.parse(turn["content"]) for turn in prompt if turn["role"] == "assistant")
        asked[label] += 1
    assert asked == dict.fromkeys(LABELS, 2)  # every label is used equally often


def test_a_free_prompt_names_no_label():
    [prompt] = write.prompts(classification, [row("Where?", "card")], 1, shown=0, seed=0)
    assert "the name of its category" in prompt[0]["content"]
    assert "card" not in prompt[0]["content"]


def test_a_label_with_one_seed_shows_that():
    seeds = [row("Where?", "card"), row("When?", "card_arrival"), row("How long?", "card_arrival")]
    prompts = write.prompts(classification, seeds, 4, shown=2, seed=0)
    shown = Counter(prompt[0]["content"].count("<question>") - 1 for prompt in prompts)
    assert shown == {1: 2, 2: 2}


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_rows_of_any_file(suffix, tmp_path):
    rows = [('Hello, "you"\nthere', 'say "hi", then go'), ("Where?", "card"), ("A, b", "card_arrival")]
    path = tmp_path / f"data.{suffix}"
    frame = pandas.DataFrame(rows, columns=["utterance", "category"])
    if suffix == "csv":
        frame.to_csv(path, index=False)
    elif suffix == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    found = classification.load(str(path), columns={"text": "utterance", "label": "category"})
    assert found == [row(text, label) for text, label in rows]
    with pytest.raises(ValueError, match=r"expected the columns \(text, label\) or \(text, intent\)"):
        classification.load(str(path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": "", "label": "card"}, "row 2: text: expected text, got ''"),
        ({"text": " \n", "label": "card"}, "row 2: text: expected text"),
        ({"text": None, "label": "card"}, "row 2: text: expected text, got None"),
        ({"text": "Where?", "label": ""}, "row 2: label: expected text, got ''"),
        ({"text": "Where?", "label": True}, "row 2: label: expected text, got True"),
        ({"text": "Where?", "label": "a\nb"}, "row 2: label: expected a name of one line"),
        ({"text": "Where?"}, "row 2: no 'label'"),
    ],
)
def test_rows_that_cannot_be_read(values, message, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "Where?", "label": 3}) + "\n" + json.dumps(values) + "\n")
    assert classification.load(str(path), limit=1) == [row("Where?", "3")]
    with pytest.raises(ValueError, match=message):
        classification.load(str(path))


def test_classes_of_a_hub_data_set_have_their_names(monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=LABELS)})
    texts = ["Who?", "Where?", "Why?", "When?"]
    found = datasets.Dataset.from_dict({"text": texts, "label": [-1, 0, None, 2]}, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
    assert classification.load("some/intents") == [row("Where?", LABELS[0]), row("When?", LABELS[2])]
    assert classification.load("some/intents", limit=1) == [row("Where?", LABELS[0])]
    found = found.select([0, 2])
    with pytest.raises(ValueError, match="none of 2 rows has a final answer"):
        classification.load("some/intents")


def test_rows_without_a_label_are_left_out(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "Good", "label": 1}\n{"text": "Well", "label": null}\n{"text": "Bad", "label": -1}\n')
    assert classification.load(str(path)) == [row("Good", "1"), row("Bad", "-1")]


def test_absent_intents_say_what_to_give(tmp_path, monkeypatch):
    monkeypatch.setenv("ACQCORE_DATA", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"set ACQCORE_DATA to a folder with intents/banking77_train\.jsonl, or"
    ):
        classification.load("intents:banking77_train")
    (tmp_path / "intents").mkdir()
    (tmp_path / "intents" / "mine.jsonl").write_text('{"text": "Where?", "intent": "card"}\n')
    assert classification.load("intents:mine") == [row("Where?", "card")]


def test_gates_refuse_what_is_no_new_row():
    seeds = [row("Where is my new card?", "card_arrival"), row("I want a card", "card")]
    tests = [row("When will you deliver my card to me?", "card_arrival")]
    gates = {gate.name: gate for gate in default_gates(classification.with_seeds(seeds), seeds=seeds, evaluation=tests)}
    fine = row("How many days until it is here?", "card_arrival")
    cases = {
        "new": row("where is my NEW card", "card_arrival"),
        "not_in_evaluation": row("when will you deliver my card to me", "card"),
        "sound": row("How many days until it is here?", "refund"),
    }
    for name, sample in cases.items():
        assert list(gates[name]([fine, sample])) == [True, False], name


def test_a_test_row_in_the_training_pool_is_left_out(tmp_path):
    def file(name, rows):
        lines = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
        (tmp_path / name).write_text(lines)
        return {"source": str(tmp_path / name)}

    test = file("test.jsonl", [("Where is it?", "card_arrival"), ("Why?", "card")])
    pool = file("pool.jsonl", [("where  is it?", "card"), ("How?", "card"), ("How long?", "card"), ("Who?", "x")])
    data = DataConfig(evaluation=test, seeds=pool, real={**pool, "per_label": 1, "skip": 1})
    collect_rows(StepContext(tmp_path), domain="classification", data=data, others={}, limit=None)
    assert [s.question for s in read_rows(tmp_path / "seeds.parquet")] == ["How?", "How long?", "Who?"]
    assert [s.question for s in read_rows(tmp_path / "real.parquet")] == ["How?"]
    assert json.loads((tmp_path / "rows.json").read_text())["seeds"] == {"rows": 3, "left_out": 1}


@pytest.mark.parametrize(("name", "labels", "share"), [("banking77", 77, 0.001), ("clinc150", 150, 0.002)])
def test_real_intents_pass(name, labels, share, shared_data):
    rows = domain("classification").load(shared_data(f"intents/{name}_train.jsonl"))
    found = Classification().with_seeds(rows)
    assert len(found.labels) == labels
    assert all(found.equivalent(rows, [found.answer_of(found.solution(sample)) for sample in rows]))
    assert sum(found.fault(sample) is not None for sample in rows) <= share * len(rows)


def test_labels_that_differ_in_a_dot_or_quotes_are_read_exactly():
    names = ["C", "C.", "U.S.", "U.S", '"quoted"', "topic: quoted", "card_arrival."]
    rows = Classification(names)
    assert rows.labels == names
    for name in names:
        assert rows.parse(f"<question>\nhello there\n</question>\n<answer>\n{name}\n</answer>").answer == name
    assert rows.canonical("**Card arrival**") == rows.canonical("card_arrival.")
    for unclear in ('"C"', "**U.S.**", "quoted"):
        assert rows.canonical(unclear) not in map(rows.canonical, names)


def test_what_stands_around_a_label_is_read_in_linear_time():
    begin = time.process_time()
    for sign in ('."', ". ", "**", " '"):
        Classification(["a"]).canonical(sign * 50_000 + "x")
    assert time.process_time() - begin < 2
