from __future__ import annotations

from pathlib import Path

import pytest

from acqsynth.domains import sandbox

SHARED = Path(__file__).parents[3] / "../shared/data"


@pytest.fixture(scope="session")
def shared_data():
    """``shared_data("code/mbpp.jsonl")``: the path of a real data set; skips where it is absent."""

    def path(name):
        if not (SHARED / name).is_file():
            pytest.skip(f"{name} is not at {SHARED}")
        return str(SHARED / name)

    return path


@pytest.fixture
def contained():
    """Skips where programs cannot be contained, with the reason."""
    try:
        sandbox.require()
    except RuntimeError as error:
        pytest.skip(str(error))
