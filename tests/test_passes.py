"""Each request takes the fewest tokenizations, trunk forwards, backwards and products with the head."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

import acqcore
from acqcore.acquisitions import REGISTRY, RowNeed
from acqcore.backends import get
from acqcore.backends.base import Backend
from acqcore.costs.shape import shape_of
from acqcore.costs.work import Work, passes
from acqcore.scoring.run import JOINED_THREADS

SAMPLES = [{"prompt": "What is 2 + 3?", "completion": f" The answer is {i}."} for i in range(6)]
ALL = {"parameters": "all"}
ALL_DRAWS = {"mutual_information": {"draws": 8}}
DRAWN = ("mutual_information", "predictive_entropy", "expected_entropy", "variation_ratio", "bald_quadratic")
OF_ROWS = tuple(name for name, entry in REGISTRY.items() if entry.needs == RowNeed())

COUNTED = ("tokenized", "forwards", "backwards", "products")

# acquisitions, arguments -> tokenized samples, trunk forwards, backwards, passes over the head (products for draws and
# probes)
REQUESTS = {
    "entropy": (("entropy",), {}, (6, 1, 0, 1)),
    "row statistics": (OF_ROWS, {}, (6, 1, 0, 1)),
    "mutual information": (("mutual_information",), ALL_DRAWS, (6, 1, 0, 8)),
    "mutual information, hidden": (
        ("mutual_information",),
        {"mutual_information": {"layers": 0, "draws": 8}},
        (6, 1, 0, 8),
    ),
    "mutual information, last block": (
        ("mutual_information",),
        {"mutual_information": {"layers": 1, "draws": 8}},
        (6, 2, 0, 8),
    ),
    "entropy, mutual information": (("entropy", "mutual_information"), ALL_DRAWS, (6, 2, 0, 9)),
    "entropy, norm, mutual information in blocks": (
        ("entropy", "grad_norm", "mutual_information"),
        {"mutual_information": {"form": "block", "block": 8, "draws": 8}},
        (6, 1, 0, 8),
    ),
    "draws": (DRAWN, ALL_DRAWS, (6, 1, 0, 8)),
    "norm, head": (("grad_norm",), {}, (6, 1, 0, 1)),
    "entropy, norm, head": (("entropy", "grad_norm"), {}, (6, 1, 0, 1)),
    "norm": (("grad_norm",), {"grad_norm": ALL}, (6, 1, 1, 1)),
    "influence": (("influence",), {"influence": {}}, (6, 1, 1, 1)),
    "norm, influence": (("grad_norm", "influence"), {"grad_norm": ALL, "influence": {}}, (6, 1, 1, 1)),
    "influence, diversity of the head": (("influence", "gradient_diversity"), {"influence": {}}, (6, 1, 1, 1)),
    "norm, influence, diversity": (
        ("grad_norm", "influence", "gradient_diversity"),
        {"grad_norm": ALL, "influence": {}, "gradient_diversity": ALL},
        (6, 1, 1, 1),
    ),
    "norm, diversity of the last block, both losses": (
        ("grad_norm", "gradient_diversity"),
        {"grad_norm": {"loss": "sum", **ALL}, "gradient_diversity": {"parameters": 1}},
        (6, 1, 1, 1),
    ),
    "norm, badge": (("grad_norm", "badge"), {"grad_norm": ALL, "badge": {"parameters": 1}}, (6, 1, 2, 2)),
    "diversity, novelty, head": (
        ("gradient_diversity", "archive_novelty"),
        {"archive_novelty": {"archive": acqcore.Archive()}},
        (6, 1, 0, 1),
    ),
    "mutual information, influence": (
        ("mutual_information", "influence"),
        {**ALL_DRAWS, "influence": {}},
        (6, 2, 1, 9),
    ),
    "linear": (("mutual_information",), {}, (6, 1, 4, 6)),
    "linear, hidden": (("mutual_information",), {"mutual_information": {"layers": 0}}, (6, 1, 0, 6)),
    "entropy, linear": (("entropy", "mutual_information"), {}, (6, 1, 4, 6)),
    "linear, isotropic": (
        ("mutual_information",),
        {"mutual_information": {"form": "linear", "posterior": "isotropic", "probes": 3}},
        (6, 1, 3, 5),
    ),
    "linear, entropy, norm": (
        ("entropy", "mutual_information", "grad_norm"),
        {"mutual_information": {"form": "linear", "probes": 2}, "grad_norm": ALL},
        (6, 1, 3, 6),
    ),
    "everything": (
        tuple(name for name in acqcore.acquisitions() if name != "epig"),  # counted in FUNCTIONS
        {
            **ALL_DRAWS,
            "grad_norm": ALL,
            "badge": ALL,
            "influence": {},
            "gradient_diversity": ALL,
            "archive_novelty": {"archive": acqcore.Archive(), **ALL},
        },
        (6, 2, 2, 11),
    ),
}


@pytest.fixture
def count(monkeypatch, tokenizer):
    """Counter of ``COUNTED``, of ``tokens`` through the trunk, and of ``heads`` looked up."""
    counted: Counter[str] = Counter()

    def hook(owner, name, add):
        original = getattr(owner, name)

        def counting(*args, **kwargs):
            add(*args, **kwargs)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    hook(type(tokenizer), "__call__", lambda _, texts, **__: counted.update(tokenized=len(texts)))
    hook(acqcore.Student, "hidden", lambda _, ids: counted.update(forwards=1, tokens=ids.numel()))
    backend = type(get("cpu"))
    for name in ("row_stats", "delta_sums", "delta_hash", "head_grad_norm"):
        assert name in vars(Backend)
        hook(backend, name, lambda _, rows, *__: counted.update(products=int(len(rows.hidden) > 0)))
    hook(backend, "row_stats", lambda _, rows, gram=None: counted.update(grams=int(gram is not None)))
    hook(
        backend,
        "delta_sums",
        lambda _, rows, values=None, places=None, hashed=None, gram=None: counted.update(
            of_values=int(values is not None), grams=int(gram is not None)
        ),
    )
    hook(backend, "fisher_sums", lambda _, rows, probes, *__: counted.update(products=2 + probes.count))
    hook(backend, "mixture_stats", lambda _, rows: counted.update(products=rows.draws))
    hook(backend, "stats_and_mixture", lambda _, rows, draws, *__: counted.update(products=draws.draws))

    head = acqcore.Student.head

    def counting(student):
        counted.update(heads=1)
        return head.fget(student)

    monkeypatch.setattr(acqcore.Student, "head", property(counting))
    # Counts only the trunk's backwards: a norm's rule differentiates the norm alone and passes tuples.
    hook(
        torch.autograd,
        "grad",
        lambda outputs, _, *given, **__: counted.update(
            backwards=int(isinstance(outputs, torch.Tensor) and len(given) == 1)
        ),
    )
    return counted


# Draws in the last block are forwards of part of the trunk; those in blocks share a product.
@pytest.mark.parametrize("name", [name for name in REQUESTS if not name.endswith(("last block", "in blocks"))])
def test_plans_count_the_same(name, tiny_model, tokenizer, count):
    """``acqcore plan`` assumes as many passes as a batch of rows of one length takes."""
    acquisitions, arguments, _ = REQUESTS[name]
    model = tiny_model("Llama")
    samples = {"input_ids": torch.arange(72).view(6, 12)}
    student = acqcore.Student.from_model(model, verify=False)
    if "influence" in arguments:
        arguments = {**arguments, "influence": {"reference": acqcore.influence_reference(student, samples)}}
    acqcore.score(student, samples, acquisitions, acquisition_args=arguments)  # does the once-per-model work
    count.clear()
    acqcore.score(student, samples, acquisitions, acquisition_args=arguments)
    shape = shape_of(model.config, torch.float32)
    planned = passes(shape, Work.checked(shape, 6, 12, None, 8192, acquisitions, arguments))
    # dL/dh takes a second product, and a Gram matrix T / 2D of one.
    products = count["products"] + count["of_values"] + count["grams"] * 11 / (2 * shape.hidden)
    assert planned.head == products
    if not planned.kept_blocks:  # backwards are counted as passes of the trunk, too
        assert planned.trunk == count["tokens"] / 72


@pytest.mark.parametrize(
    ("request_of", "dtype"),
    [
        *((name, torch.float32) for name in REQUESTS),
        *itertools.product(
            ["norm", "linear", "linear, entropy, norm", "norm, influence, diversity"], [torch.bfloat16, torch.float16]
        ),
    ],
)
def test_nothing_runs_twice(request_of, dtype, tiny_model, tokenizer, count):
    """Half precision, in which each sample's gradient is scaled by its own size, keeps batches whole."""
    acquisitions, arguments, expected = REQUESTS[request_of]
    student = acqcore.Student.from_model(tiny_model("Llama").to(dtype), tokenizer=tokenizer)
    if "influence" in arguments:
        reference = acqcore.influence_reference(student, SAMPLES[:2])
        arguments = {**arguments, "influence": {"reference": reference}}
    for _ in range(2):  # the first call includes the once-per-model work
        count.clear()
        acqcore.score(student, SAMPLES, acquisitions, acquisition_args=arguments, backend="cpu")
    assert tuple(count[name] for name in COUNTED) == expected
    assert count["heads"] == 1


def test_many_threads_compute_the_gradient_of_hidden_states_separately(tiny_model, tokenizer, count, set_threads):
    """With a sketch it would be cut into parts too short for their blocks."""
    student = acqcore.Student.from_model(tiny_model("Llama"), tokenizer=tokenizer)
    for threads, products in ((JOINED_THREADS, 1), (JOINED_THREADS + 1, 2)):
        set_threads(threads)
        acqcore.grad_sketch(student, SAMPLES, "all", backend="cpu")
        count.clear()
        acqcore.grad_sketch(student, SAMPLES, "all", backend="cpu")
        assert count["products"] == products


SAME = {"backend": "cpu"}
# name -> call on six samples, with two reference samples, and its counts as above, reference included
FUNCTIONS = {
    "norms": (lambda s, r: acqcore.grad_norm(s, SAMPLES, "all", **SAME), (6, 1, 1, 1)),
    "sketches": (lambda s, r: acqcore.grad_sketch(s, SAMPLES, "all", **SAME), (6, 1, 1, 1)),
    "badge": (lambda s, r: acqcore.badge_embedding(s, SAMPLES, 1, **SAME), (6, 1, 1, 2)),
    "influence": (
        lambda s, r: acqcore.influence(s, SAMPLES, acqcore.influence_reference(s, r, **SAME), **SAME),
        (8, 2, 2, 2),
    ),
    "expected predictive information gain": (
        lambda s, r: acqcore.epig(s, SAMPLES, acqcore.epig_reference(s, r, probes=3, **SAME), **SAME),
        (8, 2, 5, 9),  # one backward and one product per probe (3 and 2), and 2 products per batch
    ),
    "embeddings of prompts": (lambda s, r: acqcore.prompt_embedding(s, SAMPLES), (6, 1, 0, 0)),
    "Laplace posterior": (lambda s, r: acqcore.laplace_posterior(s, r, probes=3, **SAME), (2, 1, 3, 5)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_gradients(name, tiny_model, tokenizer, count):
    call, expected = FUNCTIONS[name]
    student = acqcore.Student.from_model(tiny_model("Llama"), tokenizer=tokenizer)
    for _ in range(2):  # the first call includes the once-per-model work
        count.clear()
        call(student, SAMPLES[:2])
    assert tuple(count[name] for name in COUNTED) == expected
    assert count["heads"] == count["forwards"]


@pytest.mark.parametrize("arguments", [None, {"draws": 2}, {"draws": 2, "layers": 1}], ids=["entropy", "all", "last"])
def test_forwards_without_gradients_keep_no_graph(arguments, tiny_model):
    """The checks of a new student included: a graph of the longest row takes more memory than the batches."""
    model, with_graph = tiny_model("Llama"), []
    model.model.register_forward_hook(lambda _, __, output: with_graph.append(output[0].requires_grad))
    name = "entropy" if arguments is None else "mutual_information"
    ids = torch.randint(3, 90, (5, 40), generator=torch.Generator().manual_seed(0))
    acqcore.score(model, {"input_ids": ids}, name, acquisition_args=arguments and {name: arguments})
    assert with_graph
    assert not any(with_graph)
