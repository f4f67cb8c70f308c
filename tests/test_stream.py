"""A stream gives the values of a single call and reads no further than the chunks requested."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import acqcore

TEXTS = [f"the fox {i} " + "no " * (i % 4) for i in range(10)]


@pytest.fixture
def student(tiny_model, tokenizer):
    return acqcore.Student.from_model(tiny_model("Llama"), tokenizer=tokenizer)


def test_chunks_have_the_values_of_one_call(student):
    options: dict[str, Any] = {"backend": "eager", "reduction": "max"}
    names = ("entropy", "grad_norm")
    chunks = list(acqcore.score_stream(student, iter(TEXTS), names, chunk=4, **options))
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


def test_what_is_wrong_is_told_at_once_or_with_its_chunk(student):
    with pytest.raises(ValueError, match="chunk: expected an int >= 1, got 0"):
        acqcore.score_stream(student, TEXTS, chunk=0)
    with pytest.raises(ValueError, match="acquisitions: unknown 'entropie'"):
        acqcore.score_stream(student, TEXTS, "entropie")
    with pytest.raises(ValueError, match="'gradient_diversity' compares all samples of a call"):
        acqcore.score_stream(student, TEXTS, ["entropy", "gradient_diversity"])
    stream = acqcore.score_stream(student, [*TEXTS[:5], ""], chunk=4, backend="eager")
    next(stream)
    with pytest.raises(ValueError, match=r"^chunk from sample 4: samples\[1\]: "):
        next(stream)
