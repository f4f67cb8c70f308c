"""Rows of a data set as samples: a hub id through ``datasets``, or a local jsonl, csv or parquet file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acqcore.files.data import SUFFIXES, records
from acqsynth.domains.base import Sample

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """The columns of a data set, and how a row of it becomes a sample.

    ``read`` returns None for a row that is whole but has no final answer (a proof); such rows are left out. It raises
    ValueError, naming the column, for a row that is broken.
    """

    columns: tuple[str, ...]
    read: Callable[[Row], Sample | None]
    optional: tuple[str, ...] = ()  #: columns that are read if present


def samples(
    source: str,
    split: str,
    columns: Mapping[str, str] | None,
    limit: int | None,
    layouts: Sequence[Layout],
    class_names: bool = False,
) -> list[Sample]:
    """The samples of a data set, in file order: ``Domain.load`` for a domain that knows ``layouts``.

    The first layout whose columns are all there is taken, after ``columns`` has given columns of the data the names
    that layouts know. ``limit`` counts samples; ``class_names`` is that of :func:`rows`.

    Raises:
        FileNotFoundError, ValueError: as ``Domain.load`` says.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}")
    columns = columns or {}
    layout: Layout | None = None
    found: list[Sample] = []
    number = 0
    for number, row in rows(source, split, class_names):
        if layout is None:
            if unknown := [column for column in columns.values() if column not in row]:
                raise ValueError(f"columns: no {_listed(unknown)} in {source}, which has {_listed(row)}")
            layout = _layout(source, _renamed(row, columns), layouts)
            known = (*layout.columns, *layout.optional)
            if unknown := [field for field in columns if field not in known]:
                raise ValueError(f"columns: unknown field {_listed(unknown)}, expected some of {_listed(known)}")
        renamed = _renamed(row, columns)
        if missing := [column for column in layout.columns if column not in renamed]:
            raise ValueError(f"{source}: row {number}: no {_listed(missing)}, only {_listed(row)}")
        try:
            sample = layout.read(renamed)
        except ValueError as error:
            raise ValueError(f"{source}: row {number}: {error}") from None
        if sample is not None:
            found.append(sample)
        if len(found) == limit:
            break
    if not found:
        raise ValueError(f"{source}: {f'none of {number} rows has a final answer' if number else 'no rows'}")
    return found


def rows(source: str, split: str = "train", class_names: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with its number, from 1; lazily for a local file, whose lines after a ``limit`` are not read.

    Args:
        source, split: as in ``Domain.load``.
        class_names: give the names of a hub data set's classes instead of their numbers.

    Raises:
        FileNotFoundError: no such local file, or (from ``datasets``) no such data set.
        ValueError: a row that cannot be read, or a file that is no parquet.
    """
    if not is_local(source):
        return _hub(source, split, class_names)
    path = Path(source).expanduser()
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{source}: expected a file that ends in {' or '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{source}: no such file")
    return _file(source, path)


def is_local(source: str) -> bool:
    """Whether a source is a path and no hub id."""
    path = Path(source).expanduser()
    return path.suffix in SUFFIXES or source.startswith(("/", ".", "~")) or path.is_file()


def text(row: Row, column: str) -> str:
    """The stripped text of a column, its line ends plain; ValueError if it is missing, empty or no text."""
    value = row.get(column)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)  # a csv file cannot tell 5 from "5"
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{column}: expected text, got {value!r:.60}")
    return value.replace("\r\n", "\n").strip()


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with the names that layouts know; a column left out of ``columns`` keeps its own, or yields it."""
    kept = {name: value for name, value in row.items() if name not in columns.values()}
    return {**kept, **{field: row[column] for field, column in columns.items() if column in row}}


def _layout(source: str, row: Row, layouts: Sequence[Layout]) -> Layout:
    for layout in layouts:
        if row.keys() >= set(layout.columns):
            return layout
    known = " or ".join(f"({', '.join(layout.columns)})" for layout in layouts)
    raise ValueError(f"{source}: expected the columns {known}, found {_listed(sorted(row))}")


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names))


def _file(source: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        for record in records(path):
            if record.error is not None:
                raise ValueError(f"row {record.line}: {record.error}")
            yield record.line, record.values
    except (ValueError, OSError) as error:
        raise ValueError(f"{source}: {' '.join(str(error).split())}") from None


def _hub(source: str, split: str, class_names: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    import datasets

    name, _, configuration = source.partition(":")
    found = datasets.load_dataset(name, configuration or None, split=split)
    features = found.features if class_names else {}
    kinds = {column: kind for column, kind in features.items() if hasattr(kind, "int2str")}
    for number, row in enumerate(found, 1):
        # -1 marks the rows of a test set without labels.
        names = {column: kind.int2str(row[column]) for column, kind in kinds.items() if (row[column] or 0) >= 0}
        yield number, {**row, **names}
