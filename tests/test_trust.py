"""Leave-one-out trust against regressions fitted without the row."""

from __future__ import annotations

import pytest
import torch

import acqcore
from acqcore.selection import trust


def data(n: int = 24, d: int = 5, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = 2 * torch.randn(classes, d, generator=g)
    return centres[labels] + torch.randn(n, d, generator=g), labels


def left_out(x: torch.Tensor, y: torch.Tensor, ridge: float) -> torch.Tensor:
    """Predictions of a ridge regression fitted without each row, on the scale of all rows, ``[n, classes]``.

    The identity holds for fixed columns; the mean is refitted without the row, as is the intercept.
    """
    n = len(x)
    predictions = []
    for i in range(n):
        rest = torch.arange(n) != i
        design = torch.cat([torch.ones(n, 1, dtype=x.dtype), x], dim=1)
        penalty = ridge * torch.eye(design.shape[1], dtype=x.dtype)
        penalty[0, 0] = 0  # the intercept is not penalised
        weights = torch.linalg.solve(design[rest].T @ design[rest] + penalty, design[rest].T @ y[rest])
        predictions.append(design[i] @ weights)
    return torch.stack(predictions)


@pytest.mark.parametrize("vectors", [torch.full((5, 3), 0.1), torch.zeros(5, 1), torch.full((5, 3), 0.1).double()])
def test_of_identical_vectors_the_other_labels_decide(vectors):
    found = acqcore.label_trust(vectors, torch.tensor([0, 1, 0, 1, 0]))
    torch.testing.assert_close(found, torch.tensor([0.0, -0.5, 0.0, -0.5, 0.0]))


def test_the_scale_and_the_default_dtype_do_not_matter():
    vectors, labels = data()
    expected = acqcore.label_trust(vectors, labels)
    torch.set_default_dtype(torch.float64)
    try:
        for found in (acqcore.label_trust(vectors * scale, labels) for scale in (1.0, 1e-20, 1e20)):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert acqcore.label_trust(vectors, torch.zeros_like(labels)).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("ridge", trust.RIDGES)
def test_is_the_margin_of_regressions_without_the_row(ridge, monkeypatch):
    monkeypatch.setattr(trust, "RIDGES", (ridge,))
    vectors, labels = data()
    x = vectors.double() - vectors.double().mean(dim=0)
    x = x / x.square().mean(dim=0).sqrt()
    y = torch.nn.functional.one_hot(labels).double()
    eigen = torch.linalg.svdvals(x).square()
    predicted = left_out(x, y, ridge * float(eigen.mean()))
    own = predicted[torch.arange(len(x)), labels]
    other = predicted.masked_fill(y.bool(), -torch.inf).amax(dim=1)
    torch.testing.assert_close(acqcore.label_trust(vectors, labels), (own - other).float(), rtol=1e-4, atol=1e-5)


def test_wrong_labels_are_the_least_trusted():
    vectors, labels = data(n=200, d=8, classes=5, seed=1)
    wrong = torch.arange(0, 200, 11)  # in every class
    given = labels.clone()
    given[wrong] = (given[wrong] + 1) % 5
    values = acqcore.label_trust(vectors, given)
    lowest = set(values.argsort()[: len(wrong)].tolist())
    assert len(lowest & set(wrong.tolist())) >= len(wrong) - 1  # one row may be closer to another class


def test_labels_are_names_only():
    vectors, labels = data()
    renamed = torch.tensor([70, -3, 12])[labels]
    torch.testing.assert_close(acqcore.label_trust(vectors, renamed), acqcore.label_trust(vectors, labels))


def test_more_columns_than_rows_and_constant_columns():
    vectors, labels = data(n=12, d=30)
    vectors[:, 3] = 7.0
    assert acqcore.label_trust(vectors, labels).isfinite().all()


def test_one_class_is_trusted_neither_way():
    vectors, _ = data()
    assert acqcore.label_trust(vectors, torch.zeros(len(vectors), dtype=torch.int64)).eq(0).all()


@pytest.mark.parametrize("labels", [torch.zeros(3, dtype=torch.int64), torch.zeros(24), torch.zeros(24, 1).long()])
def test_wrong_labels_are_refused(labels):
    vectors, _ = data()
    with pytest.raises(ValueError, match=r"labels: expected int64 \[24\]"):
        acqcore.label_trust(vectors, labels)


def test_a_list_is_no_tensor_of_labels():
    vectors, labels = data()
    with pytest.raises(TypeError, match=r"labels: expected int64 \[24\], got list"):
        acqcore.label_trust(vectors, labels.tolist())
