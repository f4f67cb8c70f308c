"""What a backend is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from acqcore.head import Head


@dataclass(frozen=True, eq=False)
class HeadRows:
    """N rows under a head, and their state: written by ``row_stats``, read by what follows from it."""

    hidden: torch.Tensor  # [N, D]
    head: Head
    targets: torch.Tensor | None  # [N] int64, -100 ignored; None only in row_stats
    temperature: float
    state: torch.Tensor  # [7, N] float64, contiguous
    index: torch.Tensor  # [N] int64


@dataclass(frozen=True, eq=False)
class Dropout:
    """Inverted dropout that makes draws of hidden states; masks as in ``philox.py``, found again where needed."""

    p: float
    form: str  # "element": columns drop alone; "block": in groups of ``block``, the last may be short
    block: int
    seed: int
    samples: torch.Tensor  # [N] int64: what tells the samples' masks apart
    positions: torch.Tensor  # [N] int64: of each row in its sample

    @property
    def width(self) -> int:
        """Columns that drop together."""
        return self.block if self.form == "block" else 1


@dataclass(frozen=True, eq=False)
class DrawRows:
    """K draws of N rows under a head each or one for all, and their statistics, written by ``mixture_stats``."""

    hidden: torch.Tensor  # [N, D] where dropout makes the draws, else [K, N, D]
    heads: tuple[Head, ...]  # one, or K over one vocabulary, alike in softcap and scale
    targets: torch.Tensor | None  # [N] int64, -100 ignored
    draws: int
    dropout: Dropout | None
    state: torch.Tensor  # [6, N] float64, contiguous
    votes: torch.Tensor  # [K, N] int64, contiguous


class Backend(ABC):
    """One way of filling the row state. Adapters only: the arithmetic is in kernels, csrc or plain torch."""

    name: ClassVar[str]
    description: ClassVar[str]
    automatic: ClassVar[bool] = True  #: may be chosen without being named
    devices: ClassVar[tuple[str, ...]] = ()  #: device types it serves; empty means all
    dtypes: ClassVar[tuple[torch.dtype, ...]]

    def unavailable(self) -> str | None:
        """Why it cannot run here, or None if it can."""
        return None

    def instruction_set(self) -> str | None:
        """The instruction set in use, where the backend has several."""
        return None

    def misfit(self, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
        """Why it does not serve tensors of this device and these dtypes, or None if it does."""
        if self.devices and device.type not in self.devices:
            return f"backend {self.name!r} serves {', '.join(self.devices)} tensors, got {device.type}"
        for dtype in dtypes:
            if dtype not in self.dtypes:
                known = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
                return f"backend {self.name!r} takes {known}, got {str(dtype).removeprefix('torch.')}"
        return None

    @abstractmethod
    def row_stats(
        self,
        rows: HeadRows,
    ) -> None:
        """Fill the state of ``row_stats.RowStats`` in place. A row with target -100: NaN state and index -1."""

    @abstractmethod
    def logit_stats(
        self,
        logits: torch.Tensor,  # [N, V]
        targets: torch.Tensor | None,  # [N]
        temperature: float,
        state: torch.Tensor,  # [7, N] float64, written
        index: torch.Tensor,  # [N] int64, written
    ) -> None:
        """The same from logits."""

    @abstractmethod
    def delta_product(
        self,
        rows: HeadRows,
        values: torch.Tensor,  # [V, n]
        out: torch.Tensor,  # [N, n], written
    ) -> None:
        """``delta values`` with delta as in ``head_grad.py``; zero in rows with target -100."""

    @abstractmethod
    def delta_hash(
        self,
        rows: HeadRows,
        places: torch.Tensor,  # [V] int32: a place in [0, n), or its complement ~place for a minus sign
        out: torch.Tensor,  # [N, n], written
    ) -> None:
        """Signed sums of delta's columns that share a place; zero in rows with target -100."""

    @abstractmethod
    def head_grad_norm(
        self,
        rows: HeadRows,
        offsets: torch.Tensor,  # [B + 1] int64
        weights: torch.Tensor,  # [N] float64, zero where the target is -100
        form: str,  # "auto", "gram" or "direct"
        squared: torch.Tensor,  # [B] float64, written
    ) -> None:
        """Squared norm of each sample's head gradient, the bias's included where there is one."""

    @abstractmethod
    def dropout_mask(
        self,
        dropout: Dropout,
        site: int,
        keep: torch.Tensor,  # [K, N, units] bool, contiguous, written; units are columns, or blocks of them
    ) -> None:
        """The masks of ``philox.keep_mask`` for every draw; those of site 0 are what ``mixture_stats`` applies."""

    @abstractmethod
    def mixture_stats(
        self,
        rows: DrawRows,
    ) -> None:
        """Fill the state and votes of ``bayes.BayesStats``. A row with target -100: NaN state and votes of -1."""
