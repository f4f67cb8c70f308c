"""Size of the gradient that a sample's solution leaves in all parameters of the student."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from acqsynth.domains import Domain, Sample
from acqsynth.rewards.scoring import Scorer


class Gradient:
    """``|| sum_t grad L_t || / sqrt(T)`` over the T tokens of a solution, at most what the worst seed has.

    A sum of T gradients that point anywhere grows as the root of T; what is left is no matter of length. A wrong
    answer has a larger gradient than a right one, so the norm is cut at the largest of the seeds, whose answers are
    known: beyond it lies nothing to be learned. The gates ask whether an answer is right at all.

    Args:
        student: as :class:`acqsynth.rewards.scoring.Scorer`.
        domain: of the samples.
        seeds: at least one; scored at the first call.
        paper_compat: the released form, ``|| grad L ||`` of the mean loss given the raw question, not cut, one sample
            at a time, in the student's own dtype (the released code has it in bfloat16).
        options: of Scorer.

    Raises:
        ValueError: no seeds without paper_compat; as Scorer.

    Source: the paper's gradient reward; the norms by ``acqcore.grad_norm``.
    """

    name = "gradient"

    def __init__(
        self, student: Any, domain: Domain, seeds: Sequence[Sample] = (), *, paper_compat: bool = False, **options: Any
    ) -> None:
        if not seeds and not paper_compat:
            raise ValueError("seeds: expected at least one sample")
        self.seeds = seeds
        self.domain = domain
        self.paper_compat = paper_compat
        self.scorer = Scorer(
            student,
            ("grad_norm",),
            domain=None if paper_compat else domain,
            arguments={"grad_norm": {"parameters": "all", "loss": "mean"}},
            **options,
        )
        self._limit: float | None = None

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        if self.paper_compat:
            return [self._released(sample) for sample in samples]
        return [None if norm is None else min(norm, self.limit()) for norm in self._norms(samples)]

    def refresh(self, student: Any) -> None:
        self.scorer.refresh(student)
        self._limit = None

    def limit(self) -> float:
        """The largest norm among the seeds."""
        if self._limit is None:
            norms = [norm for norm in self._norms(self.seeds) if norm is not None]
            if not norms:
                raise RuntimeError("seeds: none of them could be scored, so there is no norm to cut at")
            self._limit = max(norms)
        return self._limit

    def _norms(self, samples: Sequence[Sample]) -> list[float | None]:
        values, lengths = self.scorer(samples)
        pairs = zip(values["grad_norm"], lengths, strict=True)
        return [None if value is None else value * math.sqrt(length) for value, length in pairs]

    def _released(self, sample: Sample) -> float | None:
        row = {"prompt": sample.question + "\n", "completion": self.domain.solution(sample)}
        return self.scorer([row])[0]["grad_norm"][0]
