"""One pass over a head's weights for everything asked of its rows: statistics, and inputs for the gradient norms.

The squared norm of a sample's head gradient, ``sum_st w_s w_t <h_s, h_t> <delta_s, delta_t>``, needs no second product.
With Y the sample's distinct targets,

    <delta_s, delta_t> = sum_{v not in Y} p_s[v] p_t[v]  +  sum_{u in Y} delta_s[u] delta_t[u].

The first sum is a Gram matrix of unnormalised probabilities, accumulated beside the row state, as attention kernels
accumulate their output, and normalised at the end; every term is positive, so nothing cancels. The second has at most T
columns, whose logits are recomputed. Samples too long for T x T matrices form delta in a second pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from acqcore.backends import Backend, Gram, HeadRows
from acqcore.backends.base import DrawRows
from acqcore.head import Head, compute_dtype
from acqcore.kept import on_device
from acqcore.row_stats import MAX, RowStats, empty_state, over_vocabulary, own_stats, stats_of
from acqcore.vocab_parallel import summed

FORMS = ("auto", "gram", "direct")


@dataclass(frozen=True, eq=False)
class HeadVisit:
    """Results of one pass over the weights for the N scored rows of B samples."""

    hidden: torch.Tensor  # [N, D]
    head: Head
    temperature: float
    backend: Backend
    stats: RowStats  # over the whole vocabulary, with targets
    bounds: tuple[tuple[int, int], ...]  # B: [begin, end) rows of each sample, on the host
    short: tuple[int, ...]  # samples that ``gram`` covers
    gram: Gram | None
    local_max: torch.Tensor  # [N] float64: the rows' largest logits over this weight

    def grad_norm(
        self,
        weights: torch.Tensor,  # [N] float64, of each token's loss; zero where the target is -100
    ) -> torch.Tensor:
        """Frobenius norm of each sample's head gradient, bias included, ``[B]``."""
        assert self.stats.targets is not None
        stats, device = self.stats, self.hidden.device
        rows = HeadRows(
            self.hidden, self.head, stats.targets, self.temperature, stats.state.contiguous(), stats.max_index
        )
        squared = torch.zeros(len(self.bounds), dtype=torch.float64, device=device)
        if len(self.head.weight):  # a shard may be empty; backends never see an empty one
            covered = frozenset(self.short)
            long = [i for i in range(len(self.bounds)) if i not in covered]
            of_short, of_long = squared.split([len(self.short), len(long)])
            if self.gram is not None:
                self.backend.gram_norm(rows, self.gram, self.local_max, weights, of_short)
            if long:
                self.backend.head_grad_norm(rows, tuple(self.bounds[i] for i in long), weights, of_long)
            if long and self.short:
                squared = squared[on_device(torch.tensor([*self.short, *long]).argsort(), device)]
        return summed(squared, self.head.group).clamp_min(0).sqrt().to(stats.dtype)


def empty_gram(
    hidden: torch.Tensor,  # [N, D]
    head: Head,
    bounds: tuple[tuple[int, int], ...],
    backend: Backend,
    form: str = "auto",
) -> tuple[tuple[int, ...], Gram | None]:
    """The samples that ``form`` selects, as in :func:`visit`, and their uninitialised Gram matrices."""
    limit = {"auto": backend.longest_gram(hidden.shape[1], hidden.dtype), "gram": len(hidden), "direct": 0}[form]
    short = tuple(i for i, (begin, end) in enumerate(bounds) if end - begin <= limit)
    if not short:
        return short, None
    dtype = compute_dtype(hidden.dtype, head.weight.dtype)
    return short, Gram.empty(tuple(bounds[i] for i in short), dtype, hidden.device)


def visit(
    hidden: torch.Tensor,  # [N, D]
    head: Head,
    targets: torch.Tensor,  # [N]
    bounds: tuple[tuple[int, int], ...],
    temperature: float,
    backend: Backend,
    form: str = "auto",
    known: RowStats | None = None,  # statistics of these rows over the whole vocabulary, with these targets
    draws: DrawRows | None = None,  # of these rows, under a head of the whole vocabulary
) -> HeadVisit:
    """Statistics of the rows, Gram matrices of the samples that ``form`` selects, and the statistics of ``draws``;
    arguments are trusted.

    ``auto`` forms Gram matrices for samples of at most ``backend.longest_gram`` rows, ``gram`` for all and
    ``direct`` for none. If the statistics are already known, only the Gram matrices need the pass over the weights.
    """
    short, gram = empty_gram(hidden, head, bounds, backend, form)
    own = known
    if draws is not None:
        rows = HeadRows(hidden, head, draws.targets, temperature, *empty_state(hidden))
        backend.stats_and_mixture(rows, draws, gram)
        own = stats_of(rows, targets)
    elif own is None or gram is not None:
        own = own_stats(hidden, head, targets, temperature, backend, gram)
    stats = known if known is not None else over_vocabulary(own, head)
    return HeadVisit(hidden, head, temperature, backend, stats, bounds, short, gram, own.state[MAX])
