"""Statistics of softmax rows, from one pass over the vocabulary.

Leaving the maximum's own term (1) out of a row's sums (:class:`RowStats`) keeps confident rows exact: ``1 - p_max`` is
``R / Z`` rather than a difference of nearly equal numbers. States form a commutative monoid (:meth:`RowStats.merge`):
tiles, shards and chunks of the vocabulary combine in any grouping. Backends fill the state; they share the formulas
below, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch

from acqcore import checks
from acqcore.backends import Backend, Gram, HeadRows, LogitRows, get as get_backend, select as select_backend
from acqcore.backends.base import MAX, S1, S2, S11, SECOND, TARGET, R, matrix_starts
from acqcore.head import Head, compute_dtype
from acqcore.vocab_parallel import check_tiling, gathered

#: Statistics that every backend must provide; the parity tests iterate over this list.
FIELDS = (
    "logsumexp", "logprob", "entropy", "varentropy", "sum_sq_prob", "gini", "top1_prob", "top2_prob", "top1_index",
    "residual_norm",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class RowStats:
    """Statistics of N softmax rows, each ``[N]``; float32 (float64 where an input was float64), indices int64.

    Rows whose target is -100, and rows without a finite largest logit, hold NaN (``top1_index`` -1). Fields that need a
    target (``logprob``, ``residual_norm``) are None without targets; ``hidden_norm`` is None if only logits were given.

    The formulas below use the largest logit ``m``, sums over the other tokens of ``e = exp(z - m)``, ``R = sum e``,
    ``S1 = sum e (z - m)``, ``S2 = sum e^2`` and ``S11 = sum e (z - m)^2``, and ``Z = 1 + R``.

    Attributes:
        state: ``[7, N]`` float64: largest and second largest logit, R, S1, S2, S11, the target's logit.
        max_index: ``[N]`` int64, index of the largest logit in the whole vocabulary, the lowest on ties.
        targets: ``[N]`` int64 or None.
        hidden_norm: ``[N]``, Euclidean norm of the hidden state, or None.
        dtype: dtype of the fields.
    """

    state: torch.Tensor
    max_index: torch.Tensor
    targets: torch.Tensor | None = None
    hidden_norm: torch.Tensor | None = None
    dtype: torch.dtype = torch.float32

    def __len__(self) -> int:
        return self.state.shape[1]

    def __repr__(self) -> str:
        return f"RowStats(rows={len(self)}, valid={int(self.valid.sum())}, dtype={self.dtype})"

    @property
    def valid(self) -> torch.Tensor:
        """``[N]`` bool: the row was scored and has a finite largest logit and no NaN."""
        return self.state[MAX].isfinite() & self.state[R].isfinite()

    @property
    def logsumexp(self) -> torch.Tensor:
        """Log of the partition function, ``m + log1p(R)``."""
        return self._field(self.state[MAX] + self.state[R].log1p())

    @property
    def logprob(self) -> torch.Tensor | None:
        """Log-probability of the target in nats, ``z_y - logsumexp``."""
        if self.targets is None:
            return None
        return self._field(self.state[TARGET] - self.state[MAX] - self.state[R].log1p())

    @property
    def entropy(self) -> torch.Tensor:
        """Shannon entropy in nats, ``log1p(R) - S1 / Z``."""
        return self._field(self.state[R].log1p() - self.state[S1] / self._z)

    @property
    def varentropy(self) -> torch.Tensor:
        """Variance of the surprisal in nats squared, ``S11 / Z - (S1 / Z)^2``."""
        mean = self.state[S1] / self._z
        return self._field((self.state[S11] / self._z - mean * mean).clamp_min(0))

    @property
    def sum_sq_prob(self) -> torch.Tensor:
        """``sum p^2 = (1 + S2) / Z^2`` (its negative log is the Renyi-2 entropy)."""
        return self._field((1 + self.state[S2]) / self._z.square())

    @property
    def gini(self) -> torch.Tensor:
        """``1 - sum p^2 = (R (2 + R) - S2) / Z^2``, exact for confident rows."""
        r = self.state[R]
        return self._field((r * (2 + r) - self.state[S2]) / self._z.square())

    @property
    def top1_prob(self) -> torch.Tensor:
        """Probability of the most likely token, ``1 / Z``."""
        return self._field(self._z.reciprocal())

    @property
    def top2_prob(self) -> torch.Tensor:
        """Probability of the second most likely token; 0 if the vocabulary has only one."""
        return self._field((self.state[SECOND] - self.state[MAX]).exp() / self._z)

    @property
    def top1_index(self) -> torch.Tensor:
        """Index of the most likely token; -1 in rows that are not valid."""
        return self.max_index.where(self.valid, -1)

    @property
    def least_confidence(self) -> torch.Tensor:
        """``1 - top1_prob = R / Z``, exact for confident rows."""
        return self._field(self.state[R] / self._z)

    @property
    def residual_norm(self) -> torch.Tensor | None:
        """``||p - e_y||_2``, the norm of the loss gradient with respect to the logits.

        ``sqrt(R^2 + S2) / Z`` if the target is the maximum, else ``sqrt((Z - e_y)^2 + 1 + S2 - e_y^2) / Z``.
        """
        if self.targets is None:
            return None
        r, s2, z = self.state[R], self.state[S2], self._z
        e_y = (self.state[TARGET] - self.state[MAX]).exp()
        top = r.square() + s2
        other = (z - e_y).square() + 1 + (s2 - e_y.square()).clamp_min(0)
        return self._field(top.where(self.targets == self.max_index, other).sqrt() / z)

    def merge(self, other: RowStats) -> RowStats:
        """Statistics of the union of two disjoint parts of the vocabulary, for the same rows.

        Associative and commutative up to rounding in float64. Parts of a head come from ``Head(..., vocab_start=)``.

        Raises:
            TypeError: ``other`` is not a RowStats.
            ValueError: the numbers of rows differ, or only one side has targets.
        """
        if not isinstance(other, RowStats):
            raise TypeError(f"other: expected RowStats, got {checks.describe(other)}")
        if len(other) != len(self):
            raise ValueError(f"other: expected {len(self)} rows, got {len(other)}")
        if (self.targets is None) != (other.targets is None):
            raise ValueError("other: expected both sides with targets, or both without")
        mine, theirs = self.state, other.state
        first = (mine[MAX] > theirs[MAX]) | ((mine[MAX] == theirs[MAX]) & (self.max_index <= other.max_index))
        high, low = mine.where(first, theirs), theirs.where(first, mine)
        d = low[MAX] - high[MAX]
        d = d.where(low[MAX] != -torch.inf, 0.0)  # an empty part adds nothing; avoids 0 * -inf
        c = d.exp().where(low[MAX] != -torch.inf, 0.0)
        # The lower maximum becomes an ordinary term of the sums (the "+ 1").
        n, n1 = low[R] + 1, low[S1] + d * (low[R] + 1)
        n11 = low[S11] + 2 * d * low[S1] + d.square() * (low[R] + 1)
        state = torch.stack(
            [
                high[MAX] + 0 * mine[R] + 0 * theirs[R],  # NaN of an ignored row stays NaN
                torch.maximum(high[SECOND], low[MAX]),
                high[R] + c * n,
                high[S1] + c * n1,
                high[S2] + c.square() * (low[S2] + 1),
                high[S11] + c * n11,
                torch.maximum(mine[TARGET], theirs[TARGET]),
            ]
        )
        index = self.max_index.where(first, other.max_index)
        return replace(self, state=state, max_index=index)

    @property
    def _z(self) -> torch.Tensor:
        return 1 + self.state[R]

    def _field(self, value: torch.Tensor) -> torch.Tensor:
        return value.where(self.valid, torch.nan).to(self.dtype)


def row_stats(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    backend: str | None = None,
) -> RowStats:
    """Statistics of ``softmax(head(hidden) / temperature)`` without materialising the logits.

    Args:
        hidden: ``[N, D]`` float32, bfloat16, float16 (float64 on ``eager``); any strides; N may be 0.
        head: the last layer, on the same device. A shard with a group yields the statistics of the whole vocabulary, at
            the cost of one all-gather of eight float64 per row.
        targets: ``[N]`` int64; -100 marks rows to ignore, which are dropped before the product.
        temperature: divides the logits.
        backend: a name from :func:`acqcore.backends`; by default ``ACQCORE_BACKEND`` or the first that fits.

    Returns:
        RowStats of N rows. No gradient flows. Products accumulate in float32 for every dtype (float64 for float64).

    Raises:
        TypeError: hidden or targets have the wrong dtype.
        ValueError: mismatched shapes or devices, a target outside the vocabulary (on the CPU; on a GPU, where checking
            would stall it, the row is NaN, as are its gradient and the norm and sketch of its sample), an unknown
            backend, shards that do not tile the vocabulary.
        RuntimeError: the backend is not available here (the message says why).

    Source: Milakov & Gimelshein 2018 (online softmax), extended to the other sums of :class:`RowStats`.
    """
    temperature = checks.positive("temperature", temperature)
    chosen = checked_backend(hidden, head, targets, backend)
    return over_vocabulary(own_stats(hidden, head, targets, temperature, chosen), head)


def checked_backend(
    hidden: torch.Tensor,  # [N, D]
    head: Head,
    targets: torch.Tensor | None,  # [N]
    backend: str | None,
    op: str = "row_stats",
) -> Backend:
    """Checks the arguments of :func:`row_stats` and returns the backend that serves them for ``op``."""
    checks.instance("head", head, Head, "acqcore.Head")
    checks.hidden(hidden, head.weight)
    checks.targets(targets, hidden, "hidden")
    return chosen_backend(hidden, head, backend, op)


def chosen_backend(
    hidden: torch.Tensor,  # [N, D]
    head: Head,
    backend: str | None,
    op: str,
) -> Backend:
    """The backend that serves these rows for ``op``; raises as :func:`acqcore.backends.select`."""
    shape = (hidden.shape[0], head.weight.shape[0])
    return select_backend(backend, hidden.device, (hidden.dtype, head.weight.dtype), op, shape)


def own_stats(
    hidden: torch.Tensor,  # [N, D]
    head: Head,
    targets: torch.Tensor | None,  # [N]
    temperature: float,
    backend: Backend,
    gram: Gram | None = None,
) -> RowStats:
    """Statistics over the rows of this weight only, and the Gram if one is given; arguments are trusted."""
    # Detached rather than under no_grad: an error inside a compiled no_grad would disable gradients permanently.
    hidden, weight = hidden.detach(), head.weight.detach()
    bias = None if head.bias is None else head.bias.detach()
    state, index = empty_state(hidden)
    products = None if gram is None else gram.products
    flat = [] if gram is None else [row for pair in gram.bounds for row in pair]
    _row_stats_op(
        hidden, weight, bias, targets, head.softcap, head.scale, temperature, head.vocab_start, head.vocab_size,
        backend.name, flat, state, index, products,
    )  # fmt: skip
    return stats_of(HeadRows(hidden, head, targets, temperature, state, index), targets)


def stats_of(
    rows: HeadRows,  # their state filled
    targets: torch.Tensor | None,  # [N], as the caller gave them
) -> RowStats:
    dtype = compute_dtype(rows.hidden.dtype, rows.head.weight.dtype)
    norm = torch.linalg.vector_norm(rows.hidden, dim=1, dtype=dtype).where(~rows.state[R].isnan(), torch.nan)
    return RowStats(rows.state, rows.index, targets, norm, dtype)


def over_vocabulary(own: RowStats, head: Head) -> RowStats:
    """Statistics of the whole vocabulary, merged over the ranks of a group in its order."""
    if head.group is None or not len(own):
        return own
    check_tiling(head)
    packed = torch.cat([own.state, own.max_index[None].double()])  # [8, N]; an index is exact in float64
    parts = (replace(own, state=part[:-1], max_index=part[-1].long()) for part in gathered(packed, head.group))
    return reduce(RowStats.merge, parts)


def predicted_targets(stats: RowStats) -> RowStats:
    """The same rows with their most likely tokens as targets; arguments are trusted."""
    assert stats.targets is not None
    # A row without a finite logit has no most likely token, and its gradient is not finite for any target.
    targets = stats.max_index.clamp_min(0).where(stats.targets != checks.IGNORE_INDEX, checks.IGNORE_INDEX)
    state = stats.state.clone()
    state[TARGET] = state[MAX]
    return replace(stats, state=state, targets=targets)


def logit_stats(
    logits: torch.Tensor,
    targets: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    backend: str | None = None,
) -> RowStats:
    """Statistics of ``softmax(logits / temperature)`` for existing logits, such as a trainer's, in one read.

    Args:
        logits: ``[N, V]`` float32, bfloat16, float16 (float64 on ``eager``); any strides; N may be 0.
        targets: ``[N]`` int64 with -100 ignored, or None.
        temperature: divides the logits.
        backend: as in :func:`row_stats`.

    Returns, raises: as :func:`row_stats`; ``hidden_norm`` is None.
    """
    checks.logits(logits)
    checks.targets(targets, logits, "logits")
    temperature = checks.positive("temperature", temperature)
    n, vocab = logits.shape
    chosen = select_backend(backend, logits.device, (logits.dtype,), "logit_stats", (n, vocab))
    state, index = empty_state(logits)
    _logit_stats_op(logits.detach(), targets, temperature, chosen.name, state, index)
    return RowStats(state, index, targets, None, compute_dtype(logits.dtype))


def empty_state(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised ``state [7, N]`` float64 and ``max_index [N]`` int64 on the device of ``rows [N, ...]``."""
    n = rows.shape[0]
    state = torch.empty((7, n), dtype=torch.float64, device=rows.device)
    return state, torch.empty(n, dtype=torch.int64, device=rows.device)


@torch.library.custom_op("acqcore::row_stats", mutates_args=("state", "index", "products"))
def _row_stats_op(
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D]
    bias: torch.Tensor | None,  # [V]
    targets: torch.Tensor | None,  # [N]
    softcap: float | None,
    scale: float,
    temperature: float,
    vocab_start: int,
    vocab_size: int,
    backend: str,
    bounds: Sequence[int],  # [2 samples], begin and end of each sample of the Gram
    state: torch.Tensor,  # [7, N] float64, written
    index: torch.Tensor,  # [N] int64, written
    products: torch.Tensor | None,  # of the Gram, written
) -> None:
    targets = checks.targets_in_range(targets, vocab_size)
    if not len(weight):  # an empty shard of a group
        no_vocabulary(targets, state, index)
        if products is not None:
            products.zero_()
        return
    gram = None
    if products is not None:
        pairs = tuple(zip(bounds[::2], bounds[1::2], strict=True))
        gram = Gram(pairs, matrix_starts(pairs)[:-1], products)
    head = Head(weight, bias, softcap, scale, vocab_start, vocab_size)
    get_backend(backend).row_stats(HeadRows(hidden, head, targets, temperature, state, index), gram)


def no_vocabulary(
    targets: torch.Tensor | None,  # [N]
    state: torch.Tensor,  # [7, N] float64, written
    index: torch.Tensor,  # [N] int64, written
) -> None:
    """Fills the state of an empty vocabulary, which merging leaves without effect."""
    state.zero_()
    state[[MAX, SECOND, TARGET]] = -torch.inf
    index.zero_()
    if targets is not None:
        ignored = targets == checks.IGNORE_INDEX
        state.masked_fill_(ignored, torch.nan)
        index.masked_fill_(ignored, -1)


@torch.library.custom_op("acqcore::logit_stats", mutates_args=("state", "index"))
def _logit_stats_op(
    logits: torch.Tensor,  # [N, V]
    targets: torch.Tensor | None,  # [N]
    temperature: float,
    backend: str,
    state: torch.Tensor,  # [7, N] float64, written
    index: torch.Tensor,  # [N] int64, written
) -> None:
    targets = checks.targets_in_range(targets, logits.shape[1])
    get_backend(backend).logit_stats(LogitRows(logits, targets, temperature, state, index))
