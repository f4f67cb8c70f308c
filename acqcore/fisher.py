"""Random cotangents of the logits whose second moment is the Fisher matrix of the softmax.

Backpropagating a cotangent c with ``E c c^T = diag(p) - p p^T`` through the network gives a gradient g with

    E g_i^2 = E_{y ~ p} (d log p_y / d theta_i)^2,

so one backward pass gives an unbiased estimate of how a small perturbation of theta changes the prediction, without
sampling a token. Cotangents of different tokens are independent, so the square of a sample's g is an unbiased estimate
of the sum over its tokens.

With independent signs ``r_v = +-1``, the most likely token a and the distribution q of the others,

    c = r_a sqrt(p_a (1 - p_a)) (e_a - q) + sqrt(1 - p_a) (sqrt(q) r - q sum_v sqrt(q_v) r_v).

By the law of total variance the two terms add up to the Fisher matrix: between a and the rest, and within the rest. The
first adds no noise where two tokens share the probability; ``sqrt(p) r - p sum_v sqrt(p_v) r_v``, which has the same
moments, vanishes there half of the time. Nothing cancels in confident rows: ``p_a (1 - p_a)`` is ``R / Z^2``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from acqcore import checks
from acqcore.backends import Backend, FisherSums, HeadRows, Probes
from acqcore.bayes import places
from acqcore.defaults import standard_defaults
from acqcore.head import Head, compute_dtype
from acqcore.philox import signs_of
from acqcore.row_stats import MAX, R, RowStats, checked_backend, empty_state, stats_of

FINISHED_ELEMENTS = 1 << 21  # elements of the rows finished at a time; bounds memory beyond the result to 16 MiB


@standard_defaults()
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
    """Gradients of ``sum_v c_v z_v`` in the hidden states for random cotangents c; ``E_r g g^T`` is the Fisher matrix.

    Args:
        hidden: ``[N, D]`` float32, bfloat16, float16 (float64 on ``eager``).
        head: the whole last layer, not a shard.
        targets: ``[N]`` int64; only -100 matters, which marks rows to ignore.
        probes: P, the number of independent cotangents per row.
        seed: seed of the signs, which depend only on (seed, probe, sample, position in the sample, token) and so are
            the same on every backend and in every batch.
        offsets: ``[B + 1]`` int64; sample i is rows ``offsets[i]:offsets[i + 1]``. By default all rows are one sample.
        temperature: divides the logits.
        backend: as in :func:`acqcore.row_stats`.

    Returns:
        ``[P, N, D]`` float32 (float64 for float64 inputs); zero in ignored rows, NaN where the logits are not finite.
        Errors are within 1e-4 of a row's norm. Cotangent entries are rounded once to the dtype of a half-precision head
        on GPUs, and to bfloat16 on processors that multiply it (AVX-512 BF16, AMX) if hidden states and weights are
        bfloat16: there errors are within 8e-3, typically 2e-3, and the second moment changes by 1e-6.

    Raises:
        TypeError, ValueError: as :func:`acqcore.row_stats`; probes below 1, a shard of a head, offsets that do not
            increase from 0 to N.
    """
    probes, seed = checks.probes(probes), checks.seed(seed)
    temperature = checks.positive("temperature", temperature)
    chosen = checked_backend(hidden, head, targets, backend, "fisher_sums")
    checks.whole_head(len(head.weight), head.vocab_size, head.group)
    if targets is None:
        targets = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    of_rows = Probes(probes, seed, *places(hidden, offsets))
    return fisher_visit(hidden, head, targets, of_rows, temperature, chosen)[1].gradients


@dataclass(frozen=True, eq=False)
class FisherGrads:
    """Random cotangents of N rows backpropagated through the head; zero in ignored rows."""

    gradients: torch.Tensor  # [P, N, D], dL/dh of each probe
    expected: torch.Tensor  # [N] float64, the exact expectation of their squared norms


def fisher_visit(
    hidden: torch.Tensor,  # [N, D]
    head: Head,
    targets: torch.Tensor,  # [N]
    probes: Probes,
    temperature: float,
    backend: Backend,
) -> tuple[RowStats, FisherGrads]:
    """Statistics and random cotangents of the rows, in one pass over the weights on a CPU; arguments are trusted.

    With a row's R and Z, its most likely token a, and the sums A, B, S and Q of ``Backend.fisher_sums``,

        c W        = A / sqrt(Z) - (S / sqrt(Z) + r_a sqrt(R) / Z) B / R + r_a sqrt(R) / Z W_a
        E ||c W||^2 = Q / Z - ||B||^2 / (R Z) + ||B - R W_a||^2 / (R Z^2).
    """
    n, columns = hidden.shape
    dtype = compute_dtype(hidden.dtype, head.weight.dtype)
    found = FisherSums(
        torch.empty((probes.count + 1, n, columns), dtype=dtype, device=hidden.device),
        torch.empty((probes.count, n), dtype=torch.float64, device=hidden.device),
        torch.empty(n, dtype=torch.float64, device=hidden.device),
    )
    trusted = checks.targets_in_range(targets, head.vocab_size)
    rows = HeadRows(hidden, head, trusted, temperature, *empty_state(hidden))
    backend.fisher_sums(rows, probes, found)
    expected = torch.empty(n, dtype=torch.float64, device=hidden.device)
    tops = rows.index.clamp_min(0)  # -1 in ignored rows
    of_tops = signs_of(probes.samples, probes.positions, tops, probes.seed, probes.count)
    at_once = max(FINISHED_ELEMENTS // max(columns, 1), 1)
    for begin in range(0, n, at_once):
        part = slice(begin, begin + at_once)
        few = HeadRows(hidden[part], head, targets[part], temperature, rows.state[:, part], tops[part])
        expected[part] = _finished(few, of_tops[:, part], found.of_rows(part))
    return stats_of(rows, targets), FisherGrads(found.sums[1:], expected)


def _finished(
    rows: HeadRows,  # index is 0 in ignored rows
    of_tops: torch.Tensor,  # [P, N] signs of the rows' most likely tokens
    found: FisherSums,  # the last P of its sums become the gradients
) -> torch.Tensor:
    """The expected squared norms, ``[N]`` float64, by the formulas of :func:`fisher_visit`."""
    head, dtype = rows.head, found.sums.dtype
    assert rows.targets is not None
    scored = rows.targets != checks.IGNORE_INDEX
    largest = rows.state[MAX].where(scored, 0)
    r = rows.state[R].where(scored, 0)
    inverse = r.reciprocal().where(r > torch.finfo(r.dtype).tiny, 0)
    z = 1 + r
    slope = head.scale / rows.temperature
    top = head.weight[rows.index].to(dtype)  # [N, D]
    if head.softcap is not None:
        top = top * (1 - (largest * (rows.temperature / head.softcap)).square())[:, None].to(dtype)
    mean, gradients = found.sums[0], found.sums[1:]
    between = _squared_norms(mean - r[:, None].to(dtype) * top)
    within = found.squares - _squared_norms(mean) * inverse
    expected = (slope**2 * (within.clamp_min(0) + between * inverse / z) / z).where(scored, 0)
    of_tops = of_tops * (r.sqrt() / z.sqrt())  # [P, N]
    factor = (slope / z.sqrt()).where(largest.isfinite(), torch.nan)
    most = torch.finfo(dtype).max  # overflows where the mean is 0 in float32
    of_mean = (-(found.signed + of_tops) * inverse).clamp(-most, most)
    gradients.addcmul_(of_mean[:, :, None].to(dtype), mean)
    gradients.addcmul_(of_tops[:, :, None].to(dtype), top)
    gradients.mul_(factor[:, None].to(dtype)).masked_fill_(~scored[:, None], 0)
    return expected


def _squared_norms(
    x: torch.Tensor,  # [N, D]
) -> torch.Tensor:
    """``[N]`` float64."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).square()
