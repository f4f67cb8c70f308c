"""Influence through sketches against inner products of exact gradients."""

from __future__ import annotations

import pytest
import torch

import acqcore

Samples = dict[str, torch.Tensor]


def samples(n: int, seed: int = 0, share: torch.Tensor | float = 0.5) -> Samples:
    """Sequences of 16 to 24 tokens, padded on the right; a ``share`` of tokens is drawn from the four of a skill."""
    g = torch.Generator().manual_seed(seed)
    skill = torch.rand(n, 24, generator=g) < share
    input_ids = torch.randint(4, (n, 24), generator=g).where(skill, torch.randint(320, (n, 24), generator=g))
    lengths = torch.randint(16, 25, (n, 1), generator=g)
    return {"input_ids": input_ids, "attention_mask": (torch.arange(24) < lengths).long()}


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_ranks_agree_with_exact_head_gradients(similarity, tiny_model, exact):
    model = tiny_model("Llama")
    target, pool = samples(16, 1, 1.0), samples(160, 0, torch.linspace(0.2, 1, 160)[:, None])
    reference = acqcore.influence_reference(model, target, parameters="head")
    values = acqcore.influence(model, pool, reference, similarity=similarity)
    mean = exact(model, target, [model.lm_head.weight]).mean(dim=0)
    gradients = exact(model, pool, [model.lm_head.weight])
    expected = gradients @ mean
    if similarity == "cosine":
        expected = expected / gradients.norm(dim=1) / mean.norm()
    assert values.shape == (160,)
    assert values.dtype == torch.float32
    assert spearman(values, expected) >= 0.95


@pytest.mark.parametrize("parameters", ["head", 1, "all"])
@pytest.mark.parametrize("precondition", [None, "reference"])
def test_a_sample_has_influence_one_on_itself(parameters, precondition, tiny_model):
    model, one = tiny_model("Llama"), samples(1)
    reference = acqcore.influence_reference(model, one, parameters=parameters, dim=256, precondition=precondition)
    torch.testing.assert_close(acqcore.influence(model, one, reference), torch.ones(1))


def test_the_default_is_deeper_than_the_head(tiny_model):
    model = tiny_model("Llama")
    reference = acqcore.influence_reference(model, samples(4), dim=64)
    assert reference.parameters == "all"
    assert reference.dim == 64
    assert reference.n == 4
    assert any("layers.0" in name for name in reference.shapes)


def test_a_step_on_an_influential_sample_lowers_the_loss(tiny_model, exact):
    model = tiny_model("Llama").double()
    target, pool = samples(8, 1, 1.0), samples(24, 0, torch.linspace(0.2, 1, 24)[:, None])
    reference = acqcore.influence_reference(model, target, backend="eager")  # float64
    values = acqcore.influence(model, pool, reference, similarity="dot", backend="eager")

    def loss(tensors):
        losses = []
        for ids, mask in zip(tensors["input_ids"], tensors["attention_mask"], strict=True):
            ids = ids[mask.bool()]
            logits = model(input_ids=ids[None]).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[1:]))
        return torch.stack(losses).mean()

    drops = []
    parameters = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    with torch.no_grad():
        start = loss(target)
    for gradient in exact(model, pool, list(model.parameters())):
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(parameters - 1e-4 * gradient, model.parameters())
            drops.append(start - loss(target))
    torch.nn.utils.vector_to_parameters(parameters, model.parameters())
    assert spearman(values, torch.stack(drops)) >= 0.9


class TestReference:
    def test_mean_of_sketches(self, tiny_model):
        model, target = tiny_model("Llama"), samples(6)
        reference = acqcore.influence_reference(model, target, parameters="head", dim=64, seed=5)
        parts = []
        for i in range(6):
            one = {key: value[i : i + 1] for key, value in target.items()}
            parts.append(acqcore.influence_reference(model, one, parameters="head", dim=64, seed=5).mean)
        torch.testing.assert_close(reference.mean, torch.stack(parts).mean(dim=0))
        assert "shapes" not in repr(reference)

    def test_similarity_is_the_definition(self, tiny_model):
        model = tiny_model("Llama")
        sketches = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
        sketches[3] = 0
        moments = torch.arange(16.0)
        plain = acqcore.influence_reference(model, samples(6), parameters="head", dim=16)
        expected = sketches @ plain.mean
        torch.testing.assert_close(plain.similarity(sketches, "dot"), expected)
        cosine = torch.nn.functional.cosine_similarity(sketches, plain.mean[None])
        torch.testing.assert_close(plain.similarity(sketches), cosine)
        assert plain.similarity(sketches)[3] == 0
        scaled = acqcore.influence_reference(model, samples(6), parameters="head", dim=16, precondition=moments)
        divisor = moments.sqrt() + 0.1 * moments.mean().sqrt()
        torch.testing.assert_close(scaled.similarity(sketches, "dot"), sketches @ (plain.mean / divisor))

    def test_second_moments_of_the_reference(self, tiny_model):
        model = tiny_model("Llama")
        one = acqcore.influence_reference(model, samples(1), parameters="head", dim=16, precondition="reference")
        torch.testing.assert_close(one.second_moments, one.mean.square())

    def test_a_sketch_with_nan_gives_nan_alone(self, tiny_model):
        reference = acqcore.influence_reference(tiny_model("Llama"), samples(2), parameters="head", dim=4)
        values = reference.similarity(torch.tensor([[torch.nan, 0, 0, 0], [1.0, 2, 3, 4]]))
        assert values.isnan().tolist() == [True, False]

    def test_bad_sketches(self, tiny_model):
        reference = acqcore.influence_reference(tiny_model("Llama"), samples(2), parameters="head", dim=4)
        with pytest.raises(
            ValueError, match=r"sketches: expected \[n, d\] with d = 4 as in the reference, got .*\[2, 8\]"
        ):
            reference.similarity(torch.zeros(2, 8))
        with pytest.raises(TypeError, match=r"sketches: expected a tensor \[n, d\], got list"):
            reference.similarity([])
        with pytest.raises(ValueError, match=r"similarity: unknown 'cosin', .*did you mean 'cosine'"):
            reference.similarity(torch.zeros(2, 4), "cosin")


def test_loss_and_seed_go_with_the_reference(tiny_model):
    model, one = tiny_model("Llama"), samples(1)
    reference = acqcore.influence_reference(model, one, parameters="head", dim=64, seed=9, loss="sum")
    values = acqcore.influence(model, one, reference, similarity="dot")
    torch.testing.assert_close(values[0], reference.mean.square().sum())


@pytest.mark.parametrize("parameters", ["head", "all"])
def test_a_reference_of_another_student(parameters, tiny_model):
    model = tiny_model("Llama")
    reference = acqcore.influence_reference(model, samples(2), parameters=parameters, dim=16)
    wider = tiny_model("Llama", hidden_size=64)
    with pytest.raises(
        ValueError, match=r"made with another student: head is \[320, 32\] in the reference, \[320, 64\] here"
    ):
        acqcore.influence(wider, samples(2), reference)
    if parameters == "all":
        deeper = tiny_model("Llama", num_hidden_layers=3)
        with pytest.raises(ValueError, match=r"another student: model\.layers\.2\..* is missing in the reference"):
            acqcore.influence(deeper, samples(2), reference)


@pytest.mark.parametrize("wrapped", ["data parallel", "compiled", "compiled block"])
def test_a_reference_of_the_same_student_in_a_wrapper(wrapped, tiny_model):
    model, rows = tiny_model("Llama"), samples(3)
    reference = acqcore.influence_reference(model, rows, dim=256)
    expected = [acqcore.influence(model, rows, reference), acqcore.laplace_posterior(model, rows).factors]
    if wrapped == "compiled block":
        model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    else:
        model = torch.nn.DataParallel(model) if wrapped == "data parallel" else torch.compile(model, backend="eager")
    found = [acqcore.influence(model, rows, reference), acqcore.laplace_posterior(model, rows).factors]
    torch.testing.assert_close(found, expected)


def test_a_reference_follows_its_student_in_training(tiny_model):
    model = tiny_model("Llama")
    reference = acqcore.influence_reference(model, samples(2), dim=16)
    before = acqcore.influence(model, samples(5), reference)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(acqcore.influence(model, samples(5), reference), before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim: expected an int >= 1, got 0"),
        ({"loss": "max"}, ValueError, "loss: unknown 'max'"),
        ({"parameters": "heads"}, ValueError, "parameters: "),
        ({"precondition": "adam"}, ValueError, "precondition: unknown 'adam', expected one of reference"),
        ({"precondition": [1.0] * 16}, TypeError, r"precondition: expected a tensor \[dim\] or 'reference', got list"),
        ({"precondition": torch.ones(3)}, ValueError, r"precondition: expected \[dim\] with dim = 16, got"),
        ({"precondition": -torch.ones(16)}, ValueError, "precondition: expected finite second moments >= 0"),
        ({"precondition": torch.zeros(16)}, ValueError, "precondition: .*not all of them 0"),
    ],
)  # fmt: skip
def test_bad_reference_options(options, error, message, tiny_model):
    with pytest.raises(error, match=message):
        acqcore.influence_reference(tiny_model("Llama"), samples(2), **({"dim": 16} | options))


def test_bad_reference_samples(tiny_model):
    model = tiny_model("Llama")
    with pytest.raises(ValueError, match="samples: expected at least one reference sample, got none"):
        acqcore.influence_reference(model, [], dim=16)
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    student = acqcore.Student.from_model(model, verify=False)
    with pytest.raises(ValueError, match=r"samples\[0\]: expected a finite gradient, got NaN"):
        acqcore.influence_reference(student, samples(2), parameters="head", dim=16)


def test_bad_influence_arguments(tiny_model, tmp_path):
    model = tiny_model("Llama")
    reference = acqcore.influence_reference(model, samples(2), parameters="head", dim=16)
    with pytest.raises(TypeError, match=r"expected a result of acqcore\.influence_reference\(\), got float32"):
        acqcore.influence(model, samples(2), reference.mean)
    path = tmp_path / "reference.pt"
    reference.save(path)
    with pytest.raises(TypeError, match=r"expected a result of acqcore\.influence_reference\(\), got \w*Path"):
        acqcore.influence(model, samples(2), path)
    with pytest.raises(ValueError, match="similarity: unknown 'l2', expected one of cosine, dot"):
        acqcore.influence(model, samples(2), reference, similarity="l2")
    with pytest.raises(TypeError, match="student: expected"):
        acqcore.influence(3, samples(2), reference)


@pytest.mark.parametrize(
    "call",
    [
        "acqcore.influence(student, data, reference, batch_tokens=256)",
        "acqcore.influence_reference(student, data, parameters='head', precondition='reference', batch_tokens=256)",
    ],
    ids=["influence", "reference"],
)
def test_memory_does_not_grow_with_the_rows(call, extra_mib):
    """The sketches of all rows take 128 MiB."""
    setup = (
        "student = acqcore.Student(torch.nn.Embedding(64, 8), acqcore.Head(torch.randn(64, 8)))\n"
        "data = {'input_ids': torch.arange(4 * 8192).view(8192, 4) % 64}\n"
        "few = {'input_ids': data['input_ids'][:64]}\n"
        "reference = acqcore.influence_reference(student, few, parameters='head')\n"
        "acqcore.influence(student, few, reference)"
    )
    assert extra_mib(setup, call) <= 48


@pytest.mark.parametrize("content", [b"hello", b"t", b"rv", b"prompt,completion\n", b"{}", b""])
def test_a_file_that_is_no_reference(content, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    for name, argument in (("influence", "reference"), ("epig", "reference"), ("archive_novelty", "archive")):
        with pytest.raises(ValueError, match=rf"^{argument}: expected a .*notes\.txt"):
            acqcore.check_request(name, {name: {argument: path}})


def test_the_error_of_a_cosine_is_that_of_its_dimension(tiny_model, exact):
    model = tiny_model("Llama")
    ids = torch.randint(3, 320, (48, 12), generator=torch.Generator().manual_seed(0))
    samples = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    gradients = exact(model, samples, list(model.parameters()))
    true = torch.nn.functional.cosine_similarity(gradients, gradients[:8].mean(0)[None])
    for dim in (1024, 4096, 16384):
        reference = acqcore.influence_reference(model, {key: value[:8] for key, value in samples.items()}, dim=dim)
        error = acqcore.influence(model, samples, reference).double() - true
        assert 0.6 < float(error[8:].std()) * dim**0.5 < 1.4
