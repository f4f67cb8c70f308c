from __future__ import annotations

import json

import datasets
import pandas
import pytest
from fakes import PlainDomain

from acqsynth.domains import Domain, Sample, domain
from acqsynth.domains.base import rows

ROWS = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(5)]


def jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def math():
    return domain("math")


def test_jsonl_and_parquet_give_the_same_samples_in_order(math, tmp_path):
    pandas.DataFrame(ROWS).to_parquet(tmp_path / "rows.parquet")
    expected = [Sample(row["question"], row["answer"]) for row in ROWS]
    assert math.load(jsonl(tmp_path / "rows.jsonl", ROWS)) == expected
    assert math.load(str(tmp_path / "rows.parquet")) == expected
    assert math.load(str(tmp_path / "rows.parquet"), limit=2) == expected[:2]


LONG = "What is 2 + 2?" + " Count." * 30_000
DIGITS = "1" + "0" * 5000


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", f"question,answer,id\n{LONG},4,1\nWhy?,2,2\n", [Sample(LONG, "4"), Sample("Why?", "2")]),
        ("a.jsonl", '{"question": "Why?", "answer": 4}\n', [Sample("Why?", "4")]),
        ("a.jsonl", '{"question": "Why?", "answer": 0.5}\n', [Sample("Why?", "0.5")]),
        ("a.jsonl", f'{{"question": "Why?", "answer": {DIGITS[:401]}}}\n', [Sample("Why?", DIGITS[:401])]),
        ("a.jsonl", f'{{"x": [-{DIGITS}, {{}}], "question": "Why?", "answer": "4"}}\n', [Sample("Why?", "4")]),
    ],
    ids=["long cells", "an integer", "a fraction", "a long integer", "a long integer that nobody reads"],
)
def test_files_are_read_as_acqcore_score_reads_them(math, tmp_path, name, content, expected):
    path = tmp_path / name
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text(content, encoding=encoding)
        assert math.load(str(path)) == expected


def test_a_domain_of_ones_own_reads_questions_and_answers(tmp_path):
    class Own(PlainDomain):
        load = Domain.load

    rows = [{"question": "Why?", "answer": "So.", "reasoning": "As."}, {"question": "Who?", "answer": "I."}]
    found = Own().load(jsonl(tmp_path / "rows.jsonl", rows))
    assert found == [Sample("Why?", "So.", "As."), Sample("Who?", "I.")]


def test_columns_are_mapped(math, tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", [{"ask": "What is 2 + 2?", "say": "4", "why": "Count.", "answer": "no"}])
    columns = {"question": "ask", "answer": "say", "reasoning": "why"}
    assert math.load(source, columns=columns) == [Sample("What is 2 + 2?", "4", "Count.")]


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a": ' * 50_000, '{"question": "\udcff"', "\x00", '"' * 100])
def test_a_line_that_cannot_be_read_is_named(math, tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(f"{json.dumps(ROWS[0])}\n{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"rows\.jsonl: row 2: not (JSON|UTF-8)"):
        math.load(str(path))


def test_rows_after_the_limit_are_not_read(math, tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", [*ROWS[:2], "no json"])
    assert len(math.load(source, limit=2)) == 2
    with pytest.raises(ValueError, match=r"rows\.jsonl: row 3: not JSON"):
        math.load(source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["", " "], r"rows\.jsonl: no rows"),
        ([], r"rows\.jsonl: no rows"),
        ([ROWS[0], "[1, 2]"], r"row 2: expected a JSON object, got list"),
        ([ROWS[0], {"question": "Why?"}], r"row 2: no 'answer', only 'question'"),
        ([ROWS[0], {"question": "", "answer": "5"}], r"row 2: question: expected text, got ''"),
        ([ROWS[0], {"question": "Why?", "answer": True}], r"row 2: answer: expected text, got True"),
        ([{"q": 1}], r"expected the columns \(problem, solution\) or \(question, answer\), found 'q'"),
        ([{"problem": "Prove it.", "solution": "Clear."}], r"none of 1 rows has a final answer"),
        ([{"question": "Why?", "answer": "a\nb"}], r"row 1: answer: no final answer, marked by ####"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said(math, tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        math.load(jsonl(tmp_path / "rows.jsonl", content))


def test_a_wrong_mapping_names_the_columns_there_are(math, tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"columns: no 'ask' in .*rows\.jsonl, which has 'question', 'answer'"):
        math.load(source, columns={"question": "ask"})
    with pytest.raises(ValueError, match=r"expected the columns .*, found 'answer', 'questoin'"):
        math.load(source, columns={"questoin": "question"})
    source = jsonl(tmp_path / "rows.jsonl", [{**ROWS[0], "why": "Count."}])
    with pytest.raises(ValueError, match=r"columns: unknown field 'reason', expected some of .*'reasoning'"):
        math.load(source, columns={"reason": "why"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"question,answer\n", r"a\.csv: no rows"),
        ("a.txt", b"question,answer\n", r"a\.txt: expected a file that ends in \.jsonl or \.csv or \.parquet"),
        ("a.parquet", b"question", r"a\.parquet: .*[Pp]arquet"),
        ("a.jsonl", b"\xff\xfe\n", r"a\.jsonl: expected text in UTF-8, got UTF-16"),
        ("a.csv", b"question,answer\nA caf\xe9?,4\n", r"a\.csv: row 1: question: expected text in UTF-8, got"),
        ("a.jsonl", b'\n{"question": "\\ud83d", "answer": "5"}', r"row 2: question: expected text in UTF-8"),
    ],
)
def test_files_that_cannot_be_read(math, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        math.load(str(tmp_path / name))


def test_arguments_are_checked_before_the_file(math, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl: no such file"):
        math.load(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match="limit: expected an int >= 1, got 0"):
        math.load(str(tmp_path / "nowhere.jsonl"), limit=0)


def test_a_hub_id_goes_to_datasets(math, monkeypatch):
    asked = []

    def load_dataset(name, configuration, *, split):
        asked.append((name, configuration, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [s.answer for s in math.load("openai/gsm8k:main", "test", limit=3)] == ["1", "2", "3"]
    math.load("some/data")
    assert asked == [("openai/gsm8k", "main", "test"), ("some/data", None, "train")]


def test_rows_are_numbered_as_in_the_file(tmp_path):
    source = jsonl(tmp_path / "rows.jsonl", [ROWS[0], "", ROWS[1]])
    assert [number for number, _ in rows(source)] == [1, 3]


def test_the_shared_files_are_read_whole(shared_data):
    counts = {
        ("math", "math/gsm8k_train.jsonl"): 3000,
        ("medical", "medical/pubmedqa_train.jsonl"): 500,
        ("medical", "medical/pubmedqa_test.jsonl"): 500,
        ("code", "code/mbpp.jsonl"): 974,
        ("code", "code/humaneval.jsonl"): 164,
    }
    for (name, path), count in counts.items():
        assert len(domain(name).load(shared_data(path))) == count
