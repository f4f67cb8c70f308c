"""Signals: each is one measure of how much samples are worth to a student.

:mod:`acqsynth.rewards.answers` has the signals based on the student's own answers. ``paper_compat=True`` selects the
released form of the paper's signals, see :mod:`acqsynth.rewards.paper`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch

import acqcore
from acqcore.acquisitions import REGISTRY
from acqsynth import checks
from acqsynth.domains import Domain, Sample
from acqsynth.rewards.batch import Batch, require_samples
from acqsynth.rewards.scoring import Scorer
from acqsynth.rewards.texts import Embedder


@runtime_checkable
class Signal(Protocol):
    """One measure of how much samples are worth to a student.

    Optional attributes: ``set_level = True`` means that values depend on the other samples of the call, so the signal
    gets the samples of all ranks at once; ``stderr(samples)`` returns the values' standard errors, from which the
    reward computes ``reliability``, or None; ``accept(samples)`` receives the samples that passed a call, for example
    to archive them; ``refresh(student)`` switches to another student; ``state_dict()`` and ``load_state_dict(state)``
    save and restore it with the reward.
    """

    name: str

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """n values, larger = more worth acquiring; None for a sample that could not be scored."""
        ...


class Published:
    """A signal from the paper; ``paper_compat=True`` creates its released form instead."""

    released: ClassVar[dict[str, type]] = {}  #: name of a signal -> its class in :mod:`acqsynth.rewards.paper`
    name: str

    def __new__(cls, *arguments: Any, paper_compat: bool = False, **options: Any) -> Any:
        return cls.released[cls.name](*arguments, **options) if paper_compat else super().__new__(cls)


# --- the student's passes ---------------------------------------------------------------------------------------------


class AcquisitionSignal:
    """One acquisition of ``acqcore``: its value for the solution, given the prompt.

    Args:
        scorer: a scorer with a domain; signals with the same scorer share its pass.
        acquisition: one of the scorer's acquisitions.
        name: by default the acquisition's.

    Raises:
        ValueError: an acquisition that is not the scorer's, or a scorer without a domain.
    """

    def __init__(self, scorer: Scorer, acquisition: str, *, name: str | None = None) -> None:
        if acquisition not in scorer.acquisitions:
            raise ValueError(f"acquisition: expected one of the scorer's {scorer.acquisitions}, got {acquisition!r}")
        if scorer.domain is None:
            raise ValueError("scorer: expected one with a domain, got one of plain samples")
        self.scorer = scorer
        self.acquisition = acquisition
        self.name = name or acquisition
        self.set_level = REGISTRY[acquisition].over == "set"

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        return self.scorer(samples).values[self.acquisition]

    def stderr(self, samples: Sequence[Sample]) -> list[float | None] | None:
        """Standard errors of n values; None if the acquisition is exact or provides none."""
        return self.scorer(samples).stderr.get(self.acquisition)

    def refresh(self, student: Any) -> None:
        self.scorer.refresh(student)


class ArchiveNovelty(AcquisitionSignal):
    """``archive_novelty`` over a growing archive: each sample that passes a call adds its gradient sketch.

    Keep the capacity well below the sketch dimension, as for :class:`Diversity`.
    """

    def accept(self, samples: Sequence[Sample]) -> None:
        """Adds samples to the archive."""
        if samples:
            options = {key: value for key, value in self._arguments().items() if key != "archive"}
            sketches = self.scorer.sketches(samples, **options)
            self._arguments()["archive"].add(sketches[sketches.isfinite().all(dim=1)])

    def __len__(self) -> int:
        return len(self._arguments()["archive"])

    def state_dict(self) -> dict[str, Any]:
        return {"archive": self._arguments()["archive"].state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._arguments()["archive"].load_state_dict(state["archive"])

    def _arguments(self) -> Mapping[str, Any]:
        return self.scorer.arguments[self.acquisition]


def acquisition_signals(
    student: Any, acquisitions: str | Sequence[str] | Mapping[str, Mapping[str, Any]], domain: Domain, **options: Any
) -> list[AcquisitionSignal]:
    """One signal per acquisition; a single ``acqcore.score`` call computes all values.

    Args:
        acquisitions: a name, several names, or name -> arguments.
        student, options: as :class:`acqsynth.rewards.scoring.Scorer`, whose errors it raises.
    """
    arguments = acquisitions if isinstance(acquisitions, Mapping) else None
    scorer = Scorer(student, acquisitions, domain=domain, arguments=arguments, **options)
    kinds = {"archive_novelty": ArchiveNovelty}
    return [kinds.get(acquisition, AcquisitionSignal)(scorer, acquisition) for acquisition in scorer.acquisitions]


class Gradient(Published):
    """``|| sum_t grad L_t || / sqrt(T)`` over the T tokens of a solution, capped at the largest norm among the seeds.

    A sum of T gradients in random directions grows as sqrt(T). A wrong answer's is larger than a right one's, so
    the norm is capped at the largest of the seeds, whose answers are known.

    Args:
        student, options: as :class:`acqsynth.rewards.scoring.Scorer`.
        seeds: at least one; scored on the first call.

    Raises:
        ValueError: no seeds; as Scorer.

    Source: the paper's gradient reward; norms from ``acqcore.grad_norm``.
    """

    name = "gradient"

    def __init__(
        self, student: Any, domain: Domain, seeds: Sequence[Sample] = (), *, paper_compat: bool = False, **options: Any
    ) -> None:
        require_samples("seeds", seeds, some=True)
        self.seeds = seeds
        arguments = {"grad_norm": {"parameters": "all", "loss": "mean"}}
        self.scorer = Scorer(student, ("grad_norm",), domain=domain, arguments=arguments, **options)
        self._limit: float | None = None

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        return [None if norm is None else min(norm, self.limit()) for norm in self._norms(samples)]

    def refresh(self, student: Any) -> None:
        self.scorer.refresh(student)
        self._limit = None

    def limit(self) -> float:
        """The largest norm among the seeds."""
        if self._limit is None:
            norms = [norm for norm in self._norms(self.seeds) if norm is not None]
            if not norms:
                raise RuntimeError("seeds: none could be scored, so there is no norm to cap at")
            self._limit = max(norms)
        return self._limit

    def _norms(self, samples: Sequence[Sample]) -> list[float | None]:
        values, lengths, _ = self.scorer(samples)
        pairs = zip(values["grad_norm"], lengths, strict=True)
        return [None if value is None else value * math.sqrt(length) for value, length in pairs]


# --- the question's text ----------------------------------------------------------------------------------------------


class Proximity(Published):
    """Largest cosine similarity of a question's embedding to a k-means centre of the seed questions, in [-1, 1].

    Args:
        embed: embedder of questions.
        seeds: at least one; embedded and clustered on the first call.
        clusters: number of centres, at most one per seed.
        seed: random seed of k-means.

    Raises:
        ValueError: no seeds, or clusters below 1.

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
        require_samples("seeds", seeds, some=True)
        checks.positive_int("clusters", clusters)
        self.embed = embed
        self.texts = [sample.question for sample in seeds]
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


class Diversity(Published):
    """The smaller of two log-determinant gains of a question's embedding, in [0, log 2]: over the archive
    (``acqcore.Archive.novelty``), and over the other questions of the call (``acqcore.gradient_diversity``), so copies
    within a group gain almost nothing.

    Keep the capacity well below the embedding dimension; an archive that spans the space gives every new text zero
    novelty. On 2,000 GSM8K questions, with 384 dimensions and 20 questions per call, the median gain settles at 0.25 to
    0.36 with 64 to 128 directions; with 1,024 it falls below 0.02 after 500 questions.

    Args:
        embed: embedder of questions.
        capacity: maximum number of directions; by default a quarter of the embedding dimension.
        ridge: as in ``acqcore.Archive``; a copy gains about this much.
    """

    name = "diversity"
    set_level = True

    def __init__(
        self, embed: Embedder, *, capacity: int | None = None, ridge: float = 0.1, paper_compat: bool = False
    ) -> None:
        acqcore.Archive(1 if capacity is None else capacity, ridge=ridge)  # checks the arguments before the first call
        self.embed = embed
        self.capacity = capacity
        self.ridge = ridge
        self.archive: acqcore.Archive | None = None

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        if not samples:
            return []
        vectors = self._vectors(samples)
        gain = acqcore.gradient_diversity(vectors, ridge=self.ridge)
        if self.archive is not None:
            gain = torch.minimum(gain, self.archive.novelty(vectors))
        return list(gain.tolist())

    def accept(self, samples: Sequence[Sample]) -> None:
        """Adds samples to the archive."""
        if not samples:
            return
        vectors = self._vectors(samples)
        if self.archive is None:
            capacity = max(1, vectors.shape[1] // 4) if self.capacity is None else self.capacity
            self.archive = acqcore.Archive(capacity, ridge=self.ridge)
        self.archive.add(vectors)

    def __len__(self) -> int:
        return 0 if self.archive is None else len(self.archive)

    def state_dict(self) -> dict[str, Any]:
        return {"archive": None if self.archive is None else self.archive.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.archive = None
        if state["archive"] is not None:
            self.archive = acqcore.Archive()
            self.archive.load_state_dict(state["archive"])

    def _vectors(self, samples: Sequence[Sample]) -> torch.Tensor:
        """``[n, d]``, n >= 1; a question is embedded once per call."""
        return torch.stack(Batch.of(samples).each((self, "vectors"), [s.question for s in samples], self.embed))
