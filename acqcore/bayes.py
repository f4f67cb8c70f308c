"""Mutual information between prediction and weights (BALD), by MC dropout or an ensemble, without ``[N, K, V]`` logits.

K draws of the weights give K distributions ``p_k`` for a row, and their mean ``m = mean_k p_k``. Then

    mutual information        H(m) - mean_k H(p_k) = mean_k KL(p_k || m)     disagreement between draws: ignorance
    expected entropy          mean_k H(p_k)                                   uncertainty shared by draws: ambiguity

Each row needs a few sums, and two passes over the vocabulary because the mean distribution needs all normalisers:
``expected_entropy``, ``information = sum_v mean_k p log p - m log m``, ``reverse = sum_v m (log m - mean_k log p)``,
``log_target = log m_y``, ``sum_sq = sum_v m^2``, ``spread = sum_v mean_k p^2 - m^2``. ``information``, ``reverse`` and
``spread`` are summed from differences that vanish where the draws agree, not from differences of entropies.

If ranks share the vocabulary (``Head(group=)``), both passes run in torch on every backend, in bounded tiles, because
the normalisers are merged between them.

Source: BALD (Houlsby et al. 2011), by MC dropout (Gal & Ghahramani 2016; Gal, Islam & Ghahramani 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from acqcore import checks
from acqcore.backends import DrawRows, Dropout, get as get_backend, select as select_backend
from acqcore.backends.chunked_mixture import mixture_in_chunks
from acqcore.defaults import float32_products, standard_defaults
from acqcore.head import Head, compute_dtype
from acqcore.head_grad import sample_of_rows
from acqcore.kept import on_device
from acqcore.literals import Form
from acqcore.vocab_parallel import check_tiling, group_ranks

#: Rows of ``BayesStats.state``.
ENTROPY, INFORMATION, REVERSE, LOG_TARGET, SUM_SQ, SPREAD = range(6)

#: Statistics that every backend must provide; the parity tests iterate over this list.
FIELDS = (
    "mutual_information",
    "predictive_entropy",
    "expected_entropy",
    "variation_ratio",
    "expected_pairwise_kl",
    "logprob",
    "quadratic_mutual_information",
)


@dataclass(frozen=True, eq=False)
class BayesStats:
    """Statistics of N rows under K draws, each ``[N]``; float32 (float64 where an input was float64).

    Rows whose target is -100, and rows without a finite largest logit, hold NaN. ``logprob`` is None without targets.

    Attributes:
        state: ``[6, N]`` float64: expected entropy, information, reverse, log target, sum of squares, spread.
        votes: ``[K, N]`` int64, the most likely token of each draw.
        targets: ``[N]`` int64 or None.
        dtype: dtype of the fields.
    """

    state: torch.Tensor
    votes: torch.Tensor
    targets: torch.Tensor | None = None
    dtype: torch.dtype = torch.float32

    def __len__(self) -> int:
        return self.state.shape[1]

    def __repr__(self) -> str:
        return f"BayesStats(rows={len(self)}, draws={len(self.votes)}, valid={int(self.valid.sum())})"

    @property
    def valid(self) -> torch.Tensor:
        """``[N]`` bool: the row was scored, and every draw has a finite largest logit and no NaN."""
        return self.state[ENTROPY].isfinite() & self.state[INFORMATION].isfinite()

    @property
    def mutual_information(self) -> torch.Tensor:
        """``H(m) - mean_k H(p_k)`` in nats, in ``[0, log K]``; 0 where the draws agree."""
        return self._field(self._information)

    @property
    def predictive_entropy(self) -> torch.Tensor:
        """``H(m)`` in nats: mutual information plus expected entropy."""
        return self._field(self.state[ENTROPY] + self._information)

    @property
    def expected_entropy(self) -> torch.Tensor:
        """``mean_k H(p_k)`` in nats."""
        return self._field(self.state[ENTROPY])

    @property
    def variation_ratio(self) -> torch.Tensor:
        """Share of draws whose most likely token is not the most common one, in ``[0, 1 - 1/K]``."""
        draws = len(self.votes)
        commonest = torch.zeros_like(self.votes[0])
        for vote in self.votes:
            commonest = torch.maximum(commonest, (self.votes == vote).sum(dim=0))
        return self._field(1 - commonest.double() / draws)

    @property
    def expected_pairwise_kl(self) -> torch.Tensor:
        """``mean_jk KL(p_j || p_k)`` over all K^2 ordered pairs, in nats (Malinin & Gales 2021)."""
        return self._field(self._information + self.state[REVERSE].clamp_min(0))

    @property
    def logprob(self) -> torch.Tensor | None:
        """Log-probability of the target under the mean distribution, ``log m_y``."""
        return None if self.targets is None else self._field(self.state[LOG_TARGET])

    @property
    def quadratic_mutual_information(self) -> torch.Tensor:
        """Renyi-2 mutual information, ``log(mean_k sum_v p_k^2 / sum_v m^2)`` in nats, in ``[0, log K]``.

        By Jensen's inequality ``sum m^2 <= mean_k sum p_k^2 <= K sum m^2``. Collision probabilities are averaged before
        taking the logarithm; averaging Renyi entropies instead could give negative values.
        """
        return self._field((self.state[SPREAD].clamp_min(0) / self.state[SUM_SQ]).log1p())

    @property
    def _information(self) -> torch.Tensor:
        return self.state[INFORMATION].clamp_min(0)

    def _field(self, value: torch.Tensor) -> torch.Tensor:
        return value.where(self.valid, torch.nan).to(self.dtype)


@standard_defaults()
def mutual_information(
    hidden: torch.Tensor,
    head: Head,
    *,
    dropout: float = 0.1,
    draws: int = 8,
    form: str = "element",
    block: int = 64,
    seed: int = 0,
    offsets: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
    backend: str | None = None,
) -> BayesStats:
    """Statistics of each row under ``draws`` MC-dropout draws of its hidden state; the trunk runs once.

    Args:
        hidden: ``[N, D]`` float32, bfloat16, float16 (float64 on ``eager``); any strides; N may be 0.
        head: the last layer, on the same device.
        dropout: probability p that a column is dropped; kept columns are divided by ``1 - p``.
        draws: K, at least 2.
        form: ``element`` drops columns independently and takes K products with the head; ``block`` drops groups of
            ``block`` columns, whose partial products are recombined for each draw: about one product for any K.
        block: columns that drop together in the block form; the last block of a row may be shorter.
        seed: seed of the masks, which depend only on (seed, draw, sample, position in the sample, column) and so are
            the same on every backend and in every batch.
        offsets: ``[B + 1]`` int64; sample i is rows ``offsets[i]:offsets[i + 1]``. By default all rows are one sample.
        targets: ``[N]`` int64; -100 marks rows to ignore. Only ``logprob`` needs targets.
        backend: as in :func:`acqcore.row_stats`.

    Returns:
        BayesStats of N rows. No gradient flows.

    Raises:
        TypeError, ValueError: as :func:`acqcore.row_stats`; draws below 2, dropout outside [0, 1), an unknown form,
            block below 1, offsets that do not increase from 0 to N.
    """
    dropout = checks.dropout(dropout)
    draws, seed, block = checks.draws(draws), checks.seed(seed), checks.positive_int("block", block)
    checks.literal("form", form, Form)
    checks.instance("head", head, Head, "acqcore.Head")
    checks.hidden(hidden, head.weight)
    checks.targets(targets, hidden, "hidden")
    samples, positions = places(hidden, offsets)
    masks = Dropout(dropout, form, block, seed, samples, positions)
    return mixture_stats(hidden, (head,), masks, draws, targets, backend)


@standard_defaults()
def ensemble_stats(
    hidden: torch.Tensor,
    heads: Head | Sequence[Head],
    targets: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> BayesStats:
    """The statistics of given draws: members of an ensemble, or passes of a model under dropout.

    Args:
        hidden: ``[K, N, D]``, K at least 2; dtypes as in :func:`mutual_information`.
        heads: one head for all draws, or one per draw with the same shape, softcap, scale and dtype.
        targets: ``[N]`` int64, -100 ignored, or None.
        backend: as in :func:`acqcore.row_stats`.

    Returns, raises: as :func:`mutual_information`; ValueError for heads that differ in shape, softcap, scale or dtype.
    """
    members = tuple(heads) if isinstance(heads, Sequence) else (heads,)
    for member in members:
        checks.instance("head", member, Head, "acqcore.Head")
    checks.drawn_hidden(hidden, len(members), [member.weight for member in members])
    checks.hidden(hidden[0], members[0].weight)
    checks.targets(targets, hidden[0], "hidden")
    for k, member in enumerate(members):
        for what in ("softcap", "scale", "vocab_start", "vocab_size"):
            checks.alike(what, getattr(members[0], what), getattr(member, what), k)
        checks.alike("group", group_ranks(members[0]), group_ranks(member), k)
    return mixture_stats(hidden, members, None, len(hidden), targets, backend)


def dropout_rows(
    hidden: torch.Tensor,  # [N, D]
    head: Head,
    dropout: Dropout,
    draws: int,
    targets: torch.Tensor,  # [N]
) -> tuple[DrawRows, BayesStats]:
    """Draws for ``Backend.stats_and_mixture``, and the statistics that it fills; arguments are trusted."""
    state, votes = _empty(draws, hidden)
    dtype = compute_dtype(hidden.dtype, head.weight.dtype)
    in_range = checks.targets_in_range(targets, head.vocab_size)
    return DrawRows(hidden, (head,), in_range, draws, dropout, state, votes), BayesStats(state, votes, targets, dtype)


def _empty(
    draws: int,
    hidden: torch.Tensor,  # [..., N, D]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised ``state [6, N]`` and ``votes [K, N]``."""
    n = hidden.shape[-2]
    state = torch.empty((6, n), dtype=torch.float64, device=hidden.device)
    return state, torch.empty((draws, n), dtype=torch.int64, device=hidden.device)


def places(
    hidden: torch.Tensor,  # [N, D]
    offsets: torch.Tensor | None,  # [B + 1]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample index of each row and its position in the sample, ``[N]`` int64 each."""
    row = torch.arange(len(hidden), device=hidden.device)
    if offsets is None:
        return torch.zeros_like(row), row
    bounds = checks.offsets(offsets, hidden)
    sample = sample_of_rows(bounds, hidden.device)
    begins = on_device(torch.tensor([begin for begin, _ in bounds], dtype=torch.int64), hidden.device)
    return sample, row - begins[sample]


def mixture_stats(
    hidden: torch.Tensor,  # [N, D] with dropout, else [K, N, D]
    heads: tuple[Head, ...],
    dropout: Dropout | None,
    draws: int,
    targets: torch.Tensor | None,  # [N]
    backend: str | None,
) -> BayesStats:
    """Statistics of the draws; arguments are trusted."""
    head = heads[0]
    dtype = compute_dtype(hidden.dtype, head.weight.dtype)
    n = hidden.shape[-2]
    dtypes = hidden.dtype, head.weight.dtype
    chosen = select_backend(backend, hidden.device, dtypes, "mixture_stats", (n, len(head.weight)))
    state, votes = _empty(draws, hidden)
    if head.group is not None:
        # A shard's second pass needs the merged normalisers, which the fused kernels do not accept.
        check_tiling(head)
        of_vocabulary = checks.targets_in_range(targets, head.vocab_size)
        with torch.no_grad(), float32_products():
            mixture_in_chunks(chosen, DrawRows(hidden, heads, of_vocabulary, draws, dropout, state, votes))
        return BayesStats(state, votes, targets, dtype)
    places = None if dropout is None else torch.stack([dropout.samples, dropout.positions])
    p, form, block, seed = 0.0, "element", 1, 0
    if dropout is not None:
        p, form, block, seed = float(dropout.p), dropout.form, dropout.block, dropout.seed
    biases = [None if h.bias is None else h.bias.detach() for h in heads]
    _mixture_stats_op(
        hidden.detach(), [h.weight.detach() for h in heads], biases, targets, head.softcap, head.scale,
        head.vocab_start, head.vocab_size, draws, places, p, form, block, seed, chosen.name, state, votes,
    )  # fmt: skip
    return BayesStats(state, votes, targets, dtype)


@torch.library.custom_op("acqcore::mixture_stats", mutates_args=("state", "votes"))
def _mixture_stats_op(
    hidden: torch.Tensor,  # [N, D] with places, else [K, N, D]
    weights: Sequence[torch.Tensor],  # 1 or K of [V, D]
    biases: Sequence[torch.Tensor | None],  # 1 or K of [V]
    targets: torch.Tensor | None,  # [N]
    softcap: float | None,
    scale: float,
    vocab_start: int,
    vocab_size: int,
    draws: int,
    places: torch.Tensor | None,  # [2, N] int64, sample and position of each row under dropout
    p: float,
    form: str,
    block: int,
    seed: int,
    backend: str,
    state: torch.Tensor,  # [6, N] float64, written
    votes: torch.Tensor,  # [K, N] int64, written
) -> None:
    targets = checks.targets_in_range(targets, vocab_size)
    heads = tuple(
        Head(weight, bias, softcap, scale, vocab_start, vocab_size)
        for weight, bias in zip(weights, biases, strict=True)
    )
    dropout = None if places is None else Dropout(p, form, block, seed, places[0], places[1])
    get_backend(backend).mixture_stats(DrawRows(hidden, heads, targets, draws, dropout, state, votes))
