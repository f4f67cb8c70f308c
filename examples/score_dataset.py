"""Score a data set with ``Dataset.map`` and keep the rows with the highest values.

python examples/score_dataset.py
python examples/score_dataset.py --data rows.jsonl --acquisition margin --keep 100
"""

from __future__ import annotations

from collections.abc import Sequence

import common
import datasets

import acqcore


def main(arguments: Sequence[str] | None = None) -> datasets.Dataset:
    parser = common.parser(__doc__)
    parser.add_argument("--acquisition", default="mutual_information")
    parser.add_argument("--keep", type=int, default=8)
    options = parser.parse_args(arguments)
    student = acqcore.Student.load(options.student)
    data = datasets.Dataset.from_list(common.rows(options.data))

    scored = data.map(lambda batch: acqcore.score(student, batch, [options.acquisition]), batched=True)
    kept = scored.sort(options.acquisition, reverse=True).select(range(min(options.keep, len(scored))))
    for row in kept:
        print(f"{row[options.acquisition]:8.3f}  {row['prompt']}{row['completion']}")
    return kept


if __name__ == "__main__":
    main()
