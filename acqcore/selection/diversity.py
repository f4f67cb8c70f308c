"""Set-level signals: how much the direction of a vector adds to a batch or to an archive.

Vectors ``[n, d]`` are gradient sketches or embeddings; ``x`` are their directions (a zero vector has none and adds
nothing), ``K = x x^T`` their cosines. The part of a vector that a set S does not explain is its variance given S in a
Gaussian process with kernel K,

    r_i = k_ii - k_iS (K_SS + ridge I)^-1 k_Si = det(K_{S+i} + ridge I) / det(K_S + ridge I) - ridge,

which is 1 for a direction orthogonal to S and ``ridge / (1 + ridge)`` for a copy of a member. The signals are the
log-determinant gain ``log(1 + r_i)``: the information in nats from observing the direction under unit noise if S is
known up to noise ``ridge``. With the same noise for both, ``log(1 + r_i / ridge)``, a copy would gain ``log 2`` for
any ridge, since two noisy observations are more informative than one; here it gains about ``ridge``.

Sources: Kulesza & Taskar 2012 (determinants as diversity); Krause, Singh & Guestrin 2008 (information gain);
Friedman & Dieng 2023 (Vendi score); Jung et al. 2025 (G-Vendi, on gradients).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from acqcore import checks
from acqcore.defaults import standard_defaults
from acqcore.selection.subsets import directions, pivoted_cholesky


@standard_defaults()
@torch.no_grad()
def gradient_diversity(vectors: torch.Tensor, *, ridge: float = 0.01, ordered: bool = False) -> torch.Tensor:
    """Gain of each vector over the rest of its batch, ``log(1 + r_i)`` nats.

    Gains are leave-one-out: permuting the batch permutes the values, and copies of each other all score ~0. One
    factorization gives every r_i: ``r_i + ridge = 1 / ((K + ridge I)^-1)_ii``.

    Args:
        vectors: ``[n, d]`` float32, bfloat16, float16 or float64, such as :func:`acqcore.grad_sketch`.
        ridge: noise on the rest of the batch; a copy scores at most about this much. Raise it if n is close to d or
            larger, since vectors that span the space explain each other.
        ordered: compare each vector only with those before it, so the first of several copies gets the credit.

    Returns:
        ``[n]`` float32 (float64 for float64 inputs) between 0 and log 2.

    Raises:
        TypeError: not a floating-point tensor, or ``ordered`` is not a bool.
        ValueError: not two-dimensional, not finite, ridge below 1e-9.
    """
    checks.vectors("vectors", vectors)
    ridge = checks.ridge(ridge)
    checks.flag("ordered", ordered)
    x = directions(vectors)
    if ordered:
        factor = torch.linalg.cholesky(_ridged(x @ x.T, ridge))
        return _gain(factor.diagonal().square() - ridge, vectors)
    if len(x) <= x.shape[1]:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(_ridged(x @ x.T, ridge)))
        return _gain(inverse.diagonal().reciprocal() - ridge, vectors)
    # The same from the d by d matrix by Woodbury: with leverage h_i = x_i (X^T X + ridge I)^-1 x_i,
    # ((K + ridge I)^-1)_ii = (1 - h_i) / ridge.
    factor = torch.linalg.cholesky(_ridged(x.T @ x, ridge))
    leverage = torch.linalg.solve_triangular(factor, x.T, upper=False).square().sum(dim=0)
    return _gain(ridge * leverage / (1 - leverage), vectors)


@standard_defaults()
@torch.no_grad()
def vendi_score(vectors: torch.Tensor) -> torch.Tensor:
    """Effective number of distinct directions: exp of the entropy of the eigenvalues of ``K / n``.

    Args:
        vectors: ``[n, d]`` floating point, n >= 1.

    Returns:
        A scalar, float32 (float64 for float64 inputs): 1 if all are copies, n if all are orthogonal.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: empty, not two-dimensional, not finite, or a zero vector.

    Sources: Friedman & Dieng 2023; Jung et al. 2025 (G-Vendi, on gradients).
    """
    checks.vectors("vectors", vectors)
    if len(vectors) == 0:
        raise ValueError(f"vectors: expected at least one row, got {checks.describe(vectors)}")
    zero = ~vectors.any(dim=1)
    if bool(zero.any()):
        raise ValueError(f"vectors: row {int(zero.nonzero()[0])} is zero, expected vectors with a direction")
    x = directions(vectors)
    small = x @ x.T if len(x) <= x.shape[1] else x.T @ x  # the same nonzero eigenvalues
    eigenvalues = torch.linalg.eigvalsh(small / len(x)).clamp_min(0)
    return torch.special.entr(eigenvalues).sum().exp().to(_result_dtype(vectors))


class Archive:
    """A bounded set of directions that scores the gain of new vectors over it.

    It keeps up to ``capacity`` of the old and new directions by greedy log-determinant selection, preferring older ones
    among equals. Directions that the kept ones explain as well as a copy (``r <= ridge``) are dropped. The archive is a
    maximally spread-out subset, so it covers the extent of past vectors, not their density. It is deterministic.

    Args:
        capacity: maximum number of vectors; memory is ``capacity * d`` floats, an update costs
            ``O((capacity + n)^2 (d + capacity))``.
        ridge: as in :func:`gradient_diversity`.

    Raises:
        TypeError, ValueError: capacity not an int >= 1, ridge not a number >= 1e-9.
    """

    def __init__(self, capacity: int = 1024, *, ridge: float = 0.01) -> None:
        self.capacity = checks.positive_int("capacity", capacity)
        self.ridge = checks.ridge(ridge)
        self._held: torch.Tensor | None = None  # [m, d] float32 directions
        self._factor: torch.Tensor | None = None  # [m, m] float64, Cholesky of K + ridge I

    def __len__(self) -> int:
        return 0 if self._held is None else len(self._held)

    def __repr__(self) -> str:
        return f"Archive({len(self)} of {self.capacity}, ridge={self.ridge})"

    @torch.no_grad()
    def novelty(self, vectors: torch.Tensor) -> torch.Tensor:
        """Gain of each vector over the archive, ``log(1 + r_i)`` nats; the archive does not change.

        Args:
            vectors: ``[n, d]`` floating point on the archive's device.

        Returns:
            ``[n]`` float32 (float64 for float64 inputs): log 2 for a new direction, at most about ridge for a
            copy, 0 for a zero vector.

        Raises:
            TypeError: not a floating-point tensor.
            ValueError: not ``[n, d]`` with the archive's d, not finite, or on another device.
        """
        checks.vectors("vectors", vectors, self._held, "the archive")
        x = directions(vectors)
        variance = x.square().sum(dim=1)
        if self._held is not None:
            held = directions(self._held)
            if self._factor is None:
                self._factor = torch.linalg.cholesky(_ridged(held @ held.T, self.ridge))
            explained = torch.linalg.solve_triangular(self._factor, held @ x.T, upper=False)  # [m, n]
            variance = variance - explained.square().sum(dim=0)
        return _gain(variance, vectors)

    @torch.no_grad()
    def add(self, vectors: torch.Tensor) -> None:
        """Add vectors ``[n, d]``; raises as :meth:`novelty`."""
        checks.vectors("vectors", vectors, self._held, "the archive")
        pool = directions(vectors).float()
        if self._held is not None:
            pool = torch.cat([self._held, pool])
        x = directions(pool)
        kernel = x @ x.T
        k = min(self.capacity, len(pool))
        # Before any choice all directions are equal: their diagonal is exactly 1, or 0 for a zero vector.
        chosen, variance = pivoted_cholesky(lambda i: kernel[i], x.any(dim=1).double(), k, self.ridge)
        self._held = pool[chosen[variance > self.ridge].sort().values]
        self._factor = None

    def state_dict(self) -> dict[str, Any]:
        """``capacity``, ``ridge`` and the stored directions, ``vectors [m, d]`` float32 or None."""
        return {"capacity": self.capacity, "ridge": self.ridge, "vectors": self._held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`state_dict`.

        Raises:
            TypeError: not a mapping, or an entry of the wrong type.
            ValueError: an entry is missing or out of range, or more vectors than the capacity.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a mapping, got {checks.describe(state)}")
        for key in ("capacity", "ridge", "vectors"):
            if key not in state:
                raise ValueError(f"state: no entry {key!r}, expected the result of Archive.state_dict()")
        capacity = checks.positive_int("state: capacity", state["capacity"])
        ridge = checks.ridge(state["ridge"])
        if state["vectors"] is not None:
            checks.vectors("state: vectors", state["vectors"])
            checks.at_most("state: vectors", len(state["vectors"]), capacity, "the capacity")
        self.capacity, self.ridge, self._factor = capacity, ridge, None
        self._held = None if state["vectors"] is None else state["vectors"].float()


def _ridged(
    kernel: torch.Tensor,  # [n, n], changed in place
    ridge: float,
) -> torch.Tensor:
    kernel.diagonal().add_(ridge)
    return kernel


def _gain(
    variance: torch.Tensor,  # [n] float64
    vectors: torch.Tensor,  # [n, d]
) -> torch.Tensor:
    """``log(1 + r)`` in the dtype of results."""
    return variance.clamp_min(0).log1p().to(_result_dtype(vectors))


def _result_dtype(vectors: torch.Tensor) -> torch.dtype:
    return torch.float64 if vectors.dtype == torch.float64 else torch.float32
