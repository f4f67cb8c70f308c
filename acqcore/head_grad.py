"""Gradients of the loss through the head, per token and per sample, without the logits.

For a token with loss ``-log p_y`` and ``u = W h + b``, the gradient in ``u`` is ``delta = (p - e_y) du``, where
``du`` is the derivative of ``cap(scale u) / temperature``. If the target is the most likely token, its entry is
exactly ``-R / Z``, so confident rows lose nothing to cancellation. ``delta`` gives

    dL/dh   = delta W                               (``hidden_grad``: attention with the vocabulary as keys and values)
    dL/dW   = sum_t w_t delta_t h_t^T               (its norm: ``head_grad_norm``; its sketch: ``grad_sketch``)

The norm is accumulated unnormalised beside the statistics, in one pass over the weights; so are the sketch of a whole
head and, on a CPU, ``hidden_grad``. The others, and the norm of long samples, form ``delta`` in a second pass.

A shard of a head forms its own columns of delta from the statistics of the whole vocabulary. All three results are sums
over those columns, so the ranks add up D numbers for dL/dh, one for the squared norm and ``dim`` for the sketch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator
from dataclasses import replace
from operator import itemgetter
from typing import TypeAlias

import torch

from acqcore import checks
from acqcore.backends import Backend, Gram, HeadRows
from acqcore.backends.scatter import add_segments
from acqcore.defaults import standard_defaults
from acqcore.head import Head, compute_dtype
from acqcore.head_visit import FORMS, HeadVisit, empty_gram, visit
from acqcore.kept import kept, on_device
from acqcore.literals import Loss
from acqcore.row_stats import (
    MAX,
    TARGET,
    R,
    RowStats,
    checked_backend,
    chosen_backend,
    empty_state,
    no_vocabulary,
    over_vocabulary,
    row_stats,
    stats_of,
)
from acqcore.signs import ColumnHash, column_hash, rotated_places
from acqcore.vocab_parallel import summed

#: [begin, end) rows of each of B samples, on the host.
Bounds: TypeAlias = tuple[tuple[int, int], ...]

#: Rows sketched at a time; hashed and transformed, they take 64 MiB at dim 4096.
SKETCH_ROWS = 1024

#: Entries of the targets' weights gathered at a time, 16 MiB in float32.
GATHERED_ELEMENTS = 1 << 22

#: Hashes of heads' rows that stay on a device.
KEPT_PLACES = 8


@torch.no_grad()
def hidden_grad(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    backend: str | None = None,
) -> torch.Tensor:
    """Gradient of each token's loss with respect to its hidden state, ``softmax(z) W - W_y`` for a plain head.

    Args:
        hidden: ``[N, D]`` float32, bfloat16, float16 (float64 on ``eager``).
        head: the last layer.
        targets: ``[N]`` int64; -100 marks rows to ignore.
        temperature: divides the logits.
        backend: as in :func:`acqcore.row_stats`.

    Returns:
        ``[N, D]`` float32 (float64 for float64 inputs); zero in ignored rows, NaN where the logits are not finite.
        Errors are within 1e-4 of a row's norm. The GPU kernels round softmax(z) once to a half-precision head's dtype:
        errors are then within 5e-3 (3e-4 measured on an H100 at D = 4096, V = 131072).

    Raises: as :func:`acqcore.row_stats`; TypeError if targets is None.
    """
    checks.given("targets", targets)
    temperature = checks.positive("temperature", temperature)
    chosen = checked_backend(hidden, head, targets, backend, "hidden_grad")
    trusted = checks.targets_in_range(targets, head.vocab_size)
    rows = HeadRows(hidden, head, trusted, temperature, *empty_state(hidden))
    sums = hidden.new_empty(hidden.shape, dtype=compute_dtype(hidden.dtype, head.weight.dtype))
    if len(head.weight):
        chosen.delta_sums(rows, sums)
    else:  # a shard may be empty; backends never see an empty one
        no_vocabulary(trusted, rows.state, rows.index)
        sums.zero_()
    stats = over_vocabulary(stats_of(rows, targets), head)
    return summed(_normalised(sums, head, stats, rows.state[MAX], temperature), head.group)


def _normalised(
    sums: torch.Tensor,  # [N, D], values of ``Backend.delta_sums``, overwritten
    head: Head,
    stats: RowStats,  # over the whole vocabulary
    local_max: torch.Tensor,  # [N] float64: the largest logits that ``sums`` are relative to
    temperature: float,
) -> torch.Tensor:
    """dL/dh over the rows of this weight, ``[N, D]``; zero in ignored rows."""
    targets = stats.targets
    assert targets is not None
    largest, r, target = stats.state[MAX], stats.state[R], stats.state[TARGET]
    scored = targets != checks.IGNORE_INDEX
    slope = (head.scale / temperature / (1 + r)).where(scored, 0)  # [N]
    shift = (local_max - largest).exp().where(scored, 0)
    local = targets - head.vocab_start
    here = (local >= 0) & (local < len(head.weight))
    of_target = (-r).where(targets == stats.max_index, (target - largest).exp() - (1 + r))
    if head.softcap is not None:
        of_target = of_target * (1 - (target * (temperature / head.softcap)).square())
    of_target = (of_target * slope).where(here, 0)
    sums *= (shift * slope)[:, None].to(sums.dtype)
    at_once = max(GATHERED_ELEMENTS // max(sums.shape[1], 1), 1)
    for begin in range(0, len(sums) if len(head.weight) else 0, at_once):
        part = slice(begin, begin + at_once)
        columns = head.weight[local[part].where(here[part], 0)].to(sums.dtype)
        sums[part].addcmul_(of_target[part, None].to(sums.dtype), columns)
    return sums.masked_fill_(~scored[:, None], 0)  # an ignored row's hidden state may be NaN


@standard_defaults()
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


@standard_defaults()
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
    """Exact Frobenius norm of each sample's gradient with respect to the head's weight, and bias if present.

    ``G = sum_t w_t delta_t h_t^T``, where ``delta_t`` is the gradient in the logits. Two forms give the same number.
    ``gram`` sums ``||G||^2 = sum_st w_s w_t <delta_s, delta_t> <h_s, h_t>`` in the pass over the weights that gives the
    statistics, and adds T / 2D to its one product with the head. ``direct`` forms G tile by tile in a second pass, and
    adds two such products for any sample length T.

    Args:
        hidden: ``[N, D]``, the concatenated scored tokens of B samples.
        head: the last layer.
        targets: ``[N]`` int64; -100 marks rows to ignore.
        offsets: ``[B + 1]`` int64, increasing from 0 to N: sample i is rows ``offsets[i]:offsets[i + 1]``. Offsets on
            the CPU save the host from waiting for the GPU.
        loss: ``mean`` over a sample's scored tokens, or ``sum``.
        token_weights: ``[N]`` floating point, factors of each token's loss; None means ones.
        temperature: divides the logits.
        backend: as in :func:`acqcore.row_stats`.
        form: ``gram``, ``direct``, or ``auto``, which chooses by the sample's length.

    Returns:
        ``[B]`` float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: as :func:`acqcore.row_stats`; offsets that do not increase or do not end at N; a sample
            without a scored token; an unknown loss or form.

    Source: ghost norms (Goodfellow 2015; Li et al. 2021, "Large language models can be strong differentially private
    learners"), cross-token terms included, in a form that needs no logits.
    """
    checks.given("targets", targets)
    checks.literal("loss", loss, Loss)
    checks.one_of("form", form, FORMS)
    temperature = checks.positive("temperature", temperature)
    chosen = checked_backend(hidden, head, targets, backend, "head_grad_norm")
    bounds = checks.offsets(offsets, targets)
    weights, counts = loss_weights(targets, bounds, loss, token_weights)
    check_scored = checks.scored_tokens(counts)
    norm = visit(hidden, head, targets, bounds, temperature, chosen, form).grad_norm(weights)
    check_scored()
    return norm


@standard_defaults()
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
    """A sketch of each sample's head gradient that preserves inner products: ``E <S_i, S_j> = <G_i, G_j>``.

    This is the tensor sketch of ``G = sum_t w_t delta_t h_t^T``: rows and columns are hashed to signs and places, and
    entry (v, d) goes to place ``(a_v + b_d) mod dim`` with sign ``s_v s_d``. Neither G nor the logits are formed: delta
    and h are hashed separately and convolved, ``sum_t ifft(fft(hash(delta_t)) fft(hash(h_t)))``. The standard deviation
    of ``<S_i, S_j>`` is about ``||G_i|| ||G_j|| sqrt(2 / dim)``; dense signs on both sides (64 x 64 for the same dim)
    have 8 times that, and ranked the influence of real text at Spearman 0.8 to 0.9. The hash depends only on (seed,
    row) and (seed, column): it is the same on every machine and backend. A bias is left out.

    Args:
        hidden, head, targets, offsets, loss, token_weights, temperature, backend: as in :func:`head_grad_norm`.
        dim: length of a sketch.
        seed: seed of the hash; sketches with different seeds cannot be compared.

    Returns:
        ``[B, dim]`` float32 (float64 for float64 inputs).

    Raises: as :func:`head_grad_norm`; ValueError for dim < 1.

    Source: tensor sketch (Pham & Pagh 2013, "Fast and scalable polynomial kernels via explicit feature maps").
    """
    checks.given("targets", targets)
    checks.literal("loss", loss, Loss)
    dim, seed = checks.positive_int("dim", dim), checks.seed(seed)
    temperature = checks.positive("temperature", temperature)
    chosen = checked_backend(hidden, head, targets, backend, "delta_hash")
    bounds = checks.offsets(offsets, targets)
    weights, counts = loss_weights(targets, bounds, loss, token_weights)
    check_scored = checks.scored_tokens(counts)
    if head.group is None and len(head.weight):
        sketches = delta_visit(hidden, head, targets, bounds, weights, temperature, chosen, sketch=(dim, seed))[2]
        assert sketches is not None
    else:  # ranks share the statistics
        stats = row_stats(hidden, head, targets, temperature=temperature, backend=backend)
        sketches = grad_sketch_from(hidden, head, stats, bounds, weights, temperature, backend, dim, seed)
    check_scored()
    return sketches


def loss_weights(
    targets: torch.Tensor,  # [N]
    bounds: Bounds,
    loss: str,
    token_weights: torch.Tensor | None = None,  # [N]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight of each token's gradient within its sample's, ``[N]`` float64, zero for ignored tokens; and the number of
    each sample's scored tokens, ``[B]`` int64."""
    scored = targets != checks.IGNORE_INDEX
    samples = sample_of_rows(bounds, targets.device)
    counts = samples.new_zeros(len(bounds)).index_add_(0, samples, scored.long())
    weights = scored.double()
    if token_weights is not None:
        checks.token_weights(token_weights, targets)
        weights = token_weights.double().where(scored, 0)  # an ignored token's may be NaN
    if loss == "mean":
        weights = weights / counts[samples]
    return weights, counts


def sample_of_rows(bounds: Bounds, device: torch.device) -> torch.Tensor:
    """Sample index of each row, ``[N]`` int64."""
    lengths = on_device(torch.tensor([end - begin for begin, end in bounds], dtype=torch.int64), device)
    n = bounds[-1][1] if bounds else 0  # given, lest the host wait for a GPU
    return torch.arange(len(bounds), device=device).repeat_interleave(lengths, output_size=n)


def hidden_grad_from(
    hidden: torch.Tensor,  # [N, D]
    head: Head,
    stats: RowStats,  # of these rows, over the whole vocabulary
    backend: str | None,
) -> torch.Tensor:
    """:func:`hidden_grad` from known statistics of unscaled logits, in a second pass, ``[N, D]``; arguments
    are trusted."""
    assert stats.targets is not None
    chosen = chosen_backend(hidden, head, backend, "hidden_grad")
    sums = torch.zeros(hidden.shape, dtype=compute_dtype(hidden.dtype, head.weight.dtype), device=hidden.device)
    state = stats.state.contiguous()
    if len(head.weight):  # a shard may be empty; backends never see an empty one
        chosen.fill_hidden_grad(HeadRows(hidden, head, stats.targets, 1.0, state, stats.max_index), sums)
    return summed(_normalised(sums, head, stats, state[MAX], 1.0), head.group)


def grad_sketch_from(
    hidden: torch.Tensor,  # [N, D]
    head: Head,
    stats: RowStats,
    bounds: Bounds,
    weights: torch.Tensor,  # [N] float64
    temperature: float,
    backend: str | None,
    dim: int,
    seed: int,
) -> torch.Tensor:
    """:func:`grad_sketch` from known statistics, ``[B, dim]``; arguments are trusted."""
    assert stats.targets is not None
    chosen = chosen_backend(hidden, head, backend, "delta_hash")
    rows = HeadRows(hidden, head, stats.targets, temperature, stats.state, stats.max_index)
    return _sketches(rows, True, None, None, bounds, weights, chosen, dim, seed)


def delta_visit(
    hidden: torch.Tensor,  # [N, D]
    head: Head,  # of the whole vocabulary
    targets: torch.Tensor,  # [N]
    bounds: Bounds,
    weights: torch.Tensor,  # [N] float64
    temperature: float,
    backend: Backend,
    *,
    norms: bool = False,
    with_hidden: bool = False,
    sketch: tuple[int, int] | None = None,  # dim and seed
) -> tuple[HeadVisit, torch.Tensor | None, torch.Tensor | None]:
    """Statistics of the rows with inputs for :func:`head_grad_norm`, :func:`hidden_grad` ``[N, D]`` and
    :func:`grad_sketch` ``[B, dim]``, as asked, in one pass over the weights on a CPU; arguments are trusted."""
    trusted = checks.targets_in_range(targets, head.vocab_size)
    assert trusted is not None
    weights = weights.where(trusted == targets, torch.nan)
    short, gram = empty_gram(hidden, head, bounds, backend) if norms else ((), None)
    dtype = compute_dtype(hidden.dtype, head.weight.dtype)
    values = hidden.new_empty(hidden.shape, dtype=dtype) if with_hidden else None
    rows = HeadRows(hidden, head, trusted, temperature, *empty_state(hidden))
    sketches = None
    if sketch is None:
        backend.delta_sums(rows, values, None, None, gram)
    else:
        sketches = _sketches(rows, False, values, gram, bounds, weights, backend, *sketch)
    stats, largest = stats_of(rows, targets), rows.state[MAX]
    if values is not None:
        values = _normalised(values, head, stats, largest, temperature)
    return HeadVisit(hidden, head, temperature, backend, stats, bounds, short, gram, largest), values, sketches


def _sketches(
    rows: HeadRows,
    known: bool,  # whether their state is filled; otherwise it, ``values`` and ``gram`` are written
    values: torch.Tensor | None,  # [N, D] of ``Backend.delta_sums``
    gram: Gram | None,
    bounds: Bounds,
    weights: torch.Tensor,  # [N] float64
    chosen: Backend,
    dim: int,
    seed: int,
) -> torch.Tensor:
    """``[B, dim]``."""
    hidden, head, targets = rows.hidden, rows.head, rows.targets
    assert targets is not None
    dtype = compute_dtype(hidden.dtype, head.weight.dtype)
    of_rows, of_columns = head_places(head, dim, seed)
    if not bounds:  # torch cannot transform an empty batch
        return hidden.new_empty((0, dim), dtype=dtype)
    sketches = hidden.new_zeros((len(bounds), dim // 2 + 1, 2), dtype=dtype)  # spectra, real and imaginary part
    uncut = frozenset() if gram is None else frozenset(gram.bounds)
    for begin, end in _parts(bounds, uncut) if len(head.weight) else ():
        part = slice(begin, end)
        state, index = rows.state[:, part].contiguous(), rows.index[part]
        own = replace(rows, hidden=hidden[part], targets=targets[part], state=state, index=index)
        left = hidden.new_empty((end - begin, dim), dtype=dtype)
        if known:
            chosen.delta_hash(own, of_rows, left)
        else:
            of_part = None if gram is None else gram.within(begin, end)
            chosen.delta_sums(own, None if values is None else values[part], of_rows, left, of_part)
            rows.state[:, part] = state
        left *= weights[part, None].to(dtype)
        spectrum = torch.fft.rfft(left)
        del left  # holds at most 64 MiB at a time
        ignored = targets[part, None] == checks.IGNORE_INDEX  # the hidden state may be NaN
        _multiply(spectrum, torch.fft.rfft(of_columns(own.hidden.masked_fill(ignored, 0), dtype)))
        first, lengths = _within(bounds, begin, end)
        add_segments(sketches[first : first + len(lengths)], lengths, torch.view_as_real(spectrum))
        del spectrum
    return summed(torch.fft.irfft(torch.view_as_complex(sketches), n=dim), head.group)


def _parts(bounds: Bounds, uncut: Collection[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges of at most ``SKETCH_ROWS`` rows; a longer sample is a range if it is among ``uncut``, else several.

    How a sample is cut does not depend on the others.
    """
    begin = 0
    for sample in bounds:
        first, last = sample
        if last - begin > SKETCH_ROWS and first > begin:
            yield begin, first
            begin = first
        while last - begin > SKETCH_ROWS and sample not in uncut:
            yield begin, begin + SKETCH_ROWS
            begin += SKETCH_ROWS
    if bounds[-1][1] > begin:
        yield begin, bounds[-1][1]


def _multiply(
    a: torch.Tensor,  # complex [N, n], overwritten
    b: torch.Tensor,  # complex [N, n]
) -> None:
    """``a *= b`` in real arithmetic: torch rounds a complex product by its place in the tensor, and takes longer."""
    real, imaginary = a.real, a.imag
    crossed = real * b.imag
    crossed += imaginary * b.real
    real *= b.real
    real -= imaginary * b.imag
    imaginary.copy_(crossed)


def _within(bounds: Bounds, begin: int, end: int) -> tuple[int, list[int]]:
    """The first sample with rows in ``[begin, end)``, and how many each has from there on."""
    first = bisect_right(bounds, begin, key=itemgetter(1))
    after = bisect_left(bounds, end, key=itemgetter(0))
    return first, [min(last, end) - max(start, begin) for start, last in bounds[first:after]]


def head_places(head: Head, dim: int, seed: int) -> tuple[torch.Tensor, ColumnHash]:
    """Hashed places of the rows of a head's weight, ``[V]`` int32 encoded as in ``signs.py``, and a hash of its D
    columns."""
    v, d = head.weight.shape
    device = head.weight.device
    return _row_places(v, dim, seed, head.vocab_start, device), column_hash(d, dim, seed, 1, device)


@kept(KEPT_PLACES)
def _row_places(rows: int, dim: int, seed: int, first_row: int, device: torch.device) -> torch.Tensor:
    return rotated_places(rows, dim, seed, 0, first_row, device)
