"""Proximity to clusters of the seeds."""

from __future__ import annotations

import pytest
import torch

from acqsynth.domains import Sample
from acqsynth.rewards import NgramEmbedder, Proximity

APPLES = [f"What is left of {n} apples when {n - 3} are eaten?" for n in range(5, 15)]
FEVER = [f"Which drug helps a patient of {n} years with a fever?" for n in range(20, 30)]
SEEDS = [Sample(q, "3") for q in APPLES + FEVER]


def cosines(questions, centres):
    x = torch.nn.functional.normalize(NgramEmbedder()(questions), dim=1)
    return [max(float(row @ c) for c in centres) for row in x]


def test_largest_cosine_to_a_centre_of_questions():
    signal = Proximity(NgramEmbedder(), SEEDS, clusters=2)
    centres = signal.centres()
    assert centres.shape == (2, 1024)
    means = torch.stack([NgramEmbedder()(part).mean(dim=0) for part in (APPLES, FEVER)])
    matched = torch.nn.functional.normalize(means, dim=1) @ centres.T
    assert matched.amax(dim=1).min() > 0.98  # one centre per topic
    questions = [APPLES[3], "What is left of 90 apples when 2 are eaten?", "Name the capital of Norway."]
    values = signal([Sample(q, "3") for q in questions])
    assert values == pytest.approx(cosines(questions, centres), abs=1e-5)
    assert values[0] > 0.7
    assert values[1] > 0.6
    assert values[2] < 0.2
    assert signal([]) == []


def test_fewer_different_seeds_than_clusters():
    signal = Proximity(NgramEmbedder(), [SEEDS[0], SEEDS[0], SEEDS[1]])
    assert len(signal.centres()) == 2
    assert signal([SEEDS[0]]) == pytest.approx([1.0], abs=1e-5)


def test_the_same_seed_gives_the_same_centres():
    one, other = (Proximity(NgramEmbedder(), SEEDS, clusters=5) for _ in range(2))
    torch.testing.assert_close(one.centres(), other.centres())


def test_released_clusters_first_characters(minilm):
    """The released form embeds only the first character of each seed, W, so apples are hardly closer than Norway."""
    near, far = Sample(APPLES[0], "3"), Sample("Name the capital of Norway.", "Oslo")
    released = Proximity(minilm, SEEDS, paper_compat=True)
    assert released.texts == ["W"] * 20
    assert len(released.centres()) == 1
    values = released([near, far])
    corrected = Proximity(minilm, SEEDS, clusters=2)([near, far])
    assert corrected[0] > 0.8
    assert corrected[1] < 0.3
    assert abs(values[0] - values[1]) < 0.3
    assert max(values) < 0.5


def test_wrong_arguments():
    with pytest.raises(ValueError, match="seeds: expected at least one"):
        Proximity(NgramEmbedder(), [])
    with pytest.raises(ValueError, match="clusters: expected an int >= 1, got 0"):
        Proximity(NgramEmbedder(), SEEDS, clusters=0)
