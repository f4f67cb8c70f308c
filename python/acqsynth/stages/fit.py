"""A student learns rows."""

from __future__ import annotations

import random
from typing import Any

from acqsynth.stages import components, rows
from acqsynth.stages.unit import Work


def fit(
    work: Work,
    *,
    domain: str,
    student: str,
    n: int,
    replay: float,
    replay_domain: str,
    options: dict[str, Any],
    seed: int,
    sources: int,
) -> None:
    """Writes ``model/``, with the trainer's ``log.jsonl`` in it, and ``counts.json``.

    Inputs: ``samples-1`` to ``samples-<sources>``, of which n rows are drawn by the seed; with a share of ``replay``
    also ``replay``, rows of ``replay_domain``.
    """
    pool = [row for i in range(1, sources + 1) for row in rows.read(work.inputs[f"samples-{i}"])]
    picked = random.Random(seed).sample(pool, min(n, len(pool)))
    again = (components.domain(replay_domain), rows.read(work.inputs["replay"])) if replay else None
    components.fit(
        components.model(student),
        components.domain(domain),
        picked,
        work.folder / "model",
        {"seed": seed, **options},
        replay=again,
        replay_share=replay,
        say=work.say,
    )
    work.write("counts.json", {"wanted": n, "rows": len(picked)})
