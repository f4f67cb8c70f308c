"""The interface of a backend."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from acqcore.head import Head

#: Rows of the state in :class:`HeadRows` and :class:`LogitRows`.
MAX, SECOND, R, S1, S2, S11, TARGET = range(7)


@dataclass(frozen=True, eq=False)
class HeadRows:
    """N rows under a head, and their state, which ``row_stats`` writes and later operations read."""

    hidden: torch.Tensor  # [N, D]
    head: Head
    targets: torch.Tensor | None  # [N] int64, -100 ignored; None only in row_stats
    temperature: float
    state: torch.Tensor  # [7, N] float64, contiguous
    index: torch.Tensor  # [N] int64


@dataclass(frozen=True, eq=False)
class LogitRows:
    """N rows of logits, and their state as in :class:`HeadRows`."""

    logits: torch.Tensor  # [N, V]
    targets: torch.Tensor | None  # [N] int64, -100 ignored
    temperature: float
    state: torch.Tensor  # [7, N] float64, contiguous, written
    index: torch.Tensor  # [N] int64, written


@dataclass(frozen=True, eq=False)
class Gram:
    """Gram matrices of unnormalised probabilities, one per sample, accumulated beside the row state.

    ``products[s, t] = sum_v f_s[v] f_t[v]`` over the columns v of this weight that are not the target of any row of the
    sample, with ``f_s[v] = exp(z_s[v] - m_s) cap'_s[v]``:

    - ``m_s`` is the row's largest logit over this weight, ``state[MAX]`` after this pass.
    - ``cap'_s[v] = 1 - (z_s[v] temperature / softcap)^2`` is the derivative of the softcap, 1 without one. The constant
      ``scale / temperature`` is left out.

    Rows with target -100, and rows whose logits over this weight are all -inf, hold zeros. Rows with NaN are undefined.
    """

    bounds: tuple[tuple[int, int], ...]  # [begin, end) rows of each covered sample, on the host
    starts: tuple[int, ...]  # first element of each sample's matrix in ``products``
    products: torch.Tensor  # [sum T_i^2] float32, float64 on eager in float64: T_i x T_i, row-major, sample by sample

    @classmethod
    def empty(cls, bounds: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device) -> Gram:
        """Uninitialised matrices of these samples."""
        starts = matrix_starts(bounds)
        return cls(bounds, starts[:-1], torch.empty(starts[-1], dtype=dtype, device=device))

    def within(self, begin: int, end: int) -> Gram | None:
        """The samples among rows [begin, end), which are counted from ``begin``; None without any."""
        own = [i for i, (first, last) in enumerate(self.bounds) if begin <= first and last <= end]
        if not own:
            return None
        bounds = tuple((self.bounds[i][0] - begin, self.bounds[i][1] - begin) for i in own)
        starts = matrix_starts(bounds)
        first = self.starts[own[0]]
        return Gram(bounds, starts[:-1], self.products[first : first + starts[-1]])

    def split(self, longest: int) -> tuple[Gram, Gram]:
        """The samples of at most ``longest`` rows, and the others."""

        def some(short: bool) -> Gram:
            own = [i for i, (begin, end) in enumerate(self.bounds) if (end - begin <= longest) == short]
            return Gram(tuple(self.bounds[i] for i in own), tuple(self.starts[i] for i in own), self.products)

        return some(True), some(False)


def matrix_starts(bounds: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    """First element of each sample's matrix in a Gram, then the total number of elements."""
    return tuple(itertools.accumulate(((end - begin) ** 2 for begin, end in bounds), initial=0))


@dataclass(frozen=True, eq=False)
class Dropout:
    """Inverted dropout that draws hidden states; masks follow ``philox.py`` and are recomputed where needed."""

    p: float
    form: str  # "element": columns drop independently; "block": in groups of ``block``, the last may be shorter
    block: int
    seed: int
    samples: torch.Tensor  # [N] int64: per-sample mask key
    positions: torch.Tensor  # [N] int64: of each row in its sample

    @property
    def width(self) -> int:
        """Columns that drop together."""
        return self.block if self.form == "block" else 1

    def of_head(self, head: Head) -> Head:
        """The head that gives a draw's logits from hidden states whose dropped columns are 0.

        Its scale is divided by ``1 - p`` instead of the kept columns, which would round half-precision states.
        """
        bias = None if head.bias is None else head.bias.double() * (1 - self.p)
        return replace(head, bias=bias, scale=head.scale / (1 - self.p))


@dataclass(frozen=True, eq=False)
class DrawRows:
    """K draws of N rows under one head per draw or one for all, and the statistics that ``mixture_stats`` writes."""

    hidden: torch.Tensor  # [N, D] if dropout makes the draws, else [K, N, D]
    heads: tuple[Head, ...]  # one, or K with the same vocabulary, softcap and scale
    targets: torch.Tensor | None  # [N] int64, -100 ignored
    draws: int
    dropout: Dropout | None
    state: torch.Tensor  # [6, N] float64, contiguous
    votes: torch.Tensor  # [K, N] int64, contiguous


@dataclass(frozen=True, eq=False)
class Probes:
    """P random cotangents of each row's logits, as in ``acqcore.fisher``, with signs from ``philox.signs``."""

    count: int
    seed: int
    samples: torch.Tensor  # [N] int64: per-sample key
    positions: torch.Tensor  # [N] int64: of each row in its sample


@dataclass(frozen=True, eq=False)
class FisherSums:
    """The sums from which random cotangents of N rows are built; ``Backend.fisher_sums`` writes them."""

    sums: torch.Tensor  # [P + 1, N, D] float32 (float64 on eager in float64), contiguous
    signed: torch.Tensor  # [P, N] float64, contiguous
    squares: torch.Tensor  # [N] float64

    def of_rows(self, part: slice) -> FisherSums:
        """Views of some of the rows."""
        return FisherSums(self.sums[:, part], self.signed[:, part], self.squares[part])

    def clear(self) -> None:
        for written in (self.sums, self.signed, self.squares):
            written.zero_()


class Backend(ABC):
    """One way to fill the row state. Subclasses are adapters: the arithmetic is in kernels, csrc or plain torch."""

    name: ClassVar[str]
    description: ClassVar[str]
    automatic: ClassVar[bool] = True  #: may be chosen without being named
    devices: ClassVar[tuple[str, ...]] = ()  #: supported device types; empty means all
    dtypes: ClassVar[tuple[torch.dtype, ...]]

    def unavailable(self) -> str | None:
        """Why it cannot run here, or None if it can."""
        return None

    def instruction_set(self) -> str | None:
        """The instruction set in use, where the backend has several."""
        return None

    def misfit(self, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
        """Why it does not support tensors of this device and these dtypes, or None if it does."""
        if self.devices and device.type not in self.devices:
            return f"backend {self.name!r} supports {', '.join(self.devices)} tensors, got {device.type}"
        for dtype in dtypes:
            if dtype not in self.dtypes:
                known = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
                return f"backend {self.name!r} supports {known}, got {str(dtype).removeprefix('torch.')}"
        return None

    @abstractmethod
    def longest_gram(self, depth: int, dtype: torch.dtype) -> int:
        """Rows of the longest sample whose Gram matrix is cheaper than ``head_grad_norm`` for D = ``depth`` and inputs
        of ``dtype``."""

    @abstractmethod
    def row_stats(self, rows: HeadRows, gram: Gram | None = None) -> None:
        """Fill the state of ``row_stats.RowStats`` in place, and ``gram`` in the same pass over the weights.

        Rows with target -100 get a NaN state and index -1. Without a Gram, targets may be None.
        """

    @abstractmethod
    def logit_stats(self, rows: LogitRows) -> None:
        """``row_stats`` from logits."""

    @abstractmethod
    def delta_hash(
        self,
        rows: HeadRows,
        places: torch.Tensor,  # [V] int32: a place in [0, n), or its complement ~place for a minus sign
        out: torch.Tensor,  # [N, n], written
    ) -> None:
        """Signed sums of delta's columns that share a place; zero in rows with target -100.

        Places come from ``signs.rotated_places`` for the rows of this weight.
        """

    @abstractmethod
    def gram_norm(
        self,
        rows: HeadRows,
        gram: Gram,
        local_max: torch.Tensor,  # [N] float64: state[MAX] when the Gram was formed
        weights: torch.Tensor,  # [N] float64, zero where the target is -100
        squared: torch.Tensor,  # [len(gram.bounds)] float64, written
    ) -> None:
        """Squared norm of the head gradient of each sample of ``gram``, from the state of the whole vocabulary.

        ``sum_st w_s w_t (<h_s, h_t> + 1 with a bias) (c_s c_t products_st + sum_u delta_s[u] delta_t[u])`` with
        ``c = exp(local_max - state[MAX]) (scale / temperature) / Z`` and u over the sample's distinct targets that are
        rows of this weight. ``delta`` is exact: ``-R / Z`` times its slope where the target is the largest logit. A
        shard gives its share of the sum; the ranks' shares add up.
        """

    @abstractmethod
    def head_grad_norm(
        self,
        rows: HeadRows,
        bounds: tuple[tuple[int, int], ...],  # [begin, end) rows of each sample
        weights: torch.Tensor,  # [N] float64, zero where the target is -100
        squared: torch.Tensor,  # [len(bounds)] float64, written
    ) -> None:
        """Like ``gram_norm`` for samples of any length, from delta formed in a second pass over the weights."""

    def delta_sums(
        self,
        rows: HeadRows,
        values: torch.Tensor | None = None,  # [N, D] float32 (float64 on eager in float64), written
        places: torch.Tensor | None = None,  # [V] int32, as in ``delta_hash``
        hashed: torch.Tensor | None = None,  # [N, n], written, with places
        gram: Gram | None = None,
    ) -> None:
        """Fill the state and ``gram`` as ``row_stats`` does, and ``values`` and ``hashed`` if given, in one pass over
        the weights if a kernel can.

        ``values_s = sum_v exp(z_s[v] - m_s) cap'_s[v] W_v`` over the columns of this weight except the row's target,
        with ``m_s`` and ``cap'`` as in :class:`Gram`; zero where rows of a Gram are zero. ``head_grad.hidden_grad``
        turns it into dL/dh: it normalises and adds the target's column exactly. ``hashed`` is that of ``delta_hash``
        and requires the whole vocabulary.
        """
        self.row_stats(rows, gram)
        if values is not None:
            self.fill_hidden_grad(rows, values)
        if hashed is not None:
            assert places is not None
            self.delta_hash(rows, places, hashed)

    @abstractmethod
    def fill_hidden_grad(
        self,
        rows: HeadRows,  # their state filled, for the whole vocabulary
        out: torch.Tensor,  # [N, D], written
    ) -> None:
        """``values`` of ``delta_sums`` with ``m = state[MAX]``, in a separate pass."""

    @abstractmethod
    def fisher_sums(self, rows: HeadRows, probes: Probes, out: FisherSums) -> None:
        """Fill the state as ``row_stats`` does and, in the same pass, the sums from which random cotangents are built.

        With e the unnormalised probabilities ``exp(z - state[MAX])``, zero in the column of the largest logit, cap' as
        in :class:`Gram` and r the signs of probe k:

        - ``sums[0] = sum_v e_v cap'_v W_v``, ``squares = sum_v e_v cap'_v^2 ||W_v||^2``;
        - ``sums[1 + k] = sum_v sqrt(e_v) r_v cap'_v W_v``, ``signed[k] = sum_v sqrt(e_v) r_v``.

        All are zero in rows with target -100. ``acqcore.fisher`` turns them into dL/dh.
        """

    @abstractmethod
    def dropout_mask(
        self,
        dropout: Dropout,
        site: int,
        keep: torch.Tensor,  # [K, N, units] bool, contiguous, written; units are columns, or blocks of them
    ) -> None:
        """The masks of ``philox.keep_mask`` for every draw; ``mixture_stats`` applies those of site 0."""

    @abstractmethod
    def mixture_stats(self, rows: DrawRows) -> None:
        """Fill the state and votes of ``bayes.BayesStats``; rows with target -100 get a NaN state and votes of -1."""

    def stats_and_mixture(self, rows: HeadRows, draws: DrawRows, gram: Gram | None = None) -> None:
        """``row_stats`` and ``mixture_stats`` of the same rows, without and with dropout, in one operation if a kernel
        can."""
        self.row_stats(rows, gram)
        self.mixture_stats(draws)
