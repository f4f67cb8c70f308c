from __future__ import annotations

from pathlib import Path

import pytest

from acqsynth.domains import sandbox

SHARED = Path(__file__).parents[3] / "../shared/data"


@pytest.fixture(scope="session")
def shared_data():
    """``shared_data("code/mbpp.jsonl")`` returns the path of a real data set and skips the test if it is absent."""

    def path(name):
        if not (SHARED / name).is_file():
            pytest.skip(f"{name} is not at {SHARED}")
        return str(SHARED / name)

    return path


@pytest.fixture
def contained():
    """Skips the test, with the reason, on machines where the sandbox does not work."""
    try:
        sandbox.require()
    except RuntimeError as error:
        pytest.skip(str(error))
