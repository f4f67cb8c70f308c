"""Writes rows as jsonl, csv or parquet, a block at a time, and joins the blocks into one file.

No value is refused: what a format cannot hold is written as JSON text.
"""

from __future__ import annotations

import base64
import csv
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from acqcore.files.atomic import atomically

_PART = re.compile(r"part-\d{6}\.parquet")
_LEVELS = 30  # of a parquet type, each of which may be three in the file's schema


def write_block(path: Path, table: Mapping[str, Sequence[Any]]) -> None:
    """Write rows as one part of a file: parquet, lines of jsonl (NaN as null), or csv (NaN as an empty cell, without a
    header). The part appears atomically.

    Raises:
        ModuleNotFoundError: parquet without pyarrow.
    """
    with atomically(path) as temporary:
        if path.suffix == ".parquet":
            _write_parquet(temporary, {name: _arrow(values) for name, values in table.items()})
            return
        with temporary.open("w", newline="", encoding="utf-8") as file:
            _write_lines(file, path.suffix, table)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], source: Path) -> None:
    """Write rows as one file that appears atomically; raises ModuleNotFoundError for parquet without pyarrow.

    A jsonl keeps a missing column missing, the others leave its cell empty. Types of a parquet ``source``, which the
    rows come from, are kept in a parquet.
    """
    with atomically(path) as temporary:
        if path.suffix == ".parquet":
            types = _types(source)
            cells = {name: [row.get(name) for row in rows] for name in columns}
            _write_parquet(temporary, {name: _arrow(values, types.get(name)) for name, values in cells.items()})
            return
        with temporary.open("w", newline="", encoding="utf-8") as file:
            if path.suffix == ".csv":
                csv.writer(file).writerow(_text(column) for column in columns)
            for row in rows:
                present = columns if path.suffix == ".csv" else [name for name in columns if name in row]
                _write_lines(file, path.suffix, {name: [row.get(name)] for name in present})


def _write_parquet(path: Path, columns: Mapping[str, Any]) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({_text(name): column for name, column in columns.items()}), path)


def _types(source: Path) -> dict[str, Any]:
    """The columns' types in a parquet file; of other files values decide."""
    if source.suffix != ".parquet":
        return {}
    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(source)
    return dict(zip(schema.names, schema.types, strict=True))


def _write_lines(file: TextIO, suffix: str, table: Mapping[str, Sequence[Any]]) -> None:
    rows = zip(*table.values(), strict=True)
    if suffix == ".jsonl":
        for row in rows:
            file.write(_json({name: _plain(cell) for name, cell in zip(table, row, strict=True)}) + "\n")
        return
    writer = csv.writer(file)
    for row in rows:
        cells = (_plain(cell) for cell in row)
        writer.writerow(cell if isinstance(cell, (int, float)) else _text(cell) for cell in cells)


def _plain(value: Any) -> Any:
    """The value as JSON has it: NumPy numbers as Python's, NaN as null."""
    value = value.item() if hasattr(value, "item") and value.ndim == 0 else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_jsonable)
        text.encode()
    except ValueError:  # NaN within a value; a lone surrogate, which only an escape can write
        return json.dumps(_finite(value), default=_jsonable)
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return _plain(value)


def _jsonable(value: Any) -> Any:
    """What JSON has instead of a value of parquet."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _text(value: Any) -> str | None:
    """Text as it is (a lone surrogate, which no file can hold, as an escape), anything else as JSON."""
    if value is None:
        return None
    if not isinstance(value, (str, Mapping, list, tuple, int, float)):
        value = _jsonable(value)
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else _json(value)


def _arrow(values: Sequence[Any], kind: Any = None) -> Any:
    """The values as an Arrow array of type ``kind``; as text where neither it nor another type holds them all."""
    import pyarrow

    values = values if hasattr(values, "dtype") else list(values)
    try:
        column = pyarrow.array(values, kind)
        if _storable(column.type):
            return column
    except (ValueError, TypeError, OverflowError):  # pyarrow's own errors are of these
        pass
    return pyarrow.array([_text(_plain(value)) for value in values], pyarrow.string())


def _storable(kind: Any, levels: int = _LEVELS) -> bool:
    """Whether parquet takes the type: it has no struct without fields, and pyarrow reads a schema of 100 levels."""
    import pyarrow

    inner = [kind.field(i).type for i in range(kind.num_fields)]
    empty = pyarrow.types.is_struct(kind) and not inner
    return levels > 0 and not empty and all(_storable(part, levels - 1) for part in inner)


def join(blocks: Sequence[Path], out: Path, columns: Sequence[str]) -> None:
    """Join the parts that :func:`write_block` wrote into one file, or, if ``out`` has no extension, into a folder of
    parquet files with one schema. Replaces ``out`` atomically, of a folder only parts.

    Raises:
        OSError: ``out`` is a folder that holds other files.
    """
    temporary = out.with_name(out.name + ".tmp")
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
    if out.is_dir():
        for path in out.iterdir():
            if _PART.fullmatch(path.name):
                path.unlink()
        out.rmdir()
    os.replace(temporary, out)


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
    """A schema for all parts, and the columns that are text in it because no type fits all."""
    import pyarrow
    import pyarrow.parquet

    schemas = [pyarrow.parquet.read_schema(block).remove_metadata() for block in blocks]
    fields, as_text = [], set()
    for name in schemas[0].names:
        ones = [pyarrow.schema([schema.field(name)]) for schema in schemas]
        try:
            # A column that is empty in one part has the null type there; an integer may be wider or a float elsewhere.
            field = pyarrow.unify_schemas(ones, promote_options="permissive").field(name)
            for block, one in zip(blocks, ones, strict=True):
                if one.field(name).type != field.type:
                    with pyarrow.parquet.ParquetFile(block) as file:
                        _cast(file.read(columns=[name]).column(0), field.type)
        except (ValueError, TypeError):  # pyarrow's own errors are of these
            field = pyarrow.field(name, pyarrow.string())
            as_text.add(name)
        fields.append(field)
    return pyarrow.schema(fields), as_text


def _read_part(path: Path, schema: Any, as_text: set[str]) -> Any:
    """The part as a pyarrow table. ``read_table`` would make columns of folders named ``key=value``."""
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        table = file.read()
    for name in as_text:
        texts = [_text(_plain(value)) for value in table.column(name).to_pylist()]
        table = table.set_column(table.schema.get_field_index(name), name, pyarrow.array(texts, pyarrow.string()))
    columns = [_cast(column, field.type) for column, field in zip(table.columns, schema, strict=True)]
    return pyarrow.table(columns, schema=schema)


def _cast(column: Any, kind: Any) -> Any:
    """A column of a table as another type, which holds its values.

    Raises:
        ValueError, TypeError: it does not (pyarrow's own errors are of these).
    """
    import pyarrow

    if column.type == kind:
        return column
    try:
        cast = column.cast(kind)
        cast.validate()  # pyarrow 26 breaks nulls within lists
    except (ValueError, TypeError):
        return pyarrow.chunked_array([pyarrow.array(column.to_pylist(), kind)], kind)
    return cast
