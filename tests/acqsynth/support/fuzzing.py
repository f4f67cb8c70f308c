"""Tests on generated examples. Seeds are fixed; ``make fuzz`` runs other seeds and more examples for an hour."""

from __future__ import annotations

import os

import hypothesis

SEED = int(os.environ.get("FUZZ_SEED", "0"))
FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))


def fuzzed(examples, *, phases=tuple(hypothesis.Phase), **strategies):
    """Runs a test on generated examples, reproducible for a given ``FUZZ_SEED``."""

    def decorate(function):
        settings = hypothesis.settings(
            max_examples=examples * FACTOR,
            deadline=None,
            database=None,
            phases=phases,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        return hypothesis.seed(SEED)(settings(hypothesis.given(**strategies)(function)))

    return decorate
