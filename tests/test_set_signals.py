"""badge, gradient_diversity and archive_novelty as acquisitions of ``score``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import acqcore
from acqcore.acquisitions import REGISTRY

IDS = torch.arange(72).view(6, 12) * 37 % 320
SAMPLES = {"input_ids": IDS}


def _reference(name: str) -> Callable[..., torch.Tensor]:
    return REGISTRY[name].reference


def test_badge_is_the_gradient_of_the_students_own_predictions(tiny_model):
    """Predicted, not written, tokens are the targets, both in the head pass and in a separate pass over parameters."""
    model = tiny_model("Llama")
    scores = acqcore.score(model, SAMPLES, ["badge", "grad_norm"])
    with torch.no_grad():
        hidden, z = model.model(IDS).last_hidden_state, model(IDS).logits
    expected = torch.stack([_reference("badge")(z[i, :-1], IDS[i, 1:], hidden[i, :-1]) for i in range(6)])
    torch.testing.assert_close(scores["badge"], expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(scores["badge"], scores["grad_norm"], rtol=0.1)
    labels = torch.full_like(IDS, -100)
    labels[:, 1:] = z.argmax(dim=2)[:, :-1]
    own = {"input_ids": IDS, "labels": labels}
    for options in ({"parameters": "all"}, {"parameters": 1, "loss": "sum"}):
        got = acqcore.score(model, SAMPLES, "badge", acquisition_args={"badge": options})["badge"]
        torch.testing.assert_close(got, acqcore.grad_norm(model, own, **options), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
@pytest.mark.parametrize("parameters", ["head", 1])
def test_targets_of_badge_embeddings_are_the_students_own_argmax(kind, parameters, tiny_model):
    model = tiny_model(kind)
    mask = (torch.arange(12) < torch.tensor([12, 5, 2, 9, 12, 4])[:, None]).long()
    with torch.no_grad():
        predicted = model(input_ids=IDS).logits.argmax(dim=2)
    labels = torch.full_like(IDS, -100)
    labels[:, 1:] = predicted[:, :-1].where(mask[:, 1:].bool(), -100)
    written = {"input_ids": IDS, "attention_mask": mask}
    expected = acqcore.grad_sketch(model, {**written, "labels": labels}, parameters, dim=64, seed=2)
    for batch_tokens in (8192, 1):
        vectors = acqcore.badge_embedding(model, written, parameters, dim=64, seed=2, batch_tokens=batch_tokens)
        torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-6)


def test_for_badge_only_the_places_of_labels_count(tiny_model):
    model = tiny_model("Llama")
    labels = IDS.clone()
    labels[:, :6] = -100
    one = acqcore.badge_embedding(model, {"input_ids": IDS, "labels": labels}, dim=16)
    other = acqcore.badge_embedding(model, {"input_ids": IDS, "labels": labels.clamp_max(3)}, dim=16)
    torch.testing.assert_close(one, other)
    assert not torch.allclose(one, acqcore.badge_embedding(model, SAMPLES, dim=16))


def test_gradient_diversity(tiny_model):
    """Values match the definition, copies score nearly zero, and order matters only on request."""
    model = tiny_model("Llama")
    samples = {"input_ids": torch.cat([IDS, IDS[:1]])}
    value = acqcore.score(model, samples, "gradient_diversity")["gradient_diversity"]
    sketches = acqcore.grad_sketch(model, samples)
    torch.testing.assert_close(value.double(), _reference("gradient_diversity")(sketches), rtol=1e-3, atol=1e-5)
    assert float(value[[0, 6]].max()) < 0.02
    assert float(value[1:6].min()) > 0.05
    order = torch.tensor([3, 6, 1, 0, 5, 2, 4])
    permuted = acqcore.score(model, {"input_ids": samples["input_ids"][order]}, "gradient_diversity")
    torch.testing.assert_close(permuted["gradient_diversity"], value[order], rtol=1e-3, atol=1e-5)
    arguments = {"gradient_diversity": {"ordered": True, "ridge": 0.1, "parameters": "all", "dim": 512, "seed": 3}}
    ordered = acqcore.score(model, samples, "gradient_diversity", acquisition_args=arguments)["gradient_diversity"]
    of_all = acqcore.grad_sketch(model, samples, "all", dim=512, seed=3)
    torch.testing.assert_close(ordered, acqcore.gradient_diversity(of_all, ridge=0.1, ordered=True))
    assert float(ordered[0]) == pytest.approx(0.6931, abs=1e-3)


def test_archive_novelty(tiny_model):
    model = tiny_model("Llama")
    archive = acqcore.Archive()
    arguments = {"archive_novelty": {"archive": archive}}
    empty = acqcore.score(model, SAMPLES, "archive_novelty", acquisition_args=arguments)["archive_novelty"]
    torch.testing.assert_close(empty, torch.full((6,), 2.0).log())
    held = acqcore.grad_sketch(model, {"input_ids": IDS[:3]})
    archive.add(held)
    value = acqcore.score(model, SAMPLES, "archive_novelty", acquisition_args=arguments)["archive_novelty"]
    assert len(archive) == 3
    torch.testing.assert_close(
        value.double(), _reference("archive_novelty")(acqcore.grad_sketch(model, SAMPLES), held), rtol=1e-3, atol=1e-5
    )
    assert float(value[:3].max()) < 0.02
    assert float(value[3:].min()) > 0.05


def test_a_sample_without_a_finite_gradient(tiny_model):
    """It is invalid, and the other samples are not compared with it."""
    model = tiny_model("Llama", tie_word_embeddings=False)
    broken = IDS.clone()
    broken[1, 0] = 319
    with torch.no_grad():
        model.model.embed_tokens.weight[319] = torch.nan
    student = acqcore.Student.from_model(model, verify=False)
    scores = acqcore.score(student, {"input_ids": broken}, "gradient_diversity")
    assert scores.valid.tolist() == [True, False, True, True, True, True]
    rest = acqcore.score(student, {"input_ids": broken[[0, 2, 3, 4, 5]]}, "gradient_diversity")
    kept = scores["gradient_diversity"][[0, 2, 3, 4, 5]]
    torch.testing.assert_close(kept, rest["gradient_diversity"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("archive_novelty", {}, ValueError, "'archive_novelty' needs 'archive'"),
        ("archive_novelty", {"archive": []}, TypeError, "archive: expected acqcore.Archive"),
        ("gradient_diversity", {"dim": 0}, ValueError, "dim"),
        ("gradient_diversity", {"ridge": 0}, ValueError, "ridge"),
        ("badge", {"parameters": "heads"}, ValueError, "parameters"),
    ],
)
def test_bad_arguments(name, options, error, message, tiny_model):
    with pytest.raises(error, match=message):
        acqcore.score(tiny_model("Llama"), SAMPLES, name, acquisition_args={name: options})
