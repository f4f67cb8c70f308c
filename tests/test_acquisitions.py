"""Tests each acquisition against its slow reference, and the registry."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from unittest import mock

import pytest
import torch

import acqcore
from acqcore.acquisitions import REGISTRY, BatchNeed, DrawOptions, GradientNeed, Options, SampleBatch
from acqcore.testing import Case, random_case

BUILT_IN = (
    "loss", "perplexity", "entropy", "varentropy", "least_confidence", "margin", "gini", "el2n",
    "expected_gradient_length", "token_grad_norm",
)  # fmt: skip
DRAWN = ("mutual_information", "predictive_entropy", "expected_entropy", "variation_ratio", "bald_quadratic")
OF_SAMPLES = ("grad_norm", "badge", "influence", "epig", "gradient_diversity", "archive_novelty")


def test_the_list():
    listed = acqcore.acquisitions()
    assert tuple(listed) == (*BUILT_IN, *DRAWN, *OF_SAMPLES)
    assert all(line.endswith(".") for line in listed.values())


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("v", [1, 2, 97])
def test_against_its_reference(name, v, implementation):
    case = random_case(13, 24, v, std=2.0)
    entry = REGISTRY[name]
    value = entry.value(case.run(implementation))
    if entry.finish is not None:
        value = entry.finish(value)
    exact = case.to(torch.float64)
    expected = entry.reference(exact.head.logits(exact.hidden), case.targets, exact.hidden)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", BUILT_IN)
def test_needs_targets_is_declared_correctly(name):
    """An acquisition depends on targets exactly if it declares ``needs_targets``."""
    case = random_case(5, 8, 30)
    entry = REGISTRY[name]
    if not entry.needs_targets:
        free = acqcore.row_stats(case.hidden, case.head)
        assert torch.equal(entry.value(free), entry.value(case.run("cpu")))
    else:
        other = acqcore.row_stats(case.hidden, case.head, (case.targets + 1) % 30)
        assert not torch.equal(entry.value(other), entry.value(case.run("cpu")))


def test_a_known_uniform_row():
    """Every value on eight equal logits, by hand."""
    case = Case(torch.tensor([[3.0, 4.0]]), acqcore.Head(torch.zeros(8, 2)), torch.tensor([5]))
    stats = case.run("cpu")
    by_hand = {
        "loss": 2.0794415, "perplexity": 2.0794415, "entropy": 2.0794415, "varentropy": 0.0,
        "least_confidence": 7 / 8, "margin": 1.0, "gini": 7 / 8, "el2n": (7 / 8) ** 0.5,
        "expected_gradient_length": 25 * 7 / 8, "token_grad_norm": 5 * (7 / 8) ** 0.5,
    }  # fmt: skip
    for name, value in by_hand.items():
        assert REGISTRY[name].value(stats).item() == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize("name", ["grad_norm", "badge"])
def test_norms_against_their_references(name, implementation):
    case = random_case(13, 24, 97, std=2.0)
    exact = case.to(torch.float64)
    student = acqcore.Student(lambda ids: case.hidden[ids % 13], case.head)
    samples = [torch.tensor([3, 5]), torch.tensor([0, 1, 2, 2, 9, 12]), torch.tensor([7, 7, 8, 12, 4])]
    rows = [acqcore.Row(ids, torch.cat([torch.tensor([-100]), ids[1:]])) for ids in samples]

    def score(**options):
        return acqcore.score(student, rows, name, acquisition_args={name: options}, backend=implementation)[name]

    got, total = score(), score(loss="sum")
    for i, ids in enumerate(samples):
        hidden = exact.hidden[ids[:-1]]
        expected = REGISTRY[name].reference(exact.head.logits(hidden), ids[1:], hidden)
        torch.testing.assert_close(got[i].double(), expected, rtol=1e-4, atol=0)
        torch.testing.assert_close(total[i].double(), expected * (len(ids) - 1), rtol=1e-4, atol=0)


@pytest.fixture
def own_name():
    with mock.patch.dict(REGISTRY):
        yield "confidence_gap"


@pytest.fixture
def student():
    embedding = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    return acqcore.Student(lambda ids: embedding[ids], acqcore.Head(embedding))


IDS = {"input_ids": torch.arange(24).view(4, 6) * 7 % 30}


@dataclass(frozen=True)
class GapOptions(Options):
    power: float
    scale: float = 1.0


def test_registering_with_options(own_name, student):
    """Options may be a mapping or an instance; registering a name again replaces its acquisition."""

    @acqcore.register(own_name, options=GapOptions)
    def confidence_gap(stats: acqcore.RowStats, options: GapOptions) -> torch.Tensor:
        """(1 - 2 p1)^power."""
        return options.scale * (1 - 2 * stats.top1_prob) ** options.power

    assert acqcore.acquisitions()[own_name] == "(1 - 2 p1)^power."
    given = {own_name: {"power": 2, "scale": 3.0}}
    scores = acqcore.score(student, IDS, [own_name, "least_confidence"], acquisition_args=given, keep_tokens=True)
    for gap, doubt in zip(scores.tokens[own_name], scores.tokens["least_confidence"], strict=True):
        torch.testing.assert_close(gap, 3 * (2 * doubt - 1) ** 2)
    ready = {own_name: GapOptions(2, 3.0)}
    assert torch.equal(acqcore.score(student, IDS, own_name, acquisition_args=ready)[own_name], scores[own_name])
    with pytest.raises(ValueError, match="acquisition_args: 'confidence_gap' needs 'power'"):
        acqcore.score(student, IDS, own_name)
    with pytest.raises(ValueError, match=r"\['confidence_gap'\]: unknown 'pover', .*did you mean 'power'"):
        acqcore.score(student, IDS, own_name, acquisition_args={own_name: {"pover": 2}})

    @acqcore.register(own_name)
    def again(stats: acqcore.RowStats) -> torch.Tensor:
        """1 - 2 p1."""
        return 1 - 2 * stats.top1_prob

    assert acqcore.acquisitions()[own_name] == "1 - 2 p1."
    assert acqcore.score(student, IDS, own_name)[own_name].shape == (4,)


def test_registered_over_samples_and_over_the_set(own_name, student):
    @acqcore.register(own_name, needs=(BatchNeed(), GradientNeed()), over="sample")
    def length(batch: SampleBatch, norms: torch.Tensor) -> torch.Tensor:
        """Tokens times the norm of the gradient."""
        return torch.tensor([end - begin for begin, end in batch.bounds]) * norms

    scores = acqcore.score(student, IDS, [own_name, "grad_norm"])
    torch.testing.assert_close(scores[own_name], 5 * scores["grad_norm"])

    @acqcore.register(own_name, needs=GradientNeed(), over="set")
    def rank(norms: torch.Tensor) -> torch.Tensor:
        """How many samples have a smaller gradient."""
        return (norms[:, None] > norms).sum(dim=1)

    scores = acqcore.score(student, IDS, [own_name, "grad_norm"], batch_tokens=6)
    assert scores[own_name].tolist() == scores["grad_norm"].argsort().argsort().tolist()
    with pytest.raises(ValueError, match=r"'confidence_gap' compares all samples of a call: use acqcore\.score"):
        acqcore.score_stream(student, ["a"], own_name)


@pytest.mark.parametrize("over", ["token", "sample", "set"])
def test_learned_parameters_of_a_registered_acquisition_get_no_gradient(over, own_name, student):
    width, needs = {"set": (16, GradientNeed(dim=16))}.get(over, (8, BatchNeed()))
    probe = torch.nn.Linear(width, 1)

    @acqcore.register(own_name, needs=needs, over=over, finish=lambda values: values * probe.bias)
    def learned(found: SampleBatch | torch.Tensor) -> torch.Tensor:
        """A linear probe."""
        vectors = found.hidden if isinstance(found, SampleBatch) else found
        if over == "sample":
            vectors = torch.stack([vectors[begin:end].mean(dim=0) for begin, end in found.bounds])
        return probe(vectors)[:, 0]

    scores = acqcore.score(student, IDS, [own_name, "entropy"], keep_tokens=True)
    assert scores.valid.all()
    values = [*scores.values(), *(column for columns in scores.tokens.values() for column in columns)]
    assert not any(value.requires_grad for value in values)


def test_registered_on_draws(own_name, student):
    @acqcore.register(own_name, options=DrawOptions, needs=lambda options: options)
    def doubt(stats: acqcore.BayesStats, options: DrawOptions) -> torch.Tensor:
        """Mutual information in units of log K."""
        return stats.mutual_information / torch.tensor(options.draws).log()

    given = {name: {"layers": 0, "draws": 4} for name in (own_name, "mutual_information")}
    scores = acqcore.score(student, IDS, list(given), acquisition_args=given)
    torch.testing.assert_close(scores[own_name], scores["mutual_information"] / torch.tensor(4.0).log())


def test_a_set_of_tokens_is_refused(own_name, student):
    @acqcore.register(own_name, over="set")
    def wrong(stats: acqcore.RowStats) -> torch.Tensor:
        """Not of gradients."""
        return stats.entropy

    with pytest.raises(ValueError, match="'confidence_gap': over='set' allows only gradient needs"):
        acqcore.score(student, IDS, own_name)


def test_registering_without_a_docstring():
    with pytest.raises(ValueError, match="nameless: an acquisition function needs a docstring"):
        acqcore.register("nameless")(lambda stats: stats.entropy)
    assert "nameless" not in REGISTRY


@pytest.mark.parametrize("name", [lambda stats: stats.entropy, 3, None])
def test_registering_without_a_name(name):
    with pytest.raises(TypeError, match=r"name: expected the acquisition's name, as in @acqcore\.register\("):
        acqcore.register(name)


def test_python_without_docstrings():
    listing = [sys.executable, "-OO", "-c", "import acqcore; print(*acqcore.acquisitions())"]
    run = subprocess.run(listing, check=True, capture_output=True, text=True)
    assert {"entropy", "mutual_information"} < set(run.stdout.split())
