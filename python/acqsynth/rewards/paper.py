"""The published rewards as released, for comparison.

:class:`PaperReward` is one signal plus a format bonus. It has four defects, which
:class:`acqsynth.rewards.ComposedReward` fixes:

* the signal can outweigh the bonus (fix: gates multiply);
* it subtracts 0.001 per character after the question, so long reasoning swamps the signal (fix: signals are
  normalised against samples of similar length);
* every exception becomes a reward of -5 (fix: a failure masks the sample);
* the "format only" baseline is a constant (fix: gates alone distinguish samples).

``paper_compat=True`` turns a signal into one of the classes below.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from acqsynth.domains import Domain, Sample
from acqsynth.engines import Completion
from acqsynth.rewards.answers import SampledAnswers, mean
from acqsynth.rewards.batch import Rewards
from acqsynth.rewards.reward import ComposedReward
from acqsynth.rewards.scoring import Scorer
from acqsynth.rewards.signals import Proximity, Published, Signal
from acqsynth.rewards.texts import Embedder

_END = "</question>"
_BONUS = 1.0  # the paper does not state the bonus, only that it is a constant minus a length term
_FAILED = -5.0


class PaperReward(ComposedReward):
    """``signal + 1 - 0.001 * characters after </question>``; 0 if the text does not parse, -5 if anything raises.

    Args:
        domain: parses texts.
        signal: created with ``paper_compat=True``; None for the "format only" baseline, a constant for every text.
        name: name under which TRL logs.

    Raises:
        TypeError: the signal is not callable or has no name.
    """

    def __init__(self, domain: Domain, signal: Signal | None, *, name: str = "paper_reward") -> None:
        signals = [] if signal is None else [signal]
        super().__init__(domain, signals, fusion="raw", length_normalised=False, name=name)

    def _score(self, texts: Sequence[str | None], groups: Sequence[Hashable], update: bool, by_runs: bool) -> Rewards:
        """As :meth:`ComposedReward.score`; ``update`` only counts, as the paper's signals always update."""
        self.scored += len(texts) if update else 0
        found = [self._released(text) for text in texts]
        samples = [sample for sample, _, _ in found]
        return Rewards(
            [total for _, _, total in found],
            samples,
            {signal.name: [value for _, value, _ in found] for signal in self.signals},
            {"parses": [sample is not None for sample in samples]},
            [len(text or "") for text in texts],
        )

    def _released(self, text: str | None) -> tuple[Sample | None, float | None, float]:
        """Sample, signal value and total of one text."""
        if not self.signals:
            return self.domain.parse(text or ""), None, _BONUS
        sample = None
        try:
            sample = self.domain.parse(text or "")
            if sample is None or text is None:
                return None, None, 0.0
            [value] = self.signals[0]([sample])
            if value is None:
                raise ValueError("no value")
            return sample, value, value + _BONUS - 0.001 * len(text.partition(_END)[2])
        except Exception:
            return sample, None, _FAILED


class ReleasedConfidence:
    """``1 / mean(p1 - p2)``, clipped to [0, 2], over one answer of at most 512 tokens to the raw question; p1 and p2
    are the first two entries of a dictionary whose first entry is the sampled token."""

    name = "confidence"

    def __init__(self, answers: SampledAnswers) -> None:
        self.answers = answers

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        sampling = replace(self.answers.sampling, n=1, max_tokens=512, top2=True)
        values: list[float | None] = []
        for [completion] in self.answers.engine.generate([sample.question for sample in samples], sampling):
            margin = mean(_margins_in_dictionary_order(completion))
            values.append(None if margin is None else min(max(1 / margin if margin else math.inf, 0.0), 2.0))
        return values


class ReleasedAnswerVariance:
    """Number of HDBSCAN clusters of completion embeddings divided by k, with the noise label counted as a cluster. The
    paper does not state the minimum cluster size; here it is two.

    Raises:
        ValueError: no ``embed``.
    """

    name = "answer_variance"

    def __init__(self, answers: SampledAnswers, *, embed: Embedder | None = None) -> None:
        if embed is None:
            raise ValueError("embed: expected a sentence embedder, which paper_compat needs")
        self.answers = answers
        self.embed = embed

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        draws = self.answers.draw(samples)
        return [_labels(self.embed([d.completion.text for d in drawn])) / len(drawn) for drawn in draws]


class ReleasedProximity(Proximity):
    """Proximity to clusters of the first character of each seed question."""

    def __init__(self, embed: Embedder, seeds: Sequence[Sample], **options: Any) -> None:
        super().__init__(embed, seeds, **options)
        self.texts = [text[:1] for text in self.texts]


class ReleasedDiversity:
    """Facility location with Euclidean distances d instead of similarities: the gain of x over an archive is ``mean_i
    max(0, d(x, a_i) - best_i)``, ``best_i`` the largest distance from a_i to another member; 1 for the first sample. A
    sample joins immediately if its gain exceeds 0.01. Distant points are rewarded, and the gain falls to zero as the
    archive grows. The options of :class:`acqsynth.rewards.Diversity` have no effect.
    """

    name = "diversity"
    set_level = True

    def __init__(self, embed: Embedder, **options: Any) -> None:
        self.embed = embed
        self.members: list[torch.Tensor] = []  # of [d]
        self.best: list[float] = []

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        return [self._take(vector) for vector in self.embed([sample.question for sample in samples])]

    def __len__(self) -> int:
        return len(self.members)

    def state_dict(self) -> dict[str, Any]:
        return {"members": list(self.members), "best": list(self.best)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.members, self.best = list(state["members"]), list(state["best"])

    def _take(
        self,
        x: torch.Tensor,  # [d]
    ) -> float:
        distances = [torch.dist(x, member).item() for member in self.members]
        gains = [max(0.0, d - best) for d, best in zip(distances, self.best, strict=True)]
        gain = sum(gains) / len(gains) if gains else 1.0
        if gain > 0.01:
            self.best = [max(d, best) for d, best in zip(distances, self.best, strict=True)]
            self.members.append(x)
            self.best.append(max(distances, default=0.0))
        return gain


class ReleasedGradient:
    """Uncapped ``|| grad L ||`` of the mean loss given the raw question, one sample at a time, in the student's dtype
    (bfloat16 in the released code). ``seeds`` is unused.
    """

    name = "gradient"

    def __init__(self, student: Any, domain: Domain, seeds: Sequence[Sample] = (), **options: Any) -> None:
        self.domain = domain
        arguments = {"grad_norm": {"parameters": "all", "loss": "mean"}}
        self.scorer = Scorer(student, ("grad_norm",), arguments=arguments, **options)

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        rows = [{"prompt": s.question + "\n", "completion": self.domain.solution(s)} for s in samples]
        return [self.scorer([row]).values["grad_norm"][0] for row in rows]

    def refresh(self, student: Any) -> None:
        self.scorer.refresh(student)


Published.released.update(
    (kind.name, kind)
    for kind in (ReleasedConfidence, ReleasedAnswerVariance, ReleasedProximity, ReleasedDiversity, ReleasedGradient)
)


def _margins_in_dictionary_order(completion: Completion) -> list[float]:
    """``p1 - p2`` of each token, from the first two of {sampled token, top tokens} in vLLM's order."""
    if completion.top2_logprobs is None or completion.token_logprobs is None:
        raise ValueError("engine: returned no top2_logprobs or token_logprobs, though they were requested")
    margins = []
    for drawn, (first, second) in zip(completion.token_logprobs, completion.top2_logprobs, strict=True):
        other = second if drawn == first else first
        margins.append(math.exp(drawn) - math.exp(other))
    return margins


def _labels(
    vectors: torch.Tensor,  # [k, d]
) -> int:
    """Number of distinct HDBSCAN labels, including noise."""
    from sklearn.cluster import HDBSCAN

    if len(vectors) < 2:
        return len(vectors)
    return len(set(HDBSCAN(min_cluster_size=2, copy=True).fit_predict(vectors.double().numpy()).tolist()))
