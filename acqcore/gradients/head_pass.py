"""The head's part of the gradients; each product with the head is computed at most once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from acqcore.backends import Probes
from acqcore.defaults import float32_products
from acqcore.fisher import FisherGrads, fisher_visit
from acqcore.head import Head
from acqcore.head_grad import Bounds, grad_sketch_from, hidden_grad_from, loss_weights
from acqcore.head_visit import HeadVisit, visit
from acqcore.kept import on_device
from acqcore.literals import Loss
from acqcore.row_stats import MAX, R, RowStats, checked_backend, chosen_backend, predicted_targets

#: Entries of the logits' gradient, in float64, or of gathered weights held at a time.
PRODUCT_ELEMENTS = 1 << 20


@dataclass(frozen=True, eq=False)
class HeadPass:
    """The N scored tokens of B samples under the head."""

    hidden: torch.Tensor  # [N, D]
    head: Head
    bounds: Bounds
    loss: Loss
    backend: str | None
    mask_keys: torch.Tensor  # [N] int64, of each token's sample
    places: torch.Tensor  # [N] int64, index of each token in its sample
    stats: RowStats
    visited: HeadVisit | None = None  # source of stats, if it kept the norm's inputs
    carried: tuple[Probes, FisherGrads] | None = None  # from the same visit as stats
    hidden_grads: torch.Tensor | None = None  # [N, D] of ``head_grad.hidden_grad``, from the same visit
    #: None -> squared norms, (dim, seed) -> sketches, as far as they are known.
    found: dict[tuple[int, int] | None, torch.Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def weights(self) -> torch.Tensor:
        """Weight of each token in its sample's loss, ``[N]`` float64."""
        assert self.stats.targets is not None
        return loss_weights(self.stats.targets, self.bounds, self.loss)[0]

    def excess(self, carried: FisherGrads) -> torch.Tensor:
        """Relative excess of each probe's squared gradient norm over its expectation, ``[B, P]``.

        0 where the expectation is 0.
        """
        lengths = torch.tensor(self.counts, device=carried.expected.device)
        squares = carried.gradients.double().square().sum(dim=2).T.contiguous()  # [N, P]
        found = torch.segment_reduce(squares, "sum", lengths=lengths, axis=0)
        expected = torch.segment_reduce(carried.expected, "sum", lengths=lengths)[:, None]
        return (found / expected - 1).where(expected != 0, 0)

    @property
    def counts(self) -> list[int]:
        """Number of scored tokens of each of the B samples."""
        return [end - begin for begin, end in self.bounds]

    def predicted(self, loss: Loss) -> HeadPass:
        """The same rows with the most likely tokens as targets."""
        return replace(self, stats=predicted_targets(self.stats), loss=loss, visited=None, hidden_grads=None, found={})

    def squared_norm(self) -> torch.Tensor:
        """Squared norm of each sample's head gradient, ``[B]`` float64."""
        if None not in self.found:
            visited, targets = self.visited, self.stats.targets
            assert targets is not None
            if visited is None:  # a second pass over the weights
                chosen = chosen_backend(self.hidden, self.head, self.backend, "head_grad_norm")
                visited = visit(self.hidden, self.head, targets, self.bounds, 1.0, chosen, known=self.stats)
            self.found[None] = visited.grad_norm(self.weights).double().square()
        return self.found[None]

    def sketch(self, dim: int, seed: int) -> torch.Tensor:
        """Sketch of each sample's head gradient, ``[B, dim]``."""
        if (dim, seed) not in self.found:
            self.found[dim, seed] = grad_sketch_from(
                self.hidden, self.head, self.stats, self.bounds, self.weights, 1.0, self.backend, dim, seed
            )
        return self.found[dim, seed]

    def hidden_gradient(
        self,
        hidden: torch.Tensor,  # [B, T, D]
        positions: torch.Tensor,  # [N] int64
    ) -> torch.Tensor:
        """Gradient of the samples' losses in ``hidden``, ``[B, T, D]``; the N rows are its flattened ``positions``."""
        gradient = self.hidden_grads
        if gradient is None:
            gradient = hidden_grad_from(self.hidden, self.head, self.stats, self.backend)
        return spread(gradient * self.weights[:, None].to(gradient.dtype), hidden, positions)

    def fisher_grads(self, probes: int, seed: int) -> FisherGrads:
        """Random cotangents of the tokens' logits, propagated back through the head."""
        if self.carried is not None and (self.carried[0].count, self.carried[0].seed) == (probes, seed):
            return self.carried[1]
        assert self.stats.targets is not None
        of_rows = Probes(probes, seed, self.mask_keys, self.places)
        chosen = checked_backend(self.hidden, self.head, self.stats.targets, self.backend, "fisher_sums")
        return fisher_visit(self.hidden, self.head, self.stats.targets, of_rows, 1.0, chosen)[1]

    @float32_products()
    def row_products(
        self,
        ids: torch.Tensor,  # [B, T] int64
        values: torch.Tensor,  # [B, T, D]
    ) -> torch.Tensor:
        """Inner product of each sample's head gradient with ``sum_t e_{ids_t} values_t^T``, ``[B]`` float64."""
        head, stats, targets, device = self.head, self.stats, self.stats.targets, self.hidden.device
        assert targets is not None
        ids, values = ids.to(device), values.to(device)
        place = torch.arange(max(self.counts, default=0), device=device)
        begins, ends = on_device(torch.tensor(self.bounds), device)[:, :, None].unbind(1)  # [B, 1] each
        rows = begins + place.minimum(ends - begins - 1)  # [B, S]; the last row stands for missing ones, with weight 0
        weights = self.weights[rows].where(place < ends - begins, 0)
        found = torch.zeros(len(ids), dtype=torch.float64, device=device)
        # Of a sample, entries of its logits' gradient, of its rows and of its tokens' weights.
        of_rows, depth = max(rows.shape[1], 1), self.hidden.shape[1]
        at_once = max(PRODUCT_ELEMENTS // max(of_rows * ids.shape[1], depth * of_rows, depth * ids.shape[1], 1), 1)
        width = max(PRODUCT_ELEMENTS // (at_once * max(of_rows, depth)), 1)
        for part, own in zip(torch.arange(len(ids)).split(at_once), rows.split(at_once), strict=True):
            samples = slice(int(part[0]), int(part[-1]) + 1)
            h = self.hidden[own].to(values.dtype)  # [b, S, D]
            y, largest, r = targets[own, None], stats.state[MAX][own, None], stats.state[R][own, None]
            top = y == stats.max_index[own, None]
            for columns, x in zip(ids[samples].split(width, 1), values[samples].split(width, 1), strict=True):
                z = h @ head.weight[columns].to(h.dtype).mT  # [b, S, t]
                if head.bias is not None:
                    z = z + head.bias[columns][:, None].to(h.dtype)
                z = z * head.scale
                slope: float | torch.Tensor = head.scale
                if head.softcap is not None:
                    tanh = (z / head.softcap).tanh()
                    z, slope = head.softcap * tanh, slope * (1 - tanh.square())
                same = y == columns[:, None]
                delta = (z - largest).exp() / (1 + r) - same.double()
                delta = delta.where(~(same & top), -r / (1 + r)) * slope
                found[samples] += (delta * (h @ x.mT) * weights[samples, :, None]).sum((1, 2))
        return found


def spread(
    gradient: torch.Tensor,  # [N, D] of the scored tokens
    hidden: torch.Tensor,  # [B, T, D]
    positions: torch.Tensor,  # [N] int64, of the tokens in the flattened batch
) -> torch.Tensor:
    """Scatter the gradient into the shape and device of ``hidden``; zero at other tokens."""
    gradient = gradient.to(hidden.device)
    whole = gradient.new_zeros(hidden.shape[0] * hidden.shape[1], hidden.shape[2])
    return whole.index_copy_(0, positions.to(hidden.device), gradient).view(hidden.shape)
