"""Selects k of n samples: those with the highest scores, or a diverse subset of their vectors.

Every method is greedy, so the first j of k choices are the selection for k = j. Only ``facility_location`` compares all
pairs, in a bounded buffer, so memory stays O(n d + n k).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from acqcore import checks
from acqcore.defaults import float32_products, standard_defaults
from acqcore.literals import Method
from acqcore.scores import Scores

# Similarities that facility location computes at once (64 MiB of float32), and the most for which it keeps them all
# (256 MiB); keeping them halves the time on 2000 noisy vectors of length 4096.
_BLOCK_ELEMENTS = 1 << 24
_KEPT_ELEMENTS = 1 << 26
# Stale gains that facility location refreshes in one pass over the vectors; doubled until the choice is decided.
_REFRESH = 8


@standard_defaults()
@torch.no_grad()
def select(
    candidates: torch.Tensor | Scores,
    k: int,
    method: Method = "top_k",
    *,
    acquisition: str | None = None,
    seed: int = 0,
    ridge: float = 0.01,
    labels: torch.Tensor | None = None,
    trust: torch.Tensor | None = None,
) -> torch.Tensor:
    """Indices of k of n candidates, in order of choice.

    =====================  ================================================================================
    method                 next choice
    =====================  ================================================================================
    ``top_k``              the highest remaining score; NaN is never chosen
    ``k_center``           the vector farthest from those chosen, starting with the one nearest the mean;
                           the largest remaining distance is at most twice the optimum (Gonzalez 1985;
                           Sener & Savarese 2018)
    ``facility_location``  the largest gain in ``sum_i max_{j chosen} max(0, cos(x_i, x_j))``, by lazy
                           evaluation (Minoux 1978); at least 1 - 1/e of the optimum (Nemhauser, Wolsey &
                           Fisher 1978)
    ``badge``              drawn with probability proportional to the squared distance from those chosen,
                           the first uniformly: k-means++ seeding (Arthur & Vassilvitskii 2007); with
                           :func:`acqcore.badge_embedding` this is BADGE (Ash et al. 2020)
    ``log_det``            the largest gain in ``log det(I + K / s)``, K the Gram matrix of those chosen:
                           greedy MAP of a determinantal point process (Kulesza & Taskar 2012) by
                           incremental Cholesky (Chen, Zhang & Zhou 2018); at least 1 - 1/e of the optimum.
                           Longer vectors are worth more
    =====================  ================================================================================

    Args:
        candidates: for ``top_k``, scores ``[n]`` or :class:`acqcore.Scores`; for other methods, vectors ``[n, d]`` such
            as sketches or embeddings. float32, bfloat16, float16 or float64; distances and cosines are computed in
            float32 or float64.
        k: number of choices, from 1 to n (for ``top_k``, to the number of scores that are not NaN).
        method: as above.
        acquisition: column of Scores to use; required if there are several.
        seed: seed of ``badge``; the other methods are deterministic.
        ridge: ``s`` of ``log_det``, in units of the mean squared length of the vectors.
        labels: ``[n]`` int64, for ``top_k``: choose the highest score of each label in turn, best label first.
        trust: ``[n]`` floating point, for ``top_k``, such as :func:`acqcore.label_trust`: only candidates with trust
            above 0 are chosen; if there are fewer than k, the most trusted of the rest fill up the selection.

    Returns:
        ``[k]`` distinct int64 indices on the device of the candidates. Exact ties go to the lower index.

    Raises:
        TypeError: candidates or trust are not a floating-point tensor (or Scores for ``top_k``), labels are not a
            tensor, k is not an int.
        ValueError: an unknown method, k or seed out of range, a wrong shape, a vector that is not finite, Scores of
            several acquisitions without a name, ridge below 1e-9; labels or trust of the wrong shape or dtype, with
            NaN, or for a method other than ``top_k``.
    """
    checks.literal("method", method, Method)
    k = checks.positive_int("k", k)
    for name, given in (("labels", labels), ("trust", trust)):
        if given is not None and method != "top_k":
            raise ValueError(f"{name}: only valid with method='top_k', got method={method!r}")
    if method == "top_k":
        scores = _column(candidates, acquisition) if isinstance(candidates, Scores) else candidates
        checks.float_tensor("candidates", scores, "[n]", 1)
        if labels is not None:
            checks.labels(labels, len(scores))
        if trust is not None:
            checks.float_tensor("trust", trust, "[n]", 1)
            if trust.shape != scores.shape or bool(trust.isnan().any()):
                raise ValueError(f"trust: expected [{len(scores)}] without NaN, got {checks.describe(trust)}")
        return _top_k(scores, k, labels, trust)
    checks.vectors("candidates", candidates)
    assert isinstance(candidates, torch.Tensor)
    checks.at_most("k", k, len(candidates), "the number of candidates")
    vectors = candidates if candidates.dtype == torch.float64 else candidates.float()
    if method == "facility_location":
        return _facility_location(vectors, k)
    if vectors.numel():
        # Times a power of two, which is exact, so that squares neither overflow nor vanish.
        exponent = torch.frexp(vectors.abs().max()).exponent.clamp(-100, 100)
        vectors = vectors * vectors.new_tensor(2.0).pow(-exponent)
    if method == "k_center":
        return _k_center(vectors, k)
    if method == "badge":
        return _badge(vectors, k, checks.seed(seed))
    return _log_det(vectors, k, checks.ridge(ridge))


def _column(scores: Scores, acquisition: str | None) -> torch.Tensor:
    """Scores of the acquisition; None selects the only one."""
    if acquisition is not None:
        checks.one_of("acquisition", acquisition, scores)
        return scores[acquisition]
    if len(scores) != 1:
        raise ValueError(
            f"candidates: expected scores of one acquisition, got {', '.join(scores) or 'none'}; set acquisition="
        )
    return next(iter(scores.values()))


def _top_k(
    scores: torch.Tensor,  # [n]
    k: int,
    labels: torch.Tensor | None,  # [n]
    trust: torch.Tensor | None,  # [n]
) -> torch.Tensor:
    known = (~scores.isnan()).nonzero()[:, 0]
    checks.at_most("k", k, len(known), "the number of scores that are not NaN")
    if trust is not None:
        held = trust.to(known.device)[known]
        passing = max(k, int((held > 0).sum()))
        known = known[held.sort(descending=True, stable=True).indices[:passing].sort().values]
    order = known[scores[known].sort(descending=True, stable=True).indices]
    return order[:k] if labels is None else order[in_turn(labels.to(order.device)[order], k)]


def in_turn(
    labels: torch.Tensor,  # [n] int64
    k: int,
) -> torch.Tensor:
    """Positions ``[k]`` of rows, round-robin over labels in order of appearance: the first row of each label, then the
    second of each, and so on."""
    queues: dict[int, list[int]] = {}
    for place, label in enumerate(labels.tolist()):
        queues.setdefault(label, []).append(place)
    turns = sorted((turn, queue[0], place) for queue in queues.values() for turn, place in enumerate(queue))
    return torch.tensor([place for _, _, place in turns[:k]], device=labels.device)


def _k_center(
    vectors: torch.Tensor,  # [n, d]
    k: int,
) -> torch.Tensor:
    chosen = torch.empty(k, dtype=torch.int64, device=vectors.device)
    nearest = vectors.new_full((len(vectors),), torch.inf)  # [n] distance to the nearest chosen vector; -1 if chosen
    pick = distances(vectors, vectors.mean(dim=0)).argmin()
    for j in range(k):
        chosen[j] = pick
        nearest = torch.minimum(nearest, distances(vectors, vectors[pick]))
        nearest[chosen[: j + 1]] = -1
        pick = nearest.argmax()
    return chosen


def _badge(
    vectors: torch.Tensor,  # [n, d]
    k: int,
    seed: int,
) -> torch.Tensor:
    draws = torch.rand(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chosen = torch.empty(k, dtype=torch.int64)
    squared = torch.full((len(vectors),), torch.inf, dtype=torch.float64)  # [n] to the nearest chosen vector
    left = torch.ones(len(vectors), dtype=torch.float64)
    for j in range(k):
        weights = left if j == 0 else squared * left
        if not bool(weights.any()):  # only copies of chosen vectors remain
            weights = left
        total = weights.cumsum(0)
        # right=True skips zero weights; the clamp handles a draw that rounds up to the total.
        pick = torch.searchsorted(total, draws[j] * total[-1], right=True)
        chosen[j] = pick.clamp_max(int(weights.nonzero()[-1]))
        left[chosen[j]] = 0
        squared = torch.minimum(squared, distances(vectors, vectors[chosen[j]]).double().square().cpu())
    return chosen.to(vectors.device)


def directions(
    vectors: torch.Tensor,  # [n, d]
) -> torch.Tensor:
    """Unit rows ``[n, d]`` float64; a zero row stays zero."""
    x = vectors.double()
    return torch.nn.functional.normalize(x, dim=1, eps=torch.finfo(torch.float64).tiny)


def distances(
    vectors: torch.Tensor,  # [n, d]
    point: torch.Tensor,  # [d]
) -> torch.Tensor:
    """Euclidean distances ``[n]`` from differences, as the expanded square would not give exactly 0 for a copy."""
    return torch.cdist(vectors, point[None], compute_mode="donot_use_mm_for_euclid_dist")[:, 0]


@float32_products()
def _facility_location(
    vectors: torch.Tensor,  # [n, d]
    k: int,
) -> torch.Tensor:
    n = len(vectors)
    unit = directions(vectors).to(vectors.dtype)
    covered = unit.new_zeros(n)  # [n] similarity to the nearest chosen vector

    kept = unit @ unit.T if n * n <= _KEPT_ELEMENTS else None

    def gains(indices: torch.Tensor) -> torch.Tensor:  # [m] -> [m]
        similarity = unit[indices] @ unit.T if kept is None else kept[indices]  # [m, n]
        # As covered is at least 0, this also clips negative similarities.
        return (similarity - covered).clamp_min_(0).sum(dim=1, dtype=torch.float64)

    block = max(1, _BLOCK_ELEMENTS // n)
    bounds = torch.cat([gains(indices) for indices in torch.arange(n, device=unit.device).split(block)])
    taken = torch.zeros(n, dtype=torch.bool, device=unit.device)
    chosen = torch.empty(k, dtype=torch.int64, device=unit.device)
    for j in range(k):
        # Gains only fall as the choice grows, so a stale gain is an upper bound: refresh the highest until the
        # maximum is fresh.
        fresh = taken.clone() if j else torch.ones_like(taken)
        count = _REFRESH
        while not fresh[pick := bounds.argmax()]:
            stale = bounds.where(~fresh, -torch.inf).topk(min(count, block, n)).indices
            stale = stale[~fresh[stale]]
            bounds[stale] = gains(stale)
            fresh[stale] = True
            count *= 2
        chosen[j] = pick
        taken[pick] = True
        bounds[pick] = -torch.inf
        covered = torch.maximum(covered, unit @ unit[pick] if kept is None else kept[pick])
    return chosen


def _log_det(
    vectors: torch.Tensor,  # [n, d]
    k: int,
    ridge: float,
) -> torch.Tensor:
    vectors = vectors.double()  # a small ridge is lost in the rounding of float32
    squared = vectors.square().sum(dim=1)
    unit = squared.mean().clamp_min(torch.finfo(torch.float64).tiny)
    chosen, _ = pivoted_cholesky(lambda i: (vectors @ vectors[i]) / unit, squared / unit, k, ridge)
    return chosen


def pivoted_cholesky(
    kernel_row: Callable[[torch.Tensor], torch.Tensor],  # index -> [n]
    diagonal: torch.Tensor,  # [n] float64
    k: int,
    ridge: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedily choose k rows of a positive semi-definite kernel by ``log det(I + K / ridge)``.

    The gain of row i is ``log(1 + r_i / ridge)``, where r_i is its variance given the chosen rows,
    ``k_ii - k_iS (K_SS + ridge I)^-1 k_Si``. Each step chooses the largest r_i.

    Returns:
        Indices ``[k]`` int64 and their r at the time of choice, ``[k]`` float64.

    Source: Chen, Zhang & Zhou 2018, algorithm 1, with the ridge on the diagonal.
    """
    n = len(diagonal)
    factor = torch.zeros((n, k), dtype=torch.float64, device=diagonal.device)
    residual = diagonal.clone()
    chosen = torch.empty(k, dtype=torch.int64, device=diagonal.device)
    gained = torch.empty(k, dtype=torch.float64, device=diagonal.device)
    for j in range(k):
        pick = residual.argmax()
        chosen[j], gained[j] = pick, residual[pick].clamp_min(0)
        column = kernel_row(pick).double() - factor[:, :j] @ factor[pick, :j]
        column /= (gained[j] + ridge).sqrt()
        factor[:, j] = column
        residual -= column.square()
        residual[chosen[: j + 1]] = -torch.inf
    return chosen, gained
