"""``acqcore select`` on a small saved model: choices, output rows, bad lines, wrong usage."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow
import pytest
import torch
from pyarrow import parquet

import acqcore
from acqcore.cli import main

TEXTS = [
    "The quick brown fox", "a fox", "The answer is 5.", "def add(a, b): return a + b", "the lazy dog",
    "A patient has fever", "What is 2 + 3?", "which drug helps?",
]  # fmt: skip
ROWS = [{"text": text} for text in TEXTS]


@pytest.fixture
def choose(command):
    """``choose(rows, **options)``: a command line that chooses three of ``rows`` by entropy; None drops an option."""

    return lambda rows, **options: ["select", *command(rows, **{"signal": "entropy", "n": 3, **options})[1:]]


def entropies(student: Path, texts: list[str]) -> torch.Tensor:
    return acqcore.score(str(student), texts, "entropy", backend="eager")["entropy"]


def test_the_highest_rows_are_kept_whole_and_in_order(choose, student, tmp_path, capsys, read):
    rows = [{"id": f"r{i}", "text": text, "tags": [i, {"a": None}]} for i, text in enumerate(TEXTS)]
    del rows[1]["tags"]
    assert main(choose(rows)) == 0
    values = entropies(student, TEXTS)
    order = values.argsort(descending=True)[:3].tolist()
    found = read(tmp_path / "out.jsonl")
    assert [row["row"] for row in found] == sorted(order)
    for row in found:
        assert row["rank"] == order.index(row["row"]) + 1
        assert row["entropy"] == pytest.approx(values[row["row"]].item(), rel=1e-6)
        assert {key: row[key] for key in row if key not in ("row", "rank", "entropy")} == rows[row["row"]]
    out = capsys.readouterr().out
    assert "3 of 8 rows chosen by top_k" in out
    assert f"{values[order].mean():.4g}" in out


def test_equals_go_by_their_order(choose, tmp_path, read):
    assert main(choose([{"text": TEXTS[0]}] * 6)) == 0
    assert [(row["row"], row["rank"]) for row in read(tmp_path / "out.jsonl")] == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("method", ["badge", "facility_location", "k_center", "log_det"])
def test_diverse_methods_choose_among_the_highest(method, choose, student, tmp_path, read):
    values = entropies(student, TEXTS)
    among = values.argsort(descending=True)[:5].sort().values
    vectors = acqcore.badge_embedding(str(student), [TEXTS[i] for i in among], backend="eager")
    expected = among[acqcore.select(vectors, 3, method, seed=4)].tolist()
    assert main(choose(ROWS, method=method, among=5, seed=4)) == 0
    found = read(tmp_path / "out.jsonl")
    assert [row["row"] for row in sorted(found, key=lambda row: row["rank"])] == expected


def test_labels_that_others_predict_take_turns(choose, student, tmp_path, capsys, read):
    texts = [f"{text} {i}" for i in range(4) for text in ("The quick brown fox", "which drug helps?")]
    rows: list[dict[str, Any]] = [{"text": text, "intent": ("animal", 7)[i % 2]} for i, text in enumerate(texts)]
    rows[2]["intent"] = 7
    rows[3]["intent"] = 7.0  # as written by tables with missing cells
    rows += [{"text": "a fox", "intent": None}, {"text": "a fox", "intent": ""}, {"text": "a fox", "intent": 0.5}]
    assert main(choose(rows, n=4, label_column="intent")) == 0
    labels = torch.tensor([row["intent"] == "animal" for row in rows[:8]]).long()
    trust = acqcore.label_trust(acqcore.prompt_embedding(str(student), texts), labels)
    expected = acqcore.select(entropies(student, texts), 4, labels=labels, trust=trust).tolist()
    assert trust.argmin() == 2
    found = sorted(read(tmp_path / "out.jsonl"), key=lambda row: row["rank"])
    assert [row["row"] for row in found] == expected
    turns = [row["intent"] for row in found]
    assert turns in (["animal", 7] * 2, [7, "animal"] * 2)
    err = capsys.readouterr().err
    assert f"{int((trust > 0).sum())} of 8 labels agree with those of similar prompts\n" in err
    for got in ("None", "''", "0.5"):
        assert f"intent: expected a string or an int, got {got}" in err


def test_labels_of_equal_prompts(choose, tmp_path, capsys, read):
    rows = [{"prompt": "classify:", "completion": f" a{i}", "intent": "xy"[i % 2]} for i in range(6)]
    assert main(choose(rows, n=2, label_column="intent")) == 0
    expected = "0 of 6 labels agree with those of similar prompts; 2 of the chosen rows are not trusted\n"
    assert expected in capsys.readouterr().err
    assert len(read(tmp_path / "out.jsonl")) == 2


def test_tools_of_some_rows_only(choose, tmp_path, capsys):
    turns = [{"role": "user", "content": "a fox?"}, {"role": "assistant", "content": "a dog."}]
    rows: list[dict[str, Any]] = [{"messages": turns} for _ in range(3)]
    rows[1] |= {"tools": [], "chat_template_kwargs": {}}
    assert main(choose(rows)) == 0
    assert "a dog." in capsys.readouterr().out


def test_diversity_alone_chooses_among_all_rows(choose, student, tmp_path, read):
    copies = [{"text": TEXTS[0]}] * 5 + [{"text": TEXTS[1]}, {"text": TEXTS[3]}]
    assert main(choose(copies, method="facility_location", signal=None)) == 0
    found = read(tmp_path / "out.jsonl")
    assert [row["row"] for row in found] == [0, 5, 6]
    assert set(found[0]) == {"row", "text", "rank"}


def test_a_smaller_choice_is_the_beginning_of_a_larger(choose, tmp_path, read):
    ranked = []
    for n in (2, 5):
        assert main(choose(ROWS, n=n, method="badge", signal=None, out=tmp_path / f"{n}.jsonl")) == 0
        ranked.append([row["row"] for row in sorted(read(tmp_path / f"{n}.jsonl"), key=lambda row: row["rank"])])
    assert ranked[0] == ranked[1][:2]


@pytest.mark.parametrize("source", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("target", ["jsonl", "csv", "parquet"])
def test_every_kind_of_file(source, target, choose, student, tmp_path, read):
    texts = ['a "fox", a dog', "The\nlines", "ünïcode 🙂", "a, b"]
    data, out = tmp_path / f"in.{source}", tmp_path / f"out.{target}"
    if source == "parquet":
        table = pyarrow.table({"id": pyarrow.array([7, 8, 9, 10], pyarrow.int16()), "text": texts})
        parquet.write_table(table, data)
    elif source == "csv":
        with data.open("w", newline="") as file:
            csv.writer(file).writerows([("id", "text"), *zip((7, 8, 9, 10), texts, strict=True)])
    else:
        data.write_text("".join(json.dumps({"id": 7 + i, "text": text}) + "\n" for i, text in enumerate(texts)))
    assert main(choose([], data=data, out=out, n=2)) == 0
    found = read(out)
    if source == target == "parquet":
        assert parquet.read_schema(out).field("id").type == pyarrow.int16()
    best = entropies(student, texts).argsort(descending=True)[:2].sort().values.tolist()
    assert list(found[0]) == ["row", "id", "text", "entropy", "rank"]
    assert [(int(row["row"]), int(row["id"]), row["text"]) for row in found] == [(i, 7 + i, texts[i]) for i in best]


def test_a_data_set_by_name(choose, student, tmp_path, monkeypatch, read):
    import datasets

    asked: list[Any] = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list([{"id": i, "text": text} for i, text in enumerate(TEXTS)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert main(choose([], data="org/name", split="test")) == 0
    assert asked == [(("org/name", None), {"split": "test"})]
    best = entropies(student, TEXTS).argsort(descending=True)[:3].sort().values.tolist()
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == best


def test_a_column_of_scores_needs_no_student(choose, tmp_path, capsys, read):
    values = [1.5, None, 3, "x", 3, -2, float("inf"), 10**400, str(2**60), 2**60 + 1]
    rows = [{"row": 10 + i, "score": value} for i, value in enumerate(values)]
    words = choose(rows, signal="score", student=None, backend=None, n=5)
    assert main(words) == 0
    found = read(tmp_path / "out.jsonl")
    assert found == [
        {"row": 10, "score": 1.5, "rank": 5},
        {"row": 12, "score": 3, "rank": 3},
        {"row": 14, "score": 3, "rank": 4},
        {"row": 18, "score": str(2**60), "rank": 2},
        {"row": 19, "score": 2**60 + 1, "rank": 1},
    ]
    errors = capsys.readouterr().err.splitlines()
    assert [error.split(": ")[1] for error in errors] == ["line 2", "line 4", "line 7", "line 8"]
    assert errors[1].endswith("score: expected a finite number, got 'x'")


def test_the_mean_of_values_whose_sum_overflows_is_shown(choose, capsys):
    rows = [{"score": value} for value in (1.5e308, 1.6e308, 1.7e308)]
    assert main(choose(rows, signal="score", student=None, backend=None, n=2)) == 0
    assert "1.65e+308" in capsys.readouterr().out


def test_arguments_reach_the_signal(choose, student, tmp_path, read):
    given = {"mutual_information": {"layers": 1, "draws": 2, "seed": 3}}
    assert main(choose(ROWS, signal="mutual_information", acquisition_args=json.dumps(given))) == 0
    scores = acqcore.score(str(student), TEXTS, "mutual_information", acquisition_args=given, backend="eager")
    best = scores["mutual_information"].argsort(descending=True)[:3].sort().values.tolist()
    assert [row["row"] for row in read(tmp_path / "out.jsonl")] == best


@pytest.mark.parametrize(
    ("signal", "arguments"),
    [("gradient_diversity", {"dim": 64}), ("mutual_information", {"form": "linear", "probes": 2})],
)
def test_signals_of_sets_and_the_linear_form(signal, arguments, choose, student, tmp_path, read):
    given = {signal: arguments}
    assert main(choose(ROWS, signal=signal, acquisition_args=json.dumps(given))) == 0
    values = acqcore.score(str(student), TEXTS, signal, acquisition_args=given, backend="eager")[signal]
    found = {row["row"]: row[signal] for row in read(tmp_path / "out.jsonl")}
    assert set(found) == set(values.argsort(descending=True)[:3].tolist())
    assert all(value == pytest.approx(values[i].item(), rel=1e-5) for i, value in found.items())


def test_bad_lines_are_named_and_not_chosen(choose, tmp_path, capsys, read):
    rows = ['{"text": ', {"text": ""}, {"other": 1}, {"text": 3}, {"text": "fox " * 80}, *({"text": t} for t in TEXTS)]
    assert main(choose(rows, n=8)) == 0
    captured = capsys.readouterr()
    assert [error.split(": ")[1] for error in captured.err.splitlines()] == [f"line {i}" for i in range(1, 6)]
    assert "8 of 13 rows chosen by top_k; 5 rows with an error" in " ".join(captured.out.split())
    assert [row["row"] for row in read(tmp_path / "out.jsonl")] == list(range(5, 13))
    (tmp_path / "out.jsonl").unlink()
    assert main(choose(rows, n=9)) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "acqcore: error: --n: expected at most 8 (the number of rows that can be chosen), got 9"
    )


def test_rows_without_a_finite_value_are_not_chosen(choose, tmp_path, monkeypatch, capsys, read):
    def scored(student, rows, *_, **__):
        return {"entropy": torch.tensor([1.0, torch.nan, 0.5, 2.0])}

    monkeypatch.setattr("acqcore.files.choose.score", scored)
    rows = ROWS[:4]
    assert main(choose(rows)) == 0
    assert [(row["row"], row["rank"]) for row in read(tmp_path / "out.jsonl")] == [(0, 2), (2, 3), (3, 1)]
    assert "line 2: a value is not finite" in capsys.readouterr().err
    (tmp_path / "out.jsonl").unlink()
    assert main(choose(rows, n=4)) == 2
    assert "n: expected at most 3 (the number of rows with a finite value), got 4" in capsys.readouterr().err


@pytest.mark.parametrize("signal", [None, "entropy"])
def test_rows_without_a_finite_gradient_are_not_chosen(signal, choose, tmp_path, monkeypatch, capsys, read):
    vectors = torch.tensor([[1.0, 0.0], [torch.nan, 0.0], [1.0, 0.0], [0.0, 1.0]])
    monkeypatch.setattr("acqcore.files.choose.badge_embedding", lambda *_, **__: vectors)
    assert main(choose(ROWS[:4], n=2, method="k_center", signal=signal)) == 0
    assert [row["row"] for row in read(tmp_path / "out.jsonl")] == [0, 3]
    captured = capsys.readouterr()
    assert "data.jsonl: line 2: its gradient is not finite" in captured.err
    assert "2 of 4 rows chosen by k_center; 1 row with an error" in captured.out
    (tmp_path / "out.jsonl").unlink()
    assert main(choose(ROWS[:4], n=4, method="k_center", signal=signal)) == 2
    assert "n: expected at most 3 (the number of rows with a finite gradient), got 4" in capsys.readouterr().err


def test_a_row_too_long_for_a_member_is_not_chosen(choose, tiny_model, tokenizer, tmp_path, capsys, read):
    for folder, n in (("one", 16), ("two", 32)):
        tiny_model("GPT2", n_positions=n).save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    members = [str(tmp_path / "one"), str(tmp_path / "two")]
    arguments = json.dumps({"predictive_entropy": {"members": members}})
    rows = [{"text": "a fox"}, {"text": "12345678901234567890"}, {"text": "the dog"}]
    assert main(choose(rows, n=2, signal="predictive_entropy", acquisition_args=arguments)) == 0
    assert [row["row"] for row in read(tmp_path / "out.jsonl")] == [0, 2]
    assert "line 2: 20 tokens, the student takes at most 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 9}, "n: expected at most 8 (the number of rows of "),
        ({"n": 5, "limit": 4}, "n: expected at most 4"),
        ({"n": 0}, "n: expected an int >= 1, got 0"),
        ({"signal": "entropie"}, "--signal: unknown 'entropie', expected one of loss"),
        ({"method": "topk"}, "method: unknown 'topk', expected one of top_k, k_center"),
        ({"text_column": "body"}, "data: no column 'body', expected one of text"),
        ({"student": None}, "--backend: requires --student"),
        ({"student": None, "backend": None, "max_length": 4}, "--max-length: requires --student"),
        (
            {"signal": "score", "student": None, "backend": None},
            "signal: no column 'score' in the data (columns: text); pass",
        ),
        ({"signal": None}, "--signal: required with --method top_k"),
        ({"student": None, "method": "badge"}, "--student: expected a model"),
        ({"label_column": "intent"}, "--label-column: no column 'intent' in the data, only text"),
        ({"label_column": "text", "method": "badge"}, "--label-column: requires --student and --method top_k"),
        ({"label_column": "text", "student": None}, "--label-column: requires --student and --method top_k"),
        ({"seed": -1, "method": "badge"}, "seed: expected "),
        ({"seed": 2**70, "method": "badge"}, "seed: expected "),
        ({"among": 5}, "--among: requires --signal and a diverse --method"),
        ({"method": "badge", "among": 2}, "--among: expected at least --n = 3, got 2"),
        ({"acquisition_args": '{"loss": {}}'}, "--acquisition-args: 'loss' is not among the acquisitions asked for"),
        ({"signal": "influence"}, "--acquisition-args: 'influence' needs 'reference'"),
        ({"out": "out.txt"}, "extension of out.txt: unknown '.txt'"),
        ({"out": "data.jsonl"}, "out: data.jsonl is or contains the data, which would be lost; choose another output"),
        ({"out": "missing/out.csv"}, "out: the folder missing does not exist"),
        ({"data": "missing.jsonl"}, "missing.jsonl: No such file or directory"),
        ({"student": "./missing"}, "missing"),
    ],
)
def test_wrong_usage_is_one_sentence_before_a_forward(options, message, choose, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("acqcore.files.choose.score", None)  # a forward would raise TypeError
    assert message in refused(choose(ROWS, **options))
    assert not (tmp_path / "out.jsonl").exists()


def test_data_without_rows(choose, refused):
    assert "data.jsonl has no rows" in refused(choose([]))


@pytest.mark.parametrize("column", ["entropy", "rank"])
def test_columns_with_an_outputs_name(column, choose, refused):
    rows = [{"text": text, column: 1} for text in TEXTS]
    assert f"the column {column!r} has the name of an output column" in refused(choose(rows))


def test_an_interrupt_leaves_nothing(choose, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("acqcore.files.choose.score", Mock(side_effect=KeyboardInterrupt))
    assert main(choose(ROWS)) == 130
    assert capsys.readouterr().err == "acqcore: interrupted; nothing was written\n"
    assert not list(tmp_path.glob("out*"))
