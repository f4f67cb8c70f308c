"""A stream gives the values of a single call and reads no further than the chunks requested."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

import acqcore
from acqcore.acquisitions import REGISTRY

TEXTS = [f"the fox {i} " + "no " * (i % 4) for i in range(10)]


@pytest.fixture
def student(tiny_model, tokenizer):
    return acqcore.Student.from_model(tiny_model("Llama"), tokenizer=tokenizer)


def test_chunks_have_the_values_of_one_call(student):
    options: dict[str, Any] = {"backend": "eager", "reduction": "max"}
    names = ("entropy", "grad_norm")
    chunks = list(acqcore.score_stream(student, iter(TEXTS), iter(names), chunk=4, **options))
    whole = acqcore.score(student, TEXTS, names, **options)
    assert [len(scores.n_tokens) for scores in chunks] == [4, 4, 2]
    for name in names:
        torch.testing.assert_close(torch.cat([scores[name] for scores in chunks]), whole[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.cat([scores.n_tokens for scores in chunks]), whole.n_tokens)
    assert list(acqcore.score_stream(student, [])) == []


def test_samples_are_read_as_chunks_are_asked_for(student):
    read: list[str] = []

    def texts():
        for text in TEXTS:
            read.append(text)
            yield text

    stream = acqcore.score_stream(student, texts(), chunk=3, backend="eager")
    assert read == []
    next(stream)
    assert read == TEXTS[:3]


def test_errors_are_raised_at_once_or_with_their_chunk(student):
    with pytest.raises(ValueError, match="chunk: expected an int >= 1, got 0"):
        acqcore.score_stream(student, TEXTS, chunk=0)
    with pytest.raises(ValueError, match="acquisitions: unknown 'entropie'"):
        acqcore.score_stream(student, TEXTS, "entropie")
    with pytest.raises(ValueError, match="'gradient_diversity' compares all samples of a call"):
        acqcore.score_stream(student, TEXTS, ["entropy", "gradient_diversity"])
    for options, message in (
        ({"reduction": "median"}, "^reduction: unknown 'median'"),
        ({"max_length": 1}, "^max_length: expected at least 2"),
        ({"acquisition_args": {"mutual_information": {"layers": 9}}}, "^layers: expected at most"),
        ({"drop": True}, "unexpected keyword argument 'drop'"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            acqcore.score_stream(student, iter(TEXTS), "mutual_information", **options)
    stream = acqcore.score_stream(student, [*TEXTS[:5], ""], chunk=4, backend="eager")
    next(stream)
    with pytest.raises(ValueError, match=r"^chunk from sample 4: samples\[1\]: "):
        next(stream)


def test_an_error_class_with_another_constructor(student):
    class OwnError(ValueError):
        def __init__(self, message, code):
            super().__init__(message)

    def fail(stats):
        raise OwnError("too many", 3)

    entry = replace(REGISTRY["entropy"], value=fail)
    with mock.patch.dict(REGISTRY, entropy=entry), pytest.raises(ValueError, match="chunk from sample 0: too many"):
        next(acqcore.score_stream(student, TEXTS))


@pytest.mark.parametrize("source", ["columns", "pandas", "polars", "pyarrow", "datasets"])
def test_tables_are_cut_by_rows(source, student):
    columns = {"prompt": TEXTS, "completion": [f" {i}" for i in range(10)], "id": list(range(10))}
    make = {"pandas": "DataFrame", "polars": "DataFrame", "pyarrow": "table"}
    if source == "datasets":
        table: Any = pytest.importorskip(source).Dataset.from_dict(columns)
    else:
        table = columns if source == "columns" else getattr(pytest.importorskip(source), make[source])(columns)
    chunks = list(acqcore.score_stream(student, table, "loss", chunk=4))
    expected = acqcore.score(student, table, "loss")["loss"]
    assert [len(scores.n_tokens) for scores in chunks] == [4, 4, 2]
    torch.testing.assert_close(torch.cat([scores["loss"] for scores in chunks]), expected, rtol=1e-5, atol=1e-6)


def test_a_stream_of_a_data_set_with_known_columns(student):
    table = pytest.importorskip("datasets").Dataset.from_dict({"text": TEXTS})
    chunks = list(acqcore.score_stream(student, table.to_iterable_dataset(), "loss", chunk=4))
    expected = acqcore.score(student, TEXTS, "loss")["loss"]
    torch.testing.assert_close(torch.cat([scores["loss"] for scores in chunks]), expected, rtol=1e-5, atol=1e-6)


def test_tensors_are_cut_by_rows(student):
    samples = {"input_ids": torch.arange(40).view(5, 8) + 3, "attention_mask": torch.ones(5, 8)}
    samples["attention_mask"][1, :3] = 0
    chunks = list(acqcore.score_stream(student, samples, "loss", chunk=2))
    expected = acqcore.score(student, samples, "loss")["loss"]
    torch.testing.assert_close(torch.cat([scores["loss"] for scores in chunks]), expected, rtol=1e-5, atol=1e-6)


def test_errors_have_indices_into_all_samples(student):
    errors: dict[int, str] = {7: "of another call"}
    samples = ["", *TEXTS[:4], "", TEXTS[5]]
    found = torch.cat(
        [scores["loss"] for scores in acqcore.score_stream(student, samples, "loss", chunk=2, errors=errors)]
    )
    assert found.isnan().nonzero()[:, 0].tolist() == [0, 5]
    assert list(errors) == [7, 0, 5]
    assert acqcore.score(student, TEXTS, "loss", errors=errors).valid.all()


@pytest.mark.parametrize("samples", ["a fox", b"a fox", None, 3])
def test_samples_must_be_iterable(samples, student):
    with pytest.raises(TypeError, match="samples: expected an iterable of"):
        acqcore.score_stream(student, samples)


@pytest.mark.parametrize("errors", [[], (), "x"])
def test_errors_must_be_a_dict(errors, student):
    for call in (acqcore.score, acqcore.score_stream):
        with pytest.raises(TypeError, match="errors: expected a dict or None, got"):
            call(student, TEXTS, errors=errors)
