"""Calibrates dropout so that a student's loss rises by a given share."""

from __future__ import annotations

import pytest
import torch

from benchmarks import toy_student
from benchmarks.calibration import calibrate_dropout

DRAWS = 4


@pytest.fixture(scope="module")
def student():
    """A student that knows a table by heart, so dropout raises its loss."""
    return toy_student.train(0, blocks=2, steps=80)


@pytest.fixture(scope="module")
def ids():
    return toy_student.questions("easy", 24, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("layers", "blocks", "rise"), [("all", 2, 0.02), ("all", 2, 0.5), (1, 1, 0.02)])
def test_the_loss_rises_by_the_share_asked_for(layers, blocks, rise, student, ids, dropped_logits):
    branches = [child for block in student.model.layers for child in (block.self_attn, block.mlp)]
    sites = list(enumerate(branches, 1))[-2 * blocks :]

    def loss(p: float, draw: int) -> float:
        logits = torch.stack([dropped_logits(student, row, sites, p, draw)[-2] for row in ids])
        return float(torch.nn.functional.cross_entropy(logits, ids[:, -1]))

    p = calibrate_dropout(student, toy_student.samples(ids), rise=rise, layers=layers, draws=DRAWS)
    base = loss(0.0, 0)
    dropped = sum(loss(p, draw) for draw in range(DRAWS)) / DRAWS
    assert (dropped - base) / base == pytest.approx(rise, rel=0.06)


def test_a_larger_rise_takes_more_dropout(student, ids):
    few, more = (calibrate_dropout(student, toy_student.samples(ids), rise=rise) for rise in (0.01, 0.2))
    assert 0 < few < more / 2 < 0.25


def test_batches_do_not_matter(student, ids):
    samples = toy_student.samples(ids)
    whole = calibrate_dropout(student, samples)
    assert calibrate_dropout(student, samples, batch_tokens=40) == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 3}, "layers: expected at most 2 transformer blocks, got 3"),
        ({"rise": 1e9}, "rise: dropout of 0.5 adds"),
    ],
)
def test_wrong_arguments(options, message, student, ids):
    with pytest.raises(ValueError, match=message):
        calibrate_dropout(student, toy_student.samples(ids[:2]), **options)
