"""The signals of a pool, and how each arm selects rows from it.

Every signal comes from the warm student. ``docs/evidence-pool.md`` lists which of them use a row's label as the target,
which only as the text at which predictions are made, and which use the development rows.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from scipy.stats import spearmanr
from torch.nn import functional as F  # noqa: N812

import acqcore
from acqcore.selection.subsets import in_turn
from acqsynth.rewards.fusion import fuse
from acqsynth.rewards.reward import DEFAULT_WEIGHTS
from acqsynth.rewards.texts import NgramEmbedder
from benchmarks.pool_data import CLEAN
from benchmarks.pool_fit import IGNORED, Fitter, Rows

PROBES, DRAWS, DROPOUT = 8, 8, 0.05
RETESTED = 600  #: rows of the pool on which stochastic signals are computed a second time
NEAR_COPY = 0.88  #: hashed character n-grams; lightly edited messages of CLINC150 are above, 19 of 20 others below
SIFT_NOISE, HUDS_STRATA, HUDS_LAMBDA = 0.01, 10, 0.5

STOCHASTIC = ("mutual information", "mutual information, isotropic", "mutual information, draws", "rho loss")


@dataclass(frozen=True)
class Recipe:
    """A selection rule in three steps.

    Attributes:
        gate: ``none``; ``agree``: rows whose label the other rows' labels predict (:func:`acqcore.label_trust` above
            0); ``half``: the half with the most trusted labels. Both also keep only the most trusted of near copies,
            rows whose wording has a cosine of at least ``NEAR_COPY``.
        value: the signal that ranks the rows that pass the gate, or ``none`` for a random order.
        spread: ``top`` takes the highest; ``balanced`` one row of each label in turn; ``cover`` runs facility location
            on the prompts' states of the 3 k highest.
    """

    gate: str = "none"
    value: str = "none"
    spread: str = "top"


class Signals:
    """Signals of one pool under one warm student, each computed on first use.

    Args:
        fitter: holds the warm student; its state is restored after every call.
        warm: the warm student's weights.
        pool, development: rows on the fitter's device.
        labels: ``[n]`` int64, the intents as given.
        texts: the n messages.
        epochs, rate: how RHO-loss fits its second student, like every other student.
        stop: token that ends a label.
        seed: seed of everything random here.
        state: ``last`` or ``mean``, the prompts' hidden states used for distances.
    """

    def __init__(
        self, fitter: Fitter, warm: Sequence[torch.Tensor], pool: Rows, development: Rows, labels: torch.Tensor,
        *, texts: Sequence[str], epochs: float, rate: float, stop: int, seed: int, state: str = "last",
    ) -> None:  # fmt: skip
        self._fitter, self._warm = fitter, warm
        self._pool, self._development = pool, development
        self.labels = labels.cpu()
        self._texts = texts
        self._epochs, self._rate, self._stop, self._seed, self._state = epochs, rate, stop, seed, state
        self._student = acqcore.Student.from_model(fitter.model)
        self._samples = samples(pool)
        self._batch_tokens = 16384 if fitter.device.type == "cuda" else 4096
        self._values: dict[str, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self._pool)

    def value(self, name: str) -> torch.Tensor:
        """``[n]`` float32 on the CPU; a larger value is preferred."""
        if name not in self._values:
            self._values[name] = self._compute(name, self._seed, None).float().cpu()
        return self._values[name]

    def reliability(self, name: str) -> float:
        """Spearman correlation of a stochastic signal with itself under another seed, on ``RETESTED`` rows."""
        again = self._compute(name, self._seed + 1000, RETESTED).float().cpu()
        return float(spearmanr(self.value(name)[: len(again)], again).statistic)

    def _compute(self, name: str, seed: int, first: int | None) -> torch.Tensor:
        rows, scored = self._samples[:first], self._pool[slice(None, first)]
        if name in ("loss", "entropy", "varentropy", "grad_norm"):
            scores = self._score(rows, ("loss", "entropy", "varentropy", "grad_norm"))
            self._values.update({key: scores[key] for key in scores})
            return scores[name]
        if name in MUTUAL_INFORMATION:
            arguments = {"mutual_information": {**MUTUAL_INFORMATION[name], "seed": seed}}
            return self._score(rows, ("mutual_information",), arguments)["mutual_information"]
        if name == "influence":
            return influence(self._fitter, self._student, self._development, scored, self._batch_tokens)
        if name == "rho loss":
            return self._rho(scored, seed)
        if name == "learnability":
            p = (-self._fitter.losses(scored)[0]).exp()
            return p * (1 - p)
        if name == "diversity":
            return acqcore.gradient_diversity(self.states, ridge=1.0)
        if name == "trust":
            return acqcore.label_trust(self.states, self.labels)
        if name == "default fusion":
            columns = {key: self.value(key.replace("_", " ")).tolist() for key in DEFAULT_WEIGHTS}
            return torch.tensor(fuse(columns, [0] * len(self), "quantile", DEFAULT_WEIGHTS))
        raise ValueError(f"unknown signal {name!r}")

    def _score(
        self, rows: Sequence[acqcore.Row], names: Sequence[str], arguments: dict[str, Any] | None = None
    ) -> acqcore.Scores:
        return acqcore.score(
            self._student, rows, names, acquisition_args=arguments, batch_tokens=self._batch_tokens, progress=False
        )

    def _rho(self, rows: Rows, seed: int) -> torch.Tensor:
        """Mean loss under the warm student minus mean loss under a student fitted to the development rows (Mindermann
        et al. 2022)."""
        fitter = self._fitter
        before, _ = fitter.losses(rows)
        fitter.fit(self._development, epochs=self._epochs, rate=self._rate, seed=seed)
        after, _ = fitter.losses(rows)
        fitter.restore(self._warm)
        return (before - after) / rows.targets.ne(IGNORED).sum(dim=1)

    @cached_property
    def states(self) -> torch.Tensor:
        """Hidden states of the prompts, ``[n, D]`` float32 on the CPU, with columns centred and scaled."""
        return self._standard[: len(self)]

    @cached_property
    def prompts(self) -> torch.Tensor:
        """Hidden states of the development rows' prompts, ``[m, D]``, on the pool's scale."""
        return self._standard[len(self) :]

    @cached_property
    def _standard(self) -> torch.Tensor:
        last, mean = self._fitter.states(self._pool + self._development)
        x = (last if self._state == "last" else mean).cpu()
        own = x[: len(self)]
        return (x - own.mean(dim=0)) / own.std(dim=0).clamp_min(1e-6)

    def choose(self, arm: str, k: int) -> list[int]:
        """Indices of k rows chosen by one of the arms without a recipe."""
        device = self._fitter.device
        if arm == "badge":
            vectors = acqcore.badge_embedding(self._student, self._samples, batch_tokens=self._batch_tokens)
            return acqcore.select(vectors.to(device), k, "badge", seed=self._seed).tolist()
        if arm == "facility location":
            return acqcore.select(self.states.to(device), k, "facility_location").tolist()
        if arm == "sift":
            return sift(self.states.to(device), self.prompts.to(device), k).tolist()
        if arm == "huds":
            return huds(self._fitter.greedy(self._pool, self._stop).cpu(), self.states, k).tolist()
        raise ValueError(f"unknown arm {arm!r}")

    def follow(self, recipe: Recipe, k: int) -> list[int]:
        """Indices of k rows chosen by a recipe; if fewer than k pass the gate, the most trusted others are added."""
        n = len(self)
        order = self._order(recipe.value)
        if recipe.gate != "none":
            trust = self.value("trust")
            passing = int((trust > 0).sum()) if recipe.gate == "agree" else n // 2
            held = set(trusted(trust, self._texts, passing, k))
            order = [i for i in order if i in held]
        if recipe.spread == "top":
            return order[:k]
        if recipe.spread == "balanced":
            return [order[i] for i in in_turn(self.labels[order], k).tolist()]
        if recipe.spread == "cover":
            short = torch.tensor(order if recipe.value == "none" else order[: 3 * k])
            vectors = self.states[short].to(self._fitter.device)
            return short[acqcore.select(vectors, k, "facility_location").cpu()].tolist()
        raise ValueError(f"unknown spread {recipe.spread!r}")

    def _order(self, value: str) -> list[int]:
        """All rows, the highest value first; in random order for ``none``."""
        if value == "none":
            return random.Random(self._seed).sample(range(len(self)), len(self))
        return self.value(value).argsort(descending=True, stable=True).tolist()


#: Arguments of each form of mutual information.
MUTUAL_INFORMATION: dict[str, dict[str, Any]] = {
    "mutual information": {"form": "linear", "probes": PROBES},
    "mutual information, isotropic": {"form": "linear", "probes": PROBES, "posterior": "isotropic"},
    "mutual information, draws": {"layers": "all", "draws": DRAWS, "dropout": DROPOUT},
}


def samples(rows: Rows) -> list[acqcore.Row]:
    """The rows as samples for ``acqcore.score``: exactly the tokens that the student is fitted to."""
    ids, prompt = rows.ids.cpu(), rows.prompt.tolist()
    lengths = rows.targets.ne(IGNORED).sum(dim=1).tolist()
    found = []
    for row, begin, length in zip(ids, prompt, lengths, strict=True):
        own = row[: begin + length].clone()
        targets = own.clone()
        targets[:begin] = IGNORED
        found.append(acqcore.Row(own, targets))
    return found


def influence(fitter: Fitter, student: acqcore.Student, reference: Rows, rows: Rows, batch_tokens: int) -> torch.Tensor:
    """``[n]``, the inner product of each row's gradient with the reference's mean gradient, over the row's norm."""
    norms = acqcore.grad_norm(student, samples(rows), "all", batch_tokens=batch_tokens)
    return fitter.along(reference, rows).cpu() / norms.clamp_min(1e-12)


def clean_oracle(kinds: Sequence[str], k: int, seed: int) -> list[int]:
    """Random uncorrupted rows, in the random arm's order, so that both arms share as many rows as possible."""
    order = random.Random(seed).sample(range(len(kinds)), len(kinds))
    return [i for i in order if kinds[i] == CLEAN][:k]


def trusted(
    trust: torch.Tensor,  # [n]
    texts: Sequence[str],
    passing: int,
    k: int,
) -> list[int]:
    """The ``passing`` most trusted rows without near copies, filled up to k with the most trusted others."""
    order = trust.argsort(descending=True, stable=True).tolist()
    allowed = set(order[:passing])
    kept = distinct(order, NgramEmbedder()(texts))
    first = [i for i in kept if i in allowed]
    return first + [i for i in kept if i not in allowed][: max(0, k - len(first))]


def distinct(
    order: Sequence[int],
    vectors: torch.Tensor,  # [n, d]
    threshold: float = NEAR_COPY,
) -> list[int]:
    """``order`` without rows whose cosine with an earlier kept row is at least ``threshold``."""
    unit = F.normalize(vectors, dim=1)
    near = unit @ unit.T >= threshold
    dropped = torch.zeros(len(unit), dtype=torch.bool)
    kept = []
    for i in order:
        if not dropped[i]:
            kept.append(i)
            dropped |= near[i]
    return kept


def sift(
    candidates: torch.Tensor,  # [n, d]
    prompts: torch.Tensor,  # [m, d]
    k: int,
) -> torch.Tensor:
    """Indices ``[k]`` of candidates, each the one that most reduces the summed posterior variance at the prompts.

    The model is a Gaussian process with a cosine kernel and observation noise: choosing x reduces the variance at a
    prompt by ``cov(prompt, x)^2 / (var(x) + noise)``, both conditional on earlier choices. SIFT (Hubotter et al. 2024,
    arXiv 2410.08020) for several prompts at once, without repetition.
    """
    n = len(candidates)
    x = F.normalize(torch.cat([candidates, prompts]).double(), dim=1)
    variance = torch.ones(len(x), dtype=torch.float64, device=x.device)
    factor = torch.zeros(len(x), k, dtype=torch.float64, device=x.device)
    cross = x[n:] @ x[:n].T  # [m, n] posterior covariances
    left = torch.ones(n, dtype=torch.bool, device=x.device)
    chosen = torch.empty(k, dtype=torch.int64, device=x.device)
    for j in range(k):
        gain = cross.square().sum(dim=0) / (variance[:n] + SIFT_NOISE)
        pick = gain.where(left, -torch.inf).argmax()
        chosen[j] = pick
        left[pick] = False
        column = x @ x[pick] - factor[:, :j] @ factor[pick, :j]
        column = column / (variance[pick] + SIFT_NOISE).sqrt()
        factor[:, j] = column
        variance = variance - column.square()
        cross = cross - column[n:, None] * column[:n]
    return chosen


def huds(
    uncertainty: torch.Tensor,  # [n] mean -log p of the student's own answer
    vectors: torch.Tensor,  # [n, d]
    k: int,
) -> torch.Tensor:
    """Indices ``[k]`` of the highest ``lambda * distance + (1 - lambda) * uncertainty``.

    The distance is 1 - cos to the mean vector of the row's stratum, one of ten equal intervals of uncertainty.
    HUDS (Azeemi et al. 2024, arXiv 2403.09259) with the constants of ATGen, which adds the two without normalization.
    """
    low, high = uncertainty.min(), uncertainty.max()
    width = (high - low).clamp_min(torch.finfo(uncertainty.dtype).tiny)
    stratum = ((uncertainty - low) / width * HUDS_STRATA).long().clamp_max(HUDS_STRATA - 1)
    distance = torch.zeros_like(uncertainty)
    for s in stratum.unique():
        inside = stratum == s
        own = vectors[inside]
        distance[inside] = 1 - F.cosine_similarity(own, own.mean(dim=0, keepdim=True), dim=1).to(distance)
    return acqcore.select(HUDS_LAMBDA * distance + (1 - HUDS_LAMBDA) * uncertainty, k)


def shares(kinds: Sequence[str], chosen: Sequence[int]) -> dict[str, float]:
    """Kind -> its share of the chosen rows."""
    count = Counter(kinds[i] for i in chosen)
    return {kind: count[kind] / len(chosen) for kind in sorted(set(kinds))}
