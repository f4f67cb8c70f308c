"""Plain torch on any device, also in float64: the oracle of every parity test. It holds the logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from acqcore.backends import extension
from acqcore.backends.base import MAX, Backend, DrawRows, Dropout, FisherSums, Gram, HeadRows, LogitRows, Probes, R
from acqcore.backends.chunked_mixture import shard
from acqcore.defaults import float32_products
from acqcore.head import compute_dtype
from acqcore.philox import keep_mask, signs


class GramNorm(Backend):
    """A backend whose ``gram_norm`` runs in plain torch; it never waits for a device."""

    @float32_products()
    def gram_norm(
        self,
        rows: HeadRows,
        gram: Gram,
        local_max: torch.Tensor,  # [N] float64
        weights: torch.Tensor,  # [N] float64
        squared: torch.Tensor,  # [len(gram.bounds)] float64, written
    ) -> None:
        rows = without_ignored(rows)
        scored, columns, here = _target_columns(rows)
        assert rows.targets is not None
        head, slope = rows.head, rows.head.scale / rows.temperature
        largest = rows.state[MAX].where(scored, 0)
        r = rows.state[R].where(scored, 0)
        scale = weights.where(scored, 0) * (slope / (1 + r))
        shift = (local_max - rows.state[MAX]).exp().where(scored, 0)
        for i, ((begin, end), start) in enumerate(zip(gram.bounds, gram.starts, strict=True)):
            part, length = slice(begin, end), end - begin
            y, picked = rows.targets[part], columns[part]
            same = y[:, None] == y  # [T, T]: row s has the target of row u
            distinct = here[part] & ~same.tril(-1).any(dim=1)
            bias = None if head.bias is None else head.bias[picked]
            few = replace(head, weight=head.weight[picked], bias=bias, vocab_start=0, vocab_size=length, group=None)
            z = few.logits(rows.hidden[part], rows.temperature)
            e = (z.double() - largest[part, None]).exp()
            top = same & (y == rows.index[part])[:, None]
            delta = (e - same * (1 + r[part, None])).where(~top, -r[part, None]) * cap_slope(z, rows)
            delta = delta.where(distinct & scored[part, None], 0) * scale[part, None]  # inf times 0 is NaN
            products = gram.products[start : start + length**2].view(length, length).double()
            c = scale[part] * shift[part]
            h = rows.hidden[part].to(z.dtype)
            keys = (h @ h.T).double()
            keys = keys if head.bias is None else keys + 1
            squared[i] = ((c[:, None] * products * c + delta @ delta.T) * keys).sum()


class Eager(GramNorm):
    name = "eager"
    description = "plain torch on any device: the readable reference; holds the [N, V] logits"
    automatic = extension.ABSENT
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

    def longest_gram(self, depth: int, dtype: torch.dtype) -> int:
        return depth

    @float32_products()
    def row_stats(self, rows: HeadRows, gram: Gram | None = None) -> None:
        logits = rows.head.logits(rows.hidden, rows.temperature)
        fold(logits, rows.targets, rows.head.vocab_start, rows.state, rows.index)
        if gram is not None:
            gram_products(unnormalised(logits, rows), rows, gram)

    def logit_stats(self, rows: LogitRows) -> None:
        logits = rows.logits.to(compute_dtype(rows.logits.dtype)) / rows.temperature
        fold(logits, rows.targets, 0, rows.state, rows.index)

    @float32_products()
    def delta_hash(
        self,
        rows: HeadRows,
        places: torch.Tensor,  # [V] int32
        out: torch.Tensor,  # [N, n], written
    ) -> None:
        delta = logit_gradient(rows)
        minus = places < 0
        out.zero_().index_add_(1, torch.where(minus, ~places, places), delta.where(~minus, -delta))

    @float32_products()
    def head_grad_norm(
        self,
        rows: HeadRows,
        bounds: tuple[tuple[int, int], ...],
        weights: torch.Tensor,  # [N] float64
        squared: torch.Tensor,  # [len(bounds)] float64, written
    ) -> None:
        delta = logit_gradient(rows)
        delta = delta * weights[:, None].to(delta.dtype)
        hidden = without_ignored(rows).hidden.to(delta.dtype)
        for i, (begin, end) in enumerate(bounds):
            d, h = delta[begin:end], hidden[begin:end]
            squared[i] = (d.T @ h).double().square().sum()
            if rows.head.bias is not None:
                squared[i] += d.sum(dim=0).double().square().sum()

    @float32_products()
    def fill_hidden_grad(
        self,
        rows: HeadRows,  # their state filled
        out: torch.Tensor,  # [N, D], written
    ) -> None:
        factors = unnormalised(rows.head.logits(rows.hidden, rows.temperature), rows)
        _, columns, here = _target_columns(rows)
        factors.scatter_(1, columns[:, None], factors.gather(1, columns[:, None]).masked_fill(here[:, None], 0))
        torch.mm(factors, rows.head.weight.to(factors.dtype), out=out)

    @float32_products()
    def fisher_sums(self, rows: HeadRows, probes: Probes, out: FisherSums) -> None:
        self.row_stats(rows)
        whole = slice(0, len(rows.head.weight))
        positive = [signs(probes.samples, probes.positions, whole, probes.seed, k) for k in range(probes.count)]
        out.clear()
        add_fisher_sums(rows, positive, whole, out)

    def dropout_mask(
        self,
        dropout: Dropout,
        site: int,
        keep: torch.Tensor,  # [K, N, units] bool, written
    ) -> None:
        for k in range(len(keep)):
            keep[k] = keep_mask(dropout.samples, dropout.positions, keep.shape[2], dropout.p, dropout.seed, k, site)

    def mixture_stats(self, rows: DrawRows) -> None:
        # In float64: the rounding of a float32 product depends on the BLAS, and at logits of 100 it reaches 1e-5 nats.
        logits = [rows.heads[k % len(rows.heads)].logits(drawn_hidden(rows, k).double()) for k in range(rows.draws)]
        mixture(torch.stack(logits), rows.targets, rows.heads[0].vocab_start, rows.state, rows.votes)


def drawn_hidden(rows: DrawRows, draw: int) -> torch.Tensor:
    """Hidden states ``[N, D]`` of one draw."""
    dropout = rows.dropout
    if dropout is None:
        return rows.hidden[draw]
    width, columns = dropout.width, rows.hidden.shape[1]
    units = (columns + width - 1) // width
    keep = keep_mask(dropout.samples, dropout.positions, units, dropout.p, dropout.seed, draw)
    keep = keep.repeat_interleave(width, dim=1)[:, :columns]
    hidden = rows.hidden.to(compute_dtype(rows.hidden.dtype))
    return hidden.where(keep, 0) / (1 - dropout.p)


def mixture(
    z: torch.Tensor,  # [K, N, V] float32 or float64
    targets: torch.Tensor | None,  # [N]
    vocab_start: int,
    state: torch.Tensor,  # [6, N] float64, written
    votes: torch.Tensor,  # [K, N] int64, written
) -> None:
    """The state of ``bayes.py`` from the logits of every draw."""
    # Sums over 262144 columns in float32 lose the contract's last digit.
    log_p = z.double().log_softmax(dim=2)
    p = log_p.exp()
    log_m = log_p.logsumexp(dim=0) - math.log(len(z))
    m = log_m.exp()
    p_log_p = (p * log_p).masked_fill(p == 0, 0)
    m_log_m = (m * log_m).masked_fill(m == 0, 0)
    entropy, information, reverse, log_target, sum_sq, spread = state
    entropy[:] = -p_log_p.sum(dim=2).mean(dim=0)
    information[:] = (p_log_p.mean(dim=0) - m_log_m).sum(dim=1)
    reverse[:] = (m * (log_m - log_p.mean(dim=0))).masked_fill(m == 0, 0).sum(dim=1)
    log_target[:] = -torch.inf
    sum_sq[:] = m.square().sum(dim=1)
    spread[:] = (p.square().mean(dim=0) - m.square()).sum(dim=1)
    votes[:] = z.argmax(dim=2) + vocab_start
    if targets is not None:
        local = targets - vocab_start
        here = ((local >= 0) & (local < z.shape[2])).nonzero()[:, 0]
        log_target[here] = log_m[here, local[here]]
        ignored = targets == -100
        state[:, ignored] = torch.nan
        votes[:, ignored] = -1


def without_ignored(rows: HeadRows) -> HeadRows:
    """The rows with the hidden states of ignored ones set to zero: they may be NaN, and 0 times NaN is NaN."""
    assert rows.targets is not None
    return replace(rows, hidden=rows.hidden.masked_fill((rows.targets == -100)[:, None], 0))


def unnormalised(
    z: torch.Tensor,  # [N, V] logits
    rows: HeadRows,
) -> torch.Tensor:
    """``exp(z - m) cap'``, ``[N, V]``, the factors of :class:`Gram`; zero in ignored rows."""
    assert rows.targets is not None
    factors = (z - rows.state[MAX, :, None].to(z.dtype)).exp().masked_fill(z == -torch.inf, 0)
    factors = factors * cap_slope(z, rows)
    return factors.masked_fill((rows.targets == -100)[:, None], 0)


def gram_products(
    factors: torch.Tensor,  # [N, V], some or all columns of the weight
    rows: HeadRows,
    gram: Gram,  # products written
    first: int = 0,  # column of factors[:, 0] in the weight
) -> None:
    """The Gram matrices of some columns; if ``first`` > 0, they are added to those of the preceding columns."""
    assert rows.targets is not None
    width = factors.shape[1]
    for (begin, end), start in zip(gram.bounds, gram.starts, strict=True):
        local = rows.targets[begin:end] - (rows.head.vocab_start + first)
        here = (local >= 0) & (local < width)
        special = torch.zeros(width + 1, dtype=torch.bool, device=factors.device)
        special[local.where(here, width)] = True
        own = factors[begin:end].masked_fill(special[:width], 0)
        products = gram.products[start : start + (end - begin) ** 2].view(end - begin, end - begin)
        if first:
            products.addmm_(own, own.T)
        else:
            torch.mm(own, own.T, out=products)


def cap_slope(
    z: torch.Tensor,  # [..., V] logits
    rows: HeadRows,
) -> torch.Tensor | float:
    """Derivative of the softcap (tanh' = 1 - tanh^2), shaped like ``z``; 1 without a softcap."""
    if rows.head.softcap is None:
        return 1.0
    return 1 - (z * (rows.temperature / rows.head.softcap)).square()


def _target_columns(rows: HeadRows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``[N]`` each: whether the row is scored, its target's column (0 if absent), whether this weight has it."""
    assert rows.targets is not None
    local = rows.targets - rows.head.vocab_start
    here = (local >= 0) & (local < len(rows.head.weight))
    return rows.targets != -100, local.where(here, 0), here


def logit_gradient(rows: HeadRows) -> torch.Tensor:
    """``delta [N, V]``, the gradient of each token's loss in ``W h + b``; zero in ignored rows."""
    head, targets = rows.head, rows.targets
    assert targets is not None
    z = head.logits(rows.hidden, rows.temperature)
    max_logit, r = rows.state[MAX], rows.state[R]
    p = (z - max_logit[:, None].to(z.dtype)).exp() / (1 + r[:, None].to(z.dtype))
    local = targets - head.vocab_start
    here = ((local >= 0) & (local < z.shape[1])).nonzero()[:, 0]
    of_target = p[here, local[here]].double() - 1
    of_target = torch.where(targets[here] == rows.index[here], (-r / (1 + r))[here], of_target)
    p[here, local[here]] = of_target.to(p.dtype)
    slope = head.scale / rows.temperature
    return (p * cap_slope(z, rows) * slope).masked_fill((targets == -100)[:, None], 0)


def add_fisher_sums(
    rows: HeadRows,
    positive: Sequence[torch.Tensor],  # P of [N, columns] bool: the signs of each probe
    columns: slice,  # of the weight
    out: FisherSums,  # added to
) -> None:
    """Adds the sums of ``Backend.fisher_sums`` over some columns; the state must be filled."""
    assert rows.targets is not None
    few = shard(rows.head, columns)
    z = few.logits(rows.hidden, rows.temperature)
    weight = few.weight.to(z.dtype)
    root = ((z - rows.state[MAX, :, None].to(z.dtype)) / 2).exp()
    top = torch.arange(columns.start, columns.stop, device=z.device) == rows.index[:, None]
    root = root.masked_fill(top | (rows.targets == -100)[:, None], 0)
    slope = cap_slope(z, rows)
    out.sums[0].addmm_(root.square() * slope, weight)
    out.squares.add_((root * slope).square().double() @ weight.double().square().sum(dim=1))
    for k, sign in enumerate(positive):
        factors = root.where(sign, -root)
        out.signed[k] += factors.sum(dim=1, dtype=torch.float64)
        out.sums[1 + k].addmm_(factors * slope, weight)


def fold(
    z: torch.Tensor,  # [N, V] float32 or float64
    targets: torch.Tensor | None,  # [N]
    vocab_start: int,
    state: torch.Tensor,  # [7, N] float64, written
    index: torch.Tensor,  # [N] int64, written
) -> None:
    """The state of each row, term by term as defined in ``row_stats.py``."""
    v = z.shape[1]
    columns = torch.arange(v, device=z.device)
    m = z.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(dim=1)  # [N]; a NaN shows up in the sums
    a = (z == m[:, None]).int().argmax(dim=1)  # the first on ties
    others = z.masked_fill(columns == a[:, None], -torch.inf)  # [N, V]
    x = others - m[:, None]
    x = x.masked_fill(others == -torch.inf, 0)  # an impossible token adds nothing; avoids 0 * -inf
    e = x.exp().masked_fill(others == -torch.inf, 0)
    e, x = e.double(), x.double()
    index.copy_(a + vocab_start)
    largest, second, r, s1, s2, s11, target = state
    largest[:] = m
    second[:] = others.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(dim=1)
    r[:] = e.sum(dim=1)
    s1[:] = (e * x).sum(dim=1)
    s2[:] = (e * e).sum(dim=1)
    s11[:] = (e * x * x).sum(dim=1)
    target[:] = -torch.inf
    if targets is not None:
        local = targets - vocab_start
        here = (local >= 0) & (local < v)  # targets of other shards are found there
        target[:] = z.gather(1, local.where(here, 0)[:, None])[:, 0].double().where(here, -torch.inf)
        ignored = targets == -100
        state.masked_fill_(ignored, torch.nan)
        index.masked_fill_(ignored, -1)
