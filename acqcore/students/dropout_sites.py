"""Dropout sites in a student's trunk: the outputs that its blocks add to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from acqcore import checks
from acqcore.literals import Layers
from acqcore.students.student import Student


@dataclass(frozen=True, eq=False)
class DropoutSites:
    """Modules whose outputs dropout acts on.

    Sites are numbered over the whole model, so a block's masks do not depend on ``layers``.
    """

    sites: tuple[tuple[int, nn.Module, float], ...]  # number, module and dropout probability of each
    before: tuple[nn.Module, ...]  # the blocks before the first site

    @classmethod
    def of(cls, student: Student, layers: Layers, dropout: float) -> DropoutSites:
        """The sites of the last n blocks, of all blocks (``"all"``), or the ``nn.Dropout`` modules (``"own"``).

        ``dropout`` is the probability p for blocks; ``"own"`` modules keep their own rates. Functional dropout, such
        as that of attention weights in transformers, stays off.

        Raises:
            ValueError: fewer blocks than requested, a block whose branches are not modules, no dropout layer.
        """
        if layers == "own":
            modules = student.trunk.modules() if isinstance(student.trunk, nn.Module) else ()
            own = [module for module in modules if isinstance(module, nn.Dropout)]
            active = tuple((site, module, module.p) for site, module in enumerate(own, 1) if module.p > 0)
            if not active:
                raise ValueError("layers: 'own' needs a student with dropout layers of p > 0, this one has none")
            return cls(active, ())
        blocks = student.blocks
        checks.some_blocks(len(blocks))
        count = len(blocks) if layers == "all" else layers
        assert isinstance(count, int)
        checks.enough_blocks("layers", count, len(blocks))
        first = len(blocks) - count
        of_blocks = [(i, branch) for i, branches in enumerate(student.branches) for branch in branches]
        sites = ((number, branch, dropout) for number, (i, branch) in enumerate(of_blocks, 1) if i >= first)
        return cls(tuple(sites), tuple(blocks[:first]))
