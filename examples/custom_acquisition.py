"""A custom acquisition: one function of the statistics that the pass over the head already computes.

python examples/custom_acquisition.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import common
import torch

import acqcore


@dataclass(frozen=True)
class ShareOptions(acqcore.acquisitions.Options):
    """``floor``: probability below which a token counts as unknown."""

    floor: float = 0.1


@acqcore.register("unknown_share", options=ShareOptions, needs_targets=True)
def unknown_share(stats: acqcore.RowStats, options: ShareOptions) -> torch.Tensor:
    """Share of tokens whose probability is below the floor, 1[p_y < floor]."""
    return (stats.logprob.exp() < options.floor).float()


def main(arguments: Sequence[str] | None = None) -> acqcore.Scores:
    options = common.parser(__doc__).parse_args(arguments)
    rows = common.rows(options.data)
    scores = acqcore.score(
        options.student,
        rows,
        ["unknown_share", "loss"],
        acquisition_args={"unknown_share": {"floor": 0.05}},
    )
    for i in acqcore.select(scores["unknown_share"], min(5, len(rows))).tolist():
        print(f"{scores['unknown_share'][i]:.2f}  loss {scores['loss'][i]:.2f}  {''.join(rows[i].values())}")
    return scores


if __name__ == "__main__":
    main()
