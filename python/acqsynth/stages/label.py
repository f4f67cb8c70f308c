"""Answers of generated questions: what sampled answers agree on, what the domain computes, what the generator wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from acqsynth.config import EngineConfig, LabellingConfig
from acqsynth.domains.base import Sample
from acqsynth.stages import components, rows
from acqsynth.stages.unit import StageError, Work

CHUNK = 64  # questions


def label(
    work: Work, *, domain: str, student: str, engine: EngineConfig, labelling: LabellingConfig, seed: int
) -> None:
    """Writes ``samples.parquet``, the labelled rows, and ``counts.json``: how many were labelled, how many right.

    Inputs: ``samples``; ``student``, a model in the place of the one named.

    Raises:
        StageError: the answers agree on not one question.
    """
    own = components.domain(domain)
    asked = rows.read(work.inputs["samples"])
    kept: list[Sample] = []
    agreement: list[float | None] = []
    if labelling.method == "own":
        kept, agreement = asked, [None] * len(asked)
    else:
        path = str(work.inputs["student"]) if "student" in work.inputs else components.model(student)
        labeller = components.labeller(labelling, own, engine, path)

        def chunk(start: int, some: Sequence[Sample]) -> list[dict[str, Any]]:
            labels = labeller(some, seed + start)
            return [
                {
                    "sample": None if found.sample is None else asdict(found.sample),
                    "agreement": found.agreement,
                    "why": found.abstained_why,
                }
                for found in labels
            ]

        for some in work.chunks("labels", asked, CHUNK, chunk):
            for row in some:
                if row["sample"] is not None:
                    kept.append(Sample(**row["sample"]))
                    agreement.append(row["agreement"])
            work.say(f"{len(kept)} questions labelled of {len(asked)}")
    if not kept:
        raise StageError(f"the answers agree on none of {len(asked)} questions; lower labelling.threshold or raise k")
    truths = [verdict for verdict in own.verify(kept) if verdict is not None]
    rows.write(work.folder / "samples.parquet", kept, {"agreement": agreement})
    work.write(
        "counts.json",
        {
            "asked": len(asked),
            "labelled": len(kept),
            "truth_known": len(truths),
            "right": sum(truths),
        },
    )
