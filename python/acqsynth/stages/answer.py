"""A student answers evaluation rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from acqsynth.config import EngineConfig
from acqsynth.domains.base import Sample
from acqsynth.evaluate import evaluate
from acqsynth.stages import components, rows
from acqsynth.stages.unit import Work

CHUNK = 128  # rows


def answer(
    work: Work, *, sets: Mapping[str, str], model: str, engine: EngineConfig, max_tokens: int | None, seed: int
) -> None:
    """Writes ``answers-<set>.parquet``: question, gold, completion, answer, right, skill.

    Inputs: for each of ``sets`` (name -> domain) its rows; ``model``, a student in the place of the one named.
    """
    path = str(work.inputs["model"]) if "model" in work.inputs else components.model(model)
    answering = components.engine(engine, path)
    for name, domain in sets.items():
        own = components.domain(domain)

        def chunk(start: int, some: Sequence[Sample], own: Any = own) -> list[tuple[str, str | None, bool]]:
            found = evaluate(answering, own, some, max_tokens=max_tokens, seed=seed)
            return list(zip(found.completions, found.answers, found.right, strict=True))

        gold = rows.read(work.inputs[name])
        given = [row for some in work.chunks(f"answers-{name}", gold, CHUNK, chunk) for row in some]
        completions, answers, right = zip(*given, strict=True)
        rows.write_table(
            work.folder / f"answers-{name}.parquet",
            {
                "question": [sample.question for sample in gold],
                "gold": [sample.answer for sample in gold],
                "skill": [sample.extra.get("skill") for sample in gold],
                "completion": completions,
                "answer": answers,
                "right": right,
            },
        )
