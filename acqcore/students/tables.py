"""Converts lists, data sets, tables and mappings of columns to lists of samples."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from acqcore import checks

#: Columns, or keys of a mapping, that define a sample; the first entry whose columns are all present is used.
KINDS = (("prompt", "completion"), ("messages",), ("question", "answer"), ("text",))
#: Columns that a chat template reads in addition to the messages.
BESIDE = ("tools", "chat_template_kwargs")
#: Columns that a student of text does not see; rows that have any of them are rejected.
IMAGES = ("image", "images")
#: Columns that a row may lack.
OPTIONAL = (*BESIDE, *IMAGES)
_LISTING = ("to_pylist", "to_list", "tolist")
EXPECTED = (
    'strings, mappings with "prompt" and "completion", "messages", "question" and "answer", or "text", a '
    "datasets.Dataset, a pandas, polars or Arrow table, or a mapping of such columns, or tensors "
    '{"input_ids", "attention_mask", "labels"}'
)


def kind_of(columns: Any) -> tuple[str, ...] | None:
    """The first of ``KINDS`` whose columns are all present."""
    return next((kind for kind in KINDS if all(key in columns for key in kind)), None)


def listed(samples: Any) -> list[Any]:
    """The samples as a list; only the columns of a table that define samples are kept."""
    columns = columns_of(samples)
    if columns is not None:
        kind = kind_of(columns)
        if kind is None:
            expected = ", or ".join(" and ".join(kind) for kind in KINDS)
            raise TypeError(f"samples: expected columns {expected}, got {', '.join(map(str, columns))}")
        found: dict[str, list[Any]] = {}
        for key in (*kind, *(key for key in OPTIONAL if key in columns)):
            if (values := _list(samples[key])) is None:
                raise TypeError(
                    f"samples: expected a list of values in column {key!r}, got {checks.describe(samples[key])}; "
                    "wrap a single sample in a list"
                )
            found[key] = values
        lengths = {key: len(values) for key, values in found.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"samples: expected columns of one length, got {lengths}")
        return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]
    values = _list(samples)
    if values is None:
        raise TypeError(f"samples: expected a list of {EXPECTED}, got {checks.describe(samples)}")
    return values


def plain(value: Any) -> Any:
    """The value with arrays, such as pandas reads from nested parquet columns, converted to lists.

    Keys of mappings without a value are dropped at any depth: a table has a null, or a frame NaN, NA or NaT, where a
    row lacks a key that other rows have.
    """
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items() if not _missing(part)}
    if isinstance(value, (str, bytes)):
        return value
    if isinstance(value, Sequence):
        return [plain(part) for part in value]
    is_array = hasattr(value, "tolist") and hasattr(value, "__len__")  # which NumPy's scalars lack
    return plain(value.tolist()) if is_array else value


def _missing(value: Any) -> bool:
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # of pandas, which need not be installed
        return True
    return bool(isinstance(value, numbers.Real) and value != value)


def columns_of(samples: Any) -> list[Any] | None:
    """Names of a table's columns; None for anything else."""
    if isinstance(samples, Mapping):
        return list(samples)
    names = getattr(samples, "column_names", None)  # datasets, Arrow
    if names is None and (hasattr(samples, "iloc") or hasattr(samples, "to_dicts")):  # pandas, polars
        names = getattr(samples, "columns", None)
    return None if names is None or not hasattr(samples, "__len__") else list(names)  # an IterableDataset has none


def _list(values: Any) -> list[Any] | None:
    """A sequence, an array or a column of NumPy, pandas, polars or Arrow as a list; None for anything else."""
    method = next((name for name in _LISTING if hasattr(values, name)), None)
    values = values if method is None else getattr(values, method)()
    return None if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) else list(values)
