"""Samples and data files of any content: no raw exception, no lost row, and valid rows get the same values as alone.

Seeds are fixed here; ``make fuzz`` runs other seeds and more examples for an hour.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

import acqcore
from acqcore.cli import main

SEED = int(os.environ.get("FUZZ_SEED", "0"))
FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

texts = st.one_of(
    st.text(max_size=30),
    st.text(st.characters(categories=["Cs", "Ll", "Cc", "Zs", "Nd"]), max_size=10),
    st.sampled_from(["", " ", "\x00", "\ud83d", "a fox", "<|im_end|>", "<|eos|>a", "the dog " * 40, "5.0", "\ufeff"]),
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**400), 10**400), st.floats(), texts, st.binary(max_size=4)
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=8,
)
turns = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | values, "content": texts | values},
        optional={"tool_calls": values, "name": values},
    ),
    max_size=4,
)
samples = st.one_of(
    texts,
    st.fixed_dictionaries({"text": texts | values}, optional={"id": values}),
    st.fixed_dictionaries({"prompt": texts | turns | values, "completion": texts | turns | values}),
    st.fixed_dictionaries({"question": texts, "answer": texts | values}),
    st.fixed_dictionaries({"messages": turns | values}, optional={"tools": values}),
    st.dictionaries(texts, values, max_size=3),
    values,
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=8,
)
columns = st.sampled_from(["text", "id", "row", "error", "entropy", "", "n_tokens", "a=b"])
lines = st.one_of(
    st.fixed_dictionaries({"text": texts | json_values}, optional={"id": json_values, "row": json_values}).map(
        json.dumps
    ),
    st.dictionaries(columns, json_values, max_size=4).map(json.dumps),
    st.text(max_size=20).map(lambda text: text.replace("\n", " ")),
    st.sampled_from(["", "{}", "[]", '{"text": ', '{"text": "a fox", "n": ' + "7" * 5000 + "}", "{" * 300]),
)


def settings(examples: int) -> Any:
    return hypothesis.settings(
        max_examples=FACTOR * examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )


@pytest.fixture
def loaded(student):
    return acqcore.Student.load(student)


def test_samples(loaded):
    """With ``errors`` nothing raises; without it, the message names the index of a bad sample."""

    @hypothesis.seed(SEED)
    @settings(150)
    @hypothesis.given(given=st.lists(samples, max_size=5))
    def check(given):
        errors: dict[int, str] = {}
        found = acqcore.score(loaded, given, "entropy", backend="eager", progress=False, errors=errors)
        assert len(found.valid) == len(given)
        assert all((i in errors) != bool(found.valid[i]) for i in range(len(given)))
        sound = [sample for i, sample in enumerate(given) if i not in errors]
        alone = acqcore.score(loaded, sound, "entropy", backend="eager", progress=False)["entropy"].tolist()
        together = [value for value in found["entropy"].tolist() if not math.isnan(value)]
        assert together == pytest.approx(alone, rel=1e-4)
        if errors:
            with pytest.raises((ValueError, TypeError), match=r"samples\[\d+\]: "):
                acqcore.score(loaded, given, "entropy", backend="eager", progress=False)

    check()


@pytest.mark.parametrize("out", ["out.jsonl", "out.csv", "out.parquet", "out"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_data_files(kind, out, command, tmp_path, capsys, read):
    """The output has as many rows as the file, each with a value or an error."""
    data = tmp_path / f"in.{kind}"
    arguments = [*command([], data=data, out=tmp_path / out, block_rows=3), "--overwrite"]
    contents = {
        "jsonl": st.lists(lines, min_size=1, max_size=6).map(
            lambda rows: "\n".join(rows).encode("utf-8", "surrogatepass")
        ),
        "csv": st.one_of(
            st.lists(st.lists(texts, min_size=1, max_size=4), max_size=5).map(written), st.binary(max_size=60)
        ),
        "parquet": st.lists(
            st.fixed_dictionaries({"text": texts | st.none(), "id": json_values}), min_size=1, max_size=5
        ),
    }

    @hypothesis.seed(SEED)
    @settings(12)
    @hypothesis.given(content=contents[kind])
    def check(content):
        if kind == "parquet":
            try:
                table = pyarrow.table({name: [row[name] for row in content] for name in ("text", "id")})
                parquet.write_table(table, data)
            except (ValueError, TypeError, OverflowError, NotImplementedError):  # no such file can exist
                return
            expected = len(content)
        elif kind == "jsonl":
            data.write_bytes(b'{"text": "a fox"}\n' + content)
            expected = 1 + sum(bool(line.strip()) for line in content.split(b"\n"))
        else:
            data.write_bytes(b"text,id\na fox,1\n" + content)
            expected = None
        code = main(arguments)
        said = capsys.readouterr().err
        assert code in (0, 1), said
        assert "failed 3 times" not in said
        found = read(tmp_path / out)
        assert expected is None or len(found) == expected
        assert [int(row["row"]) for row in found] == list(range(len(found)))
        for row in found:
            assert (row["valid"] in (True, "True")) == (row["error"] in (None, ""))

    check()


def written(rows: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")
