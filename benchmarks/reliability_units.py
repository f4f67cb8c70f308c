"""Units of a reliability run, saved as they finish, and statistics of their values."""

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
    """The finished units of a run; the first line of the file holds its settings.

    Args:
        settings: settings of this run; empty to read a finished run from any machine.
        seconds: no unit starts after this time.

    Raises:
        SystemExit: the folder contains a run with other settings (the message names one).
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
            if self.settings.get(key) != wanted[key]:
                raise SystemExit(
                    f"{folder}: contains a run with {key} {self.settings.get(key)!r}, expected {wanted[key]!r}; "
                    "repeat that run's options or choose another folder (--out)"
                )
        done = [unit for unit in units if "failed" not in unit]
        self.units: dict[tuple[Any, ...], dict[str, Any]] = {tuple(unit.pop("key")): unit for unit in done}

    def run(self, key: tuple[Any, ...], work: Callable[[], dict[str, Any]]) -> bool:
        """Runs a unit unless it is done; False once the time is up."""
        if key in self.units:
            return True
        if time.monotonic() > self._until:
            return False
        begin = time.perf_counter()
        try:
            unit = work()
        except Exception as error:  # other units are still measured, and a later run retries this one
            unit = {"failed": harness.first_line(error)}
        harness.append(self.path, key=key, **unit)
        self.units[key] = unit
        outcome = unit.get("failed", f"{time.perf_counter() - begin:.2f} s")
        print(f"{', '.join(map(str, key))}: {outcome}", flush=True)
        return True

    def found(self, kind: str) -> dict[tuple[Any, ...], dict[str, Any]]:
        """Successful units of a kind, by the rest of their key."""
        return {key[1:]: unit for key, unit in self.units.items() if key[0] == kind and "failed" not in unit}


def rounded(values: torch.Tensor) -> list[float]:
    """The values with seven significant digits, the precision of float32."""
    return [float(f"{value:.7g}") for value in values.tolist()]


def spearman(
    values: np.ndarray,  # [s, ..., n], of s seeds
) -> np.ndarray:  # [...]
    """Rank correlation of two seeds' values, averaged over all pairs of seeds; ties share their mean rank."""
    ranks = rankdata(values, axis=-1)
    ranks = ranks - ranks.mean(axis=-1, keepdims=True)
    norm = np.sqrt((ranks**2).sum(axis=-1))
    pairs = itertools.combinations(range(len(values)), 2)
    with np.errstate(invalid="ignore"):  # constant values have no correlation
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
    """Reliability of a test from that of its halves (Spearman 1910; Brown 1910)."""
    return 2 * half / (1 + half)
