"""Random cotangents of the logits whose second moment is the Fisher matrix of the softmax.

A cotangent c with ``E c c^T = diag(p) - p p^T``, carried back through the network, gives a g with

    E g_i^2 = E_{y ~ p} (d log p_y / d theta_i)^2,

so one backward estimates, without bias and without sampling a token, what a small perturbation of theta does to the
prediction. Cotangents of different tokens are independent, so the square of a sample's g is unbiased for the sum over
its tokens.

With independent signs ``r_v = +-1``, a the most likely token and q the distribution of the others,

    c = r_a sqrt(p_a (1 - p_a)) (e_a - q) + sqrt(1 - p_a) (sqrt(q) r - q sum_v sqrt(q_v) r_v).

By the law of total variance the two terms make up the Fisher matrix: between a and the rest, and within the rest. The
first has no noise of its own where two tokens share the probability; ``sqrt(p) r - p sum_v sqrt(p_v) r_v``, which has
the same moments, vanishes there half of the time. Nothing cancels in confident rows: ``p_a (1 - p_a)`` is ``R / Z^2``.
"""

from __future__ import annotations

import torch

from acqcore import checks
from acqcore.backends import HeadRows, Probes, select as select_backend
from acqcore.bayes import places
from acqcore.head import Head, compute_dtype
from acqcore.row_stats import RowStats, row_stats


@torch.no_grad()
def fisher_grad(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor | None = None,
    *,
    probes: int = 1,
    seed: int = 0,
    offsets: torch.Tensor | None = None,
    temperature: float = 1.0,
    backend: str | None = None,
) -> torch.Tensor:
    """Gradients in the hidden states of ``sum_v c_v z_v`` for random cotangents c, ``E_r g g^T`` the Fisher matrix.

    Args:
        hidden: ``[N, D]`` float32, bfloat16, float16 (float64 on ``eager``).
        head: the last layer, whole: not a shard of a group.
        targets: ``[N]`` int64; only -100, which marks rows to ignore, matters.
        probes: P, independent cotangents of each row.
        seed: of the signs, a function of (seed, probe, sample, position in the sample, token): the same on every
            backend and in every batch.
        offsets: ``[B + 1]`` int64, sample i being rows ``offsets[i]:offsets[i + 1]``; by default all are one sample.
        temperature: divides the logits.
        backend: as in :func:`acqcore.row_stats`.

    Returns:
        ``[P, N, D]`` float32 (float64 for float64 inputs); zero in ignored rows, NaN where the logits are not finite.

    Raises:
        TypeError, ValueError: as :func:`acqcore.row_stats`; probes below 1, a shard of a head, offsets that do not
            increase from 0 to N.
    """
    checks.probes(probes)
    checks.seed(seed)
    checks.instance("head", head, Head, "acqcore.Head")
    checks.whole_head(head.group)
    stats = row_stats(hidden, head, _ignored(targets, hidden), temperature=temperature, backend=backend)
    samples, positions = places(hidden, offsets)
    return fisher_grad_from(hidden, head, stats, Probes(probes, seed, samples, positions), temperature, backend)


def fisher_grad_from(
    hidden: torch.Tensor,  # [N, D]
    head: Head,
    stats: RowStats,  # of these rows, with targets
    probes: Probes,
    temperature: float,
    backend: str | None,
) -> torch.Tensor:
    """:func:`fisher_grad` from statistics in hand, ``[P, N, D]``; arguments are trusted."""
    shape = (hidden.shape[0], head.weight.shape[0])
    chosen = select_backend(backend, hidden.device, (hidden.dtype, head.weight.dtype), "fisher_grad", shape)
    dtype = compute_dtype(hidden.dtype, head.weight.dtype)
    out = torch.empty((probes.count, *hidden.shape), dtype=dtype, device=hidden.device)
    rows = HeadRows(hidden, head, stats.targets, temperature, stats.state.contiguous(), stats.max_index)
    chosen.fisher_grad(rows, probes, out)
    return out


def _ignored(
    targets: torch.Tensor | None,  # [N]
    hidden: torch.Tensor,  # [N, D]
) -> torch.Tensor:
    """Targets in which only -100 matters, ``[N]``."""
    if targets is None:
        return torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    return targets
