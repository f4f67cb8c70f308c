"""Tile shapes from the JSON files in ``configs/``: one per measured device, one per architecture.

A file holds, for each kernel and kind of product (``half``: bfloat16 and float16; ``tf32``; ``ieee``: float32), a list
of entries: a weight shape and its tiles. A weight uses the entry with the nearest shape. Device files are named after
the device and written by ``python -m acqcore.kernels.tune``. Architecture files (``sm_90.json``) are not measured.
Their tiles were chosen so that the compiled kernels spill few or no registers. If the fold is long compared to the
product (small depths on sm_90), two programs also share a multiprocessor, so one's fold overlaps the other's product.
"""

from __future__ import annotations

import functools
import json
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "configs"

#: Compute capability (major) -> architecture whose tiles fit; other devices have shared memory only for those of sm_80.
ARCHITECTURES = {8: "sm_80", 9: "sm_90", 10: "sm_100"}


@dataclass(frozen=True)
class Tiles:
    """How ``row_stats`` tiles the product of ``[N, D]`` and ``[V, D]``; must not depend on N.

    Attributes:
        block_m, block_n, block_k: rows, vocabulary and depth of a tile; powers of two, at least 16.
        warps: per program.
        stages: tiles of depth ``block_k`` in flight.
        group_m: blocks of rows whose programs run side by side.
        splits: maximum number of programs that share the vocabulary.
        descriptors: load through the copy engine (sm_90 and later) if strides allow.
        flatten: fuse the loops over tiles and depth, so a tile's loads overlap the fold of the previous one.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int
    splits: int
    descriptors: bool
    flatten: bool

    def split(self, vocab: int) -> tuple[int, int]:
        """(splits of the vocabulary, tiles of each split but the last)."""
        tiles = -(-vocab // self.block_n)
        each = -(-tiles // self.splits)
        return -(-tiles // each), each


@dataclass(frozen=True)
class GramTiles(Tiles):
    """How ``row_stats_and_grams`` tiles its product; ``block_m`` is 128.

    Attributes:
        resident: keep the Gram matrix in registers between tiles instead of in memory.
    """

    resident: bool

    def even_split(self, vocab: int) -> tuple[int, int, int]:
        """(splits of the vocabulary, tiles of each, number of leading splits with one more)."""
        tiles = -(-vocab // self.block_n)
        splits = min(self.splits, tiles)
        return splits, tiles // splits, tiles % splits


@dataclass(frozen=True)
class Strips:
    """How ``logit_stats`` tiles ``[N, V]``.

    Attributes:
        rows, columns: size of the strip that a program folds at a time; powers of two.
        split_columns: columns per program.
        warps: per program.
    """

    rows: int
    columns: int
    split_columns: int
    warps: int


def file_name(device: str) -> str:
    """File name for a device, given the driver's name for it."""
    return re.sub(r"[^A-Za-z0-9]+", "_", device).strip("_") + ".json"


@functools.cache
def table(device: str, major: int) -> dict[str, Any]:
    """The tiles of ``device``, or of its architecture after one warning."""
    measured, architecture = FOLDER / file_name(device), ARCHITECTURES.get(major, "sm_80")
    tables = json.loads((FOLDER / f"{architecture}.json").read_text())
    if measured.exists():
        return tables | json.loads(measured.read_text())  # a file from an earlier version may lack kernels
    warnings.warn(
        f"acqcore.kernels: no tile shapes measured for {device!r}, using those of {architecture}; "
        "measure them with 'python -m acqcore.kernels.tune'",
        stacklevel=2,
    )
    return tables


@functools.cache
def tiles_for(device: str, major: int, product: str, vocab: int, depth: int, kernel: str = "row_stats") -> Tiles:
    """Tiles for a weight ``[vocab, depth]``.

    Args:
        device: the driver's name of the device, or ``interpreter`` for Triton's.
        major: first number of its compute capability.
        product: ``half``, ``tf32`` or ``ieee``.
        vocab, depth: shape of the weight.
        kernel: a key of the table that holds tiles: ``row_stats``, ``gram``, ``sketch``, ``mixture`` or
            ``block_mixture``.
    """
    kind = GramTiles if kernel == "gram" else Tiles
    return kind(**_nearest(table(device, major)[kernel][product], vocab=vocab, depth=depth))


@functools.cache
def strips_for(device: str, major: int, vocab: int) -> Strips:
    """Strips for logits ``[N, vocab]``; arguments as in :func:`tiles_for`."""
    return Strips(**_nearest(table(device, major)["logit_stats"], vocab=vocab))


def _nearest(entries: list[dict[str, Any]], **shape: int) -> dict[str, Any]:
    """Settings of the entry nearest in log shape; ties go to the first."""

    def distance(entry: dict[str, Any]) -> float:
        return sum(abs(math.log2(max(size, 1) / entry[name])) for name, size in shape.items())

    return {key: value for key, value in min(entries, key=distance).items() if key not in shape}
