"""Rejection sampling: of several candidates of each prompt the best, by the scores that also train."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from acqsynth.domains.base import Messages
from acqsynth.engines.base import Engine, Sampling
from acqsynth.generate import Collected, collect
from acqsynth.generators.candidates import Scored, Scorer, candidates


def select(
    engine: Engine,
    prompts: Sequence[Messages],
    reward: Scorer,
    *,
    rows: int,
    sampling: Sampling,
    threshold: float = -math.inf,
    rounds: int = 8,
) -> Collected[Scored]:
    """The best candidate of each prompt, until there are enough rows.

    Args:
        engine: of the generator, which is not trained.
        prompts: asked in turn, again with other seeds when all were asked.
        reward: scores candidates; one that a gate rejects or a scorer fails on is none.
        rows: how many are wanted.
        sampling: its ``n`` is the candidates of a prompt.
        threshold: least total of what is kept.
        rounds: as in :func:`acqsynth.generate.generate`.

    Returns:
        Rows with ``sample`` and ``total`` not None and different questions.

    Raises:
        ValueError: rows, rounds or the number of prompts is below 1.
    """
    asked: set[str] = set()

    def keep(picked: Sequence[Messages], sampling: Sampling, dropped: Counter[str]) -> list[Scored]:
        kept = []
        for group in candidates(engine, picked, reward, sampling):
            dropped.update(reason for scored in group if (reason := scored.rejected_by))
            valid = sorted((s for s in group if s.rejected_by is None), key=_total, reverse=True)
            for place, scored in enumerate(valid):
                question = " ".join(scored.sample.question.lower().split()) if scored.sample else ""
                if place:
                    dropped["not the best of its prompt"] += 1
                elif _total(scored) < threshold:
                    dropped["below the threshold"] += 1
                elif question in asked:
                    dropped["asks what another one asks"] += 1
                else:
                    asked.add(question)
                    kept.append(scored)
        return kept

    return collect(prompts, keep, sampling, rows=rows, rounds=rounds, per_prompt=1)


def _total(scored: Scored) -> float:
    return -math.inf if scored.total is None else scored.total
