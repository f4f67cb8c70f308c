"""Students: rows and replay that they learn, rows that they cannot, and answers by likelihood."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from fakes import SEEDS, TRAINER

from acqsynth.artefacts import read_json, read_table, write_rows
from acqsynth.config import EngineConfig
from acqsynth.domains import Sample
from acqsynth.stages import students
from acqsynth.stages.students import Replay
from acqsynth.steps import StepContext


@pytest.fixture
def fit(scoring, student_path, tmp_path):
    samples = [tmp_path / "samples.parquet"]
    return partial(students.fit_student, domain="sums", student=str(student_path), samples=samples, seed=0)


def test_a_student_learns_rows_and_replay(fit, tmp_path):
    write_rows(tmp_path / "samples.parquet", SEEDS[:4])
    said = []
    replay = Replay(0.5, "sums", tmp_path / "seeds.parquet")
    fit(StepContext(tmp_path, said.append), n=3, options=TRAINER, replay=replay)
    assert read_json(tmp_path / "counts.json") == {"wanted": 3, "rows": 3}
    assert (tmp_path / "model/config.json").is_file()
    assert said[-1].startswith("step 3 of 3: loss ")
    with pytest.raises(ValueError, match=r"replay: expected 9 rows for a share of 0\.75 beside 3 samples, got 8"):
        fit(StepContext(tmp_path), n=3, options=TRAINER, replay=replace(replay, share=0.75))


def test_a_student_tells_the_rows_it_did_not_learn(fit, tmp_path):
    write_rows(tmp_path / "samples.parquet", [*SEEDS[:3], Sample("1+" * 30 + "1", "31")])
    said = []
    short = {"replay": None, "options": TRAINER | {"max_length": 50}}
    fit(StepContext(tmp_path, said.append), n=4, **short)
    assert read_json(tmp_path / "counts.json") == {"wanted": 4, "rows": 3}
    assert said[-1].startswith("of 4 rows, 1 are not learnt, as the prompt alone fills max_length = 50 tokens, and 0")
    for ranked, learnt in ((False, 2), (True, 3)):  # the fourth row is drawn, but does not rank among the first three
        fit(StepContext(tmp_path / str(ranked)), n=3, ranked=ranked, **short)
        assert read_json(tmp_path / str(ranked) / "counts.json") == {"wanted": 3, "rows": learnt}


def test_answers_by_likelihood(student_path, tmp_path):
    """The likeliest label is always in the set, even if the untrained student writes no label."""
    rows = [Sample(f"text {i}", label) for i in range(3) for label in ("card", "card_arrival", "a, b")]
    write_rows(tmp_path / "rows.parquet", rows)
    said = []
    students.answer_rows(
        StepContext(tmp_path, said.append), sets={"test": ("classification", tmp_path / "rows.parquet")},
        model=student_path, engine=EngineConfig(), max_tokens=4, seed=0, likelihood=True,
    )  # fmt: skip
    table = read_table(tmp_path / "answers-test.parquet")
    assert set(table["likeliest"]) <= {"card", "card_arrival", "a, b"}
    assert table["likeliest_right"] == [a == b for a, b in zip(table["likeliest"], table["gold"], strict=True)]
    assert table["right"] == [False] * 9
    assert said[-1].startswith("test: 0.0% right as written, ")
    assert said[-1].endswith("by the likeliest of 3 labels")
