"""Writes rows as jsonl, csv or parquet, block by block, and joins the blocks, or their highest rows, into one file.

No value is rejected: values that a format cannot represent are written as JSON text.
"""

from __future__ import annotations

import base64
import csv
import heapq
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

#: Raised for values that a type cannot hold and for types that pyarrow does not support; includes pyarrow's errors.
UNFIT = (ValueError, TypeError, OverflowError, NotImplementedError)

_PART = re.compile(r"part-\d{6}\.parquet")
_LEVELS = 30  # maximum nesting of a parquet type; a level may take three in the file's schema


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Context that yields a temporary file next to ``path``; it replaces ``path`` on success and is removed on error.

    Its name contains the process id, so several processes may write the same file.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def long_cells(most: int = 2**31 - 1) -> Iterator[None]:
    """Context in which csv cells of up to ``most`` characters can be read."""
    before = csv.field_size_limit(most)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def distinct(names: Sequence[str]) -> list[str]:
    """Column names made unique: a second ``name`` becomes ``name.1``, as in pandas."""
    found: dict[str, None] = {}
    for name in names:
        other, n = name, 0
        while other in found:
            other, n = f"{name}.{n + 1}", n + 1
        found[other] = None
    return list(found)


def write_block(path: Path, table: Mapping[str, Sequence[Any]], types: Mapping[str, Any] | None = None) -> None:
    """Write rows atomically as one part of a file: parquet, jsonl (NaN as null), or csv without a header (NaN as an
    empty cell). ``types`` are those of parquet columns, see :func:`column_types`; the others are inferred."""
    with atomically(path) as temporary:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            columns = {_text(name): _arrow(values, (types or {}).get(name)) for name, values in table.items()}
            pyarrow.parquet.write_table(pyarrow.table(columns), temporary)
            return
        with temporary.open("w", newline="", encoding="utf-8") as file:
            for cells in zip(*table.values(), strict=True):
                _write_line(file, path.suffix, dict(zip(table, cells, strict=True)))


def write_rows(
    path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], types: Mapping[str, Any] | None = None
) -> None:
    """Write rows atomically as one file. jsonl omits a row's missing columns; the other formats leave their cells
    empty. ``types`` as in :func:`write_block`."""
    if path.suffix == ".parquet":
        write_block(path, {name: [row.get(name) for row in rows] for name in columns}, types)
        return
    with atomically(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            csv.writer(file).writerow(_text(column) for column in columns)
        for row in rows:
            present = columns if path.suffix == ".csv" else [name for name in columns if name in row]
            _write_line(file, path.suffix, {name: row.get(name) for name in present})


def column_types(source: Path) -> dict[str, Any]:
    """Column types of a parquet file; empty for other formats, whose types are inferred from the values."""
    if source.suffix != ".parquet":
        return {}
    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(source)
    return dict(zip(distinct(schema.names), schema.types, strict=True))


def _write_line(file: TextIO, suffix: str, row: Mapping[str, Any]) -> None:
    cells = {name: _plain(cell) for name, cell in row.items()}
    if suffix == ".jsonl":
        file.write(_json(cells) + "\n")
    else:
        csv.writer(file).writerow(cell if isinstance(cell, (int, float)) else _text(cell) for cell in cells.values())


def _plain(value: Any) -> Any:
    """The value for JSON: NumPy numbers as Python's, NaN and infinities as null."""
    value = value.item() if hasattr(value, "item") and value.ndim == 0 else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_jsonable)
        text.encode()
    except ValueError:  # NaN within a value, or a lone surrogate, which must be escaped
        return json.dumps(_finite(value), default=_jsonable)
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return _plain(value)


def _jsonable(value: Any) -> Any:
    """The JSON substitute for a parquet value."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _text(value: Any) -> str | None:
    """Text unchanged, except that lone surrogates, which no file can hold, are escaped; anything else as JSON."""
    if value is None:
        return None
    if not isinstance(value, (str, Mapping, list, tuple, int, float)):
        value = _jsonable(value)
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else _json(value)


def _arrow(values: Sequence[Any], kind: Any = None) -> Any:
    """The values as an Arrow array of type ``kind``, else of the type that Arrow infers, else as text."""
    import pyarrow

    values = values if hasattr(values, "dtype") else list(values)
    for wanted in (kind, None):
        try:
            column = pyarrow.array(values, wanted)
            if _storable(column.type):
                return column
        except UNFIT:
            pass
    return pyarrow.array([_text(_plain(value)) for value in values], pyarrow.string())


def _storable(kind: Any, levels: int = _LEVELS) -> bool:
    """Whether parquet can store the type: it has no empty structs, and pyarrow reads at most 100 schema levels."""
    import pyarrow

    inner = [kind.field(i).type for i in range(kind.num_fields)]
    empty = pyarrow.types.is_struct(kind) and not inner
    return levels > 0 and not empty and all(_storable(part, levels - 1) for part in inner)


def join(blocks: Sequence[Path], out: Path, columns: Sequence[str]) -> None:
    """Join the parts written by :func:`write_block` into one file, or, if ``out`` has no extension, into a folder of
    parquet files with one schema. Replaces ``out`` atomically, from a file beside the first part; in an existing folder
    it replaces the parts one by one.
    """
    temporary = blocks[0].with_name(f"block-joined{out.suffix}")
    if out.suffix in (".jsonl", ".csv"):
        if out.suffix == ".csv":
            with temporary.open("w", newline="", encoding="utf-8") as text:
                csv.writer(text).writerow(_text(column) for column in columns)
        with temporary.open("ab" if out.suffix == ".csv" else "wb") as file:
            for block in blocks:
                with block.open("rb") as part:
                    shutil.copyfileobj(part, file)
    else:
        _join_parquet(blocks, temporary, into_folder=not out.suffix)
    if not out.is_dir():
        os.replace(temporary, out)
        return
    for path in out.iterdir():
        if _PART.fullmatch(path.name):
            path.unlink()
    for path in temporary.iterdir():  # the folder itself stays: it may be a link or a mount point
        shutil.move(path, out)
    temporary.rmdir()


def holds_parts_alone(folder: Path) -> bool:
    """Whether :func:`join` may replace the folder."""
    return all(_PART.fullmatch(path.name) for path in folder.iterdir())


def _join_parquet(blocks: Sequence[Path], out: Path, into_folder: bool) -> None:
    import pyarrow.parquet

    schema, as_text = _common_schema(blocks)
    if into_folder:
        shutil.rmtree(out, ignore_errors=True)  # left by an interrupted run
        out.mkdir()
        for i, block in enumerate(blocks):
            pyarrow.parquet.write_table(_read_part(block, schema, as_text), out / f"part-{i:06d}.parquet")
        return
    with pyarrow.parquet.ParquetWriter(out, schema) as writer:
        for block in blocks:
            writer.write_table(_read_part(block, schema, as_text))


def _common_schema(blocks: Sequence[Path]) -> tuple[Any, set[str]]:
    """A schema for all parts, and the columns stored as text because no type fits all parts."""
    import pyarrow
    import pyarrow.parquet

    schemas = [pyarrow.parquet.read_schema(block).remove_metadata() for block in blocks]
    fields, as_text = [], set()
    for name in schemas[0].names:
        ones = [pyarrow.schema([schema.field(name)]) for schema in schemas]
        try:
            # A column that is empty in one part has the null type there; integers may be wider or floats elsewhere.
            field = pyarrow.unify_schemas(ones, promote_options="permissive").field(name)
            for block, one in zip(blocks, ones, strict=True):
                if one.field(name).type != field.type:
                    _cast(_table(block, [name]).column(0), field.type)
        except UNFIT:
            field = pyarrow.field(name, pyarrow.string())
            as_text.add(name)
        fields.append(field)
    return pyarrow.schema(fields), as_text


def _table(path: Path, columns: list[str] | None = None) -> Any:
    """A part as a pyarrow table. ``read_table`` would turn folders named ``key=value`` into columns."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read(columns)


def _read_part(path: Path, schema: Any, as_text: set[str]) -> Any:
    """The part as a pyarrow table with the given schema."""
    import pyarrow

    table = _table(path)
    for name in as_text:
        texts = [_text(_plain(value)) for value in table.column(name).to_pylist()]
        table = table.set_column(table.schema.get_field_index(name), name, pyarrow.array(texts, pyarrow.string()))
    columns = [_cast(column, field.type) for column, field in zip(table.columns, schema, strict=True)]
    return pyarrow.table(columns, schema=schema)


def _cast(column: Any, kind: Any) -> Any:
    """Cast a table's column to another type.

    Raises:
        ValueError, TypeError, NotImplementedError: the type cannot hold the values (includes pyarrow's errors).
    """
    import pyarrow

    if column.type == kind:
        return column
    try:
        cast = column.cast(kind)
        cast.validate()  # pyarrow 26 breaks nulls within lists
    except UNFIT:
        return pyarrow.chunked_array([pyarrow.array(column.to_pylist(), kind)], kind)
    return cast


def keep_top(blocks: Sequence[Path], k: int, name: str, columns: Sequence[str]) -> list[Path]:
    """Write the ``k`` rows with the largest values of acquisition ``name``, in their order, to parts beside ``blocks``
    (files from :func:`write_block`); returns the parts.

    Ties keep the earlier rows; rows without a value are dropped. Memory holds ``k`` values and one block.
    """

    def values() -> Iterator[tuple[float, int, int]]:
        for b, block in enumerate(blocks):
            for r, value in enumerate(_numbers(block, name, columns)):
                if math.isfinite(value):
                    yield value, -b, -r

    kept: dict[int, list[int]] = {}
    with long_cells():
        for _, b, r in heapq.nlargest(k, values()):
            kept.setdefault(-b, []).append(-r)
        if not kept:
            kept = {0: []}  # an output without rows still has columns
        return [_write_rows_of(blocks[b], sorted(rows)) for b, rows in sorted(kept.items())]


def _numbers(block: Path, name: str, columns: Sequence[str]) -> list[float]:
    """The values of a column, NaN where missing."""
    if block.suffix == ".parquet":
        cells = _table(block, [name]).column(0).to_pylist()
    elif block.suffix == ".jsonl":
        cells = [json.loads(line)[name] for line in _rows(block)]
    else:
        place = list(columns).index(name)
        cells = [row[place] or None for row in _rows(block)]
    return [math.nan if cell is None else float(cell) for cell in cells]


def _rows(block: Path) -> list[Any]:
    """The lines of a jsonl, or the cells of each row of a csv."""
    with block.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file) if block.suffix == ".csv" else file)


def _write_rows_of(block: Path, rows: list[int]) -> Path:
    out = block.with_name(f"block-top-{block.name}")
    if block.suffix == ".parquet":
        import pyarrow.parquet

        table = _table(block)
        # Slices: Arrow cannot take rows of views and some nested types.
        picked = [table.slice(0, 0), *(table.slice(i, 1) for i in rows)]
        pyarrow.parquet.write_table(pyarrow.concat_tables(picked), out)
        return out
    every = _rows(block)
    with out.open("w", newline="", encoding="utf-8") as file:
        write = csv.writer(file).writerows if block.suffix == ".csv" else file.writelines
        write(every[i] for i in rows)
    return out
