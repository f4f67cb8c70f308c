"""Fine-tune on selected and on random rows, and compare the loss on held-out rows.

    python examples/select_and_finetune.py --plot chosen.png

A demonstration on about fifty rows, not evidence; measured comparisons are in the documentation.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence

import common
import torch

import acqcore


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    parser = common.parser(__doc__)
    parser.add_argument("--acquisition", default="mutual_information")
    parser.add_argument("--n", type=int, default=12, help="rows to train on")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=4, help="number of points on the curve")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--plot", help="output file of the plot, such as chosen.png")
    options = parser.parse_args(arguments)

    rows = list(common.rows(options.data))
    random.Random(0).shuffle(rows)
    held_out, pool = rows[: len(rows) // 4], rows[len(rows) // 4 :]
    base, tokenizer = common.pair(options.student)
    linear = {"mutual_information": common.LINEAR} if options.acquisition == "mutual_information" else None
    scores = acqcore.score(base, pool, [options.acquisition], acquisition_args=linear, tokenizer=tokenizer)
    chosen = acqcore.select(scores[options.acquisition], options.n).tolist()
    arms = {"chosen": [pool[i] for i in chosen], "random": random.Random(1).sample(pool, options.n)}

    curves: dict[str, list[float]] = {}
    for arm, picked in arms.items():
        model = copy.deepcopy(base)
        curves[arm] = [held_out_loss(model, tokenizer, held_out)]
        for _ in range(options.rounds):
            common.fine_tune(model, tokenizer, picked, options.steps // options.rounds, options.lr)
            curves[arm].append(held_out_loss(model, tokenizer, held_out))
        print(f"{arm:7} {' -> '.join(f'{value:.3f}' for value in curves[arm])}")
    if options.plot:
        plot(curves, options.steps // options.rounds, options.plot)
    return curves


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, tokenizer: object, rows: list[dict[str, str]]) -> float:
    return common.loss(model, tokenizer, rows).item()


def plot(curves: dict[str, list[float]], every: int, path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for arm, values in curves.items():
        axes.plot([every * i for i in range(len(values))], values, "o-", label=arm)
    axes.set(xlabel="steps", ylabel="loss on held-out rows")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
