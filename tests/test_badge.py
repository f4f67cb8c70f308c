"""BADGE vectors are gradients of the student's own predictions."""

from __future__ import annotations

import pytest
import torch

import acqcore

IDS = torch.arange(60).view(5, 12) * 37 % 320
MASK = (torch.arange(12) < torch.tensor([12, 5, 2, 9, 12])[:, None]).long()


@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
@pytest.mark.parametrize("parameters", ["head", 1])
def test_targets_are_the_students_own_argmax(kind, parameters, tiny_model):
    model = tiny_model(kind)
    with torch.no_grad():
        predicted = model(input_ids=IDS).logits.argmax(dim=2)
    labels = torch.full_like(IDS, -100)
    labels[:, 1:] = predicted[:, :-1].where(MASK[:, 1:].bool(), -100)
    own = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    expected = acqcore.grad_sketch(model, own, parameters, dim=64, seed=2)
    written = {"input_ids": IDS, "attention_mask": MASK}
    for batch_tokens in (8192, 1):
        vectors = acqcore.badge_embedding(model, written, parameters, dim=64, seed=2, batch_tokens=batch_tokens)
        assert vectors.shape == (5, 64)
        torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-6)


def test_labels_do_not_count_but_where_they_are_does(tiny_model):
    model = tiny_model("Llama")
    labels = IDS.clone()
    labels[:, :6] = -100
    one = acqcore.badge_embedding(model, {"input_ids": IDS, "labels": labels}, dim=16)
    other = acqcore.badge_embedding(model, {"input_ids": IDS, "labels": labels.clamp_max(3)}, dim=16)
    torch.testing.assert_close(one, other)
    whole = acqcore.badge_embedding(model, {"input_ids": IDS}, dim=16)
    assert not torch.allclose(one, whole)


def test_text(tiny_model, tokenizer):
    vectors = acqcore.badge_embedding(tiny_model("Llama"), ["a fox", "a dog"], tokenizer=tokenizer, dim=16)
    assert vectors.shape == (2, 16)
    assert acqcore.select(vectors, 1, "badge").shape == (1,)


def test_no_samples(tiny_model):
    assert acqcore.badge_embedding(tiny_model("Llama"), [], dim=16).shape == (0, 16)


def test_a_sample_without_a_finite_gradient_is_told_apart(tiny_model):
    model = tiny_model("Llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[int(IDS[1, 0])] = torch.nan
    student = acqcore.Student.from_model(model, verify=False)
    vectors = acqcore.badge_embedding(student, {"input_ids": IDS}, dim=16)
    assert vectors.isnan().any(dim=1).tolist() == [False, True, False, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim: expected an int >= 1, got 0"),
        ({"batch_tokens": 0}, "batch_tokens: expected an int >= 1, got 0"),
        ({"loss": "max"}, "loss: unknown 'max'"),
        ({"parameters": "heads"}, "parameters: "),
    ],
)
def test_bad_options(options, message, tiny_model):
    with pytest.raises(ValueError, match=message):
        acqcore.badge_embedding(tiny_model("Llama"), {"input_ids": IDS}, **options)
