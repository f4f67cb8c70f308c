"""Units of a reliability run, kept as they are done, and statistics of their values."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

from benchmarks import harness

BOOTSTRAP = 1000  # resamples of the rows
LEVEL = 0.95


class Store:
    """The finished units of a run; the first line holds its settings.

    Args:
        settings: of this run; empty to read a finished one, of whatever machine.
        seconds: no unit begins after so many.

    Raises:
        SystemExit: the folder holds a run of other settings (names them).
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], seconds: float = math.inf) -> None:
        self.path = folder / "units.jsonl"
        self._until = time.monotonic() + seconds
        wanted = json.loads(json.dumps(settings))
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        if not lines:
            harness.append(self.path, **wanted)
            lines = [json.dumps(wanted)]
        self.settings, *units = map(json.loads, lines)
        for key in wanted:
            if self.settings[key] != wanted[key]:
                raise SystemExit(
                    f"{folder}: holds a run with {key} {self.settings[key]!r}, here it is {wanted[key]!r}; "
                    "repeat that run's options, or name another folder (--out)"
                )
        done = [unit for unit in units if "failed" not in unit]
        self.units: dict[tuple[Any, ...], dict[str, Any]] = {tuple(unit.pop("key")): unit for unit in done}

    def run(self, key: tuple[Any, ...], work: Callable[[], dict[str, Any]]) -> bool:
        """Does a unit that is not done yet; False once the time is up."""
        if key in self.units:
            return True
        if time.monotonic() > self._until:
            return False
        begin = time.perf_counter()
        try:
            unit = work()
        except Exception as error:  # the other units are still measured, and a later run tries this one again
            unit = {"failed": harness.first_line(error)}
        harness.append(self.path, key=key, **unit)
        self.units[key] = unit
        outcome = unit.get("failed", f"{time.perf_counter() - begin:.2f} s")
        print(f"{', '.join(map(str, key))}: {outcome}", flush=True)
        return True

    def found(self, kind: str) -> dict[tuple[Any, ...], dict[str, Any]]:
        """Units of a kind that succeeded, by the rest of their key."""
        return {key[1:]: unit for key, unit in self.units.items() if key[0] == kind and "failed" not in unit}


def rounded(values: torch.Tensor) -> list[float]:
    """Seven digits, which float32 has, as JSON."""
    return [float(f"{value:.7g}") for value in values.tolist()]


def spearman(
    values: np.ndarray,  # [s, ..., n], of s seeds
) -> np.ndarray:  # [...]
    """Rank correlation of two seeds' values, the mean over all pairs of seeds; ties share their mean rank."""
    ranks = rankdata(values, axis=-1)
    ranks = ranks - ranks.mean(axis=-1, keepdims=True)
    norm = np.sqrt((ranks**2).sum(axis=-1))
    pairs = itertools.combinations(range(len(values)), 2)
    with np.errstate(invalid="ignore"):  # values that are all alike have no correlation
        found = [(ranks[a] * ranks[b]).sum(axis=-1) / (norm[a] * norm[b]) for a, b in pairs]
    return np.mean(found, axis=0)


def interval(
    values: np.ndarray,  # [s, n]
) -> list[float]:
    """Bounds of the central ``LEVEL`` of :func:`spearman` over resamples of the n rows."""
    picked = np.random.default_rng(0).integers(0, values.shape[1], (BOOTSTRAP, values.shape[1]))
    found = spearman(values[:, picked])
    return [round(float(bound), 3) for bound in np.nanquantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]


def stepped_up(half: float) -> float:
    """Reliability of a test from that of its halves. Source: Spearman 1910; Brown 1910."""
    return 2 * half / (1 + half)
