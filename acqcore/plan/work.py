"""What is to be scored, and how many passes through trunk and head that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from acqcore import checks
from acqcore.plan.shape import Shape
from acqcore.score import ARGUMENTS, Request

#: Acquisitions whose required argument is an object; measuring makes one where it can.
_MADE_HERE = {"influence": "reference"}
_NOT_PLANNED = {"archive_novelty": "needs an archive that only the run has"}


@dataclass(frozen=True)
class Work:
    """Rows to score, all of one length, and what is asked of them.

    Attributes:
        rows: how many.
        tokens: T, of each row.
        scored: of a row's tokens, at most T - 1.
        batch_tokens: most padded tokens in a forward; a longer row goes alone.
        acquisitions, arguments: as in :func:`acqcore.score`.
    """

    rows: int
    tokens: int
    scored: int
    batch_tokens: int
    acquisitions: tuple[str, ...]
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def checked(
        cls,
        shape: Shape,
        rows: int,
        tokens: int,
        scored: int | None,
        batch_tokens: int,
        acquisitions: Sequence[str],
        arguments: Mapping[str, Mapping[str, Any]] | None,
    ) -> Work:
        """Raises ValueError or TypeError for what can not be scored, or not be planned."""
        checks.positive_int("rows", rows)
        checks.row_tokens(tokens, scored, shape.max_tokens)
        work = cls(
            rows,
            tokens,
            tokens - 1 if scored is None else scored,
            batch_tokens,
            tuple(acquisitions),
            checks.acquisition_args(arguments, acquisitions, ARGUMENTS),
        )
        work.request()  # raises what score would
        checks.planned(work.acquisitions, work.arguments, _NOT_PLANNED)
        checks.block_count(work.fewest_blocks, shape.blocks)
        return work

    def request(self) -> Request:
        """What ``score`` makes of it, a required object standing as None."""
        arguments = dict(self.arguments)
        for name in set(self.acquisitions) & set(_MADE_HERE):
            arguments[name] = {**arguments.get(name, {}), _MADE_HERE[name]: None}
        return Request.checked(self.acquisitions, "mean", 1, self.batch_tokens, None, arguments)

    @property
    def batch_rows(self) -> int:
        """Rows of a full batch."""
        return min(self.rows, max(1, self.batch_tokens // self.tokens))

    @property
    def fewest_blocks(self) -> int:
        """A model of fewer blocks could not do what is asked: arguments name the last n."""
        named = [a.get(key) for a in self.arguments.values() for key in ("parameters", "layers")]
        return max([1, *(n for n in named if isinstance(n, int))])


@dataclass(frozen=True)
class Passes:
    """Forwards of the whole trunk, products with the head's weight, and blocks that keep activations for a backward
    pass; the first two in multiples of one."""

    trunk: float
    head: float
    kept_blocks: int


def passes(shape: Shape, work: Work) -> Passes:
    """What the acquisitions take, counted.

    - Those of tokens share one forward and one product.
    - Of samples, from the head pass: T / 2D of a product for the Gram matrix, at most the two of a second visit. Its
      targets are known in the first visit for ``grad_norm``, and are the first visit's result for ``badge``.
    - Of K draws: K products; with dropout in the last n of L blocks also a forward of the others and K of these.
    - Gradients deeper than the head: a forward, a backward (of activations alone: as much again) and their norms or
      sketches (about as much again) through the blocks asked for; a product for the statistics, two for the gradient of
      the hidden states, one for the head's own part.
    """
    request = work.request()
    trunk = head = 0.0
    kept = 0
    one_pass = request.in_one_pass()
    if one_pass:
        trunk, head = 1.0, 1.0
    for entry in one_pass:
        if entry.per_sample is not None:
            head += min(2.0, work.scored / (2 * shape.hidden)) + (0 if entry.needs_gram else 1)
    for options in set(request.draw_options.values()):
        head += options.draws
        if options.layers != 0:
            last = options.layers if isinstance(options.layers, int) else shape.blocks
            trunk += 1 - last / shape.blocks + options.draws * last / shape.blocks
    for name in request.own_passes:
        parameters = request.arguments.get(name, {}).get("parameters", "all" if name == "influence" else "head")
        last = {"head": 0, "all": shape.blocks}.get(parameters, parameters)
        trunk += 1 + 2 * last / shape.blocks
        head += 4 if last else 2
        kept = max(kept, last)
    return Passes(trunk, head, kept)


def most_draws(work: Work) -> int:
    """The largest K among the acquisitions of several draws in the trunk, else 1."""
    return max([1, *(o.draws for o in work.request().draw_options.values() if o.layers != 0)])
