"""Loads the rows of a recipe's sources, including the bundled ones: a seed set and word problems.

The seed set has 60 short samples written for this project, 20 each of mathematics, medicine and code. Most are ordinary
and correct; some are deliberately trivial, ambiguous (no answer follows from the question) or garbled, to show how
acquisition functions respond. The 96 word problems come in 12 kinds, all with the right answer.
"""

from __future__ import annotations

import json
from collections import Counter
from importlib import resources
from typing import TYPE_CHECKING

from acqsynth.domains import Domain, Sample

if TYPE_CHECKING:  # loading seeds does not need pydantic
    from acqsynth.config import Source

BUNDLED = "bundled:"  #: prefix of sources in the package
DOMAINS = ("mathematics", "medicine", "code")
KINDS = ("ordinary", "trivial", "ambiguous", "garbled")


def load_seeds(domain: str | None = None, kind: str | None = None) -> list[dict[str, str]]:
    """The seeds in file order, each ``{"id", "domain", "kind", "prompt", "completion"}``; in mathematics also
    ``"answer"`` if there is one final answer.

    A prompt ends with a newline, so ``acqcore.score`` accepts the rows unchanged.

    Args:
        domain: one of ``DOMAINS``, or None for all.
        kind: one of ``KINDS``, or None for all.

    Raises:
        ValueError: an unknown domain or kind.
    """
    for name, value, known in (("domain", domain, DOMAINS), ("kind", kind, KINDS)):
        if value is not None and value not in known:
            raise ValueError(f"{name}: unknown {value!r}, expected one of {', '.join(known)} or None")
    return [s for s in _rows("seeds.jsonl") if domain in (None, s["domain"]) and kind in (None, s["kind"])]


def load_word_problems() -> list[dict[str, str]]:
    """The word problems, each ``{"question", "reasoning", "answer"}``, in mixed order of kinds."""
    return _rows("word_problems.jsonl")


def bundled(name: str) -> list[Sample]:
    """The rows of a source ``bundled:<name>``. Rows of mathematics have no reasoning: small models that are shown
    some forget to end theirs."""
    if name == "mathematics":
        return [Sample(row["prompt"].strip(), row["answer"]) for row in load_seeds(name) if "answer" in row]
    if name == "word_problems":
        return [Sample(row["question"], row["answer"], row["reasoning"]) for row in load_word_problems()]
    raise ValueError(f"bundled:{name}: unknown, expected bundled:mathematics or bundled:word_problems")


def load_source(domain: Domain, source: Source) -> list[Sample]:
    """The rows of a source, in file order; ValueError if none are left, and errors as in :meth:`Domain.load`."""
    limit = None if source.limit is None or source.per_label else source.skip + source.limit
    if source.source.startswith(BUNDLED):
        if source.columns or source.split != type(source).model_fields["split"].default:
            raise ValueError(f"columns, split: expected none for {source.source}, whose rows come with the package")
        found = bundled(source.source.removeprefix(BUNDLED))[:limit]
    else:
        found = domain.load(source.source, source.split, source.columns, limit)
    if source.per_label is None:
        kept = found[source.skip :]
    else:
        seen = Counter[str]()
        kept = []
        for sample in found:
            label = domain.canonical(sample.answer)
            seen[label] += 1
            if source.skip < seen[label] <= source.skip + source.per_label:
                kept.append(sample)
        kept = kept[: source.limit]
    if not kept:
        raise ValueError(f"{source.source} has no rows after the first {source.skip}")
    return kept


def _rows(name: str) -> list[dict[str, str]]:
    lines = (resources.files("acqsynth") / "data" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
