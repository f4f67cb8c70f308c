"""Tile shapes, from the JSON files in ``configs/``: one for each measured device, one for each architecture.

A file holds, for each kernel and kind of product (``half``: bfloat16 and float16; ``tf32``; ``ieee``: float32), a list
of entries: the shape of a weight, and the tiles for it. A weight takes those of the nearest shape. Device files are
named after the device and written by ``python -m acqcore.kernels.tune``; those of architectures (``sm_90.json``) were
not measured: they were chosen so that the compiled kernels spill no registers, or few, and, where the fold is long
beside the product (small depths on sm_90), so that two programs share a multiprocessor and one's fold runs under the
other's product.
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

#: compute capability (major) -> architecture whose tiles fit; others have the shared memory of none but sm_80's
ARCHITECTURES = {8: "sm_80", 9: "sm_90", 10: "sm_100"}


@dataclass(frozen=True)
class Tiles:
    """How ``row_stats`` cuts the product of ``[N, D]`` and ``[V, D]``; none of it may follow from N.

    Attributes:
        block_m, block_n, block_k: rows, vocabulary and depth of a tile; powers of two, at least 16.
        warps: of a program.
        stages: tiles of depth ``block_k`` in flight.
        group_m: blocks of rows whose programs run side by side.
        splits: at most so many programs share the vocabulary.
        descriptors: load through the copy engine (sm_90 and later) where strides allow.
        flatten: run the loops over tiles and depth as one, so that a tile's loads start under the fold of the last.
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
        """(splits of a vocabulary, tiles of each but the last)."""
        tiles = -(-vocab // self.block_n)
        each = -(-tiles // self.splits)
        return -(-tiles // each), each


@dataclass(frozen=True)
class GramTiles(Tiles):
    """How ``row_stats_and_grams`` cuts its product; ``block_m`` is 128.

    Attributes:
        resident: keep the Gram matrix in registers from tile to tile; else it waits in memory.
    """

    resident: bool

    def even_split(self, vocab: int) -> tuple[int, int, int]:
        """(splits of a vocabulary, tiles of each, how many of the first have one more)."""
        tiles = -(-vocab // self.block_n)
        splits = min(self.splits, tiles)
        return splits, tiles // splits, tiles % splits


@dataclass(frozen=True)
class Strips:
    """How ``logit_stats`` cuts ``[N, V]``.

    Attributes:
        rows, columns: of the strip that a program folds at a time; powers of two.
        split_columns: columns of a program.
        warps: of a program.
    """

    rows: int
    columns: int
    split_columns: int
    warps: int


def file_name(device: str) -> str:
    """The file of a device called so by the driver."""
    return re.sub(r"[^A-Za-z0-9]+", "_", device).strip("_") + ".json"


@functools.cache
def table(device: str, major: int) -> dict[str, Any]:
    """The file of ``device``, or of its architecture after one warning."""
    path = FOLDER / file_name(device)
    if not path.exists():
        path = FOLDER / f"{ARCHITECTURES.get(major, 'sm_80')}.json"
        warnings.warn(
            f"acqcore.kernels: no tile shapes measured on {device!r}, those of {path.stem} are used; "
            "'python -m acqcore.kernels.tune' measures them",
            stacklevel=2,
        )
    return json.loads(path.read_text())


@functools.cache
def tiles_for(device: str, major: int, product: str, vocab: int, depth: int, kernel: str = "row_stats") -> Tiles:
    """Tiles for a weight ``[vocab, depth]``.

    Args:
        device: the driver's name of the device; ``interpreter`` for Triton's.
        major: first number of its compute capability.
        product: ``half``, ``tf32`` or ``ieee``.
        vocab, depth: shape of the weight.
        kernel: whose tiles: ``row_stats``, ``gram`` or ``mixture``.
    """
    kind = GramTiles if kernel == "gram" else Tiles
    return kind(**_nearest(table(device, major)[kernel][product], vocab=vocab, depth=depth))


@functools.cache
def strips_for(device: str, major: int, vocab: int) -> Strips:
    """Strips for logits ``[N, vocab]``; arguments as in :func:`tiles_for`."""
    return Strips(**_nearest(table(device, major)["logit_stats"], vocab=vocab))


def _nearest(entries: list[dict[str, Any]], **shape: int) -> dict[str, Any]:
    """The settings of the entry whose shape is nearest by its logarithms; the first among equals."""

    def distance(entry: dict[str, Any]) -> float:
        return sum(abs(math.log2(max(size, 1) / entry[name])) for name, size in shape.items())

    return {key: value for key, value in min(entries, key=distance).items() if key not in shape}
