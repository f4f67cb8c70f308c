"""Measures of each sample's gradient, accumulated piece by piece: its squared norm, or a sketch of it.

A backward pass yields the gradient of one parameter at a time, in its cheapest form:

    OuterGrad  ``G = sum_t left_t right_t^T``        linear layers: output gradients and inputs
    RowGrad    ``G = sum_t e_{ids_t} values_t^T``    embeddings
    DenseGrad  the gradient itself                   biases, normalisation layers, anything small or left to autograd

The head's gradient comes as a :class:`HeadPass`, which never forms it either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from acqcore import checks
from acqcore.backends.scatter import add_at
from acqcore.defaults import float32_products
from acqcore.gradients.head_pass import HeadPass
from acqcore.head import compute_dtype
from acqcore.head_grad import head_places
from acqcore.kept import kept
from acqcore.signs import ColumnHash, column_hash, hashed_places, random_signs

#: Most elements of per-sample weight gradients that the direct form holds at a time (64 MiB in float32).
CHUNK_ELEMENTS = 1 << 24

#: Rows and columns to which a matrix is projected before its entries are hashed. With 64 (no hashing needed at dim
#: 4096), influence on real text ranked at Spearman 0.85 to 0.95; 256 has a quarter of that variance.
WIDTH = 256

#: Most entries of the embedding's hashed rows held at a time (16 MiB in float32).
HASHED_ELEMENTS = 1 << 22

#: Hashes of embeddings' rows that stay on a device.
KEPT_EMBEDDINGS = 8


@dataclass(frozen=True, eq=False)
class OuterGrad:
    left: torch.Tensor  # [B, T, P], possibly in half precision
    right: torch.Tensor  # [B, T, Q], likewise


@dataclass(frozen=True, eq=False)
class RowGrad:
    ids: torch.Tensor  # [B, T] int64
    values: torch.Tensor  # [B, T, Q]
    size: int  # upper bound of ids, exclusive


@dataclass(frozen=True, eq=False)
class DenseGrad:
    values: torch.Tensor  # [B, P]; [B, P, Q] of a linear layer's weight, by outputs and inputs


GradPiece: TypeAlias = OuterGrad | RowGrad | DenseGrad


def merged(pieces: Sequence[GradPiece]) -> GradPiece | None:
    """The gradient of a parameter with several uses; None if their pieces have different types."""
    if len(pieces) == 1:
        return pieces[0]
    outer = [piece for piece in pieces if isinstance(piece, OuterGrad)]
    rows = [piece for piece in pieces if isinstance(piece, RowGrad)]
    entries = [piece for piece in pieces if isinstance(piece, DenseGrad)]
    if len(outer) == len(pieces):  # a sum over the tokens of all uses
        return OuterGrad(torch.cat([p.left for p in outer], 1), torch.cat([p.right for p in outer], 1))
    if len(rows) == len(pieces):
        return RowGrad(torch.cat([p.ids for p in rows], 1), torch.cat([p.values for p in rows], 1), rows[0].size)
    if len(entries) == len(pieces):
        return DenseGrad(torch.stack([p.values for p in entries]).sum(0))
    return None


def of_sample(piece: GradPiece, sample: int, shape: torch.Size, transposed: bool) -> torch.Tensor:
    """One sample's gradient in the parameter's ``shape``; a linear layer's weight is ``transposed`` if its rows are
    inputs."""
    if isinstance(piece, OuterGrad):
        dtype = compute_dtype(piece.left.dtype)
        gradient = piece.left[sample].T.to(dtype) @ piece.right[sample].to(dtype)
        return gradient.T if transposed else gradient
    if isinstance(piece, RowGrad):
        values = piece.values[sample]
        return values.new_zeros(shape).index_add_(0, piece.ids[sample], values)
    return piece.values[sample].reshape(shape)


def scaled(
    piece: RowGrad | DenseGrad,
    factor: torch.Tensor | None,  # [B]
) -> RowGrad | DenseGrad:
    """Each sample's gradient times its factor."""
    if factor is None:
        return piece
    if isinstance(piece, RowGrad):
        return RowGrad(piece.ids, piece.values * factor.to(piece.values)[:, None, None], piece.size)
    return DenseGrad(piece.values * factor.to(piece.values).view(-1, *[1] * (piece.values.dim() - 1)))


class SquaredNorm:
    """Squared Frobenius norm of each sample's gradient, ``values [B]`` float64: the sum of ghost norms.

    A small student's backward is launch-bound on a GPU, so squares are only collected as they arrive.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self._squares = [torch.zeros(batch, dtype=torch.float64, device=device)]  # [B] each
        self._scaled: list[torch.Tensor] = []  # [B] each, of gradients still to be multiplied by ``_factor``
        self._factor: torch.Tensor | None = None  # [B], of the backward that gave these pieces

    def add(self, name: str, piece: GradPiece, factor: torch.Tensor | None) -> None:
        if isinstance(piece, OuterGrad):
            squared = _outer_squared(piece)
        elif isinstance(piece, RowGrad):
            keys, sums = _row_sums(piece)
            squared = torch.zeros(len(piece.ids), dtype=torch.float64, device=sums.device)
            add_at(squared, 0, keys // piece.size, sums.double().square().sum(1))
        else:
            squared = piece.values.flatten(1).double().square().sum(1)
        (self._squares if factor is None else self._scaled).append(squared.to(self._squares[0].device))
        self._factor = self._factor if factor is None else factor

    def add_head(self, head: HeadPass) -> None:
        self._squares.append(head.squared_norm())

    def add_tied(self, head: HeadPass, name: str, rows: RowGrad) -> None:
        """Add a weight shared by head and embedding: both squared norms plus twice the inner product."""
        self.add_head(head)
        self.add(name, rows, None)
        self._squares.append(2 * head.row_products(rows.ids, rows.values))

    @property
    def values(self) -> torch.Tensor:
        values = torch.stack(self._squares).sum(0)
        if self._factor is not None:
            values += torch.stack(self._scaled).sum(0) * self._factor.to(values).square()
        return values


class WeightedNorm(SquaredNorm):
    """The squared norm of linear weights' gradients, each squared entry multiplied by its (rank-one) variance."""

    def __init__(
        self, batch: int, device: torch.device, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        super().__init__(batch, device)
        self._variances = factors

    def add(self, name: str, piece: GradPiece, factor: torch.Tensor | None) -> None:
        assert not isinstance(piece, RowGrad)
        given = piece.left if isinstance(piece, OuterGrad) else piece.values
        rows, columns = (f.to(given.device, compute_dtype(given.dtype)).sqrt() for f in self._variances[name])
        if isinstance(piece, OuterGrad):
            piece = OuterGrad(piece.left * rows, piece.right * columns)
        else:
            piece = DenseGrad(piece.values * rows[:, None] * columns)
        super().add(name, piece, factor)


class Marginals:
    """Sums of each weight's squared gradient over inputs and over outputs, ``found``: name -> ``[P]``, ``[Q]`` float64.

    They accumulate over samples, each divided by its number of scored tokens.
    """

    def __init__(self, head: HeadPass, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._tokens = torch.tensor(head.counts, dtype=torch.float64)
        self.found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def takes(self, name: str) -> bool:
        return name in self._names

    @float32_products()
    def add(self, name: str, piece: GradPiece, factor: torch.Tensor | None) -> None:
        assert not isinstance(piece, RowGrad)
        if isinstance(piece, OuterGrad):
            left, right = (x.to(compute_dtype(x.dtype)) for x in (piece.left, piece.right))
            # Row i of G = left^T right has the squared norm (left^T (right right^T) left)_ii, so G need not be formed.
            of_rows = (right @ right.mT @ left * left).sum(dim=1).double()
            of_columns = (left @ left.mT @ right * right).sum(dim=1).double()
        else:
            squares = piece.values.double().square()
            of_rows, of_columns = squares.sum(dim=2), squares.sum(dim=1)
        inverse = self._tokens.to(of_rows.device).reciprocal()
        if factor is not None:
            inverse = inverse * factor.to(inverse).square()
        sums = tuple((inverse @ values).cpu() for values in (of_rows, of_columns))
        before = self.found.get(name)
        self.found[name] = (sums[0], sums[1]) if before is None else (before[0] + sums[0], before[1] + sums[1])


class Sketch:
    """A sketch of each sample's gradient, ``values [B, dim]``: the sum of the parameters' sketches.

    Parameters have independent signs, so inner products within a parameter add up and those between parameters vanish
    in expectation. The head and embeddings are sketched as in ``head_grad.grad_sketch``. Other matrices are projected
    to at most WIDTH rows and columns with dense signs. Their entries, like those of small parameters, are then hashed
    to one place each (Weinberger et al. 2009, "Feature hashing"), which costs less than two Fourier transforms per
    token and layer. Hashes depend on the parameter's name.
    """

    def __init__(self, batch: int, device: torch.device, dim: int, seed: int) -> None:
        self.values = torch.zeros(batch, dim, dtype=torch.float64, device=device)
        self.dim = dim
        self.seed = seed

    def add(self, name: str, piece: GradPiece, factor: torch.Tensor | None) -> None:
        stream = _stream(name)
        if isinstance(piece, OuterGrad):
            left = self._projected(piece.left, stream)  # [B, T, a]
            right = self._projected(piece.right, stream + 1)  # [B, T, b]
            entries = _product(left.mT, right).flatten(1)
            self._add_entries(entries if factor is None else entries * factor.to(entries)[:, None], stream + 2)
            return
        piece = scaled(piece, factor)
        if isinstance(piece, RowGrad):
            device, width = piece.ids.device, piece.values.shape[2]
            of_rows = _row_places(piece.size, self.dim, self.seed, stream, device)
            self._add_rows(piece, of_rows, column_hash(width, self.dim, self.seed, stream + 1, device))
        elif piece.values.dim() == 3:  # the same sketch as of its outer products
            of_columns = self._projected(piece.values, stream + 1)  # [B, P, b]
            self._add_entries(self._projected(of_columns.mT, stream).mT.flatten(1), stream + 2)
        else:
            self._add_entries(piece.values, stream + 2)

    def add_head(self, head: HeadPass) -> None:
        self.values += head.sketch(self.dim, self.seed)

    def add_tied(self, head: HeadPass, name: str, rows: RowGrad) -> None:
        """Add a weight shared by head and embedding: the sketch of the sum, under the head's hash."""
        self.add_head(head)
        of_rows, of_columns = head_places(head.head, self.dim, self.seed)
        self._add_rows(rows, of_rows, of_columns)

    def _projected(
        self,
        values: torch.Tensor,  # [B, T, P]
        stream: int,
    ) -> torch.Tensor:
        """``[B, T, min(P, WIDTH)]``, preserving inner products in expectation; small P is returned unchanged."""
        if values.shape[2] <= WIDTH:
            return values
        signs = random_signs(values.shape[2], WIDTH, self.seed, stream, device=values.device, dtype=values.dtype)
        flat = _product(values.flatten(0, 1)[None], signs[None])[0]
        return flat.mul_(WIDTH**-0.5).unflatten(0, values.shape[:2])

    def _add_rows(
        self,
        rows: RowGrad,
        of_rows: torch.Tensor,  # [size] int32, hashed places
        of_columns: ColumnHash,  # of Q columns
    ) -> None:
        """Add entry (v, d) at place (of_rows[v] + of_columns[d]) mod dim: a row's hash, rotated by its place."""
        of_rows = of_rows.to(rows.ids.device)
        places = torch.arange(self.dim, device=rows.ids.device)
        batch, length = rows.ids.shape
        tokens = min(length, max(HASHED_ELEMENTS // self.dim, 1))
        samples = max(HASHED_ELEMENTS // (self.dim * tokens), 1)
        for b in range(0, batch, samples):
            for t in range(0, length, tokens):
                part = slice(b, b + samples), slice(t, t + tokens)
                row = of_rows[rows.ids[part]]  # [b, t]
                values = rows.values[part]
                hashed = of_columns(values.flatten(0, 1), values.dtype).unflatten(0, row.shape)  # [b, t, dim]
                turn = torch.where(row < 0, ~row, row)
                at = places - turn[:, :, None]
                turned = hashed.gather(2, at.where(at >= 0, at + self.dim))
                self.values[part[0]] += turned.where(row[:, :, None] >= 0, -turned).sum(1).to(self.values)

    def _add_entries(
        self,
        values: torch.Tensor,  # [B, P]
        stream: int,
    ) -> None:
        hashed = column_hash(values.shape[1], self.dim, self.seed, stream, values.device)(values, values.dtype)
        self.values += hashed.to(self.values.device)


class SiteSquares:
    """``sum_s p_s / (1 - p_s) sum_i (o_i g_i)^2`` over activations o and their gradients g, ``values [B]`` float64.

    Inverted dropout with probability p multiplies an activation by noise of variance ``p / (1 - p)``.
    A site costs three GPU launches, which matters because a small student's backward is launch-bound.
    """

    def __init__(
        self,
        head: HeadPass,
        sites: Mapping[nn.Module, float],
        first: torch.Tensor | None,  # [B] int64, each sample's first token that counts; None if all do
        length: int,  # tokens that have a gradient
    ) -> None:
        self._head = head
        self._sites = sites
        self._first = first
        self._length = length
        self._norms: dict[float, list[torch.Tensor]] = {}  # p -> norms of o g per site, [B, T]
        self._factor: torch.Tensor | None = None  # [B]
        self._of_rows = torch.zeros(len(head.bounds), dtype=torch.float64, device=head.hidden.device)

    def add_site(
        self,
        module: nn.Module,
        value: torch.Tensor,  # [B, ..., T, D] (attention weights: heads before tokens), [B, T, ...] or [B * T, ...]
        gradient: torch.Tensor,  # same shape
        factor: torch.Tensor | None,  # [B], by which each sample's gradient is still to be multiplied
    ) -> None:
        if module not in self._sites:
            return
        # In bfloat16 the products of SmolLM2's few massive activations moved a sample's value by 5e-4.
        value = value.to(compute_dtype(value.dtype))
        terms, batch = value * gradient, len(self._of_rows)
        if terms.dim() == 2 or terms.shape[0] != batch:  # [B * T, ...]
            terms = terms.reshape(batch, -1, *terms.shape[1:])
        if self._first is not None:
            terms = terms.movedim(self._token_dim(terms), 1)
        norms = torch.linalg.vector_norm(terms.flatten(2), dim=2)  # [B, T]
        self._norms.setdefault(self._sites[module], []).append(norms.to(self._of_rows.device))
        self._factor = factor

    def _token_dim(self, terms: torch.Tensor) -> int:
        for dim in (terms.dim() - 2, 1):
            if terms.shape[dim] == self._length:
                return dim
        raise ValueError(
            f"positions: 'completion' needs dropout on [B, T, D] or [B, H, T, T] with T = {self._length}, "
            f"got {checks.describe(terms)}"
        )

    @property
    def values(self) -> torch.Tensor:
        values = self._of_rows.clone()
        for p, norms in self._norms.items():
            squares = torch.cat(norms, dim=1).double().square_()  # [B, tokens of all sites]
            if self._first is not None:
                places = torch.cat([torch.arange(of_site.shape[1]) for of_site in norms]).to(values.device)
                squares.masked_fill_(places < self._first.to(places.device)[:, None], 0)
            scale = 1 if self._factor is None else self._factor.to(values).square()
            values += p / (1 - p) * scale * squares.sum(dim=1)
        return values

    def add_rows(
        self,
        hidden: torch.Tensor,  # [N, D]
        gradient: torch.Tensor,  # [N, D]
        p: float,
    ) -> None:
        """Add dropout on the last hidden state of the scored tokens."""
        terms = (hidden.to(gradient.dtype) * gradient).square_().sum(1, dtype=torch.float64)
        lengths = torch.tensor(self._head.counts, device=terms.device)
        self._of_rows += p / (1 - p) * torch.segment_reduce(terms, "sum", lengths=lengths)


Measure: TypeAlias = SquaredNorm | Sketch


@kept(KEPT_EMBEDDINGS)
def _row_places(size: int, dim: int, seed: int, stream: int, device: torch.device) -> torch.Tensor:
    return hashed_places(size, dim, seed, stream, device=device)


def _stream(name: str) -> int:
    """The first of a parameter's four hash streams; the head uses 0 and 1."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 3 | 1) * 4


def _outer_squared(piece: OuterGrad) -> torch.Tensor:
    """``[B]`` float64, from the tokens' Gram matrices or the gradient itself, whichever is cheaper."""
    left, right = (x if x.is_cuda else x.to(compute_dtype(x.dtype)) for x in (piece.left, piece.right))
    (_, t, p), q = left.shape, right.shape[2]
    if t * (p + q) < p * q:
        gram = _product(left, left.mT).mul_(_product(right, right.mT))  # [B, T, T]
        return gram.sum((1, 2), dtype=torch.float64)
    chunk = max(1, CHUNK_ELEMENTS // (p * q))
    gradients = (_product(x.mT, y) for x, y in zip(left.split(chunk), right.split(chunk), strict=True))
    return torch.cat([g.square_().sum((1, 2), dtype=torch.float64) for g in gradients])


@float32_products()
def _product(
    a: torch.Tensor,  # [B, m, k]
    b: torch.Tensor,  # [B, k, n]
) -> torch.Tensor:
    """``[B, m, n]`` in float32 (float64 for float64).

    On a GPU the matrix units multiply half-precision factors as they are. Each product is exact in float32.
    """
    if a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    dtype = compute_dtype(a.dtype, b.dtype)
    return a.to(dtype) @ b.to(dtype)


def _row_sums(rows: RowGrad) -> tuple[torch.Tensor, torch.Tensor]:
    """Nonzero rows of the samples' gradients, ``[U, Q]``, and their keys ``[U]`` (sample * size + row)."""
    b = len(rows.ids)
    keys = torch.arange(b, device=rows.ids.device)[:, None] * rows.size + rows.ids
    keys, places = keys.unique(return_inverse=True)
    sums = rows.values.new_zeros(len(keys), rows.values.shape[2])
    add_at(sums, 0, places.flatten(), rows.values.flatten(0, 1))
    return keys, sums
