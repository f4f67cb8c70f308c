"""Gradients of the loss through the head, per token and per sample, without the logits.

For a token with loss ``-log p_y`` and ``u = W h + b`` the gradient in ``u`` is ``delta = (p - e_y) du``, where
``du`` is the derivative of ``cap(scale u) / temperature``. A first pass (``row_stats``) gives each row's normaliser;
a second forms ``delta`` tile by tile, exactly: where the target is the most likely token its entry is ``-R / Z``,
so that a confident row loses nothing to cancellation. From ``delta`` follow

    dL/dh   = delta W                               (``hidden_grad``: attention with the vocabulary as keys and values)
    dL/dW   = sum_t w_t delta_t h_t^T               (its norm: ``head_grad_norm``; its sketch: ``grad_sketch``)

A shard of a head forms its own rows of delta from the statistics of the whole vocabulary. All three are sums over those
rows, of which the ranks add up D, one and ``dim`` numbers: dL/dh, the squared norm and the sketch.
"""

from __future__ import annotations

import torch

from acqcore import checks
from acqcore.backends import HeadRows, select as select_backend
from acqcore.head import Head, compute_dtype
from acqcore.row_stats import RowStats, row_stats
from acqcore.signs import hashed_places
from acqcore.vocab_parallel import summed

LOSSES = ("mean", "sum")

#: Rows sketched at a time: hashed and transformed they take 64 MiB at dim 4096.
SKETCH_ROWS = 1024


@torch.no_grad()
def hidden_grad(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    backend: str | None = None,
) -> torch.Tensor:
    """Gradient of each token's loss in its hidden state, ``softmax(z) W - W_y`` for a plain head.

    Args:
        hidden: ``[N, D]`` float32, bfloat16, float16 (float64 on ``eager``).
        head: the last layer.
        targets: ``[N]`` int64; -100 marks rows to ignore.
        temperature: divides the logits.
        backend: as in :func:`acqcore.row_stats`.

    Returns:
        ``[N, D]`` float32 (float64 for float64 inputs); zero in ignored rows, NaN where the logits are not finite.

    Raises: as :func:`acqcore.row_stats`; TypeError where targets are None.
    """
    checks.given("targets", targets)
    stats = row_stats(hidden, head, targets, temperature=temperature, backend=backend)
    return delta_product(hidden, head, stats, head.weight, temperature, backend)


@torch.no_grad()
def hidden_grad_norm(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    backend: str | None = None,
) -> torch.Tensor:
    """Euclidean norm of :func:`hidden_grad`, ``[N]``; NaN in ignored rows."""
    grad = hidden_grad(hidden, head, targets, temperature=temperature, backend=backend)
    return grad.norm(dim=1).where(targets != checks.IGNORE_INDEX, torch.nan)


@torch.no_grad()
def head_grad_norm(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    offsets: torch.Tensor,
    *,
    loss: str = "mean",
    token_weights: torch.Tensor | None = None,
    temperature: float = 1.0,
    backend: str | None = None,
    form: str = "auto",
) -> torch.Tensor:
    """Exact Frobenius norm of each sample's gradient in the head: weight, and bias where there is one.

    With ``delta_t`` the gradient in the logits, ``G = sum_t w_t delta_t h_t^T``. Two forms give the same number:
    ``gram``, ``||G||^2 = sum_st w_s w_t <delta_s, delta_t> <h_s, h_t>``, costs T/D of the head's product, and
    ``direct``, rows of G tile by tile, costs one such product whatever the sample's length T.

    Args:
        hidden: ``[N, D]``, the scored tokens of B samples one after another.
        head: the last layer.
        targets: ``[N]`` int64; -100 marks rows to ignore.
        offsets: ``[B + 1]`` int64, increasing from 0 to N: sample i is rows ``offsets[i]:offsets[i + 1]``.
        loss: ``mean`` over a sample's scored tokens, or ``sum``.
        token_weights: ``[N]`` floating point, multiply each token's loss; None for ones.
        temperature: divides the logits.
        backend: as in :func:`acqcore.row_stats`.
        form: ``gram``, ``direct``, or ``auto`` by the sample's length.

    Returns:
        ``[B]`` float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: as :func:`acqcore.row_stats`; offsets that do not increase or do not end at N; a sample
            without a scored token; an unknown loss or form.

    Source: ghost norms (Goodfellow 2015; Li et al. 2021, "Large language models can be strong differentially private
    learners"), cross-token terms included, in a form that needs no logits.
    """
    checks.given("targets", targets)
    checks.one_of("loss", loss, LOSSES)
    checks.one_of("form", form, ("auto", "gram", "direct"))
    stats = row_stats(hidden, head, targets, temperature=temperature, backend=backend)
    weights = loss_weights(targets, offsets, loss, token_weights)
    return head_grad_norm_from(hidden, head, stats, offsets, weights, temperature, backend, form)


@torch.no_grad()
def grad_sketch(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    offsets: torch.Tensor,
    *,
    dim: int = 4096,
    seed: int = 0,
    loss: str = "mean",
    token_weights: torch.Tensor | None = None,
    temperature: float = 1.0,
    backend: str | None = None,
) -> torch.Tensor:
    """A sketch of each sample's head gradient that keeps inner products: ``E <S_i, S_j> = <G_i, G_j>``.

    The tensor sketch of ``G = sum_t w_t delta_t h_t^T``: signs and places are hashed for rows and for columns, and
    entry (v, d) goes to place ``(a_v + b_d) mod dim`` with sign ``s_v s_d``. Neither G nor the logits are formed:
    both are hashed alone and convolved, ``sum_t ifft(fft(hash(delta_t)) fft(hash(h_t)))``. The standard deviation of
    ``<S_i, S_j>`` is about ``||G_i|| ||G_j|| sqrt(2 / dim)``; dense signs on both sides (64 x 64 for the same dim) have
    8 times that, and ranked the influence of real text at Spearman 0.8 to 0.9. The hash is of (seed, row) and
    (seed, column): the same on every machine and backend. A bias is left out.

    Args:
        hidden, head, targets, offsets, loss, token_weights, temperature, backend: as in :func:`head_grad_norm`.
        dim: length of a sketch.
        seed: of the signs; sketches of different seeds can not be compared.

    Returns:
        ``[B, dim]`` float32 (float64 for float64 inputs).

    Raises: as :func:`head_grad_norm`; ValueError for dim < 1.

    Source: tensor sketch (Pham & Pagh 2013, "Fast and scalable polynomial kernels via explicit feature maps").
    """
    checks.given("targets", targets)
    checks.one_of("loss", loss, LOSSES)
    checks.positive_int("dim", dim)
    stats = row_stats(hidden, head, targets, temperature=temperature, backend=backend)
    weights = loss_weights(targets, offsets, loss, token_weights)
    return grad_sketch_from(hidden, head, stats, offsets, weights, temperature, backend, dim, seed)


def loss_weights(
    targets: torch.Tensor,  # [N]
    offsets: torch.Tensor,  # [B + 1]
    loss: str,
    token_weights: torch.Tensor | None,  # [N]
) -> torch.Tensor:
    """Weight of each token's gradient in its sample's, ``[N]`` float64: zero where ignored."""
    checks.offsets(offsets, targets)
    scored = (targets != checks.IGNORE_INDEX).double()
    counts = segment_sum(scored, offsets)
    checks.scored_tokens(counts)
    weights = scored
    if token_weights is not None:
        checks.token_weights(token_weights, targets)
        weights = weights * token_weights.double()
    if loss == "mean":
        weights = weights / counts.repeat_interleave(offsets.diff())
    return weights


def segment_sum(
    values: torch.Tensor,  # [N, ...]
    offsets: torch.Tensor,  # [B + 1]
) -> torch.Tensor:
    """Sums of the rows of each segment, ``[B, ...]``."""
    segments = torch.arange(len(offsets) - 1, device=values.device).repeat_interleave(offsets.diff())
    out = torch.zeros((len(offsets) - 1, *values.shape[1:]), dtype=values.dtype, device=values.device)
    return out.index_add_(0, segments, values)


def delta_product(
    hidden: torch.Tensor,  # [N, D]
    head: Head,
    stats: RowStats,  # of these rows
    values: torch.Tensor,  # [V, n]
    temperature: float,
    backend: str | None,
) -> torch.Tensor:
    """``delta values``, ``[N, n]``: zero in ignored rows. Of a shard V are its own rows, and the product is the sum."""
    assert stats.targets is not None
    chosen = select_backend(backend, hidden.device, (hidden.dtype, head.weight.dtype))
    dtype = compute_dtype(hidden.dtype, head.weight.dtype)
    out = torch.zeros((hidden.shape[0], values.shape[1]), dtype=dtype, device=hidden.device)
    rows = HeadRows(hidden, head, stats.targets, temperature, stats.state, stats.max_index)
    if len(head.weight):  # a shard may be empty; backends never see one
        chosen.delta_product(rows, values, out)
    return summed(out, head.group)


def head_grad_norm_from(
    hidden: torch.Tensor,  # [N, D]
    head: Head,
    stats: RowStats,
    offsets: torch.Tensor,  # [B + 1]
    weights: torch.Tensor,  # [N] float64
    temperature: float,
    backend: str | None,
    form: str,
) -> torch.Tensor:
    """:func:`head_grad_norm` from statistics in hand, ``[B]``; arguments are trusted."""
    assert stats.targets is not None
    chosen = select_backend(backend, hidden.device, (hidden.dtype, head.weight.dtype))
    squared = torch.zeros(len(offsets) - 1, dtype=torch.float64, device=hidden.device)
    rows = HeadRows(hidden, head, stats.targets, temperature, stats.state, stats.max_index)
    if len(head.weight):
        chosen.head_grad_norm(rows, offsets, weights, form, squared)
    return summed(squared, head.group).clamp_min(0).sqrt().to(stats.dtype)


def grad_sketch_from(
    hidden: torch.Tensor,  # [N, D]
    head: Head,
    stats: RowStats,
    offsets: torch.Tensor,  # [B + 1]
    weights: torch.Tensor,  # [N] float64
    temperature: float,
    backend: str | None,
    dim: int,
    seed: int,
) -> torch.Tensor:
    """:func:`grad_sketch` from statistics in hand, ``[B, dim]``; arguments are trusted."""
    assert stats.targets is not None
    chosen = select_backend(backend, hidden.device, (hidden.dtype, head.weight.dtype))
    of_rows, of_columns = head_places(head, dim, seed)
    sketches = hidden.new_zeros((len(offsets) - 1, dim // 2 + 1), dtype=_complex(stats.dtype))
    segments = torch.arange(len(offsets) - 1, device=hidden.device).repeat_interleave(offsets.diff())
    for begin in range(0, len(hidden) if len(head.weight) else 0, SKETCH_ROWS):
        part = slice(begin, begin + SKETCH_ROWS)
        left = hidden.new_empty((len(hidden[part]), dim), dtype=stats.dtype)
        state, index = stats.state[:, part].contiguous(), stats.max_index[part]
        piece = HeadRows(hidden[part], head, stats.targets[part], temperature, state, index)
        chosen.delta_hash(piece, of_rows, left)
        left *= weights[part, None].to(stats.dtype)
        right = hash_columns(hidden[part].to(stats.dtype), of_columns, dim)
        sketches.index_add_(0, segments[part], torch.fft.rfft(left) * torch.fft.rfft(right))
    return summed(torch.fft.irfft(sketches, n=dim), head.group)


def head_places(head: Head, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hashed places of the rows ``[V]`` and columns ``[D]`` of a head's weight (see ``signs.hashed_places``)."""
    v, d = head.weight.shape
    device = head.weight.device
    return hashed_places(v, dim, seed, 0, head.vocab_start, device), hashed_places(d, dim, seed, 1, 0, device)


def hash_columns(
    values: torch.Tensor,  # [..., D]
    places: torch.Tensor,  # [D] int32
    dim: int,
) -> torch.Tensor:
    """Signed sums of the columns that share a place, ``[..., dim]``."""
    minus = places < 0
    out = values.new_zeros((*values.shape[:-1], dim))
    return out.index_add_(-1, torch.where(minus, ~places, places), values.where(~minus, -values))


def _complex(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype == torch.float64 else torch.complex64
