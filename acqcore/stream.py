"""``acqcore.score_stream``: scores of more samples than are to be held at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from acqcore import checks
from acqcore.acquisitions import REGISTRY
from acqcore.samples import Sample
from acqcore.score import score
from acqcore.scores import Scores
from acqcore.student import Student, StudentLike, as_student

#: Acquisitions whose values are relative to the other samples of the call.
RELATIVE = ("gradient_diversity",)


def score_stream(
    student: StudentLike,
    samples: Iterable[Sample],
    acquisitions: str | Sequence[str] = ("entropy",),
    *,
    chunk: int = 4096,
    **options: Any,
) -> Iterator[Scores]:
    """Acquisition values of any number of samples, a chunk held at a time.

    Args:
        student: as in :func:`acqcore.score`; loaded once.
        samples: strings or mappings as there, from a list, a generator, a ``datasets.IterableDataset``; read as chunks
            are asked for.
        acquisitions: names from ``acqcore.acquisitions()``, but those that compare the samples of a call.
        chunk: samples a chunk.
        options: the other arguments of :func:`acqcore.score`.

    Returns:
        An iterator of Scores, in order, of ``chunk`` samples each and the rest in the last.

    Raises:
        TypeError, ValueError: at once for student, chunk and names; with the chunk concerned what
            :func:`acqcore.score` raises, its message headed by the chunk's first sample.
    """
    checks.positive_int("chunk", chunk)
    names = checks.names("acquisitions", acquisitions, REGISTRY)
    checks.not_relative(names, RELATIVE)
    return _scores(as_student(student), iter(samples), names, chunk, options)


def _scores(
    student: Student, samples: Iterator[Sample], names: Sequence[str], chunk: int, options: dict[str, Any]
) -> Iterator[Scores]:
    start = 0
    while held := list(islice(samples, chunk)):
        try:
            scores = score(student, held, names, **options)
        except (ValueError, TypeError) as error:
            raise type(error)(f"chunk from sample {start}: {error}") from error
        start += len(held)
        yield scores
