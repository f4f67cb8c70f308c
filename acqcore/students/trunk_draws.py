"""Draws of a student's final hidden states: dropout inside its trunk, or the members of an ensemble.

Dropout in the last n blocks acts on the outputs that each attention and MLP adds to the residual stream; ``blocks.py``
finds them wherever the sum is written. Earlier blocks and the first branch after them run once. All draws of the rest
run as one batch through the model's own code, in which those modules return their stored outputs. Masks come from
``philox.py``, so a sample's draws depend neither on its batch nor on the backend.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from acqcore import checks
from acqcore.backends import Dropout, select as select_backend
from acqcore.literals import Layers
from acqcore.students.blocks import first_tensor, scales, with_first
from acqcore.students.sharding import replaced_forward
from acqcore.students.student import Student


@dataclass(frozen=True, eq=False)
class DropoutSites:
    """Modules whose outputs dropout acts on.

    Sites are numbered over the whole model, so a block's masks do not depend on ``layers``.
    """

    sites: tuple[tuple[int, nn.Module, float], ...]  # number, module and dropout probability of each
    shared: tuple[nn.Module, ...]  # the blocks before the first site, and that site: no dropout acts on their inputs

    @classmethod
    def of(cls, student: Student, layers: Layers, dropout: float) -> DropoutSites:
        """The sites of the last n blocks, of all blocks (``"all"``), or the ``nn.Dropout`` modules (``"own"``).

        ``dropout`` is the probability p for blocks; ``"own"`` modules keep their own rates. Functional dropout, such
        as that of attention weights in transformers, stays off.
        """
        if layers == "own":
            modules = student.trunk.modules() if isinstance(student.trunk, nn.Module) else ()
            own = [module for module in modules if isinstance(module, nn.Dropout)]
            active = tuple((site, module, module.p) for site, module in enumerate(own, 1) if module.p > 0)
            if not active:
                raise ValueError("layers: 'own' needs a student with dropout layers of p > 0, this one has none")
            return cls(active, ())._checked(student)
        blocks = student.blocks
        checks.some_blocks(len(blocks))
        count = len(blocks) if layers == "all" else layers
        assert isinstance(count, int)
        checks.enough_blocks("layers", count, len(blocks))
        first = len(blocks) - count
        of_blocks = [(i, branch) for i, branches in enumerate(student.branches) for branch in branches]
        # By module, as blocks may share one.
        numbers = {branch: number for number, (i, branch) in enumerate(of_blocks, 1) if i >= first}
        sites = tuple((number, branch, dropout) for branch, number in numbers.items())
        shared = (*blocks[:first], sites[0][1]) if first else ()  # one branch alone is not worth another forward
        return cls(sites, shared)._checked(student)

    def _checked(self, student: Student) -> DropoutSites:
        """Raise ValueError if a site's output does not hold samples first: with as many tokens or heads as samples, it
        would look as if it did."""
        batch, length = 7, min(5, student.max_length or 5)  # unlikely numbers of heads

        def check(module: nn.Module, arguments: Any, output: Any) -> None:
            value = first_tensor(output)
            if value is None or value.shape[:1] not in ((batch,), (batch * length,)):
                raise ValueError(
                    f"layers: dropout acts on [B, T, D] or [B * T, D], got {checks.describe(value)} from "
                    f"{type(module).__name__} for {batch} samples of {length} tokens"
                )

        def run() -> bool:
            ids = torch.arange(batch * length, device=student.device).view(batch, length) % student._vocab_size
            with ExitStack() as stack:
                for _, module, _ in self.sites:
                    stack.callback(module.register_forward_hook(check).remove)
                student.hidden(ids)
            return True

        student.verdict("samples first", run, *(id(module) for _, module, _ in self.sites))
        return self


class TrunkDraws:
    """Hidden states of K draws under dropout in the trunk. Arguments and errors are those of :class:`DrawOptions` and
    :meth:`DropoutSites.of`."""

    def __init__(
        self, student: Student, layers: Layers, draws: int, dropout: float, seed: int, backend: str | None
    ) -> None:
        found = DropoutSites.of(student, layers, dropout)
        self._student = student
        self._draws = draws
        self._seed = seed
        self._dropped = 0
        self._backend = backend
        self._sites = found.sites
        self._shared: tuple[nn.Module, ...] = ()
        # Ranks that run forwards together skip nothing: another rank may be running all blocks.
        shared, alone = found.shared, not student.forwards_are_collective
        if shared and alone:
            gates = scales(student.blocks)  # once one opens, a block may read more of an earlier one
            if student.verdict("skips", lambda: self._skipping(shared), *map(id, shared), *gates):
                self._shared = shared

    def _skipping(self, shared: tuple[nn.Module, ...]) -> bool:
        """Whether stored outputs can replace these modules; False if a later one reads more of them than that."""
        ids = torch.arange(8, device=self._student.device).view(2, 4) % 4
        trial = copy.copy(self)
        trial._shared, trial._sites = shared, ()
        expected = self._student.hidden(ids)
        try:
            found = trial._hidden(ids, ids[:, 0], range(2))  # all tensors that go on must be repeated
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError):
            return False
        error = (found.double() - expected.double()).abs().max()
        return bool(error <= 16 * torch.finfo(expected.dtype).eps * expected.double().abs().max())

    def hidden(
        self,
        input_ids: torch.Tensor,  # [B, T] int64, padded on the right, on any device
        samples: torch.Tensor,  # [B] int64: mask key of each sample
    ) -> torch.Tensor:
        """Final hidden states ``[K, B, T, D]``."""
        input_ids = input_ids.to(self._student.device)
        self._dropped = 0
        length = input_ids.shape[1]
        first, second = self._student.length_groups([length] * 2, self._draws * length)
        # Rows that may not share a forward with others may not with their own draws either.
        parts = [range(self._draws)] if first == second else [range(k, k + 1) for k in range(self._draws)]
        with self._student.scoring():
            hidden = torch.cat([self._hidden(input_ids, samples, draws) for draws in parts])
        if not self._dropped:
            raise ValueError("layers: the student's forward went through none of the modules that dropout acts on")
        return hidden

    def _hidden(
        self,
        input_ids: torch.Tensor,  # [B, T]
        samples: torch.Tensor,  # [B]
        draws: range,
    ) -> torch.Tensor:
        expanded = input_ids.repeat(len(draws), 1)  # [k * B, T]
        with ExitStack() as stack:
            for module, output in self._stored(input_ids, len(draws)).items():
                stack.enter_context(replaced_forward(module, lambda *_, given=output, **__: given))
            for site, module, p in self._sites:
                drop = partial(self._after_site, site=site, p=p, samples=samples, draws=draws)
                stack.callback(module.register_forward_hook(drop).remove)
            hidden = self._student.hidden(expanded)
        return hidden.unflatten(0, (len(draws), len(input_ids)))

    def _stored(
        self,
        input_ids: torch.Tensor,  # [B, T]
        draws: int,
    ) -> dict[nn.Module, Any]:
        """Outputs of the shared modules from one forward that ends there, repeated for each draw. Blocks all return
        that of the last one."""
        if not self._shared:
            return {}
        *blocks, branch = self._shared
        found: dict[nn.Module, Any] = {}

        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            value = first_tensor(output)
            if value is None or value.shape[:2] != input_ids.shape:
                raise ValueError(f"layers: expected a block to return [B, T, ...], got {checks.describe(value)}")
            found[module] = with_first(output, value.repeat(draws, *[1] * (value.dim() - 1)))
            if module is branch:
                raise _Found

        with ExitStack() as stack:
            for module in (*blocks[-1:], branch):
                stack.callback(module.register_forward_hook(keep).remove)
            with suppress(_Found):
                self._student.hidden(input_ids)
        return {module: found[blocks[-1] if module is not branch else branch] for module in self._shared}

    def _after_site(
        self,
        module: nn.Module,
        arguments: Any,
        output: Any,  # or its first tensor: [k * B, T, D], [k * B * T, D]
        *,
        site: int,
        p: float,
        samples: torch.Tensor,  # [B]
        draws: range,  # k of the K draws
    ) -> Any:
        """A site's output with the draws' dropout applied."""
        value = first_tensor(output)
        if value is None:
            raise ValueError(f"layers: dropout acts on a tensor, {type(module).__name__} returns none")
        rows = len(draws) * len(samples)
        columns = value.shape[-1]
        # Some models flatten the tokens before their MLP.
        if value.shape[0] % rows or value.dim() != (3 if value.shape[0] == rows else 2):
            raise ValueError(f"layers: dropout acts on [{rows}, T, D], got {checks.describe(value)}")
        self._dropped += 1
        length = value.numel() // (rows * columns)
        positions = torch.arange(length, device=value.device).repeat(len(samples))
        of_rows = samples.to(value.device).repeat_interleave(length)
        dropout = Dropout(p, "element", 1, self._seed, of_rows, positions)
        shape = (len(of_rows), columns)
        backend = select_backend(self._backend, value.device, (value.dtype,), "dropout_mask", shape)
        keep = torch.empty((self._draws, *shape), dtype=torch.bool, device=value.device)
        backend.dropout_mask(dropout, site, keep)
        return with_first(output, value.where(keep[draws.start : draws.stop].view(value.shape), 0).div_(1 - p))


class _Found(Exception):  # noqa: N818
    """Ends a forward after the last shared module."""


def member_hidden(
    members: Sequence[Student],
    input_ids: torch.Tensor,  # [B, T] int64
    device: torch.device,
) -> torch.Tensor:
    """Final hidden states of each member of an ensemble, ``[K, B, T, D]`` on ``device``."""
    hidden = []
    for member in members:
        with member.scoring():
            hidden.append(member.hidden(input_ids.to(member.device)).to(device))
    return torch.stack(hidden)
