"""Proximity: how near a question is to what the seeds are about."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from acqsynth.domains import Sample
from acqsynth.rewards.embeddings import Embedder


class Proximity:
    """Largest cosine of a question's embedding to a k-means centre of the seed questions, in [-1, 1].

    Args:
        embed: of questions.
        seeds: at least one; embedded and clustered at the first call.
        clusters: centres, at most one a seed.
        seed: of k-means.
        paper_compat: the released form, which clusters the first character of each seed question.

    Raises:
        ValueError: no seeds, clusters below 1.

    Source: the paper's proximity; k-means by scikit-learn's MiniBatchKMeans (Sculley 2010).
    """

    name = "proximity"

    def __init__(
        self,
        embed: Embedder,
        seeds: Sequence[Sample],
        *,
        clusters: int = 100,
        seed: int = 0,
        paper_compat: bool = False,
    ) -> None:
        if not seeds:
            raise ValueError("seeds: expected at least one sample")
        if clusters < 1:
            raise ValueError(f"clusters: expected at least 1, got {clusters}")
        self.embed = embed
        self.texts = [sample.question[:1] if paper_compat else sample.question for sample in seeds]
        self.clusters = clusters
        self.seed = seed
        self._centres: torch.Tensor | None = None  # [c, d]

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        if not samples:
            return []
        vectors = torch.nn.functional.normalize(self.embed([sample.question for sample in samples]), dim=1)
        return list((vectors @ self.centres().T).amax(dim=1).tolist())

    def centres(self) -> torch.Tensor:
        """``[c, d]`` float32 unit rows."""
        if self._centres is None:
            from sklearn.cluster import MiniBatchKMeans

            vectors = self.embed(self.texts).numpy()
            count = min(self.clusters, len({row.tobytes() for row in vectors}))
            means = MiniBatchKMeans(count, random_state=self.seed, n_init=3).fit(vectors).cluster_centers_
            self._centres = torch.nn.functional.normalize(torch.from_numpy(means).float(), dim=1)
        return self._centres
