"""Rank training rows by how much a gradient step on each lowers the validation loss.

    python examples/influence_to_validation.py

The validation rows are sums; the pool mixes sums, facts and coins. Prints the kinds of the top rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import common

import acqcore


def kind(row: dict[str, str]) -> str:
    return "sum" if "*" in row["prompt"] else "coin" if row["prompt"].startswith("Coin") else "fact"


def main(arguments: Sequence[str] | None = None) -> dict[str, int]:
    parser = common.parser(__doc__)
    parser.add_argument("--parameters", default="all", help="all, head, or the number of last blocks to use")
    options = parser.parse_args(arguments)
    parameters = int(options.parameters) if options.parameters.isdecimal() else options.parameters
    rows = common.rows(options.data)
    validation = [row for row in rows if kind(row) == "sum"][::3]
    pool = [row for row in rows if row not in validation]

    student = acqcore.Student.load(options.student)
    reference = acqcore.influence_reference(student, validation, parameters=parameters)
    scores = acqcore.score(student, pool, ["influence"], acquisition_args={"influence": {"reference": reference}})
    best = acqcore.select(scores["influence"], min(12, len(pool))).tolist()
    for i in best[:5]:
        print(f"{scores['influence'][i]:+.3f}  {''.join(pool[i].values())}")
    found = Counter(kind(pool[i]) for i in best)
    print(f"kinds of the highest {len(best)}: {dict(found)}; of the pool: {dict(Counter(map(kind, pool)))}")
    return dict(found)


if __name__ == "__main__":
    main()
